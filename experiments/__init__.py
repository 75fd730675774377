"""The studies: one package each, with a `run(config)`, a command and a report."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.experiments import head_attribution, head_sweep, ocr_heads, reproduce, steering
    from hooked_vlm.experiments.common.publish import load_tables, push_tables

__all__ = ["head_attribution", "head_sweep", "load_tables", "ocr_heads", "push_tables", "reproduce", "steering"]
__getattr__, __dir__ = lazy_names(__name__)
