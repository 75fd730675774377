"""Figure style and output: one palette, PNG and SVG, the same bytes on every run."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from hooked_vlm.runtime.files import atomic_write

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
"""Colour-blind safe (Okabe and Ito 2008); grey comes last, for controls."""
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"


def new_figure(width: int | float, height: int | float) -> Figure:
    """Figure of `width` x `height` inches with constrained layout."""
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write `path`.png and `path`.svg.

    Raises:
        OutputError: they cannot be written.
    """
    # no timestamps or versions in the files: reruns give the same bytes
    formats: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    with matplotlib.rc_context({"svg.hashsalt": "hooked_vlm", "svg.fonttype": "none"}):
        for suffix, metadata in formats.items():
            atomic_write(
                path.with_suffix(f".{suffix}"),
                lambda aside, s=suffix, m=metadata: figure.savefig(aside, dpi=150, format=s, metadata=m),
            )
