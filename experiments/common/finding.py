"""What an experiment reports: sentences to quote, lines for the terminal, figures and tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Finding:
    """Result of an experiment: a section of the report, and lines for the terminal."""

    heading: str
    lines: list[str]
    """For the terminal; the page shows them only where the finding has no table."""
    paragraphs: list[str] = field(default_factory=list)
    figures: Mapping[str, tuple[Figure, str]] = field(default_factory=dict)
    """Name -> (figure, caption)."""
    tables: Mapping[str, tuple[pd.DataFrame, str, int | None]] = field(default_factory=dict)
    """Name -> (all rows, caption, number of rows shown)."""
    answer: list[str] = field(default_factory=list)
    """Sentences a reader can quote: which heads, how strong, with interval, against what, on how many samples."""
