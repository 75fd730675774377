"""Results of a sweep over heads: one table of all rows, one of the samples, and what a report needs of them.

sweep.parquet, sweep.csv   case, run, layer, head, intervention, row, value, baseline, effect, answer: all rows
samples.csv                case, picture, answer, baseline: one row a sample
sweep.json                 settings, model, shard
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from hooked_vlm.data.samples import Sample
from hooked_vlm.errors import InputError
from hooked_vlm.interventions import Head
from hooked_vlm.runtime.files import atomic_write, why

TABLE, CSV, SAMPLES, RECORD = "sweep.parquet", "sweep.csv", "samples.csv", "sweep.json"
SAME = ("settings", "weights", "heads", "means", "dtype", "of_samples")
"""What the records of one sweep's shards have in common."""
ROWS_AT_ONCE = 2**16
"""Rows of a row group."""
SCHEMA = pa.schema(
    [
        *(("case", pa.string()), ("run", pa.int64()), ("layer", pa.int32()), ("head", pa.int32())),
        *(("intervention", pa.string()), ("row", pa.int64())),
        *(("value", pa.float32()), ("baseline", pa.float32()), ("effect", pa.float32()), ("answer", pa.string())),
    ]
)


@dataclass(eq=False)
class Results:
    """What is kept in memory of a sweep: one number for each head and sample."""

    heads: Sequence[Head]
    cases: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    """What tells pictures apart; samples of one picture are no independent observations."""
    baselines: list[float] = field(default_factory=list)
    rows: list[Float[np.ndarray, "head"]] = field(default_factory=list)

    @property
    def effects(self) -> Float[np.ndarray, "sample head"]:
        """Changes of the metric."""
        return np.array(self.rows, dtype=np.float32).reshape(len(self.cases), len(self.heads))

    def add(self, table: pd.DataFrame, picture: str) -> None:
        """Take in the table of one sample."""
        self.cases.append(str(table["case"].iloc[0]))
        self.answers.append(str(table["answer"].iloc[0]))
        self.baselines.append(float(table["baseline"].iloc[0]))
        self.pictures.append(picture)
        self.rows.append(table["effect"].to_numpy(dtype=np.float32))

    def samples(self) -> pd.DataFrame:
        """One row for each sample."""
        columns = {"case": self.cases, "picture": self.pictures, "answer": self.answers, "baseline": self.baselines}
        return pd.DataFrame(columns)


def picture_of(sample: Sample) -> str:
    """What tells the (first) picture of a sample apart: its path, or the digest of its bytes where the data set holds
    them (the names that come with these may be all the same); the sample's own name where it has none."""
    first = next(iter(sample.images), None)
    if isinstance(first, Mapping):
        held = first.get("bytes")
        return hashlib.sha256(held).hexdigest()[:16] if held else str(first.get("path") or sample.id)
    return str(first) if isinstance(first, str | Path) else sample.id


def write_results(
    out: Path, tables: Iterable[pd.DataFrame], heads: Sequence[Head], pictures: Mapping[str, str]
) -> Results:
    """Write the tables of the samples one after the other, and keep what a report needs.

    Args:
        tables: of one sample each, as of `sweep_each`.
        pictures: of every case.

    Raises:
        OutputError: `out` cannot be written.
    """
    results = Results(heads)

    def save(table_aside: Path) -> None:
        def save_csv(csv_aside: Path) -> None:
            with (
                pq.ParquetWriter(table_aside, SCHEMA, write_page_checksum=True) as writer,
                csv_aside.open("w", encoding="utf-8") as file,
            ):
                file.write(",".join(SCHEMA.names) + "\n")
                for group in _groups(_with_heads(table, heads) for table in tables):
                    for table in group:
                        results.add(table, pictures[str(table["case"].iloc[0])])
                    whole = pd.concat(group)
                    writer.write_table(pa.Table.from_pandas(whole, SCHEMA, preserve_index=False))
                    whole.to_csv(file, index=False, header=False)
            (out / RECORD).unlink(missing_ok=True)  # of the tables that are replaced now

        atomic_write(out / CSV, save_csv)

    atomic_write(out / TABLE, save)
    samples = results.samples()
    atomic_write(out / SAMPLES, lambda aside: samples.to_csv(aside, index=False))
    return results


def _groups(tables: Iterable[pd.DataFrame]) -> Iterator[list[pd.DataFrame]]:
    """Tables that are written together."""
    group: list[pd.DataFrame] = []
    for table in tables:
        group.append(table)
        if sum(map(len, group)) >= ROWS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _with_heads(table: pd.DataFrame, heads: Sequence[Head]) -> pd.DataFrame:
    if "layer" in table:
        return table
    layer, head = np.array(heads, dtype=np.int32)[table["run"].to_numpy()].T
    return table.assign(layer=layer, head=head).reindex(columns=SCHEMA.names)


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """Write sweep.json: the results of this folder are complete."""
    text = json.dumps(record, indent=2) + "\n"
    atomic_write(out / RECORD, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_record(folder: Path) -> dict[str, Any]:
    """Read sweep.json.

    Raises:
        InputError: the folder holds no finished sweep, or the file is damaged.
    """
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if not isinstance(found["settings"], dict) or not isinstance(found["shard"], list):
            raise ValueError("it has other fields")
        if missing := [name for name in (*SAME, "samples", "skipped") if name not in found]:
            raise ValueError(f"there is no {missing[0]!r} in it")
        return found
    except FileNotFoundError:
        raise InputError(f"{folder} holds no finished sweep: there is no {RECORD} in it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / RECORD} is damaged ({error}): run the sweep into this folder again") from error


def read_tables(folder: Path) -> Iterator[pd.DataFrame]:
    """The table of each sample of a finished sweep.

    Raises:
        InputError: a damaged file.
    """
    try:
        with pq.ParquetFile(folder / TABLE, page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                whole = file.read_row_group(number).to_pandas()
                yield from (own for _, own in whole.groupby("case", sort=False))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{folder / TABLE} is damaged ({why(error)}): run the sweep into this folder again") from error


def read_pictures(folder: Path) -> dict[str, str]:
    """The picture of each sample of a finished sweep, by the sample's name."""
    try:
        table = pd.read_csv(folder / SAMPLES, dtype=str, keep_default_na=False)
        return dict(zip(table["case"], table["picture"], strict=True))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / SAMPLES} is damaged ({error}): run the sweep into this folder again") from error
