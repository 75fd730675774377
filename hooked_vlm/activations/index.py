"""The index of stored activations: for every row, which token or patch of which sample it belongs to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.activations.names import Kind
from hooked_vlm.activations.places import Places, patch_places, token_places
from hooked_vlm.config import VLMConfig
from hooked_vlm.data.samples import Sample
from hooked_vlm.errors import GeometryError, InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs

FEATURES = "hook_image_features"
GROUPS = ("image", "question", "assistant_header", "generated")
"""The groups of `inputs.positions` that share no token; "final" has a column of its own."""
NAMED = ("all", "text", *GROUPS, "final", "evidence")
TokenChoice = str | int | Sequence[str | int]
"""Selection of tokens: "all", a group of `inputs.positions`, "text" (all but images), "evidence" (in a named box),
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
SCHEMA = pa.schema([("kind", pa.string()), *_TYPES.items()])
_LACKING: dict[Kind, set[str]] = {
    "tokens": {"patch"},
    "patches": {"position", "token_id", "token", "group", "final", "image_token"},
    "image_tokens": {"token_id", "token", "group", "final", "patch"},
}
COLUMNS: dict[Kind, list[str]] = {
    kind: [name for name in _TYPES if name not in lacking] for kind, lacking in _LACKING.items()
}


def checked_choice(tokens: TokenChoice) -> list[str | int]:
    """`tokens` as a list.

    Raises:
        InputError: a group that does not exist.
    """
    given = [tokens] if isinstance(tokens, str | int) else list(tokens)
    parts = [part for one in given for part in ([p.strip() for p in one.split("+")] if isinstance(one, str) else [one])]
    unknown = [part for part in parts if isinstance(part, str) and part not in NAMED]
    if unknown or not parts:
        got = repr(unknown[0]) if unknown else "nothing"
        raise InputError(f"tokens are chosen by position or as one of {', '.join(NAMED)}; got {got}")
    return parts


@dataclass(frozen=True, eq=False)
class Indexer:
    """Builds the index of samples, one by one."""

    cfg: VLMConfig
    kinds: tuple[Kind, ...]
    choice: tuple[str | int, ...]
    """Tokens of the language model to keep; all patches and image tokens of images are kept."""
    min_overlap: float | int
    """A token or patch lies in a named box if more than this share of the box lies in it."""
    text_of: Callable[[int], str]
    """The text of a token id."""

    def tables(self, sample: Sample, inputs: VLMInputs) -> dict[Kind, pa.Table]:
        """The rows of a sample in every kind of activations; `inputs` hold this sample only.

        Raises:
            GeometryError: a box that does not lie in its image.
        """
        makers = {"tokens": self._tokens, "patches": self._patches, "image_tokens": self._image_tokens}
        return {kind: makers[kind](sample, inputs) for kind in self.kinds}

    def slots(self, kind: Kind, tables: Sequence[pa.Table], batch: VLMInputs) -> Int[Tensor, "row"]:
        """Indices of the rows of a batch's samples in a hook point's tensor with its first two axes flattened."""
        if kind == "tokens":
            at = [
                row * batch.shape[1] + batch.first[row] + table["position"].to_numpy()
                for row, table in enumerate(tables)
            ]
        else:
            merged = 1 if kind == "patches" else batch.spec.token_size**2
            extra = _class_tokens(self.cfg) if kind == "patches" else 0
            lengths = [extra + h * w // merged for t, h, w in batch.grids for _ in range(t)]
            at = [image * max(lengths) + np.arange(n) for image, n in enumerate(lengths)]
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *at]))

    def _tokens(self, sample: Sample, inputs: VLMInputs) -> pa.Table:
        ids, n = inputs.tokens[0].tolist(), inputs.shape[1]
        group, final = np.full(n, "other", dtype=object), np.zeros(n, dtype=bool)
        for name in GROUPS:
            group[getattr(inputs.positions, name)[0].numpy()] = name
        final[inputs.positions.final[0].numpy()] = True
        columns = {name: np.full(n, None, dtype=object) for name in _TYPES}
        columns |= {"position": np.arange(n), "token_id": np.array(ids), "group": group, "final": final}
        columns["token"] = np.array([self.text_of(token) for token in ids], dtype=object)
        columns["evidence"] = _column([[] for _ in range(n)])
        for visual in inputs.visuals:
            described = self._described(token_places(visual.layout), sample, visual.index)
            for name, values in described.items():
                columns[name][visual.positions] = values
            columns["image_token"][visual.positions] = np.arange(visual.n_tokens)
        chosen = self._chosen(group, final, columns["evidence"])
        return _table("tokens", sample, {name: values[chosen] for name, values in columns.items()})

    def _chosen(self, group: np.ndarray, final: np.ndarray, evidence: np.ndarray) -> Int[np.ndarray, "row"]:
        n = len(group)
        chosen = np.zeros(n, dtype=bool)
        for part in self.choice:
            if isinstance(part, int):
                chosen[[part] if -n <= part < n else []] = True
            elif part == "evidence":
                chosen |= np.array([bool(names) for names in evidence])
            else:
                named = {"all": np.ones(n, dtype=bool), "text": group != "image", "final": final}
                chosen |= named.get(part, group == part)
        return np.flatnonzero(chosen)

    def _patches(self, sample: Sample, inputs: VLMInputs) -> pa.Table:
        tables = []
        for visual in inputs.visuals:
            t, h, w = visual.grid
            places = patch_places(visual.layout, _class_tokens(self.cfg))
            columns = self._described(places, sample, visual.index)
            columns["patch"] = np.tile(np.arange(_class_tokens(self.cfg) + h * w), t)
            tables.append(_table("patches", sample, columns))
        return pa.concat_tables([SCHEMA.empty_table(), *tables])

    def _image_tokens(self, sample: Sample, inputs: VLMInputs) -> pa.Table:
        tables = []
        for visual in inputs.visuals:
            columns = self._described(token_places(visual.layout), sample, visual.index)
            columns["image_token"] = np.arange(visual.n_tokens)
            columns["position"] = visual.positions.numpy()
            tables.append(_table("image_tokens", sample, columns))
        return pa.concat_tables([SCHEMA.empty_table(), *tables])

    def _described(self, places: Places, sample: Sample, image: int) -> dict[str, np.ndarray]:
        """Index columns of the tokens or patches of one image."""
        try:
            names = places.evidence([box for box in sample.boxes if box.image == image], self.min_overlap)
        except GeometryError as error:
            raise GeometryError(f"sample {sample.id!r}: {error}") from error
        return {
            "image": np.full(len(names), image),
            "tile": places.tile,
            "thumbnail": places.thumbnail,
            **dict(zip(("x0", "y0", "x1", "y1"), places.boxes.T, strict=True)),
            "evidence": _column(names),
        }


def take_rows(name: str, tensor: Float[Tensor, "..."], slots: Int[Tensor, "row"]) -> Float[Tensor, "row *rest"]:
    """The rows of a hook point's tensor; a copy."""
    if name == FEATURES:  # all images in a row already
        return tensor.clone()
    return tensor.flatten(0, 1).index_select(0, slots.to(tensor.device))


def _class_tokens(cfg: VLMConfig) -> int:
    """Before the patches of every tile."""
    return int(cfg.vision is not None and cfg.vision.class_token)


def _column(lists: list[list[str]]) -> np.ndarray:
    column = np.empty(len(lists), dtype=object)
    for at, names in enumerate(lists):  # numpy would make lists of one length a second axis
        column[at] = names
    return column


def _table(kind: Kind, sample: Sample, columns: Mapping[str, np.ndarray]) -> pa.Table:
    n = len(columns["evidence"])
    given = {**columns, "sample": np.full(n, sample.id, dtype=object), "kind": np.full(n, kind, dtype=object)}
    arrays = {name: pa.array(values, SCHEMA.field(name).type, from_pandas=True) for name, values in given.items()}
    missing = {field.name: pa.nulls(n, field.type) for field in SCHEMA if field.name not in arrays}
    return pa.Table.from_pydict({**arrays, **missing}, schema=SCHEMA)
