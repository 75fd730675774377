"""Outputs of heads, watched in a run."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from hooked_vlm.nn.hooks import HookPoint

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
