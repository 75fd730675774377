"""Interventions of every kind, for laws that hold for all of them."""

from typing import Any

import torch

from hooked_vlm import interventions as iv

KINDS = (
    "zero",
    "scale",
    "mean",
    "image mean",
    "image mean after RoPE",
    "image zero",
    "image knocked out",
    "image mean of a dataset",
    "some image tokens, some queries",
    "blocked",
    "sink",
    "uniform",
    "uniform while generating",
    "patch",
    "steering",
    "image tokens",
    "together",
)
HEADS = ((0, 1), (1, 0), (1, 3), (2, 2))


def some_of_the_image(batch: Any) -> tuple[tuple[int, ...], ...]:
    """The second and every third token after it."""
    return tuple(tuple(positions[1::3].tolist()) for positions in batch.positions.image)


def of_every_kind(model: Any, batch: Any) -> dict[str, iv.Intervention]:
    """One intervention of each kind that acts on the text side."""
    generator = torch.Generator().manual_seed(1)
    _, cache = model.run_with_cache(batch)
    vector = torch.randn(model.cfg.d_model, generator=generator)
    kinds: dict[str, iv.Intervention] = {
        "zero": iv.ZeroHeads(HEADS),
        "scale": iv.ScaleHeads(HEADS, 0.5, "text"),
        "mean": iv.MeanHeads(HEADS, iv.mean_head_outputs(model, [batch])),
        "image mean": iv.ReplaceImageKV(HEADS),
        "image mean after RoPE": iv.ReplaceImageKV(HEADS, before_rope=False),
        "image zero": iv.ReplaceImageKV(HEADS, "zero"),
        "image knocked out": iv.ReplaceImageKV(HEADS, "knockout"),
        "image mean of a dataset": iv.ReplaceImageKV(HEADS, iv.mean_image_kv(model, [batch])),
        "some image tokens, some queries": iv.ReplaceImageKV(HEADS, queries="text", tokens=some_of_the_image(batch)),
        "blocked": iv.BlockAttention(HEADS, "text", "image"),
        "sink": iv.RedistributeSink(HEADS, 0.3),
        "uniform": iv.UniformAttention(HEADS),
        "uniform while generating": iv.UniformAttention(HEADS, "generated"),
        "patch": iv.PatchActivation("blocks.1.hook_resid_mid", cache["resid_mid", 2], "question"),
        "steering": iv.AddVector("blocks.1.hook_resid_post", vector, positions="text"),
        "image tokens": iv.ReplaceImageTokens("image", "mean"),
        "together": iv.Compose((iv.ZeroHeads(((2, 0),)), iv.BlockAttention(((1, 1),), "final", "image"))),
    }
    assert tuple(kinds) == KINDS
    return kinds
