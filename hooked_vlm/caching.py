"""What `run_with_cache` stores of a pass."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import Slice

from hooked_vlm.attention import AttentionCall, attention_pattern
from hooked_vlm.forward_pass import Recorder
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


class Caching:
    """A store of activations by hook name, and what fills it.

    Args:
        positions: which positions of the text side are kept.
        explicit: whether a layer makes all of its scores and patterns anyway, asked by the name of such a point.
        incl_bwd: whether gradients are stored, too.
    """

    def __init__(
        self,
        positions: Slice,
        device: torch.device | str | None,
        remove_batch_dim: bool,
        explicit: Callable[[str], bool],
        incl_bwd: bool = False,
    ) -> None:
        self.store: dict[str, Tensor] = {}
        self.positions, self.device, self.remove_batch_dim = positions, device, remove_batch_dim
        self.explicit, self.incl_bwd = explicit, incl_bwd

    def recorder(self, names: Sequence[str] | None) -> tuple[Recorder, Hooks]:
        """What records `names` (None: all that fire), and hooks for scores and patterns of which only some rows are
        made: those cut to some positions, unless something else has the layer make all of them."""
        if names is None:
            return Recorder(self.keep), []
        rows = {name for name in names if self._by_rows(name)}
        hooks = [(f"{name.rsplit('.', 1)[0]}.hook_z", partial(self._save_rows, name=name)) for name in sorted(rows)]
        return Recorder(self.keep, frozenset(names) - rows), hooks

    def keep(self, name: str, tensor: Tensor, suffix: str = "") -> None:
        """Store what passed the hook point `name`."""
        text = not is_vision(name)
        if text and self.positions.mode != "identity":
            # a copy: a view would keep the whole tensor in memory
            tensor = self.positions.apply(tensor, dim=position_axis(name)).clone()
        if text and self.remove_batch_dim:
            tensor = tensor[0]
        self.store[name + suffix] = tensor if self.device is None else tensor.to(self.device)

    def save(self, tensor: Tensor, hook: HookPoint, suffix: str = "") -> None:
        """`keep` as a hook."""
        self.keep(str(hook.name), tensor.detach(), suffix)

    def _by_rows(self, name: str) -> bool:
        cut = is_quadratic(name) and not is_vision(name) and self.positions.mode != "identity"
        return cut and not self.incl_bwd and not self.explicit(name)

    def _save_rows(self, z: Tensor, hook: Any, name: str) -> None:
        rows = _rows(hook.ctx["attention"], self.positions, name).detach()
        rows = rows[0] if self.remove_batch_dim else rows
        self.store[name] = rows if self.device is None else rows.to(self.device)


def _rows(call: AttentionCall, positions: Slice, name: str) -> Float[Tensor, "batch head *row key"]:
    """The rows of scores or pattern at `positions`; without a row axis where that is one number."""
    n = call.q.shape[1]
    index = positions.apply(torch.arange(n, device=call.q.device), dim=0)
    rows = call.scores(index.reshape(1, -1))
    if name.endswith("hook_pattern"):
        valid = call.mask.query_valid(n)
        rows = attention_pattern(rows, None if valid is None else valid[:, index.reshape(-1)])
    return rows if index.ndim else rows[:, :, 0]


def position_axis(name: str) -> int:
    """The axis of a text hook point's tensor (batch axis first) that runs over (query) positions."""
    return -2 if is_quadratic(name) else 1
