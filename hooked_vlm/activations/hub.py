"""Streams of activations as ordinary data sets of Hugging Face, and back.

    TOKENS/000000000.parquet   one row a token: the columns of the index, and one of each hook point
    activations.json           the manifest of the stream

Values of a hook point with several axes are flat; the manifest has their shape. bfloat16, which Parquet does not have,
is written as float32, which holds the same numbers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from torch import Tensor

from hooked_vlm.activations.index import COLUMNS, SCHEMA
from hooked_vlm.activations.names import Kind
from hooked_vlm.activations.read import DTYPES, Activations
from hooked_vlm.activations.shards import (
    EXTENT,
    MANIFEST,
    Shard,
    claim,
    damaged,
    open_data,
    read_manifest,
    shard_path,
    write_manifest,
    write_shard,
)
from hooked_vlm.data.hub import bring, copied, send, write_readme
from hooked_vlm.errors import ActivationsError, InputError
from hooked_vlm.runtime.files import writable_folder


def push_activations(activations: Activations, name: str | Path, *, private: bool = True) -> str:
    """Send a finished stream to the hub as a data set (owner/name), or write it to a folder; return where it is.

    Each kind of rows is a configuration: `datasets.load_dataset(name, "tokens")`.

    Raises:
        InputError: the stream is unfinished.
        OutputError: see `hooked_vlm.data.hub.send`.
        ActivationsError: a damaged file.
    """
    if not activations.finished:
        raise InputError(f"{activations.folder} is unfinished: run its stream again first")
    return send(lambda folder: _write(activations, folder), name, private=private)


def load_activations(name: str | Path, folder: str | Path) -> Activations:
    """Bring a stream that `push_activations` sent, and write it to `folder`: the same activations and index.

    Raises:
        InputError: there is no such data set, or it is none of activations.
        ActivationsError: a damaged file.
        OutputError: `folder` cannot be written.
    """
    source = bring(name)
    manifest = read_manifest(source)
    if manifest is None:
        raise InputError(f"{name} is no data set of activations: there is no {MANIFEST} in it")
    made, out = manifest["made"], writable_folder(Path(folder))
    claim(out, made)
    kinds = sorted({own["rows"] for own in made["names"].values()})
    for path in sorted((source / kinds[0]).glob("*.parquet")):
        tables = {kind: _read(source / kind / path.name) for kind in kinds}
        extent = json.loads((tables[kinds[0]].schema.metadata or {}).get(EXTENT, b"{}"))
        try:
            shard = Shard(shard_path(out, manifest["key"], extent["start"]), **extent)
        except (KeyError, TypeError) as error:
            raise ActivationsError(f"{path} is damaged: it does not say which samples it holds") from error
        pieces = {
            name: [_values(tables[own["rows"]], name, own["shape"], DTYPES[made["written_as"]])]
            for name, own in made["names"].items()
            if name in tables[own["rows"]].column_names
        }
        write_shard(shard, pieces, [_index(tables[kind], cast(Kind, kind)) for kind in kinds])
    totals = {name: value for name, value in manifest.items() if name not in ("format", "key", "finished", "made")}
    write_manifest(out, made, totals)
    found = Activations(out)
    if found.n_samples != manifest["samples"]:
        raise ActivationsError(f"{name} is incomplete: {found.n_samples} of {manifest['samples']} samples are there")
    return found


def _write(activations: Activations, folder: Path) -> None:
    names = activations.manifest["made"]["names"]
    kinds: list[Kind] = sorted({own["rows"] for own in names.values()})
    for shard in activations.shards:
        for kind in kinds:
            of_kind = [name for name, own in names.items() if own["rows"] == kind]
            path = folder / kind / f"{shard.start:09d}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(_table(shard, kind, of_kind), path)
    copied(activations.folder / MANIFEST, folder / MANIFEST)
    made = activations.manifest["made"]
    hooks = "\n".join(f"- `{name}`: one of the {own['rows']}, shape {own['shape']}" for name, own in names.items())
    text = f"Made with hooked_vlm {made['versions']['hooked-vlm']} of {made['model']}.\n\n{hooks}"
    files = {kind: f"{kind}/*.parquet" for kind in kinds}
    write_readme(folder, f"Activations of {activations.n_samples} samples", text, files)


def _table(shard: Shard, kind: Kind, names: Sequence[str]) -> pa.Table:
    """The rows of one kind of a shard: index and values."""
    try:
        table = pq.read_table(shard.index, columns=COLUMNS[kind], filters=[("kind", "=", kind)])
        extent = (pq.read_schema(shard.index).metadata or {})[EXTENT]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise damaged(shard.index, error) from error
    try:
        with open_data(shard.data) as file:
            there = set(file.keys())
            for name in names:
                if name in there:
                    table = table.append_column(name, _column(file.get_tensor(name)))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise damaged(shard.data, error) from error
    return table.replace_schema_metadata({EXTENT: extent})


def _column(values: Tensor) -> pa.Array:
    flat = values.flatten(1).to(torch.float32 if values.dtype == torch.bfloat16 else values.dtype)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.flatten().numpy()), flat.shape[1])


def _values(table: pa.Table, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    column = table[name].combine_chunks()
    flat: Any = column.flatten().to_numpy(zero_copy_only=False)
    if len(flat) != len(table) * int(np.prod(shape)):
        raise ActivationsError(f"the column {name} is damaged: it does not hold {list(shape)} numbers in each row")
    return torch.from_numpy(np.array(flat)).view(len(table), *shape).to(dtype)


def _index(table: pa.Table, kind: Kind) -> pa.Table:
    """The rows of a shard's index."""
    own = {field.name: table[field.name] for field in SCHEMA if field.name in table.column_names}
    missing = {field.name: pa.nulls(len(table), field.type) for field in SCHEMA if field.name not in own}
    columns = own | missing | {"kind": pa.array([kind] * len(table), pa.string())}
    return pa.table({field.name: columns[field.name] for field in SCHEMA}).cast(SCHEMA)


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ActivationsError(f"{path} is damaged or missing ({' '.join(str(error).split())})") from error
