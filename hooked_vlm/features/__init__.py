"""Sparse features in the loop: autoencoders and transcoders as parts of a run.

dictionary = load_dictionary("sae_layer_8")
logits, features = run_with_features(model, inputs, {dictionary.hook_name: dictionary})
sweep(model, inputs, [EditFeatures(dictionary, (feature,)) for feature in features_of_interest], metric)
feature_attribution(model, inputs, {dictionary.hook_name: dictionary}, metric)
"""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.features.attribution import feature_attribution, feature_edges
    from hooked_vlm.features.dictionary import Dictionary, FeatureDictionary
    from hooked_vlm.features.edits import EditFeatures
    from hooked_vlm.features.files import load_dictionary, save_dictionary
    from hooked_vlm.features.quality import reconstruction_quality
    from hooked_vlm.features.running import run_with_features

__all__ = [
    "Dictionary", "EditFeatures", "FeatureDictionary", "feature_attribution", "feature_edges", "load_dictionary",
    "reconstruction_quality", "run_with_features", "save_dictionary",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
