"""Joining streams that were written in parts: one folder, with the samples in their order."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from hooked_vlm.activations.read import Activations
from hooked_vlm.activations.shards import (
    Shard,
    claim,
    clear_leftovers,
    damaged,
    open_data,
    read_shard,
    shard_path,
    write_manifest,
    write_shard,
)
from hooked_vlm.data.skipped import join_skipped
from hooked_vlm.errors import ActivationsError, InputError
from hooked_vlm.runtime.files import writable_folder
from hooked_vlm.runtime.progress import Progress


def join_activations(folders: Iterable[str | Path], out: str | Path, *, progress: bool = False) -> Activations:
    """Copy the shards of finished streams, which together are one data set, into one folder. Repeat an interrupted
    call to go on.

    The rows are those of a stream over the whole data set, in the same order; only their division into shards differs.
    Streams of `Samples.shard` know which samples they hold and are put in order; others are joined as they are given.

    Raises:
        InputError: streams of other settings, unfinished ones, samples that are missing, come twice or share a name.
        ActivationsError: a damaged file.
        OutputError: `out` cannot be written.
    """
    parts = [Activations(folder) for folder in folders]
    if not parts:
        raise InputError("there are no folders to join")
    for part in parts:
        _check_fits(part, parts[0])
    ordered, extent = _in_order(parts)
    _check_ids(ordered)
    made, key, out = parts[0].manifest["made"], parts[0].manifest["key"], writable_folder(Path(out))
    claim(out, made)
    clear_leftovers(out)
    shards = [shard for part in ordered for shard in part.shards]
    start = 0
    with Progress("joining", "shard", len(shards), quiet=not progress) as bar:
        for shard in shards:
            moved = replace(shard, path=shard_path(out, key, start), start=start)
            if _is_there(moved):
                bar.found()
            else:
                _copy(shard, moved, parts[0].names)
                bar.update()
            start = moved.stop
    join_skipped([part.folder for part in ordered], out)
    skipped = sum(part.manifest.get("skipped", 0) for part in ordered)
    write_manifest(out, made, Activations(out).summary() | {"skipped": skipped} | extent)
    return Activations(out)


def _check_fits(part: Activations, first: Activations) -> None:
    if not part.finished:
        raise InputError(f"{part.folder} is unfinished: run its stream again before it is joined")
    own, others = part.manifest["made"], first.manifest["made"]
    if changed := sorted(name for name in {*own, *others} if own.get(name) != others.get(name)):
        raise InputError(f"{part.folder} was made with another {' and '.join(changed)} than {first.folder}")


def _in_order(parts: Sequence[Activations]) -> tuple[list[Activations], dict[str, Any]]:
    """The streams in the order of their samples, and the range of samples that they are together, if they know it."""
    if any("range" not in part.manifest for part in parts):
        return list(parts), {}
    ordered = sorted(parts, key=lambda part: part.manifest["range"])
    for one, other in pairwise(ordered):
        (_, stop), (start, _) = one.manifest["range"], other.manifest["range"]
        if start > stop:
            raise InputError(f"samples {stop} to {start - 1} are missing, between {one.folder} and {other.folder}")
        if start < stop:
            raise InputError(f"{one.folder} and {other.folder} both hold sample {start}")
    extent = [ordered[0].manifest["range"][0], ordered[-1].manifest["range"][1]]
    return ordered, {"range": extent, "divided": parts[0].manifest.get("divided", [])}


def check_complete(folders: Iterable[str | Path]) -> None:
    """Refuse shards that together are not all samples that were divided, as far as they know.

    Raises:
        InputError: shards of different divisions, a first or a last one that is missing.
        ActivationsError: a damaged file.
    """
    ordered, extent = _in_order([Activations(folder) for folder in folders])
    whole = extent.get("divided")
    for part in ordered if whole else ():
        if part.manifest.get("divided") != whole:
            raise InputError(f"{part.folder} and {ordered[0].folder} are shards of different numbers of samples")
    if not whole:
        return
    (start, stop), (first, last) = extent["range"], whole
    if missing := [f"{a} to {b - 1}" for a, b in ((first, start), (stop, last)) if a < b]:
        raise InputError(f"samples {' and '.join(missing)} are missing: name the folders of all shards")


def _check_ids(parts: Sequence[Activations]) -> None:
    """Refuse samples of one name, whose rows the index could not tell apart."""
    seen: dict[str, Path] = {}
    for part in parts:
        own: set[str] = set()
        for shard in part.shards:
            own.update(_read_index(shard, ["sample"])["sample"].unique().to_pylist())
        if twice := sorted(own & seen.keys()):
            raise InputError(f"{seen[twice[0]]} and {part.folder} both have a sample named {twice[0]!r}")
        seen |= dict.fromkeys(own, part.folder)


def _read_index(shard: Shard, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(shard.index, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise damaged(shard.index, error) from error


def _is_there(shard: Shard) -> bool:
    try:
        return read_shard(shard.path) == shard
    except (FileNotFoundError, ActivationsError):
        return False


def _copy(shard: Shard, moved: Shard, names: Sequence[str]) -> None:
    try:
        with open_data(shard.data) as file:
            pieces = {name: [file.get_tensor(name)] for name in file.keys() if name in names}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise damaged(shard.data, error) from error
    write_shard(moved, pieces, [_read_index(shard)])
