"""Checkpoint folders, the hub and transformers' models: loading, placement on devices, quantisation, saving."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.loading.folders import TOY_MODELS, bundled_models
    from hooked_vlm.loading.quantisation import QUANTISED

__all__ = ["QUANTISED", "TOY_MODELS", "bundled_models"]
__getattr__, __dir__ = lazy_names(__name__)
