"""Tables read row by row, with the types that pandas leaves open."""

from collections.abc import Iterator
from typing import Any

import pandas as pd


def each_row(frame: pd.DataFrame) -> Iterator[Any]:
    """The rows as named tuples, whose fields are the columns that are words: `row.low`."""
    return iter(frame.itertuples(index=False))
