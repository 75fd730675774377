"""Results kept as they are made: a folder of Parquet parts, one for each unit of work.

    parts = ResultStore(out / "parts" / "scores")
    for image in images:
        table = parts.get_or_make({**settings, "image": image.id}, lambda: score(image))

A part's name is made from its key, which holds everything that decides its content. So work that was interrupted
goes on where it stopped and ends with the same table, changed settings never meet old results, and the same unit
done twice, even by two processes at once, is one part.
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
    """A folder of tables, found again by their keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the part of a key is kept."""
        return self.folder / f"{hashlib.sha256(_canonical(key)).hexdigest()[:24]}.parquet"

    def get(self, key: Mapping[str, Any]) -> pd.DataFrame | None:
        """A part that is there whole, or None."""
        path = self.path(key)
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            stated = table.schema.metadata or {}
            if stated.get(_KEY) != _canonical(key) or stated.get(_FORM) != _form(table):
                return None
            return table.to_pandas()
        except Exception:  # not there, not ours, or damaged since, which readers answer with any error: made again
            return None

    def put(self, key: Mapping[str, Any], frame: pd.DataFrame) -> None:
        """Keep a part; nobody ever reads half of one.

        Raises:
            OutputError: it cannot be written.
        """
        table = pa.Table.from_pandas(frame, preserve_index=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: _canonical(key)})
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _FORM: _form(table)})
        atomic_write(self.path(key), lambda aside: pq.write_table(table, aside, write_page_checksum=True))

    def get_or_make(self, key: Mapping[str, Any], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The part of a key, made and kept if it is not there."""
        found = self.get(key)
        if found is not None:
            return found
        self.put(key, make())
        made = self.get(key)
        assert made is not None
        return made  # as read back, so that a first run and a resumed one see the same

    def missing(self, keys: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The keys whose parts are yet to be made."""
        return [key for key in keys if self.get(key) is None]


def _form(table: pa.Table) -> bytes:
    """Stands for rows, names, types and metadata, about which the checksums of pages say nothing."""
    metadata = sorted((name, text) for name, text in (table.schema.metadata or {}).items() if name != _FORM)
    said = f"{table.num_rows} {table.column_names} {[_type(field.type) for field in table.schema]} {metadata}"
    return hashlib.sha256(said.encode()).hexdigest().encode()


def _type(of: pa.DataType) -> str:
    """The same before and after Parquet, which has its own types in a dictionary and its own word for items."""
    return "dictionary" if pa.types.is_dictionary(of) else str(of).replace("<element:", "<item:")


def _canonical(key: Mapping[str, Any]) -> bytes:
    return json.dumps(key, sort_keys=True, separators=(",", ":")).encode()
