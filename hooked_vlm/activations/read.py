"""Stored activations, read row by row without loading more than the requested rows.

acts = Activations("out/activations")
rows = acts.index.query("group == 'image'").index
x = acts["blocks.3.hook_resid_post"][rows]
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset

from hooked_vlm.activations.index import COLUMNS
from hooked_vlm.activations.names import Kind
from hooked_vlm.activations.shards import Shard, damaged, open_data, read_manifest, read_shard
from hooked_vlm.errors import ActivationsError, InputError
from hooked_vlm.nn.hooks import nearest_names

_NULLABLE = {pa.int32(): pd.Int32Dtype(), pa.bool_(): pd.BooleanDtype()}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Activations:
    """A folder that `stream_activations` wrote or is writing: the shards that were complete when it was opened.

    Raises:
        ActivationsError: it is no such folder, or one of its files is damaged (which is named).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise ActivationsError(f"{self.folder} holds no activations: there is no activations.json in it")
        self.manifest = manifest
        """`activations.json`: under "made" the model, its weights' hash, settings and versions."""
        self.shards = tuple(_shards(self.folder, manifest["key"]))

    @property
    def names(self) -> list[str]:
        """The hook points, including those without rows."""
        return list(self.manifest["made"]["names"])

    @property
    def finished(self) -> bool:
        """Whether all samples were written."""
        return self.manifest["finished"]

    @property
    def n_samples(self) -> int:
        return sum(shard.n_samples for shard in self.shards)

    @property
    def skipped(self) -> dict[str, str]:
        """Samples that could not be used, with the reason."""
        return {id: reason for shard in self.shards for id, reason in shard.skipped.values()}

    @property
    def n_rows(self) -> dict[Kind, int]:
        """Number of rows of each kind."""
        return {kind: sum(shard.rows.get(kind, 0) for shard in self.shards) for kind in COLUMNS}

    @property
    def index(self) -> pd.DataFrame:
        """The index of the language model's activations: one row for each token, numbered as theirs are."""
        return self.table("tokens")

    def table(self, kind: Kind, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The index of one kind of rows ("tokens", "patches", "image_tokens"), or some columns of it.

        Raises:
            ActivationsError: a damaged file.
        """
        chosen = list(COLUMNS[kind] if columns is None else columns)
        parts = []
        for shard in self.shards:
            try:
                table = pq.read_table(shard.index, columns=chosen, filters=[("kind", "=", kind)])
            except (pa.ArrowException, OSError) as error:
                raise damaged(shard.index, error) from error
            if len(table) != shard.rows.get(kind, 0):
                raise damaged(shard.index, f"it has {len(table)} rows of {kind}, not {shard.rows.get(kind, 0)}")
            parts.append(table)
        if not parts:
            return pd.DataFrame(columns=chosen)
        return pa.concat_tables(parts).to_pandas(types_mapper=_NULLABLE.get)

    def __getitem__(self, name: str) -> "Rows":
        if name not in self.names:
            raise KeyError(f"{name!r} was not kept.{nearest_names(name, self.names)}")
        return Rows(self, name)

    def summary(self) -> dict[str, Any]:
        """Totals of the stream, for `activations.json`."""
        return {"samples": self.n_samples, "shards": len(self.shards), "rows": self.n_rows}

    def __repr__(self) -> str:
        state = "" if self.finished else ", unfinished"
        return f"Activations({str(self.folder)!r}, {self.n_samples} samples, {len(self.names)} names{state})"


class Batch(NamedTuple):
    """Some rows of an activation."""

    rows: Int[np.ndarray, "row"]
    values: Float[Tensor, "row *rest"]


class Rows(Dataset):
    """The rows of one activation, read on access: by number, numbers, slice or mask.

    It is a `torch.utils.data.Dataset`; for a `DataLoader` of single rows `batches` is the quicker way.
    """

    def __init__(self, activations: Activations, name: str) -> None:
        self.activations, self.name = activations, name
        self.kind: Kind = activations.manifest["made"]["names"][name]["rows"]
        counts = [shard.rows.get(self.kind, 0) for shard in activations.shards]
        self._stops = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.activations.manifest["made"]["written_as"]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (rows, ...) of all rows together."""
        return (len(self), *self.activations.manifest["made"]["names"][self.name]["shape"])

    @property
    def index(self) -> pd.DataFrame:
        """The kind of rows."""
        return self.activations.table(self.kind)

    def __getitem__(self, rows: Any) -> Float[Tensor, "..."]:
        """Some rows as one tensor, in the requested order; an int gives one without the row axis.

        Args:
            rows: a number, a slice, numbers in any order, or a boolean mask over all rows (arrays, tensors, lists,
                the pandas index of a filtered `index`).

        Raises:
            InputError: rows that do not exist.
            ActivationsError: a damaged file.
        """
        numbers = self._numbers(rows)
        out = torch.empty((len(numbers), *self.shape[1:]), dtype=self.dtype)
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        shard_of = np.searchsorted(self._stops, ordered, side="right")
        for number in np.unique(shard_of):
            here = shard_of == number
            start = self._stops[number - 1] if number else 0
            self._read(self.activations.shards[number], ordered[here] - start, out, order[here])
        return out[0] if isinstance(rows, int | np.integer) else out

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        return list(self[np.array(rows)])

    def batches(
        self,
        size: int,
        *,
        rows: Any = slice(None),
        seed: int | None = None,
    ) -> Iterator[Batch]:
        """Batch after batch of at most `size` rows, in order, or with a seed in an order drawn from all of them."""
        numbers = self._numbers(rows)
        if seed is not None:
            numbers = np.random.default_rng(seed).permutation(numbers)
        for start in range(0, len(numbers), size):
            own = numbers[start : start + size]
            yield Batch(own, self[own])

    def __repr__(self) -> str:
        return f"Rows({self.name!r}, shape {self.shape}, {self.dtype})"

    def _numbers(self, rows: Any) -> Int[np.ndarray, "row"]:
        n = len(self)
        if isinstance(rows, slice):
            return np.arange(n)[rows]
        asked = np.atleast_1d(np.asarray(rows.numpy() if isinstance(rows, Tensor) else rows))
        if not asked.size:
            return np.zeros(0, dtype=np.int64)
        if asked.dtype == bool and asked.shape == (n,):
            return np.flatnonzero(asked)
        if asked.ndim != 1 or asked.dtype.kind not in "iu":
            raise InputError(
                f"rows are asked for by number, slice or a mask of all {n}; got {asked.dtype} of shape {asked.shape}"
            )
        numbers = np.where(asked < 0, asked + n, asked).astype(np.int64)
        if (wrong := (numbers < 0) | (numbers >= n)).any():
            raise InputError(f"there is no row {asked[wrong][0]}: {self.name} has {n}, counted from 0")
        return numbers

    def _read(
        self, shard: Shard, rows: Int[np.ndarray, "row"], out: Float[Tensor, "all *rest"], to: Int[np.ndarray, "row"]
    ) -> None:
        """Copy increasing rows of a shard into `out`, run by run."""
        source = _slice_of(shard, self.name)
        starts = np.flatnonzero(np.diff(rows, prepend=-2) > 1)
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            first = int(rows[start])
            try:
                values = source[first : int(rows[stop - 1]) + 1]
            except (SafetensorError, OSError, RuntimeError) as error:
                raise damaged(shard.data, error) from error
            out[to[start:stop]] = values[rows[start:stop] - first]


def _shards(folder: Path, key: str) -> Iterator[Shard]:
    """The shards from the first sample on, as far as they follow each other."""
    start = 0
    for path in sorted((folder / "shards").glob("[0-9]*.parquet")):
        shard = read_shard(path.with_suffix(""))
        if (shard.key, shard.start) != (key, start):
            raise damaged(path, f"the shard before it ends at sample {start}")
        start = shard.stop
        yield shard


def _slice_of(shard: Shard, name: str) -> Any:
    try:
        stat = shard.data.stat()
        return _opened(shard.data, stat.st_size, stat.st_mtime_ns).get_slice(name)
    except (SafetensorError, OSError) as error:
        raise damaged(shard.data, error) from error


@lru_cache(maxsize=64)
def _opened(path: Path, size: int, changed: int) -> Any:
    """A shard's tensors, opened once; `size` and `changed` detect a replaced file."""
    return open_data(path)
