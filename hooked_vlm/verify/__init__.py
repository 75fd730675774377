"""A user's own checkpoint, run here and in `transformers` side by side: `hooked-vlm verify MODEL`, or
`hooked_vlm.verify.run.verify(VerifyConfig(...))` from Python."""
