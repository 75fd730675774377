"""An atlas on disk: `atlas.json`, `observations.parquet` and `heads.csv`."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hooked_vlm.errors import InputError
from hooked_vlm.runtime.files import atomic_write

RECORD, OBSERVATIONS, HEADS = "atlas.json", "observations.parquet", "heads.csv"
Parts = dict[str, tuple[tuple[str, ...], np.ndarray, np.ndarray]]
"""Names of the stimuli, values and nulls [stimulus, layer, head], by score."""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atlas(
    folder: Path, model: str, settings: dict[str, Any], observed: Mapping[str, Any], table: pd.DataFrame
) -> None:
    """Write the files of an atlas, the record last.

    Raises:
        OutputError: the folder cannot be written.
    """
    shapes = {name: list(own.values.shape[1:]) for name, own in observed.items()}
    stimuli = {name: list(own.stimuli) for name, own in observed.items()}
    rows = [
        pd.DataFrame(
            {
                "score": name,
                "stimulus": np.repeat(np.array(own.stimuli, dtype=object), own.values[0].size),
                "value": own.values.ravel().astype(np.float32),
                "null": own.nulls.ravel().astype(np.float32),
            }
        )
        for name, own in observed.items()
    ]
    whole = pa.Table.from_pandas(pd.concat(rows), preserve_index=False)
    atomic_write(folder / OBSERVATIONS, lambda aside: pq.write_table(whole, aside, write_page_checksum=True))
    atomic_write(folder / HEADS, lambda aside: table.to_csv(aside, index=False, lineterminator="\n"))
    record = {"model": model, "settings": settings, "shapes": shapes, "stimuli": stimuli}
    record["observations"] = _digest(folder / OBSERVATIONS)
    atomic_write(folder / RECORD, lambda aside: aside.write_text(json.dumps(record, indent=1), encoding="utf-8"))


def read_atlas(folder: Path) -> tuple[str, dict[str, Any], Parts]:
    """Model, settings and observations of an atlas.

    Raises:
        InputError: no atlas is there, or it is damaged.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no atlas in {folder}: expected {RECORD}, which `hooked-vlm atlas` writes") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / RECORD} cannot be read: {error}") from error
    try:
        if record["observations"] != _digest(folder / OBSERVATIONS):
            raise ValueError(f"{OBSERVATIONS} is of another run than {RECORD}")
        rows = pq.read_table(folder / OBSERVATIONS, page_checksum_verification=True).to_pandas()
        parts: Parts = {}
        for name, own in rows.groupby("score", sort=False):
            shape = (len(record["stimuli"][name]), *record["shapes"][name])
            values, nulls = (own[column].to_numpy(dtype=float).reshape(shape) for column in ("value", "null"))
            parts[str(name)] = tuple(record["stimuli"][name]), values, nulls
        return str(record["model"]), dict(record["settings"]), parts
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the atlas in {folder} is damaged: {error}; make it again with `hooked-vlm atlas`") from error
