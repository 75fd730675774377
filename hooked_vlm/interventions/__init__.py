"""Interventions as data: small frozen objects that compile to ordinary (hook name, function) pairs.

    mask = ZeroHeads(((2, 1), (3, 0)))
    model.run_with_hooks(inputs, fwd_hooks=mask.hooks(model, inputs))
    model.generate(inputs, fwd_hooks=mask.hooks(model, inputs))
    sweep(model, inputs, [mask, ...], metric)

Positions are absolute: columns of `inputs.tokens`, and past their end in generation. Under a key-value cache the
same hooks act on what is new and see what is old.
"""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.interventions.activations import AddVector, PatchActivation, ReplaceImageTokens
    from hooked_vlm.interventions.attention import BlockAttention, all_heads
    from hooked_vlm.interventions.base import Compose, CustomHooks, Hooks, Intervention, Positions
    from hooked_vlm.interventions.heads import Head, MeanHeads, ScaleHeads, ZeroHeads, mean_head_outputs
    from hooked_vlm.interventions.image_kv import ImageMeans, ReplaceImageKV, mean_image_kv
    from hooked_vlm.interventions.patterns import RedistributeSink, UniformAttention

__all__ = [
    "AddVector", "BlockAttention", "Compose", "CustomHooks", "Head", "Hooks", "ImageMeans", "Intervention",
    "MeanHeads", "PatchActivation", "Positions", "RedistributeSink", "ReplaceImageKV", "ReplaceImageTokens",
    "ScaleHeads", "UniformAttention", "ZeroHeads", "all_heads", "mean_head_outputs", "mean_image_kv",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
