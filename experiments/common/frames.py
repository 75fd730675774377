"""Typed row-wise access to pandas tables."""

from collections.abc import Iterator
from typing import Any

import pandas as pd


def each_row(frame: pd.DataFrame) -> Iterator[Any]:
    """Iterate over rows as named tuples: `row.low` is the column "low"."""
    return iter(frame.itertuples(index=False))
