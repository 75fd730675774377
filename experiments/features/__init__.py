"""Sparse dictionaries from activations to a page: training, what features stand for, pictures of each.

`train(TrainConfig(hook="hook_image_features"))`; `hooked-vlm features` is the same from the command line.
"""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.experiments.features.config import FindConfig, PageConfig, TrainConfig
    from hooked_vlm.experiments.features.pipeline import Found, find, train

__all__ = ["FindConfig", "Found", "PageConfig", "TrainConfig", "find", "train"]
__getattr__, __dir__ = lazy_names(__name__)
