"""What `run_with_cache` stores of a pass."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.utilities import Slice

from hooked_vlm.errors import HookError
from hooked_vlm.nn.attention import AttentionCall, attention_pattern
from hooked_vlm.nn.forward_pass import Recorder
from hooked_vlm.nn.hooks import QUADRATIC, HookPoint, is_hooked, is_quadratic, is_vision

Hooks = list[tuple[str, Callable]]


def runs_explicitly(model: Any, name: str) -> bool:
    """Whether the layer of a hook point for scores or patterns makes them for a hook, or for another module in such a
    point's place.

    An edit may have changed them then: what is derived from queries and keys would be wrong.
    """
    layer = name.rsplit(".", 1)[0]
    points = [model.hook_dict.get(f"{layer}.{suffix}") for suffix in QUADRATIC]
    return any(point is None or is_hooked(point) for point in points)


def default_filter(model: Any) -> Callable[[str], bool]:
    """Every hook point but the [pos, pos] ones of layers that run the fused kernel."""
    return lambda name: not is_quadratic(name) or runs_explicitly(model, name)


def exchanged_patterns(model: nn.Module) -> frozenset[str]:
    """The attention modules, by name, in which another module stands in the place of scores or pattern."""
    suffixes = tuple(f".{suffix}" for suffix in QUADRATIC)
    found = (n for n, m in model.named_modules() if n.endswith(suffixes) and not isinstance(m, HookPoint))
    return frozenset(name.rsplit(".", 1)[0] for name in found)


class Caching:
    """A store of activations by hook name, and what fills it.

    Args:
        positions: which positions of the text side are kept.
        explicit: whether a layer makes all of its scores and patterns anyway, asked by the name of such a point.
        incl_bwd: whether gradients are stored, too.
        copies: whether copies are stored, because modules of someone else's may write into what they are given.
    """

    def __init__(
        self,
        positions: Slice,
        device: torch.device | str | None,
        remove_batch_dim: bool,
        explicit: Callable[[str], bool],
        incl_bwd: bool = False,
        copies: bool = False,
    ) -> None:
        self.store: dict[str, Tensor] = {}
        self.put: Callable[[str, Tensor], None] = self.store.__setitem__
        self.positions, self.device, self.remove_batch_dim = positions, device, remove_batch_dim
        self.explicit, self.incl_bwd, self.copies = explicit, incl_bwd, copies

    def recorder(self, names: Sequence[str] | None) -> tuple[Recorder, Hooks]:
        """What records `names` (None: all that fire), and hooks for scores and patterns of which only some rows are
        made: those cut to some positions, unless something else has the layer make all of them."""
        if names is None:
            return Recorder(self.record), []
        rows = {name for name in names if self._by_rows(name)}
        hooks = [(f"{name.rsplit('.', 1)[0]}.hook_z", partial(self._save_rows, name=name)) for name in sorted(rows)]
        return Recorder(self.record, frozenset(names) - rows), hooks

    def record(self, name: str, tensor: Tensor) -> None:
        """`keep` for a pass, in which a hook point fires once (the first norm thrice, where heads have own inputs).

        Raises:
            HookError: it fired before.
        """
        if name in self.store and ".ln1." not in name:
            raise HookError(
                f"{name!r} fired twice in the pass that is cached: a hook calls parts of the model. Call them under "
                "hooked_vlm.nn.hooks.silent_hook_points(), or leave their names out of names_filter"
            )
        self.keep(name, tensor.clone() if self.copies else tensor)

    def keep(self, name: str, tensor: Tensor, suffix: str = "") -> None:
        """Store what passed the hook point `name`."""
        text = not is_vision(name)
        if text and self.positions.mode != "identity":
            # a copy: a view would keep the whole tensor in memory
            tensor = self.positions.apply(tensor, dim=position_axis(name)).clone()
        if text and self.remove_batch_dim:
            tensor = tensor[0]
        self.put(name + suffix, tensor if self.device is None else tensor.to(self.device))

    def save(self, tensor: Tensor, hook: Any, suffix: str = "") -> None:
        """`keep` as a hook."""
        self.keep(str(hook.name), tensor.detach(), suffix)

    def _by_rows(self, name: str) -> bool:
        cut = is_quadratic(name) and not is_vision(name) and self.positions.mode != "identity"
        return cut and not self.incl_bwd and not self.explicit(name)

    def _save_rows(self, z: Tensor, hook: Any, name: str) -> None:
        rows = _rows(hook.ctx["attention"], self.positions, name).detach()
        rows = rows[0] if self.remove_batch_dim else rows
        self.put(name, rows if self.device is None else rows.to(self.device))


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
