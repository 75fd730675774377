"""The hooks that record activations for `run_with_cache`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from transformer_lens.utilities import Slice

from hooked_vlm.hooks import QUADRATIC, HookPoint, is_hooked, is_quadratic, is_vision

Hooks = list[tuple[str, Callable]]


def default_filter(hook_dict: Mapping[str, HookPoint]) -> Callable[[str], bool]:
    """Every hook point but the [pos, pos] ones of layers that run the fused kernel.

    Where scores or pattern of a layer are hooked already, it runs explicitly and an edit may have changed
    them: deriving them from queries and keys would then be wrong, so both are stored.
    """

    def wanted(name: str) -> bool:
        if not is_quadratic(name):
            return True
        layer = name.rsplit(".", 1)[0]
        return any(is_hooked(hook_dict[f"{layer}.{suffix}"]) for suffix in QUADRATIC)

    return wanted


def caching_hooks(
    names: Sequence[str],
    positions: Slice,
    device: torch.device | str | None,
    remove_batch_dim: bool,
    incl_bwd: bool,
) -> tuple[dict[str, Tensor], Hooks, Hooks]:
    """An empty store, and the forward and backward hooks that fill it under the hook points' names."""
    store: dict[str, Tensor] = {}

    def save(tensor: Tensor, hook: HookPoint, suffix: str) -> None:
        name = str(hook.name)
        kept = tensor.detach()
        if not is_vision(name):
            if positions.mode != "identity":
                # a copy: a view would keep the whole tensor in memory
                kept = positions.apply(kept, dim=position_axis(name)).clone()
            if remove_batch_dim:
                kept = kept[0]
        store[name + suffix] = kept.to(device) if device is not None else kept

    fwd: Hooks = [(name, partial(save, suffix="")) for name in names]
    bwd: Hooks = [(name, partial(save, suffix="_grad")) for name in names] if incl_bwd else []
    return store, fwd, bwd


def position_axis(name: str) -> int:
    """The axis of a text hook point's tensor (batch axis first) that runs over (query) positions."""
    return -2 if is_quadratic(name) else 1
