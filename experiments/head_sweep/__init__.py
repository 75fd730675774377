"""What each head does for the answers to a data set: one intervention per head, on every sample."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.experiments.head_sweep.config import HeadSweepConfig
    from hooked_vlm.experiments.head_sweep.study import run

__all__ = ["HeadSweepConfig", "run"]
__getattr__, __dir__ = lazy_names(__name__)
