"""An atlas of a model's heads: what each head of both towers does, by twenty-three scores on shipped stimuli."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.atlas.comparison import Comparison, compare
    from hooked_vlm.atlas.definitions import SCORES, Score
    from hooked_vlm.atlas.page import Picture, atlas_page, save_atlas_page
    from hooked_vlm.atlas.result import Atlas, Observed
    from hooked_vlm.atlas.stimuli import Stimulus, as_stimuli, shipped
    from hooked_vlm.atlas.study import atlas

__all__ = [
    "SCORES", "Atlas", "Comparison", "Observed", "Picture", "Score", "Stimulus", "as_stimuli", "atlas", "atlas_page",
    "compare", "save_atlas_page", "shipped",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
