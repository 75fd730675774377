"""Interventions as data: small frozen objects that compile to ordinary (hook name, function) pairs.

    mask = ZeroHeads(((2, 1), (3, 0)))
    model.run_with_hooks(inputs, fwd_hooks=mask.hooks(model, inputs))
    model.generate(inputs, fwd_hooks=mask.hooks(model, inputs))
    sweep(model, inputs, [mask, ...], metric)

Positions are absolute: columns of `inputs.tokens`, and past their end in generation. Under a key-value cache the
same hooks act on what is new and see what is old.
"""

from hooked_vlm.interventions.activations import AddVector as AddVector
from hooked_vlm.interventions.activations import PatchActivation as PatchActivation
from hooked_vlm.interventions.activations import ReplaceImageTokens as ReplaceImageTokens
from hooked_vlm.interventions.attention import BlockAttention as BlockAttention
from hooked_vlm.interventions.base import Compose as Compose
from hooked_vlm.interventions.base import CustomHooks as CustomHooks
from hooked_vlm.interventions.base import Intervention as Intervention
from hooked_vlm.interventions.heads import Head as Head
from hooked_vlm.interventions.heads import MeanHeads as MeanHeads
from hooked_vlm.interventions.heads import ScaleHeads as ScaleHeads
from hooked_vlm.interventions.heads import ZeroHeads as ZeroHeads
from hooked_vlm.interventions.heads import mean_head_outputs as mean_head_outputs
from hooked_vlm.interventions.image_kv import ImageMeans as ImageMeans
from hooked_vlm.interventions.image_kv import ReplaceImageKV as ReplaceImageKV
from hooked_vlm.interventions.image_kv import mean_image_kv as mean_image_kv
from hooked_vlm.interventions.patterns import RedistributeSink as RedistributeSink
from hooked_vlm.interventions.patterns import UniformAttention as UniformAttention
