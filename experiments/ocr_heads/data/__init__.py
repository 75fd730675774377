"""What the study asks: pages and texts with an answer in them, and the tasks that masking is measured on."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.experiments.ocr_heads.data.scored import scored_sets
    from hooked_vlm.experiments.ocr_heads.data.tasks import QATask, load_tasks

__all__ = ["QATask", "load_tasks", "scored_sets"]
__getattr__, __dir__ = lazy_names(__name__)
