"""Patching with images: a clean and a corrupt input, and what flips the answer.

    pair = Pair(clean, clean.with_image(0, masked(page, box)), {"value": Region(box)})
    result = patch(model, pair, "resid_pre", log_prob(answer), where=("value", "question", "final"))
    result.heatmap(); result.summary()

Exact patches run on the sweep engine; `attribute` estimates all of them from one backward pass a pair.
"""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.patching.attribution import attribute
    from hooked_vlm.patching.corruption import masked, noised, swapped
    from hooked_vlm.patching.exact import patch
    from hooked_vlm.patching.knockout import answers_without, attention_knockout, sweep_knockout
    from hooked_vlm.patching.pairs import Pair, Region
    from hooked_vlm.patching.paths import PatchPath, patch_paths
    from hooked_vlm.patching.result import Agreement, PatchingResult

__all__ = [
    "Agreement", "Pair", "PatchPath", "PatchingResult", "Region", "answers_without", "attention_knockout",
    "attribute", "masked", "noised", "patch", "patch_paths", "swapped", "sweep_knockout",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
