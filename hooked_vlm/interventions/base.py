"""What an intervention is, and which positions it acts on."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.hooks import HookName, is_encoder, is_vision

Hooks = list[tuple[str, Callable]]

Positions = str | tuple[int, ...] | tuple[tuple[int, ...], ...] | None
"""Which positions: None for all; a group of `inputs.positions` ("image", "video", "question", "assistant_header",
"final", "generated") or "text" (all but images and videos); absolute positions, for all rows or a tuple per row."""

EMBEDDING = -1
"""The "layer" of `hook_embed`."""
ENCODER = -2
"""The "layer" of everything before it: the vision tower, the projector, the features they hand over."""


class Intervention(ABC):
    """A change to a forward pass."""

    position_aware: ClassVar[bool] = False
    """Whether its hooks go by `hook.ctx["positions"]`, so that a pass may leave out positions nobody asks for."""
    attention: ClassVar[Literal["edited", "made again", ""]] = ""
    """Whether it edits a head's scores or pattern, or makes z again from queries and keys."""

    @abstractmethod
    def hooks(self, model: Any, inputs: VLMInputs) -> Hooks:
        """Pairs for `run_with_hooks(inputs, ...)` and `generate(inputs, ...)`.

        Raises:
            InputError: layers, heads or positions that this model or these inputs do not have.
        """

    def first_layer(self, model: Any, inputs: VLMInputs) -> int:
        """The first layer it touches; `EMBEDDING`, `ENCODER` or the number of layers (final norm) outside."""
        return min((layer_of(name, model.cfg.n_layers) for name, _ in self.hooks(model, inputs)), default=0)

    def first_position(self, model: Any, inputs: VLMInputs) -> int:
        """Positions before this one are as they would be without it."""
        return 0


@dataclass(frozen=True)
class Compose(Intervention):
    """Several interventions in one run, in this order where they meet at one hook point."""

    parts: tuple[Intervention, ...]

    @property
    def position_aware(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(part.position_aware for part in self.parts)

    def hooks(self, model: Any, inputs: VLMInputs) -> Hooks:
        pairs = [pair for part in self.parts for pair in part.hooks(model, inputs)]
        again, edited = self._heads("made again"), self._heads("edited")
        if both := sorted(head for head in again if again[head] > 1 or edited[head]):
            layer, head = both[0]
            raise InputError(
                f"head {layer}.{head} has its z made again from queries and keys, which would undo what another part "
                "does to its attention: put them on different heads, or block attention (BlockAttention) in both"
            )
        return pairs

    def _heads(self, kind: str) -> Counter[tuple[int, int]]:
        """How many parts change the attention of a head in this way."""
        found: Counter[tuple[int, int]] = Counter()
        for part in self.parts:
            if isinstance(part, Compose):
                found += part._heads(kind)
            elif part.attention == kind:
                found.update({tuple(head) for head in getattr(part, "heads", ())})
        return found

    def first_position(self, model: Any, inputs: VLMInputs) -> int:
        return min((part.first_position(model, inputs) for part in self.parts), default=0)


@dataclass(frozen=True, eq=False)
class CustomHooks(Intervention):
    """Hooks of your own, for a sweep: (name or filter, function that sees a whole tensor), as in `run_with_hooks`."""

    fwd_hooks: Sequence[tuple[HookName, Callable]]
    label: str = "custom"

    def hooks(self, model: Any, inputs: VLMInputs) -> Hooks:
        pairs: Hooks = []
        for name, fn in self.fwd_hooks:
            if isinstance(name, str):
                pairs.append((name, fn))
            else:
                pairs += [(n, fn) for n in model.hook_dict if name(n) and not model.why_silent(n, inputs, {})]
        return pairs

    def __str__(self) -> str:
        return self.label


def layer_of(name: str, n_layers: int) -> int:
    """The layer of a hook point, in the order a pass meets them."""
    if is_encoder(name) or is_vision(name):
        return ENCODER
    if name == "hook_embed":
        return EMBEDDING
    return int(name.split(".")[1]) if name.startswith("blocks.") else n_layers


def position_table(where: Positions, inputs: VLMInputs) -> Bool[Tensor, "batch width_and_one"]:
    """Which columns of `inputs` are meant, row by row; the last entry stands for every position past their end.

    Padding is never meant.

    Raises:
        InputError: an unknown group, positions that are no whole numbers or lie outside the inputs, or a number of
            rows that is not theirs.
    """
    n_rows, width = inputs.shape
    table = torch.zeros(n_rows, width + 1, dtype=torch.bool)
    spans = list(zip(inputs.first, inputs.stop, strict=True))
    if where is None or where == "text":
        for row, (first, stop) in enumerate(spans):
            table[row, first:stop] = True
        table[:, -1] = True
        if where == "text":
            for visual in inputs.visuals:
                table[visual.row, visual.start : visual.stop] = False
        return table
    if isinstance(where, str):
        groups = vars(inputs.positions)
        if where not in groups:
            raise InputError(f"there is no group of positions {where!r}: choose from {', '.join(groups)}, text")
        for row, members in enumerate(groups[where]):
            table[row, members] = True
        if where != "generated" and not table.any():
            raise InputError(f"these inputs have no {where} positions")
        table[:, -1] = where == "generated"
        return table
    for row, members in enumerate(_per_row(where, n_rows)):
        first, stop = spans[row]
        outside = [p for p in members if not first <= p < stop]
        if outside:
            raise InputError(f"position {outside[0]} of row {row} is not one of its tokens ({first} to {stop - 1})")
        table[row, list(members)] = True
    return table


def whole_numbers(values: Any) -> bool:
    """Whether `values` is a sequence of whole numbers; truth values are none: as an index they would be a mask."""
    return isinstance(values, Sequence) and all(isinstance(v, Integral) and not isinstance(v, bool) for v in values)


def _per_row(where: Any, n_rows: int) -> Sequence[Sequence[int]]:
    if whole_numbers(where):
        return [where] * n_rows
    if not isinstance(where, Sequence) or not all(whole_numbers(row) for row in where):
        raise InputError(
            "positions are None, the name of a group, a tuple of whole numbers, or such a tuple for each row, got "
            f"{where!r}"
        )
    if len(where) != n_rows:
        raise InputError(f"there are positions for {len(where)} rows, but the inputs have {n_rows}")
    return where


def first_position(table: Bool[Tensor, "batch width_and_one"]) -> int:
    """The first column that is meant in any row; past the end if none is."""
    columns = table[:, :-1].any(0).nonzero()
    return int(columns[0]) if len(columns) else table.shape[1] - 1


def positions_mask(
    table: Bool[Tensor, "batch width_and_one"], n_past: int, n_queries: int, rows: int
) -> Bool[Tensor, "rows query"]:
    """The table's columns n_past, n_past + 1, ...; its rows repeated where several runs share a batch."""
    width = table.shape[1] - 1
    columns = table[:, min(n_past, width) : min(n_past + n_queries, width)]
    if columns.shape[1] < n_queries:
        columns = torch.cat((columns, table[:, -1:].expand(-1, n_queries - columns.shape[1])), dim=1)
    return columns if rows == len(table) else columns.repeat(rows // len(table), 1)
