"""The cells of a patching experiment: layers x heads x places of one kind of activation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.interventions import PatchActivation
from hooked_vlm.interventions.base import in_range
from hooked_vlm.interventions.heads import tower_shape
from hooked_vlm.patching.pairs import Direction, Pair, same_places
from hooked_vlm.patching.places import Tower, Where, patches_at, place_names, positions_at

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

What = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "deepstack", "z", "q", "k", "v", "pattern"
]
"""An activation, by TransformerLens' short name. `k` and `v` have key-value heads; a `pattern` is patched in rows: its
places are queries; `deepstack` is what image features add behind the first blocks of some models."""
PER_HEAD = ("z", "q", "k", "v", "pattern")


@dataclass(frozen=True)
class Cells:
    """Every combination of a layer, a head and a place."""

    what: What
    tower: Tower
    direction: Direction
    layers: tuple[int, ...]
    heads: tuple[int | None, ...]
    """(None,) where the activation has no heads."""
    places: tuple[str | int, ...]

    @classmethod
    def of(
        cls,
        model: "HookedVLM",
        pairs: Sequence[Pair],
        what: What,
        where: Where,
        tower: Tower,
        direction: Direction,
        layers: Sequence[int] | None,
        heads: Sequence[int] | None,
    ) -> "Cells":
        """Raises `InputError` for activations, layers, heads or places that do not exist."""
        if what not in get_args(What):
            raise InputError(f"there is no activation {what!r} to patch: choose from {', '.join(get_args(What))}")
        if tower not in get_args(Tower):
            raise InputError(f'tower must be "language" or "vision", got {tower!r}')
        n_layers, n_heads = _sizes(model, what, tower)
        if heads is not None and what not in PER_HEAD:
            raise InputError(f"{what} has no heads: leave out heads")
        if tower == "vision":
            _check_grids(pairs)
        chosen: tuple[int | None, ...] = (None,)
        if what in PER_HEAD:
            chosen = in_range(heads, n_heads, f"{'key-value ' if what in 'kv' else ''}head")
        names = place_names(pairs, where, tower, direction)
        if not names:
            raise InputError("there is no place to patch: where is empty, or no position corresponds to another")
        return cls(what, tower, direction, in_range(layers, n_layers, "layer"), chosen, names)

    def __iter__(self) -> Iterator[tuple[int, int | None, str | int]]:
        for layer in self.layers:
            for head in self.heads:
                for place in self.places:
                    yield layer, head, place

    @property
    def title(self) -> str:
        """The activation and its tower, for figures."""
        return self.what if self.tower == "language" else f"{self.what} of the vision tower"

    @property
    def axes(self) -> dict[str, tuple[str | int, ...]]:
        """The axes of a result, those of one label included."""
        heads = {"head": tuple(h for h in self.heads if h is not None)} if self.heads != (None,) else {}
        return {"layer": self.layers, **heads, "patch" if self._by_patch else "place": self.places}

    @property
    def _by_patch(self) -> bool:
        return self.tower == "vision" and isinstance(self.places[0], int)

    def name(self, layer: int) -> str:
        """The hook point of a layer."""
        part = "attn." if self.what in PER_HEAD else ""
        return f"{'vision.' if self.tower == 'vision' else ''}blocks.{layer}.{part}hook_{self.what}"

    @property
    def names(self) -> list[str]:
        return [self.name(layer) for layer in self.layers]

    def positions(self, pair: Pair) -> dict[str | int, tuple[tuple[int, ...], ...]]:
        """Positions by row, or patches by image, of each place in a pair."""
        if self.tower == "vision":
            return {place: patches_at(pair, place) for place in self.places}
        matches = pair.matches(self.direction)
        return {place: positions_at(pair, place, self.direction, matches) for place in self.places}

    def interventions(self, pair: Pair, source: dict[str, Tensor]) -> list[PatchActivation]:
        """One intervention for each cell, in order; `source` holds activations at the edited inputs' positions."""
        where = self.positions(pair)
        return [
            PatchActivation(self.name(layer), source[self.name(layer)], where[place], None if head is None else (head,))
            for layer, head, place in self
        ]


def _sizes(model: "HookedVLM", what: str, tower: Tower) -> tuple[int, int]:
    """Number of layers, and of heads of the activation."""
    cfg = model.cfg
    if what == "deepstack":
        if tower != "language" or not cfg.n_deepstack:
            where = "the vision tower" if tower != "language" else cfg.model_name or "this model"
            raise InputError(f"no image features enter behind the blocks of {where}: it has no deepstack to patch")
        return cfg.n_deepstack, 0
    n_layers, n_heads, _ = tower_shape(model, tower)
    return n_layers, cfg.n_key_value_heads if tower == "language" and what in ("k", "v") else n_heads


def _check_grids(pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        visuals = zip(pair.clean.in_feature_order, pair.corrupt.in_feature_order, strict=True)
        if not all(same_places(pair.clean, v, pair.corrupt, w) for v, w in visuals):
            raise InputError(
                f"the vision tower's patches are those of images of one size: clean has {pair.clean.grids}, corrupt "
                f"{pair.corrupt.grids} (frames or tiles, rows, columns of patches), or tiles that lie otherwise. "
                "Resize one to the other"
            )
