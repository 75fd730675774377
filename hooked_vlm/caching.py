"""The hooks that record activations for `run_with_cache`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import Slice

from hooked_vlm.attention import AttentionCall, attention_pattern
from hooked_vlm.hooks import QUADRATIC, HookPoint, is_hooked, is_quadratic, is_vision

Hooks = list[tuple[str, Callable]]


def runs_explicitly(hook_dict: Mapping[str, HookPoint], name: str) -> bool:
    """Whether the layer of a hook point for scores or patterns makes them for a hook that is there already.

    An edit may have changed them then: what is derived from queries and keys would be wrong.
    """
    layer = name.rsplit(".", 1)[0]
    return any(is_hooked(hook_dict[f"{layer}.{suffix}"]) for suffix in QUADRATIC)


def default_filter(hook_dict: Mapping[str, HookPoint]) -> Callable[[str], bool]:
    """Every hook point but the [pos, pos] ones of layers that run the fused kernel."""
    return lambda name: not is_quadratic(name) or runs_explicitly(hook_dict, name)


def caching_hooks(
    names: Sequence[str],
    positions: Slice,
    device: torch.device | str | None,
    remove_batch_dim: bool,
    incl_bwd: bool,
    explicit: Callable[[str], bool],
) -> tuple[dict[str, Tensor], Hooks, Hooks]:
    """An empty store, and the forward and backward hooks that fill it under the hook points' names.

    Of scores and patterns cut to some positions, only those rows are ever made, unless something else
    (`explicit`, asked by name) has the layer make all of them.
    """
    store: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        if remove_batch_dim and not is_vision(name):
            tensor = tensor[0]
        store[name] = tensor.to(device) if device is not None else tensor

    def save(tensor: Tensor, hook: HookPoint, suffix: str) -> None:
        name = str(hook.name)
        kept = tensor.detach()
        if not is_vision(name) and positions.mode != "identity":
            # a copy: a view would keep the whole tensor in memory
            kept = positions.apply(kept, dim=position_axis(name)).clone()
        keep(name + suffix, kept)

    def save_rows(z: Tensor, hook: HookPoint, name: str) -> None:
        keep(name, _rows(hook.ctx["attention"], positions, name).detach())

    fwd: Hooks = []
    for name in names:
        if is_quadratic(name) and positions.mode != "identity" and not (incl_bwd or is_vision(name) or explicit(name)):
            fwd.append((f"{name.rsplit('.', 1)[0]}.hook_z", partial(save_rows, name=name)))
        else:
            fwd.append((name, partial(save, suffix="")))
    bwd: Hooks = [(name, partial(save, suffix="_grad")) for name in names] if incl_bwd else []
    return store, fwd, bwd


def _rows(call: AttentionCall, positions: Slice, name: str) -> Float[Tensor, "batch head *row key"]:
    """The rows of scores or pattern at `positions`; without a row axis where that is one number."""
    n = call.q.shape[1]
    index = positions.apply(torch.arange(n, device=call.q.device), dim=0)
    rows = call.scores(index.reshape(1, -1))
    if name.endswith("hook_pattern"):
        rows = attention_pattern(rows)
        valid = call.mask.query_valid(n)
        if valid is not None:
            rows = rows.masked_fill(~valid[:, index.reshape(-1)][:, None, :, None], 0.0)
    return rows if index.ndim else rows[:, :, 0]


def position_axis(name: str) -> int:
    """The axis of a text hook point's tensor (batch axis first) that runs over (query) positions."""
    return -2 if is_quadratic(name) else 1
