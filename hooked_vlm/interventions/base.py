"""Base classes of interventions, tables of the positions they act on, and hooks bound to the inputs they are for."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakSet

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.hooks import HookName, HookPoint, checked, is_encoder, is_vision

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Hooks = list[tuple[str, Callable]]

Edits = list[tuple[int, int, Callable]]
"""(first run, one past the last, hook)."""

Positions = str | tuple[int, ...] | tuple[tuple[int, ...], ...] | None
"""None for all positions; a group of `inputs.positions` ("image", "video", "question", "assistant_header",
"final", "generated"), "text" (all but images and videos) or a sum of groups ("final+generated", where a group that
these inputs do not have adds nothing); absolute positions, for all rows or a tuple per row."""

Tower = Literal["language", "vision"]
"""The language model, or the vision tower: there positions are numbers of patches, a class token in front of them
included; the same of every image, or a tuple for each image, tile or frame of a video."""

EMBEDDING = -1
"""The "layer" of `hook_embed`."""
ENCODER = -2
"""The "layer" of everything before `hook_embed`: the vision tower, the projector, and their output features."""


class Intervention(ABC):
    """A change to a forward pass."""

    position_aware: ClassVar[bool] = False
    """Whether its hooks read `hook.ctx["positions"]`, so that a pass may leave out positions that are not needed."""
    attention: ClassVar[Literal["edited", "recomputed", ""]] = ""
    """Whether it edits a head's scores or pattern, or recomputes z from queries and keys."""

    @abstractmethod
    def hooks(self, model: "HookedVLM", inputs: VLMInputs) -> Hooks:
        """Pairs for `run_with_hooks(inputs, ...)` and `generate(inputs, ...)`.

        Raises:
            InputError: layers, heads or positions that this model or these inputs do not have.
        """

    def first_layer(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        """The first layer that changes; `EMBEDDING`, `ENCODER` or the number of layers (final norm) outside blocks."""
        return min((layer_of(name, model.cfg.n_layers) for name, _ in self.hooks(model, inputs)), default=0)

    def first_position(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        """The first position that changes."""
        return 0


@dataclass(frozen=True)
class Compose(Intervention):
    """Several interventions in one run, applied in this order where they share a hook point."""

    parts: tuple[Intervention, ...]

    @property
    def position_aware(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(part.position_aware for part in self.parts)

    def hooks(self, model: "HookedVLM", inputs: VLMInputs) -> Hooks:
        pairs = [pair for part in self.parts for pair in part.hooks(model, inputs)]
        recomputed, edited = self._heads("recomputed"), self._heads("edited")
        if both := sorted(head for head in recomputed if recomputed[head] > 1 or edited[head]):
            tower, layer, head = both[0]
            of = " of the vision tower" if tower == "vision" else ""
            raise InputError(
                f"head {layer}.{head}{of} has its z recomputed from queries and keys, which would undo what another "
                "part does to its attention: put them on different heads, or block attention (BlockAttention) in both"
            )
        return pairs

    def _heads(self, kind: str) -> Counter[tuple[Tower, int, int]]:
        """Number of parts that change the attention of each head in this way."""
        counts: Counter[tuple[Tower, int, int]] = Counter()
        for part in self.parts:
            if isinstance(part, Compose):
                counts += part._heads(kind)
            elif part.attention == kind:
                tower: Tower = getattr(part, "tower", "language")
                counts.update({(tower, layer, head) for layer, head in getattr(part, "heads", ())})
        return counts

    def first_position(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        return min((part.first_position(model, inputs) for part in self.parts), default=0)


@dataclass(frozen=True, eq=False)
class CustomHooks(Intervention):
    """Hooks of your own, for a sweep: (name or filter, function that sees a whole tensor), as in `run_with_hooks`.

    Results that are stored (`sweep_many`) need a label and a version of them: functions cannot be compared, so stored
    results are used as long as both are the same.
    """

    fwd_hooks: Sequence[tuple[HookName, Callable]]
    label: str = "custom"
    version: str | int | None = None

    @property
    def known_as(self) -> tuple[str, str | int] | None:
        """What the hooks are identified by, if a version is given."""
        return None if self.version is None else (self.label, self.version)

    def hooks(self, model: "HookedVLM", inputs: VLMInputs) -> Hooks:
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
    """The layer of a hook point, ordered as a pass runs them."""
    if is_encoder(name) or is_vision(name):
        return ENCODER
    if name == "hook_embed":
        return EMBEDDING
    return int(name.split(".")[1]) if name.startswith("blocks.") else n_layers


def position_table(where: Positions, inputs: VLMInputs) -> Bool[Tensor, "batch width_and_one"]:
    """Selected columns of `inputs`, row by row; the last entry stands for every position past their end.

    Padding is never selected.

    Raises:
        InputError: an unknown group, positions that are no whole numbers or lie outside the inputs, or another number
            of rows.
    """
    n_rows, width = inputs.shape
    table = torch.zeros(n_rows, width + 1, dtype=torch.bool)
    spans = list(zip(inputs.first, inputs.stop, strict=True))
    if where is None or where == "text":
        for row, (first, stop) in enumerate(spans):
            table[row, first:stop] = True
        table[:, -1] = True
        for visual in inputs.visuals if where == "text" else ():
            table[visual.row, visual.positions] = False
        return table
    if isinstance(where, str):
        names = [name.strip() for name in where.split("+")]
        for name in names:
            table |= position_table("text", inputs) if name == "text" else _group_table(name, inputs)
        if "generated" not in names and not table.any():
            raise InputError(f"these inputs have no {where} positions")
        return table
    for row, members in enumerate(_per_row(where, n_rows, "rows")):
        first, stop = spans[row]
        outside = [p for p in members if not first <= p < stop]
        if outside:
            raise InputError(f"position {outside[0]} of row {row} is not one of its tokens ({first} to {stop - 1})")
        table[row, list(members)] = True
    return table


def _group_table(name: str, inputs: VLMInputs) -> Bool[Tensor, "batch width_and_one"]:
    groups = vars(inputs.positions)
    if name not in groups:
        raise InputError(f"there is no group of positions {name!r}: choose from {', '.join(groups)}, text, or a sum")
    table = torch.zeros(len(inputs), inputs.shape[1] + 1, dtype=torch.bool)
    for row, members in enumerate(groups[name]):
        table[row, members] = True
    table[:, -1] = name == "generated"
    return table


def image_tokens(where: Positions, inputs: VLMInputs) -> Bool[Tensor, "batch width_and_one"]:
    """Image and video tokens, or some of them, as a `position_table`.

    Raises:
        InputError: a position that is not an image token.
    """
    text = position_table("text", inputs)
    if where is None:
        return position_table(None, inputs) & ~text
    table = position_table(where, inputs)
    if (table & text).any():
        row, position = (table & text).nonzero()[0].tolist()
        raise InputError(f"position {position} of row {row} is not an image token")
    return table


def whole_numbers(values: Any) -> bool:
    """Whether `values` is a sequence of integers; booleans do not count, because as an index they would be a mask."""
    return isinstance(values, Sequence) and all(isinstance(v, Integral) and not isinstance(v, bool) for v in values)


def _per_row(where: Any, n_rows: int, unit: str) -> Sequence[Sequence[int]]:
    if whole_numbers(where):
        return [where] * n_rows
    if not isinstance(where, Sequence) or not all(whole_numbers(row) for row in where):
        raise InputError(
            "positions are None, the name of a group, a tuple of whole numbers, or such a tuple for each row, got "
            f"{where!r}"
        )
    if len(where) != n_rows:
        raise InputError(f"there are positions for {len(where)} {unit}, but the inputs have {n_rows}")
    return where


# ---------------------------------------------------------------- the vision tower


def n_patches(inputs: VLMInputs) -> tuple[int, ...]:
    """Patches of each image, tile or video frame, class token included: the vision tower's first two axes."""
    return tuple(inputs.spec.class_tokens + h * w for t, h, w in inputs.grids for _ in range(t))


def patch_table(where: Positions, inputs: VLMInputs) -> Bool[Tensor, "image patch_and_one"]:
    """Selected patches, image by image, as a `position_table`; the last entry is False, since no patch is added later.

    Raises:
        InputError: no images, the name of a group, patches that an image does not have, or another number of images.
    """
    counts = n_patches(inputs)
    if not counts:
        raise InputError("there is no image in these inputs, so the vision tower does not run")
    if isinstance(where, str):
        raise InputError(f"patches of the vision tower have numbers, not groups like {where!r}: None for all of them")
    table = torch.zeros(len(counts), max(counts) + 1, dtype=torch.bool)
    chosen = [range(n) for n in counts] if where is None else _per_row(where, len(counts), "images")
    for image, (members, n) in enumerate(zip(chosen, counts, strict=True)):
        if outside := [patch for patch in members if not 0 <= patch < n]:
            raise InputError(f"image {image} has no patch {outside[0]}: its patches are numbered 0 to {n - 1}")
        table[image, list(members)] = True
    return table


def first_image_position(inputs: VLMInputs) -> int:
    """The first position that a change of the image side reaches; 0 where there are no images."""
    return min((visual.start for visual in inputs.visuals), default=0)


def first_position(table: Bool[Tensor, "batch width_and_one"]) -> int:
    """The first column selected in any row; past the end if none is."""
    columns = table[:, :-1].any(0).nonzero()
    return int(columns[0]) if len(columns) else table.shape[1] - 1


def positions_mask(
    table: Bool[Tensor, "batch width_and_one"], n_past: int, n_queries: int, rows: int
) -> Bool[Tensor, "rows query"]:
    """Columns n_past to n_past + n_queries of the table, its rows repeated where several runs share a batch."""
    width = table.shape[1] - 1
    columns = table[:, min(n_past, width) : min(n_past + n_queries, width)]
    if columns.shape[1] < n_queries:
        columns = torch.cat((columns, table[:, -1:].expand(-1, n_queries - columns.shape[1])), dim=1)
    return columns if rows == len(table) else columns.repeat(rows // len(table), 1)


def in_range(chosen: Sequence[int] | None, n: int, kind: str) -> tuple[int, ...]:
    """Check that layers (or heads) exist; all `n` of them by default.

    Raises:
        InputError: none are chosen, or one is out of range.
    """
    if chosen is None:
        return tuple(range(n))
    if not len(chosen):
        raise InputError(f"no {kind} is chosen: leave {kind.split()[-1]}s out for all {n} of them")
    for number in chosen:
        if not 0 <= number < n:
            raise InputError(f"{kind} {number} is out of range: there are {kind}s 0 to {n - 1}")
    return tuple(chosen)


def on_own_rows(edits: Edits, n_rows: int) -> Callable[[Tensor, Any], Tensor]:
    """A hook for a batch of runs with `n_rows` rows each."""

    def apply(x: Tensor, hook: HookPoint) -> Tensor:
        call = hook.ctx.get("attention")
        for lo, hi, fn in edits:
            rows = slice(lo * n_rows, hi * n_rows)
            if call is not None:
                hook.ctx["attention"] = call.rows(rows.start, rows.stop)
            own = x[rows]
            edited = fn(own, hook)
            if edited is not None:
                x[rows] = checked(hook, own, edited)
        return x

    return apply


# ---------------------------------------------------------------- hooks know their inputs


def made_for(inputs: VLMInputs, hooks: Hooks) -> Hooks:
    """Bind hooks to the token layout whose positions they hold.

    They run on inputs with the same layout, and on the same rows with tokens appended (as generation appends them).

    Raises:
        InputError: when one is called in a pass over other inputs.
    """
    known: dict[bool, WeakSet[VLMInputs]] = {behind: WeakSet() for behind in (False, True)}

    def bound(name: str, fn: Callable) -> Callable:
        def hook_for_inputs(x: Tensor, hook: HookPoint) -> Any:
            ctx = hook.ctx
            begins: VLMInputs | None = ctx.get("inputs")
            given: VLMInputs | None = ctx.get("own_inputs", begins)  # a step of generation has none of its own
            n_past = ctx.get("first_position", 0) if "own_inputs" in ctx else 0
            if begins is not None and given is not None and given not in known[bool(n_past)]:
                fits = _continues(inputs, begins, given, n_past) if n_past else _fits(inputs, given, "step" in ctx)
                if not fits:
                    raise InputError(_refusal(name, inputs, given, n_past))
                known[bool(n_past)].add(given)
            return fn(x, hook)

        return hook_for_inputs

    return [(name, bound(name, fn)) for name, fn in hooks]


def _fits(own: VLMInputs, given: VLMInputs, cached: bool) -> bool:
    """Whether hooks for `own` fit a pass over `given`, to which tokens may follow if it is `cached`."""
    alike = given is own or _layout(own) == _layout(given)
    return alike or _appended(own, given) or (cached and _appended(given, own))


def _continues(own: VLMInputs, begins: VLMInputs, given: VLMInputs, n_past: int) -> bool:
    """Whether hooks for `own` fit a pass over `given` behind `n_past` positions of a cache that begins with `begins`:
    they are for its beginning, or for all of it."""
    if not (_appended(begins, own) or _appended(own, begins)):
        return False
    part = own.tokens[:, n_past : n_past + given.shape[1]]
    return not part.shape[1] or torch.equal(part.cpu(), given.tokens[:, : part.shape[1]].cpu())


def _refusal(name: str, own: VLMInputs, given: VLMInputs, n_past: int) -> str:
    made = f"a hook on {name!r} was made for {own} and runs on {given}"
    if n_past:
        return (
            f"{made} behind {n_past} positions of a key-value cache: make the hooks for all of them together, "
            "intervention.hooks(model, inputs)"
        )
    return f"{made}, whose tokens lie elsewhere: make them for the inputs of the run, intervention.hooks(model, inputs)"


def _layout(inputs: VLMInputs) -> tuple:
    """The rows, and the positions of their images and groups, whatever the texts and pictures are."""
    groups = {name: [own.tolist() for own in rows] for name, rows in vars(inputs.positions).items()}
    return inputs.shape, inputs.first, inputs.stop, _visuals(inputs), groups


def _visuals(inputs: VLMInputs) -> list[tuple]:
    return [(v.kind, v.row, v.start, v.grid, v.runs) for v in inputs.visuals]


def _appended(short: VLMInputs, long: VLMInputs) -> bool:
    """Whether `long` is `short` with tokens appended where its columns end."""
    width = short.shape[1]
    if len(short) != len(long) or long.shape[1] < width or short.first != long.first:
        return False
    ends = zip(short.stop, long.stop, strict=True)
    if any(after != before and not (before == width and after > before) for before, after in ends):
        return False
    if _visuals(short) != [visual for visual in _visuals(long) if visual[2] < width]:
        return False
    real = short.attention_mask.bool().cpu()
    return torch.equal(short.tokens.cpu()[real], long.tokens[:, :width].cpu()[real])
