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
    ENCODER,
    Edits,
    Hooks,
    Intervention,
    Positions,
    Tower,
    first_image_position,
    first_position,
    made_for,
    n_patches,
    patch_table,
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
    """The run of each block of rows: all rows (images) of the inputs for the first run, then for the next."""

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

    @property
    def in_tower(self) -> Tower:
        """The field `tower` of interventions that have one, otherwise "language"."""
        return getattr(self, "tower", "language")

    def selected(self, where: Positions, inputs: VLMInputs) -> Bool[Tensor, "row width_and_one"]:
        """Positions of each row, or patches of each image, as a table (`position_table`, `patch_table`)."""
        return table_in(self.in_tower, where, inputs).to(inputs.device)

    def first_position(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        if self.in_tower == "vision":
            return first_image_position(inputs)
        return first_position(position_table(self.edited_positions, inputs))

    @property
    def kind(self) -> tuple:
        """Equal for interventions that can be edited together."""
        rest = (getattr(self, field.name) for field in fields(self) if field.name not in self.varies)
        return (type(self), *(value if isinstance(value, str | float | int | tuple) else id(value) for value in rest))

    def hooks(self, model: "HookedVLM", inputs: VLMInputs) -> Hooks:
        inputs = model.as_inputs(inputs)
        by_layer: dict[int, list[int]] = defaultdict(list)
        for layer, head in check_heads(model, self.heads, self.in_tower):
            by_layer[layer].append(head)
        pairs: Hooks = []
        n_heads = tower_shape(model, self.in_tower)[1]
        for layer, heads in sorted(by_layer.items()):
            chosen = torch.zeros(1, n_heads, dtype=torch.bool)
            chosen[0, heads] = True
            pairs += layer_hooks((self,), model, inputs, layer, chosen)
        return made_for(inputs, pairs)

    def first_layer(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        layers = [layer for layer, _ in check_heads(model, self.heads, self.in_tower)]
        if layers and self.in_tower == "vision":
            return ENCODER
        return min(layers, default=model.cfg.n_layers)

    def __str__(self) -> str:
        tower = "vision " if self.in_tower == "vision" else ""
        return f"{type(self).__name__} {tower}{' '.join(f'{layer}.{head}' for layer, head in self.heads)}"


def layer_hooks(
    runs: tuple[HeadIntervention, ...],
    model: "HookedVLM",
    inputs: VLMInputs,
    layer: int,
    chosen: Bool[Tensor, "run head"],
) -> Hooks:
    """The edits of one layer as hooks, for runs of one kind that share a batch (run by run, row by row; in the vision
    tower image by image)."""
    heads = tuple(chosen.any(0).nonzero()[:, 0].tolist())
    vision = runs[0].in_tower == "vision"
    n_rows = len(n_patches(inputs)) if vision else len(inputs)
    where = HeadSelection(chosen.repeat_interleave(n_rows, dim=0).to(inputs.device), heads, runs)
    attn = f"vision.blocks.{layer}.attn" if vision else f"blocks.{layer}.attn"

    def hook_for(edit: Edit) -> Callable[[Tensor, Any], Tensor]:
        return lambda x, hook: edit(x, hook, where.rows_of(x))

    return [(f"{attn}.{suffix}", hook_for(edit)) for suffix, edit in runs[0].edits(model, inputs, layer)]


def joint_edits(model: "HookedVLM", inputs: VLMInputs, runs: Sequence[Intervention]) -> dict[str, Edits]:
    """The edits of runs that share a batch, by hook point.

    Interventions on heads that can be edited together (`HeadIntervention.kind`) become one edit with a mask.
    """
    edits: dict[str, Edits] = defaultdict(list)
    kinds: dict[tuple, dict[int, HeadIntervention]] = defaultdict(dict)
    for i, run in enumerate(runs):
        if isinstance(run, HeadIntervention):
            kinds[run.kind][i] = run
        else:
            for name, fn in run.hooks(model, inputs):
                edits[name].append((i, i + 1, fn))
    for members in kinds.values():
        any_member = next(iter(members.values()))
        heads = torch.zeros(len(runs), *tower_shape(model, any_member.in_tower)[:2], dtype=torch.bool)
        for i, run in members.items():
            if run.heads:
                layers, numbers = zip(*run.heads, strict=True)
                heads[i, list(layers), list(numbers)] = True
        for layer in heads.any(-1).any(0).nonzero()[:, 0].tolist():
            touched = heads[:, layer].any(-1).nonzero()[:, 0]
            lo, hi = int(touched[0]), int(touched[-1]) + 1
            own = tuple(members.get(i, any_member) for i in range(lo, hi))  # the mask leaves other runs' rows alone
            for name, fn in layer_hooks(own, model, inputs, layer, heads[lo:hi, layer]):
                edits[name].append((lo, hi, fn))
    return edits


@dataclass(frozen=True)
class ScaleHeads(HeadIntervention):
    """The outputs of heads (`hook_z`) are multiplied by `factor`."""

    factor: float
    positions: Positions = None
    tower: Tower = "language"

    def edits(self, model: "HookedVLM", inputs: VLMInputs, layer: int) -> list[tuple[str, Edit]]:
        return [("hook_z", _edit_z(self.selected(self.positions, inputs), lambda z: z * self.factor))]


@dataclass(frozen=True)
class ZeroHeads(HeadIntervention):
    """The outputs of heads (`hook_z`) are zero, at every position and every step of generation by default."""

    positions: Positions = None
    tower: Tower = "language"

    def edits(self, model: "HookedVLM", inputs: VLMInputs, layer: int) -> list[tuple[str, Edit]]:
        return [("hook_z", _edit_z(self.selected(self.positions, inputs), torch.zeros_like))]


@dataclass(frozen=True, eq=False)
class MeanHeads(HeadIntervention):
    """The outputs of heads (`hook_z`) are replaced by `means[layer, head]` (`mean_head_outputs`)."""

    means: Float[Tensor, "layer head d_head"]
    positions: Positions = None
    tower: Tower = "language"

    def edits(self, model: "HookedVLM", inputs: VLMInputs, layer: int) -> list[tuple[str, Edit]]:
        expected = tower_shape(model, self.tower)
        if self.means.shape != expected:
            of = " of the vision tower" if self.tower == "vision" else ""
            raise InputError(f"means{of} must be [layer, head, d_head] = {expected}, got {tuple(self.means.shape)}")
        return [("hook_z", _edit_z(self.selected(self.positions, inputs), lambda z: self.means[layer].to(z)))]


def _edit_z(table: Bool[Tensor, "row width_and_one"], make: Callable[[Tensor], Tensor]) -> Edit:
    def edit(z: Tensor, hook: HookPoint, chosen: HeadSelection) -> Tensor:
        call = hook.ctx["attention"]
        here = positions_mask(table, call.k.shape[1] - z.shape[1], z.shape[1], len(z)).to(z.device)
        return torch.where((here[:, :, None] & chosen.mask[:, None])[..., None], make(z), z)

    return edit


def table_in(tower: Tower, where: Positions, inputs: VLMInputs) -> Bool[Tensor, "row width_and_one"]:
    """Selected positions of each row, or patches of each image."""
    return patch_table(where, inputs) if tower == "vision" else position_table(where, inputs)


def tower_shape(model: "HookedVLM", tower: Tower) -> tuple[int, int, int]:
    """Number of layers that run, of heads in each, and d_head.

    Raises:
        InputError: a model without a vision tower, or another word for a tower.
    """
    if tower not in ("language", "vision"):
        raise InputError(f'tower must be "language" or "vision", got {tower!r}')
    cfg, vision = model.cfg, model.cfg.vision
    if tower == "language":
        return cfg.n_layers, cfg.n_heads, cfg.d_head
    if vision is None:
        raise InputError(f"{cfg.model_name or 'this model'} is a language model without a vision tower")
    return vision.n_layers_run, vision.n_heads, vision.d_head


def check_heads(model: "HookedVLM", heads: Sequence[Head], tower: Tower = "language") -> Sequence[Head]:
    """Check that heads exist, and return them.

    Raises:
        InputError: entries that are not pairs of integers, a layer or head out of range, or what `tower_shape` raises.
    """
    n_layers, n_heads, _ = tower_shape(model, tower)
    if not isinstance(heads, Sequence) or not all(whole_numbers(head) and len(head) == 2 for head in heads):
        raise InputError(f"heads are pairs (layer, head), such as ((2, 1), (3, 0)), got {heads!r}")
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            which = "model" if tower == "language" else "vision tower"
            raise InputError(
                f"there is no head {layer}.{head}: the {which} has layers 0 to {n_layers - 1} "
                f"with heads 0 to {n_heads - 1}"
            )
    return heads


def mean_head_outputs(
    model: "HookedVLM", inputs: Iterable[VLMInputs], positions: Positions = None, tower: Tower = "language"
) -> Float[Tensor, "layer head d_head"]:
    """Every head's `hook_z` averaged over positions of all inputs, for `MeanHeads`.

    In the vision tower over patches, class tokens included: each patch counts once, so a picture with more of them, in
    more tiles or frames, counts more. Inputs without images are left out there.

    Raises:
        InputError: there are no such positions.
    """
    total, n = head_output_sums(model, inputs, positions, tower)
    if n == 0:
        raise InputError("there are no such positions in these inputs to average over")
    return total / n


@torch.no_grad()
def head_output_sums(
    model: "HookedVLM", inputs: Iterable[VLMInputs], positions: Positions = None, tower: Tower = "language"
) -> tuple[Float[Tensor, "layer head d_head"], int]:
    """Sums of `mean_head_outputs`, and the number of positions; they add up over parts of a data set."""
    shape = tower_shape(model, tower)
    total, n = torch.zeros(shape, device=model.cfg.device), 0
    prefix = "vision." if tower == "vision" else ""
    names = [f"{prefix}blocks.{layer}.attn.hook_z" for layer in range(shape[0])]
    for batch in inputs:
        if tower == "vision" and not batch.has_visuals:
            continue
        table = table_in(tower, positions, batch)[:, :-1].to(batch.device)
        _, cache = model.run_with_cache(batch, names_filter=names, return_type=None)
        z = torch.stack([cache[name][table] for name in names])
        total, n = total + z.sum(1, dtype=torch.promote_types(z.dtype, torch.float32)), n + z.shape[1]
    return total, n
