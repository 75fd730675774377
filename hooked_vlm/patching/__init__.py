"""Patching with images: a clean and a corrupt input, and what flips the answer.

    pair = Pair(clean, clean.with_image(0, masked(page, box)), {"value": Region(box)})
    result = patch(model, pair, "resid_pre", log_prob(answer), where=("value", "question", "final"))
    result.heatmap(); result.summary()

Exact patches run on the sweep engine; `attribute` estimates all of them from one backward pass a pair.
"""

from hooked_vlm.patching.attribution import attribute as attribute
from hooked_vlm.patching.corruption import masked as masked
from hooked_vlm.patching.corruption import noised as noised
from hooked_vlm.patching.corruption import swapped as swapped
from hooked_vlm.patching.exact import patch as patch
from hooked_vlm.patching.knockout import answers_without as answers_without
from hooked_vlm.patching.knockout import attention_knockout as attention_knockout
from hooked_vlm.patching.knockout import sweep_knockout as sweep_knockout
from hooked_vlm.patching.pairs import Pair as Pair
from hooked_vlm.patching.pairs import Region as Region
from hooked_vlm.patching.paths import PatchPath as PatchPath
from hooked_vlm.patching.paths import patch_paths as patch_paths
from hooked_vlm.patching.result import Agreement as Agreement
from hooked_vlm.patching.result import PatchingResult as PatchingResult
