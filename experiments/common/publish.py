"""Tables of a finished run as an ordinary data set of Hugging Face, and back."""

import json
from pathlib import Path

import pandas as pd

from hooked_vlm.data.hub import bring, copied, send, write_readme
from hooked_vlm.errors import InputError

RECORD, ROWS = "run.json", "sweep.parquet"


def push_tables(folder: str | Path, name: str | Path, *, private: bool = True) -> str:
    """Send the tables of a run (scores of heads, ...) to the hub as a data set (owner/name), or write it to a folder;
    return where it is.

    Each table is a configuration: `datasets.load_dataset(name, "scores")`. The rows of a sweep are one, too ("rows").

    Raises:
        InputError: the folder holds no finished run.
        OutputError: see `hooked_vlm.data.hub.send`.
    """
    folder = Path(folder)
    tables = {path.stem: path for path in sorted((folder / "tables").glob("*.parquet"))}
    if not tables or not (folder / RECORD).is_file():
        raise InputError(f"{folder} holds no finished run: there is no {RECORD} with tables beside it")
    if (folder / ROWS).is_file():
        tables["rows"] = folder / ROWS

    def write(to: Path) -> None:
        for table, path in tables.items():
            copied(path, to / "tables" / f"{table}.parquet")
        copied(folder / RECORD, to / RECORD)
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        text = f"Made with hooked_vlm of {record.get('model', 'a model')}; run.json has settings and versions."
        write_readme(to, f"Results of {folder.name}", text, {own: f"tables/{own}.parquet" for own in tables})

    return send(write, name, private=private)


def load_tables(name: str | Path) -> dict[str, pd.DataFrame]:
    """The tables of a data set that `push_tables` sent, or of the folder of a run, by name.

    Raises:
        InputError: there is no such data set, or it holds no tables.
    """
    folder = bring(name)
    paths = sorted((folder / "tables").glob("*.parquet"))
    if not paths:
        raise InputError(f"{name} holds no tables of a run")
    try:
        return {path.stem: pd.read_parquet(path) for path in paths}
    except Exception as error:  # readers of damaged files raise any error
        raise InputError(f"a table of {name} is damaged ({error})") from error
