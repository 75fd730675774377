"""A folder of stored activations: its manifest and its shards.

    activations.json                   model, weights, settings, versions: written first
    shards/000000000-<key>.safetensors activations, one tensor [row, ...] for each hook point
    shards/000000000-<key>.parquet     their index, written last: a shard without it does not exist

The number is that of the shard's first sample; the key stands for the settings and that number.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_vlm.errors import ActivationsError, InputError, OutputError
from hooked_vlm.runtime.files import atomic_write
from hooked_vlm.runtime.progress import FILE as PROGRESS
from hooked_vlm.runtime.store import canonical

MANIFEST = "activations.json"
FORMAT = 1
EXTENT = b"hooked_vlm.shard"


@dataclass(frozen=True)
class Shard:
    """Consecutive samples whose activations lie in one pair of files."""

    path: Path
    """Path of both files, without suffix."""
    key: str
    start: int
    """Number of its first sample."""
    n_samples: int
    """Samples with activations."""
    samples: str
    """Digest of its samples."""
    rows: Mapping[str, int]
    """Number of rows of each kind."""
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Samples among them that could not be used, by their place from `start` on: id and reason."""

    @property
    def stop(self) -> int:
        """Number of the first sample of the next shard."""
        return self.start + self.n_samples + len(self.skipped)

    @property
    def data(self) -> Path:
        return self.path.with_suffix(".safetensors")

    @property
    def index(self) -> Path:
        return self.path.with_suffix(".parquet")


def shard_path(folder: Path, key: str, start: int) -> Path:
    """Path of the shard that begins with this sample, without suffix."""
    name = hashlib.sha256(f"{key} {start}".encode()).hexdigest()[:16]
    return folder / "shards" / f"{start:09d}-{name}"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """`activations.json`, or None where there is none.

    Raises:
        ActivationsError: it is damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ActivationsError(f"{path} has format {manifest['format']!r}, this version reads {FORMAT}")
        if manifest["key"] != key_of(manifest["made"]):
            raise ActivationsError(f"{path} was changed by hand: its key is not that of its contents")
        return manifest
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise ActivationsError(f"{folder} is a file; expected a folder of activations") from error
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, ActivationsError):
            raise
        raise ActivationsError(
            f"{path} is damaged ({type(error).__name__}: {error}): stream into a new folder"
        ) from error


def write_manifest(folder: Path, made: Mapping[str, Any], result: Mapping[str, Any] | None) -> None:
    """Write `activations.json`; `result` holds the totals of a finished stream."""
    manifest = {"format": FORMAT, "key": key_of(made), "finished": result is not None, "made": made}
    text = json.dumps({**manifest, **(result or {})}, indent=2) + "\n"
    atomic_write(folder / MANIFEST, lambda aside: aside.write_text(text, encoding="utf-8"))


def key_of(made: Mapping[str, Any]) -> str:
    """Hash of everything that decides the activations except the samples."""
    return hashlib.sha256(canonical(made).encode()).hexdigest()[:16]


def write_shard(shard: Shard, pieces: dict[str, list[Tensor]], tables: Sequence[pa.Table]) -> None:
    """Write a shard, its index last. `pieces` (name: the rows of its batches) is emptied on the way.

    Raises:
        OutputError: it cannot be written; it does not exist then.
    """
    # one name at a time, so that rows are held twice for one name only
    tensors = {name: torch.cat(pieces.pop(name)) for name in sorted(pieces)}

    def save(aside: Path) -> None:
        aside.touch()
        mode = aside.stat().st_mode  # safetensors would let nobody else read the file
        try:
            save_file(tensors, aside, metadata={"shard": canonical(_extent(shard))})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        aside.chmod(mode)

    atomic_write(shard.data, save)
    table = pa.concat_tables(tables)
    table = table.replace_schema_metadata({EXTENT: canonical(_extent(shard)).encode()})
    atomic_write(shard.index, lambda aside: pq.write_table(table, aside))


def _extent(shard: Shard) -> dict[str, Any]:
    left_out = {"path"} if shard.skipped else {"path", "skipped"}
    return {name: value for name, value in asdict(shard).items() if name not in left_out}


def read_shard(path: Path) -> Shard:
    """A shard by its path without suffix, if the headers of both files are intact.

    Raises:
        ActivationsError: the file that is damaged.
        FileNotFoundError: there is no such shard.
    """
    index, data = path.with_suffix(".parquet"), path.with_suffix(".safetensors")
    try:
        found = json.loads((pq.read_schema(index).metadata or {})[EXTENT])
        shard = Shard(path, **found)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(index, error) from error
    with open_data(data) as file:
        if json.loads((file.metadata() or {}).get("shard", "null")) != found:
            raise damaged(data, f"it does not belong to {index.name}")
    return shard


def open_data(path: Path) -> Any:
    """The tensors of a shard, opened but not read. Raises `ActivationsError`."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: object) -> ActivationsError:
    said = " ".join(str(error).split())
    return ActivationsError(
        f"{path} is damaged or missing ({said}): delete it and run the same stream into this folder again"
    )


def clear_leftovers(folder: Path) -> None:
    """Remove temporary files of a writer that was killed (safetensors writes files of its own there).

    Raises:
        OutputError: it cannot be removed.
    """
    try:
        for left in [*folder.glob(f".{MANIFEST}.*.part"), *folder.glob("..writable.*.part"), *folder.glob("shards/.*")]:
            left.unlink()
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error


def claim(folder: Path, made: Mapping[str, Any]) -> None:
    """Create the folder of these activations, or check that it holds them already.

    Raises:
        InputError: it holds others, or other files.
        ActivationsError: its `activations.json` is damaged.
        OutputError: it cannot be written.
    """
    there = read_manifest(folder)
    if there is None and any(not path.name.startswith(".") and path.name != PROGRESS for path in folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no {MANIFEST}: choose a new folder for activations")
    if there is not None and there["key"] != key_of(made):
        changed = sorted(name for name in {*made, *there["made"]} if made.get(name) != there["made"].get(name))
        raise InputError(
            f"{folder} holds activations that were made with another {' and '.join(changed)}: choose another folder"
        )
    write_manifest(folder, made, None)
