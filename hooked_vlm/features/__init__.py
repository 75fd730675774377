"""Sparse features in the loop: autoencoders and transcoders as parts of a run.

dictionary = load_dictionary("sae_layer_8")
logits, features = run_with_features(model, inputs, {dictionary.hook_name: dictionary})
sweep(model, inputs, [EditFeatures(dictionary, (feature,)) for feature in features_of_interest], metric)
feature_attribution(model, inputs, {dictionary.hook_name: dictionary}, metric)
train_dictionary(activations, "blocks.8.hook_resid_post", TrainingConfig(), "out").dictionary
"""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.features.attribution import feature_attribution, feature_edges
    from hooked_vlm.features.config import TrainingConfig
    from hooked_vlm.features.dictionary import Dictionary, FeatureDictionary
    from hooked_vlm.features.edits import EditFeatures
    from hooked_vlm.features.files import load_dictionary, save_dictionary
    from hooked_vlm.features.labelled import boxed_pictures, toy_pictures
    from hooked_vlm.features.meanings import find_meanings
    from hooked_vlm.features.quality import reconstruction_quality
    from hooked_vlm.features.reading import read_tokens
    from hooked_vlm.features.running import run_with_features
    from hooked_vlm.features.training import train_dictionary

__all__ = [
    "Dictionary", "EditFeatures", "FeatureDictionary", "TrainingConfig", "boxed_pictures", "feature_attribution",
    "feature_edges", "find_meanings", "load_dictionary", "read_tokens", "reconstruction_quality", "run_with_features",
    "save_dictionary", "toy_pictures", "train_dictionary",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
