"""Samples that could not be used: a list beside the results, and a warning."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from warnings import warn

import pandas as pd

from hooked_vlm.runtime.files import atomic_write

SKIPPED_FILE = "skipped.csv"


def report_skipped(folder: Path, skipped: Mapping[str, str], stacklevel: int) -> None:
    """Write which samples were skipped (name: reason) to `skipped.csv`, and warn; remove the list if there are none.

    Raises:
        OutputError: it cannot be written.
    """
    path = folder / SKIPPED_FILE
    path.unlink(missing_ok=True)
    if not skipped:
        return
    table = pd.DataFrame(skipped.items(), columns=["sample", "reason"])
    atomic_write(path, lambda aside: table.to_csv(aside, index=False))
    name, reason = next(iter(skipped.items()))
    which = "1 sample was" if len(skipped) == 1 else f"{len(skipped)} samples were"
    warn(f"{which} skipped, the first {name!r} ({reason}): all are in {path}", stacklevel=stacklevel + 1)


def join_skipped(folders: Iterable[Path], out: Path) -> None:
    """Write the lists of some folders to another, one after the other.

    Raises:
        OutputError: it cannot be written.
    """
    lists = [
        pd.read_csv(path, dtype=str, keep_default_na=False)
        for folder in folders
        if (path := folder / SKIPPED_FILE).exists()
    ]
    (out / SKIPPED_FILE).unlink(missing_ok=True)
    if lists:
        table = pd.concat(lists)
        atomic_write(out / SKIPPED_FILE, lambda aside: table.to_csv(aside, index=False))
