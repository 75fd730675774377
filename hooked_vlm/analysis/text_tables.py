"""Tables for the terminal and for the docs."""

import re
import textwrap
from collections.abc import Sequence

WIDTH = 80
"""Columns of a terminal that what a command prints fits into; names and paths longer than that excepted."""


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns in line, the first `left` of them aligned to the left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def in_width(text: str, width: int = WIDTH) -> str:
    """Wrap longer lines at spaces; what follows stands under the last column (two spaces part columns). A line of two
    words (`page: PATH`) stays whole."""
    lines = text.split("\n")
    return "\n".join(line if len(line) <= width or len(line.split()) < 3 else _wrapped(line, width) for line in lines)


def _wrapped(line: str, width: int) -> str:
    column = max(gap.end() for gap in re.finditer(r"^\s*|\s{2,}(?=\S)", line))
    indent = " " * (column if column <= width // 2 else 4)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def size(n_bytes: float | int) -> str:
    """A number of bytes in decimal units: 4.4 GB."""
    for unit, one in (("GB", 10**9), ("MB", 10**6)):
        if n_bytes >= one:
            return f"{n_bytes / one:,.1f} {unit}"
    return f"{n_bytes / 1000:.1f} kB"
