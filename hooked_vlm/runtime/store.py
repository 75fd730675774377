"""Store of results: a folder of Parquet files, one for each task, written as it is computed.

    store = ResultStore(out / "parts" / "scores")
    for image in images:
        table = store.get_or_make({**settings, "image": image.id}, lambda: score(image))

A file is named by the hash of its key, which holds everything that decides its content. So interrupted work resumes
where it stopped and ends with the same table, changed settings never read old results, and a task executed twice, even
by two processes at once, is one file.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hooked_vlm.runtime.files import atomic_write

_KEY, _FORM = b"hooked_vlm.key", b"hooked_vlm.form"


class ResultStore:
    """A folder of tables, looked up by keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: Mapping[str, Any]) -> Path:
        """The file of a key."""
        return self.folder / f"{hashlib.sha256(canonical(key).encode()).hexdigest()[:24]}.parquet"

    def get(self, key: Mapping[str, Any]) -> pd.DataFrame | None:
        """The table of a key, or None if it is missing or damaged."""
        path = self.path(key)
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            stated = table.schema.metadata or {}
            if stated.get(_KEY) != canonical(key).encode() or stated.get(_FORM) != _form(table):
                return None
            return table.to_pandas()
        except Exception:  # missing, foreign or damaged, for which readers raise any error: recomputed
            return None

    def put(self, key: Mapping[str, Any], frame: pd.DataFrame) -> None:
        """Store a table atomically.

        Raises:
            OutputError: it cannot be written.
        """
        table = pa.Table.from_pandas(frame, preserve_index=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: canonical(key).encode()})
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _FORM: _form(table)})
        atomic_write(self.path(key), lambda aside: pq.write_table(table, aside, write_page_checksum=True))

    def get_or_make(self, key: Mapping[str, Any], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table of a key, computed and stored if it is missing."""
        stored = self.get(key)
        if stored is not None:
            return stored
        self.put(key, make())
        stored = self.get(key)
        assert stored is not None
        return stored  # as read back, so that a first run and a resumed one see the same

    def changed(self, key: Mapping[str, Any]) -> list[str]:
        """What of the model has changed since a table was stored that is missing under this key.

        Names of the entries of `key["model"]` that differ where nothing else does; empty if there is no such table.
        """
        own = json.loads(canonical(key))
        model = own.pop("model", None) or {}
        for path in sorted(self.folder.glob("*.parquet")) if model else []:
            other = _stored_key(path)
            before = other.pop("model", None)
            if other == own and isinstance(before, dict):
                return sorted(name for name in {*model, *before} if model.get(name) != before.get(name))
        return []

    def missing(self, keys: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The keys without a table."""
        return [key for key in keys if self.get(key) is None]


def _stored_key(path: Path) -> dict[str, Any]:
    """The key that a file was stored under; empty if it is damaged or foreign."""
    try:
        metadata: dict[bytes, bytes] = pq.read_schema(path).metadata or {}
        return dict(json.loads(metadata[_KEY]))
    except Exception:  # readers of damaged files raise any error
        return {}


def _form(table: pa.Table) -> bytes:
    """Hash of rows, names, types and metadata, which the checksums of pages do not cover."""
    metadata = sorted((name, text) for name, text in (table.schema.metadata or {}).items() if name != _FORM)
    text = f"{table.num_rows} {table.column_names} {[_type(field.type) for field in table.schema]} {metadata}"
    return hashlib.sha256(text.encode()).hexdigest().encode()


def _type(of: pa.DataType) -> str:
    """A type's name that is the same before and after Parquet, which changes dictionaries and names of list items."""
    return "dictionary" if pa.types.is_dictionary(of) else str(of).replace("<element:", "<item:")


def canonical(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
