"""Outputs of heads, watched in a run."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.nn.block import Block
from hooked_vlm.nn.hooks import HookPoint
from hooked_vlm.nn.weight_access import is_plain

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Watch = Callable[[int, Tensor, Tensor | None], None]
"""Called with a layer, its z [batch, pos, head, d_head] and the denominator of the norm behind attention
[batch, pos, 1], None where there is no such norm: what `Block.head_outputs` takes."""


def on_head_outputs(model: "HookedVLM", watch: Watch) -> list[tuple[str, Callable]]:
    """Hooks that call `watch` for each layer, in order."""
    zs: dict[int, Tensor] = {}

    def keep(z: Tensor, hook: HookPoint) -> None:
        zs[hook.layer()] = z

    def with_scale(scale: Tensor, hook: HookPoint) -> None:
        watch(hook.layer(), zs.pop(hook.layer()), scale)

    def alone(z: Tensor, hook: HookPoint) -> None:
        watch(hook.layer(), z, None)

    points = [("attn.hook_z", alone)]
    if model.cfg.use_normalization_before_and_after:
        points = [("attn.hook_z", keep), ("ln1_post.hook_scale", with_scale)]
    return [(f"blocks.{layer}.{point}", fn) for layer in range(model.cfg.n_layers) for point, fn in points]


def output_norms(
    z: Float[Tensor, "batch pos head d_head"],
    block: Block,
    where: Int[Tensor, "batch pos"],
    post_scale: Float[Tensor, "batch pos 1"] | None,
) -> Float[Tensor, "batch head"]:
    """Mean norm of what each head adds to the stream, over the positions marked in `where`.

    Makes no [pos, head, d_model] tensor if the output projection is a plain linear layer.
    """
    if is_plain(block.attn.o_proj):
        written = block.attn.W_O.float() * (block.ln1_post.factor if block.post_norms else 1)
        gram = torch.einsum("hdm,hem->hde", written, written)
        norms = torch.einsum("bphd,hde,bphe->bph", z.float(), gram, z.float()).clamp_min(0).sqrt()
        norms = norms if post_scale is None else norms / post_scale
    else:
        norms = block.head_outputs(z, post_scale).float().norm(dim=-1)
    mask = where.to(norms.device).bool()[:, :, None]  # padding has a norm of 0, by which its numbers were divided
    return norms.where(mask, 0).sum(1) / mask.sum(1)
