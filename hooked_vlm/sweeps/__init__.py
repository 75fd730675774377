"""Many interventions at the cost of a few forwards."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.sweeps.answers import OfAnswer
    from hooked_vlm.sweeps.many import SweepCase, sweep_each, sweep_many
    from hooked_vlm.sweeps.run import SweepResult, sweep

__all__ = ["OfAnswer", "SweepCase", "SweepResult", "sweep", "sweep_each", "sweep_many"]
__getattr__, __dir__ = lazy_names(__name__)
