"""The studies: one package each, with a `run(config)`, a command and a report."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.experiments import head_attribution, ocr_heads, reproduce, steering

__all__ = ["head_attribution", "ocr_heads", "reproduce", "steering"]
__getattr__, __dir__ = lazy_names(__name__)
