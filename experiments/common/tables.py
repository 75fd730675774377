"""Tables of a report: how their columns are shown, and the files they are written to."""

import base64
import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image

from hooked_vlm.runtime.files import atomic_write

CHECKED: dict[str, Any] = {"write_page_checksum": True}
"""Checksums, because `compare` reads the tables again: a flipped bit must raise, not change a number."""
RAW = 10
"""A table that shows at most this many of its rows is raw data: it is folded away at the end of the page."""
MISSING = "–"
THUMBNAIL = 96
"""Largest side of a picture in a table, in pixels."""
PLAIN, LARGEST = 64 * 1024, 1024 * 1024
"""Bytes up to which a table lies in the page as CSV, and up to which as gzip-compressed CSV."""
DIGITS, MOST_DECIMALS = 3, 6
_P_VALUE = re.compile(r"(^|[ _])p([ _(]|$)")


@dataclass(frozen=True)
class Cell:
    """Displayed text, and the value that rows are sorted by."""

    shown: str
    key: str


@dataclass(frozen=True)
class Column:
    """A column as it is shown: numbers are aligned to the right, pictures (`shown` is their URL) are not sorted."""

    name: str
    kind: Literal["number", "text", "picture"]
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Table:
    """All rows of a table, and how many of them the page shows (None: all)."""

    name: str
    frame: pd.DataFrame
    caption: str
    limit: int | None = None

    @property
    def visible(self) -> pd.DataFrame:
        return self.frame if self.limit is None else self.frame.head(self.limit)

    @property
    def is_raw(self) -> bool:
        return self.limit is not None and self.limit <= RAW and self.limit < len(self.frame)

    @property
    def more(self) -> str:
        """Note on the rows that are not shown."""
        if not len(self.visible):
            return f" ({len(self.frame):,} rows)"
        return f" ({len(self.visible):,} of {len(self.frame):,} rows)" if len(self.visible) < len(self.frame) else ""

    @cached_property
    def columns(self) -> list[Column]:
        return _columns(self.visible)

    @property
    def rows(self) -> list[tuple[tuple[Column, Cell], ...]]:
        return [
            tuple(zip(self.columns, row, strict=True)) for row in zip(*(c.cells for c in self.columns), strict=True)
        ]

    @cached_property
    def data(self) -> pd.DataFrame:
        """What files hold: every column that is no picture."""
        pictures = [is_picture(self.frame.iloc[:, i]) for i in range(self.frame.shape[1])]
        return self.frame.loc[:, ~np.array(pictures, dtype=bool)]

    @cached_property
    def csv(self) -> bytes:
        return self.data.to_csv(index=False, lineterminator="\n").encode()

    @property
    def download(self) -> tuple[str, str] | None:
        """Name and URL of a file of all rows inside the page; None if it is too large for a page."""
        content = self.csv
        if len(content) <= PLAIN:
            return f"{self.name}.csv", data_url(content, "text/csv")
        packed = gzip.compress(content, mtime=0)
        return (f"{self.name}.csv.gz", data_url(packed, "application/gzip")) if len(packed) <= LARGEST else None

    def write(self, folder: Path) -> list[Path]:
        """Write `name`.parquet and `name`.csv.

        Raises:
            OutputError: they cannot be written.
        """
        parquet, csv = (folder / f"{self.name}.{suffix}" for suffix in ("parquet", "csv"))
        atomic_write(parquet, lambda aside: self.data.to_parquet(aside, index=False, **CHECKED))
        atomic_write(csv, lambda aside: aside.write_bytes(self.csv))
        return [parquet, csv]


def data_url(content: bytes, kind: str) -> str:
    """URL that holds its content."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def is_picture(values: pd.Series) -> bool:
    """Whether a column holds pictures (PIL images or arrays [height, width] or [height, width, channel])."""
    return any(isinstance(v, Image.Image) or (isinstance(v, np.ndarray) and v.ndim in (2, 3)) for v in values)


def decimals(values: np.ndarray) -> int:
    """Decimals that all numbers of a column are shown with.

    None for whole numbers; as few as show every number exactly, if these are few; otherwise three digits of the
    largest number, and three decimals of shares (numbers up to 1).
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0
    for n in range(DIGITS):
        if np.allclose(finite, finite.round(n), rtol=0, atol=1e-9):
            return n
    largest = float(np.abs(finite).max())
    if largest > 1:
        return max(0, DIGITS - 1 - int(np.floor(np.log10(largest))))
    return min(MOST_DECIMALS, max(DIGITS, DIGITS - 1 - int(np.floor(np.log10(largest)))))


def _columns(frame: pd.DataFrame) -> list[Column]:
    """Columns as they are shown; a number and the ends of its interval, which follow it, have the same decimals."""
    numbers = [_numbers(frame.iloc[:, i]) for i in range(frame.shape[1])]
    places = [0 if values is None else decimals(values) for values in numbers]
    names = [str(name) for name in frame.columns]
    for i in range(len(names) - 2):
        if names[i + 1].endswith("low") and names[i + 2].endswith("high"):
            places[i : i + 3] = [max(places[i : i + 3])] * 3
    return [_column(name, frame.iloc[:, i], numbers[i], places[i]) for i, name in enumerate(names)]


def _column(name: str, values: pd.Series, numbers: np.ndarray | None, places: int) -> Column:
    if numbers is not None:
        show = _p_value if _P_VALUE.search(name) else lambda x: _signed(f"{round(x, places) + 0.0:,.{places}f}")
        return Column(name, "number", [Cell(MISSING if np.isnan(x) else show(x), repr(float(x))) for x in numbers])
    if is_picture(values):
        return Column(name, "picture", [Cell(_thumbnail(value), "") for value in values])
    return Column(name, "text", [_text(value) for value in values])


def _numbers(values: pd.Series) -> np.ndarray | None:
    """A column as floats, NaN where there is none; None if it holds anything but numbers."""
    present = [value for value in values if not _is_missing(value)]
    kinds = (int, float, np.integer, np.floating)
    if not present or not all(isinstance(v, kinds) and not isinstance(v, bool) for v in present):
        return None
    return np.array([np.nan if _is_missing(value) else float(value) for value in values])


def _text(value: Any) -> Cell:
    if _is_missing(value):
        return Cell(MISSING, "")
    if isinstance(value, bool | np.bool_):
        return Cell("yes" if value else "no", str(int(value)))
    return Cell(str(value), str(value))


def _signed(number: str) -> str:
    return number.replace("-", "−")


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def _p_value(p: float) -> str:
    return "<0.001" if 0 <= p < 0.0005 else f"{p:.3f}"


def _thumbnail(value: Any) -> str:
    """URL of a small PNG; "" where there is no picture."""
    if isinstance(value, np.ndarray):
        pixels = value if value.dtype == np.uint8 else (np.clip(value, 0, 1) * 255).round().astype(np.uint8)
        value = Image.fromarray(pixels)
    if not isinstance(value, Image.Image):
        return ""
    small = value.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = BytesIO()
    small.save(buffer, format="PNG")
    return data_url(buffer.getvalue(), "image/png")
