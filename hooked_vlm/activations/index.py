"""The index of stored activations: for every row, which token or patch of which sample it belongs to.

There are three kinds of rows. Activations of the language model have a row for each token, those of the vision
tower one for each patch, and those of the projector and what it hands over one for each image token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.activations.samples import Sample
from hooked_vlm.config import VLMConfig
from hooked_vlm.geometry import GeometryError, ImageGrid, TileGrid
from hooked_vlm.hooks import is_vision
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.token_layout import InputError, Visual

Kind = Literal["tokens", "patches", "image_tokens"]
FEATURES = "hook_image_features"
GROUPS = ("image", "question", "role", "generated")
"""The groups of `inputs.positions` that share no token; "final" has a column of its own."""
NAMED = ("all", "text", *GROUPS, "final", "evidence")
TokenChoice = str | int | Sequence[str | int]
"""Which tokens: "all", a group of `inputs.positions`, "text" (all but images), "evidence" (tokens in a named box),
positions in the sample (negative ones count from its end), or several of these together."""

_TYPES = {
    "sample": pa.string(),
    "position": pa.int32(),
    "token_id": pa.int32(),
    "token": pa.string(),
    "group": pa.string(),
    "final": pa.bool_(),
    "image": pa.int32(),
    "image_token": pa.int32(),
    "tile": pa.int32(),
    "patch": pa.int32(),
    "thumbnail": pa.bool_(),
    **dict.fromkeys(("x0", "y0", "x1", "y1"), pa.float64()),
    "evidence": pa.list_(pa.string()),
}
_BOX = ("x0", "y0", "x1", "y1", "evidence")
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "tokens": (*list(_TYPES)[:9], "thumbnail", *_BOX),
    "patches": ("sample", "image", "tile", "patch", "thumbnail", *_BOX),
    "image_tokens": ("sample", "position", "image", "image_token", "tile", "thumbnail", *_BOX),
}
SCHEMA = pa.schema([("kind", pa.string()), *_TYPES.items()])


def kind_of(name: str, cfg: VLMConfig) -> Kind:
    """What the rows of a hook point's activations are."""
    if not is_vision(name):
        return "tokens"
    of_patches = name.startswith("vision.") or (
        name.startswith("projector.ln.") and cfg.vision is not None and cfg.vision.projector_norm == "patch"
    )
    return "patches" if of_patches else "image_tokens"


def checked_choice(tokens: TokenChoice) -> list[str | int]:
    """`tokens` as a list.

    Raises:
        InputError: a group that does not exist.
    """
    parts = [tokens] if isinstance(tokens, str | int) else list(tokens)
    unknown = [part for part in parts if isinstance(part, str) and part not in NAMED]
    if unknown or not parts:
        got = repr(unknown[0]) if unknown else "nothing"
        raise InputError(f"tokens are chosen by position or as one of {', '.join(NAMED)}; got {got}")
    return parts


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that a batch gives to one kind of activations."""

    table: pa.Table
    slots: Int[Tensor, "row"]
    """Where each row lies among the first two axes of the hook point's tensor, taken as one."""

    def take(self, name: str, tensor: Float[Tensor, "..."]) -> Float[Tensor, "row *rest"]:
        """The rows of a hook point's tensor; a copy."""
        if name == FEATURES:  # has no padding
            return tensor.clone()
        return tensor.flatten(0, 1).index_select(0, self.slots.to(tensor.device))


def rows_of_batch(
    inputs: VLMInputs,
    samples: Sequence[Sample],
    kinds: Sequence[Kind],
    choice: Sequence[str | int],
    min_overlap: float | int,
    cfg: VLMConfig,
    text_of: Callable[[int], str | None],
) -> dict[Kind, Rows]:
    """What to keep of a batch, one row of `inputs` for each sample.

    Args:
        choice: which tokens of the language model; of images all patches and image tokens are kept.
        min_overlap: a token or patch belongs to a named box if more than this share of the box lies in it.
        text_of: the text of a token id.

    Raises:
        GeometryError: a box that does not lie in its image.
    """
    makers: dict[Kind, Callable[[], Rows]] = {
        "tokens": lambda: _token_rows(inputs, samples, choice, min_overlap, text_of),
        "patches": lambda: _patch_rows(inputs, samples, min_overlap, cfg),
        "image_tokens": lambda: _image_token_rows(inputs, samples, min_overlap),
    }
    return {kind: makers[kind]() for kind in kinds}


# ---------------------------------------------------------------- geometry of one image


@dataclass(frozen=True, eq=False)
class _Places:
    """The tokens or patches of one image, in the order of the activations."""

    grid: ImageGrid | TileGrid
    """Numbers them in an order of its own."""
    number: Int[np.ndarray, "place"]
    """Each one's number in `grid`; -1 for class tokens, which lie nowhere."""
    boxes: Float[np.ndarray, "place 4"]
    tile: Int[np.ndarray, "place"]
    thumbnail: Bool[np.ndarray, "place"]

    def evidence(self, boxes: Sequence[Any], min_overlap: float | int) -> list[list[str]]:
        """The names of the boxes that each one lies in."""
        names: list[list[str]] = [[] for _ in self.number]
        for name in dict.fromkeys(box.name for box in boxes):
            own = [self.grid.tokens_in_box(box.box, min_overlap) for box in boxes if box.name == name]
            for at in np.flatnonzero(np.isin(self.number, np.concatenate(own))):
                names[at].append(name)
        return names


@lru_cache(maxsize=256)
def _token_places(grid: ImageGrid | TileGrid) -> _Places:
    return _places(grid, np.arange(grid.n_tokens))


@lru_cache(maxsize=256)
def _patch_places(grid: ImageGrid | TileGrid) -> _Places:
    """As they leave the tower: merge block by merge block, or tile by tile in raster order behind class tokens."""
    if isinstance(grid, ImageGrid):
        fine = replace(grid, merge_size=1)
        return _places(fine, np.array([fine.index(row, col, frame) for frame, row, col in grid.patch_order().tolist()]))
    fine = replace(grid, merge_size=1, transposed_tokens=False)
    by_tile = np.arange(fine.n_tokens).reshape(fine.n_tiles, -1)
    return _places(fine, np.concatenate((np.full((len(by_tile), 1), -1), by_tile), axis=1).ravel())


def _places(grid: ImageGrid | TileGrid, number: Int[np.ndarray, "place"]) -> _Places:
    boxes = np.array([grid.box_of(i) for i in range(grid.n_tokens)])
    boxes = np.concatenate((boxes, np.full((1, 4), np.nan)))[number]  # the last row is that of number -1
    tile, thumbnail = np.zeros(len(number), dtype=int), np.zeros(len(number), dtype=bool)
    if isinstance(grid, TileGrid):
        tile = np.arange(len(number)) // (len(number) // grid.n_tiles)
        thumbnail = (tile == grid.n_tiles - 1) & grid.thumbnail
    return _Places(grid, number, boxes, tile, thumbnail)


# ---------------------------------------------------------------- tables


def _token_rows(
    inputs: VLMInputs,
    samples: Sequence[Sample],
    choice: Sequence[str | int],
    min_overlap: float | int,
    text_of: Callable[[int], str | None],
) -> Rows:
    tables, slots = [], []
    ids, width, images = inputs.tokens.tolist(), inputs.shape[1], _images_of(inputs)
    for row, sample in enumerate(samples):
        first, n = inputs.first[row], inputs.stop[row] - inputs.first[row]
        group, final = np.full(n, "other", dtype=object), np.zeros(n, dtype=bool)
        for name in GROUPS:
            group[getattr(inputs.positions, name)[row].numpy() - first] = name
        final[inputs.positions.final[row].numpy() - first] = True
        own = ids[row][first : first + n]
        columns = _empty(n) | {
            "position": np.arange(n, dtype=object),
            "token_id": np.array(own, dtype=object),
            "token": np.array([text_of(token) for token in own], dtype=object),
            "group": group,
            "final": final.astype(object),
        }
        for number, visual in enumerate(images[row]):
            at = slice(visual.start - first, visual.stop - first)
            places = _token_places(inputs.image_grid(visual.index))
            for name, values in _described(places, sample, number, min_overlap).items():
                columns[name][at] = values
            columns["image_token"][at] = np.arange(visual.n_tokens)
        chosen = _chosen(choice, group, final, columns["evidence"])
        tables.append(_table("tokens", sample, {name: values[chosen] for name, values in columns.items()}))
        slots.append(row * width + first + chosen)
    return Rows(pa.concat_tables(tables), torch.from_numpy(np.concatenate(slots)))


def _chosen(
    choice: Sequence[str | int], group: np.ndarray, final: np.ndarray, evidence: np.ndarray
) -> Int[np.ndarray, "row"]:
    n = len(group)
    chosen = np.zeros(n, dtype=bool)
    for part in choice:
        if isinstance(part, int):
            chosen[[part] if -n <= part < n else []] = True
        elif part == "evidence":
            chosen |= np.array([bool(names) for names in evidence])
        else:
            named = {"all": np.ones(n, dtype=bool), "text": group != "image", "final": final}
            chosen |= named[part] if part in named else group == part
    return np.flatnonzero(chosen)


def _patch_rows(inputs: VLMInputs, samples: Sequence[Sample], min_overlap: float | int, cfg: VLMConfig) -> Rows:
    assert cfg.vision is not None
    class_tokens = 0 if cfg.vision.tile_size is None else 1
    lengths = [class_tokens + h * w for t, h, w in inputs.grids for _ in range(t)]
    tables = []
    for row, (sample, visuals) in enumerate(zip(samples, _images_of(inputs), strict=True)):
        for number, visual in enumerate(visuals):
            places = _patch_places(inputs.image_grid(visual.index))
            t, h, w = visual.grid
            columns = _described(places, sample, number, min_overlap)
            columns["patch"] = np.tile(np.arange(class_tokens + h * w), t)
            tables.append(_table("patches", samples[row], columns))
    return Rows(_joined(tables), _padded_slots(lengths))


def _image_token_rows(inputs: VLMInputs, samples: Sequence[Sample], min_overlap: float | int) -> Rows:
    tables = []
    for row, (sample, visuals) in enumerate(zip(samples, _images_of(inputs), strict=True)):
        for number, visual in enumerate(visuals):
            places = _token_places(inputs.image_grid(visual.index))
            columns = _described(places, sample, number, min_overlap)
            columns["image_token"] = np.arange(visual.n_tokens)
            columns["position"] = columns["image_token"] + visual.start - inputs.first[row]
            tables.append(_table("image_tokens", sample, columns))
    lengths = [visual.n_tokens // visual.grid[0] for visual in inputs.in_feature_order for _ in range(visual.grid[0])]
    return Rows(_joined(tables), _padded_slots(lengths))


def _images_of(inputs: VLMInputs) -> list[list[Visual]]:
    """The images of each row, in order."""
    return [[v for v in inputs.in_feature_order if v.row == row] for row in range(len(inputs))]


def _padded_slots(lengths: Sequence[int]) -> Int[Tensor, "row"]:
    width = max(lengths, default=0)
    slots = [at * width + np.arange(n) for at, n in enumerate(lengths)]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *slots]))


def _empty(n: int) -> dict[str, np.ndarray]:
    columns = {name: np.full(n, None, dtype=object) for name in _TYPES}
    columns["evidence"] = _column([[] for _ in range(n)])
    return columns


def _column(lists: list[list[str]]) -> np.ndarray:
    column = np.empty(len(lists), dtype=object)
    for at, names in enumerate(lists):  # numpy would make lists of one length a second axis
        column[at] = names
    return column


def _described(places: _Places, sample: Sample, number: int, min_overlap: float | int) -> dict[str, np.ndarray]:
    """What the index says of the places of one image."""
    n = len(places.number)
    try:
        names = places.evidence([box for box in sample.boxes if box.image == number], min_overlap)
    except GeometryError as error:
        raise GeometryError(f"sample {sample.id!r}: {error}") from error
    x0, y0, x1, y1 = places.boxes.T
    return {
        "image": np.full(n, number),
        "tile": places.tile,
        "thumbnail": places.thumbnail,
        "x0": x0,
        "y0": y0,
        "x1": x1,
        "y1": y1,
        "evidence": _column(names),
    }


def _table(kind: Kind, sample: Sample, columns: Mapping[str, np.ndarray]) -> pa.Table:
    n = len(columns["evidence"])
    given = {**columns, "sample": np.full(n, sample.id, dtype=object), "kind": np.full(n, kind, dtype=object)}
    arrays = [
        pa.array(given[field.name], type=field.type, from_pandas=True)
        if field.name in given
        else pa.nulls(n, field.type)
        for field in SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _joined(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables([SCHEMA.empty_table(), *tables])
