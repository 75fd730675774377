"""Interventions on the outputs of chosen heads, and the base class of all interventions on heads."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import (
    Hooks,
    Intervention,
    Positions,
    first_position,
    made_for,
    position_table,
    positions_mask,
    whole_numbers,
)
from hooked_vlm.nn.hooks import HookPoint

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Head = tuple[int, int]
"""(layer, head), both from 0."""


@dataclass(frozen=True, eq=False)
class HeadSelection:
    """The heads that an edit changes, in each row of a batch."""

    mask: Bool[Tensor, "rows head"]
    heads: tuple[int, ...]
    """Heads chosen in any row."""
    runs: "tuple[HeadIntervention, ...]"
    """The run of each block of rows: all rows of the inputs for the first run, then for the next."""

    def rows_of(self, x: Tensor) -> "HeadSelection":
        """The selection for a tensor, whose batch may hold all rows several times (samples of the same prompts)."""
        return replace(self, mask=self.mask.repeat(len(x) // len(self.mask), 1).to(x.device))


Edit = Callable[[Tensor, Any, HeadSelection], Tensor]
"""(tensor, hook point, where) -> the tensor edited there."""


@dataclass(frozen=True, eq=False)
class HeadIntervention(Intervention):
    """The same change for a set of heads.

    Runs that differ in their heads only are edited together: the functions that `edits` returns take a mask over rows
    and heads.
    """

    heads: tuple[Head, ...]

    position_aware: ClassVar[bool] = True
    varies: ClassVar[frozenset[str]] = frozenset({"heads"})
    """Fields in which runs may differ that are edited together; `edits` of one finds the others' in
    `HeadSelection.runs`."""

    @abstractmethod
    def edits(self, model: "HookedVLM", inputs: VLMInputs, layer: int) -> list[tuple[str, Edit]]:
        """(suffix of the hook point's name, edit) pairs of one layer."""

    @property
    def edited_positions(self) -> Positions:
        """The field `positions` of interventions that have one, otherwise all positions."""
        return getattr(self, "positions", None)

    def first_position(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        return first_position(position_table(self.edited_positions, inputs))

    @property
    def kind(self) -> tuple:
        """Equal for interventions that can be edited together."""
        rest = (getattr(self, field.name) for field in fields(self) if field.name not in self.varies)
        return (type(self), *(value if isinstance(value, str | float | int | tuple) else id(value) for value in rest))

    def hooks(self, model: "HookedVLM", inputs: VLMInputs) -> Hooks:
        inputs = model.as_inputs(inputs)
        by_layer: dict[int, list[int]] = defaultdict(list)
        for layer, head in check_heads(model, self.heads):
            by_layer[layer].append(head)
        pairs: Hooks = []
        for layer, heads in sorted(by_layer.items()):
            chosen = torch.zeros(1, model.cfg.n_heads, dtype=torch.bool)
            chosen[0, heads] = True
            pairs += layer_hooks((self,), model, inputs, layer, chosen)
        return made_for(inputs, pairs)

    def first_layer(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        return min((layer for layer, _ in check_heads(model, self.heads)), default=model.cfg.n_layers)

    def __str__(self) -> str:
        return f"{type(self).__name__} {' '.join(f'{layer}.{head}' for layer, head in self.heads)}"


def layer_hooks(
    runs: tuple[HeadIntervention, ...],
    model: "HookedVLM",
    inputs: VLMInputs,
    layer: int,
    chosen: Bool[Tensor, "run head"],
) -> Hooks:
    """The edits of one layer as hooks, for runs of one kind that share a batch (run by run, row by row)."""
    heads = tuple(chosen.any(0).nonzero()[:, 0].tolist())
    where = HeadSelection(chosen.repeat_interleave(len(inputs), dim=0).to(inputs.device), heads, runs)

    def hook_for(edit: Edit) -> Callable[[Tensor, Any], Tensor]:
        return lambda x, hook: edit(x, hook, where.rows_of(x))

    return [(f"blocks.{layer}.attn.{suffix}", hook_for(edit)) for suffix, edit in runs[0].edits(model, inputs, layer)]


@dataclass(frozen=True)
class ScaleHeads(HeadIntervention):
    """The outputs of heads (`hook_z`) are multiplied by `factor`."""

    factor: float
    positions: Positions = None

    def edits(self, model: "HookedVLM", inputs: VLMInputs, layer: int) -> list[tuple[str, Edit]]:
        return [("hook_z", _edit_z(inputs, self.positions, lambda z: z * self.factor))]


@dataclass(frozen=True)
class ZeroHeads(HeadIntervention):
    """The outputs of heads (`hook_z`) are zero, at every position and every step of generation by default."""

    positions: Positions = None

    def edits(self, model: "HookedVLM", inputs: VLMInputs, layer: int) -> list[tuple[str, Edit]]:
        return [("hook_z", _edit_z(inputs, self.positions, torch.zeros_like))]


@dataclass(frozen=True, eq=False)
class MeanHeads(HeadIntervention):
    """The outputs of heads (`hook_z`) are replaced by `means[layer, head]` (`mean_head_outputs`)."""

    means: Float[Tensor, "layer head d_head"]
    positions: Positions = None

    def edits(self, model: "HookedVLM", inputs: VLMInputs, layer: int) -> list[tuple[str, Edit]]:
        cfg = model.cfg
        if self.means.shape != (cfg.n_layers, cfg.n_heads, cfg.d_head):
            expected = (cfg.n_layers, cfg.n_heads, cfg.d_head)
            raise InputError(f"means must be [layer, head, d_head] = {expected}, got {tuple(self.means.shape)}")
        return [("hook_z", _edit_z(inputs, self.positions, lambda z: self.means[layer].to(z)))]


def _edit_z(inputs: VLMInputs, positions: Positions, make: Callable[[Tensor], Tensor]) -> Edit:
    table = position_table(positions, inputs).to(inputs.device)

    def edit(z: Tensor, hook: HookPoint, chosen: HeadSelection) -> Tensor:
        call = hook.ctx["attention"]
        here = positions_mask(table, call.k.shape[1] - z.shape[1], z.shape[1], len(z)).to(z.device)
        return torch.where((here[:, :, None] & chosen.mask[:, None])[..., None], make(z), z)

    return edit


def check_heads(model: "HookedVLM", heads: Sequence[Head]) -> Sequence[Head]:
    """Check that heads exist, and return them.

    Raises:
        InputError: entries that are not pairs of integers, or a layer or head out of range.
    """
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    if not isinstance(heads, Sequence) or not all(whole_numbers(head) and len(head) == 2 for head in heads):
        raise InputError(f"heads are pairs (layer, head), such as ((2, 1), (3, 0)), got {heads!r}")
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise InputError(
                f"there is no head {layer}.{head}: the model has layers 0 to {n_layers - 1} "
                f"with heads 0 to {n_heads - 1}"
            )
    return heads


@torch.no_grad()
def mean_head_outputs(
    model: "HookedVLM", inputs: Iterable[VLMInputs], positions: Positions = None
) -> Float[Tensor, "layer head d_head"]:
    """Every head's `hook_z` averaged over positions of all inputs, for `MeanHeads`."""
    total, n = torch.zeros((), device=model.cfg.device), 0
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    for batch in inputs:
        table = position_table(positions, batch)[:, :-1].to(batch.device)
        _, cache = model.run_with_cache(batch, names_filter=names, return_type=None)
        z = torch.stack([cache[name][table] for name in names])
        total, n = total + z.sum(1, dtype=torch.promote_types(z.dtype, torch.float32)), n + z.shape[1]
    if n == 0:
        raise InputError("there are no such positions in these inputs to average over")
    return total / n
