"""An atlas of a model's heads: what each head of both towers does, by twenty-two scores on shipped stimuli."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.atlas.definitions import SCORES, Score
    from hooked_vlm.atlas.result import Atlas, Observed

__all__ = ["SCORES", "Atlas", "Observed", "Score"]
__getattr__, __dir__ = lazy_names(__name__)
