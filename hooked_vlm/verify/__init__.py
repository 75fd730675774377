"""A user's own checkpoint, run here and in `transformers` side by side: `hooked-vlm verify MODEL`, or
`hooked_vlm.verify.run.verify(VerifyConfig(...))` from Python."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.verify.config import VerifyConfig
    from hooked_vlm.verify.result import Row, Verification
    from hooked_vlm.verify.run import verify

__all__ = ["Row", "Verification", "VerifyConfig", "verify"]
__getattr__, __dir__ = lazy_names(__name__)
