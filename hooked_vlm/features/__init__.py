"""Sparse features in the loop: autoencoders and transcoders as parts of a run.

dictionary = load_dictionary("sae_layer_8")
"""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.features.dictionary import Dictionary, FeatureDictionary
    from hooked_vlm.features.files import load_dictionary, save_dictionary

__all__ = ["Dictionary", "FeatureDictionary", "load_dictionary", "save_dictionary"]
__getattr__, __dir__ = lazy_names(__name__)
