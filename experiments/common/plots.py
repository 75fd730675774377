"""Drawing that both studies share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from hooked_vlm.experiments.common.figures import (
    COLOURS,
    DIVERGING,
    DOUBLE,
    ON_DARK,
    ON_LIGHT,
    SEQUENTIAL,
    SINGLE,
    new_figure,
    styled,
)

WRITTEN = 64
"""Heatmaps of at most this number of cells show their values as text."""
ROW, FLAT = 0.24, 0.165
"""Height of a row of a heatmap or of a bar, in inches; of a row without numbers in it."""
FINEST = 560
"""Largest side of a picture in a figure, in pixels."""
LINE = 0.15
"""Least distance of two tick labels, in inches."""


@styled
def heatmap(
    values: Float[np.ndarray, "row column"],
    rows: Sequence[Any],
    columns: Sequence[Any],
    labels: tuple[str, str, str],
    limits: tuple[int | float, int | float] | None = None,
    framed: Bool[np.ndarray, "row column"] | None = None,
) -> Figure:
    """Draw a matrix as colours, with the numbers in the cells where they are few.

    Args:
        labels: those of rows, columns and colours.
        limits: ends of the colour scale, (0, 1) for scores; by default symmetric about 0. A value outside takes the
            colour of the end, and the colour bar ends in a point.
        rows, columns: names; those named "" have no tick.
        framed: cells with a frame.
    """
    height, width = values.shape
    wide = width > 6 or max((len(str(name)) for name in rows), default=0) > 6
    figure = new_figure(DOUBLE if wide else SINGLE, 0.9 + (ROW if values.size <= WRITTEN else FLAT) * height)
    axes = figure.subplots()
    largest = max(1e-9, float(np.nanmax(np.abs(values), initial=0)))
    low, high = limits or (-largest, largest)
    colours = DIVERGING if low < 0 else SEQUENTIAL
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none")
    for row, column in np.argwhere(framed) if framed is not None else ():
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=1.8, zorder=3)
        axes.add_patch(frame)
    if values.size <= WRITTEN:
        _numbers(axes, image, values)
    _ticks(axes.yaxis, rows, figure.get_figheight() - 0.9)
    upright = any(len(str(name)) > 3 for name in columns)
    _ticks(axes.xaxis, columns, figure.get_figwidth() - 1.8, LINE if upright else 2 * LINE)
    if upright:
        axes.tick_params(axis="x", rotation=90)
    axes.set(ylabel=labels[0], xlabel=labels[1])
    axes.spines[:].set_visible(False)
    below, above = (values < low - 1e-9).any(), (values > high + 1e-9).any()
    ends = "both" if below and above else "min" if below else "max" if above else "neither"
    bar = figure.colorbar(image, ax=axes, label=labels[2], extend=ends, pad=0.02, fraction=0.06, aspect=22)
    bar.outline.set_visible(False)  # pyright: ignore
    return figure


def _numbers(axes: Axes, image: ScalarMappable, values: Float[np.ndarray, "row column"]) -> None:
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            red, green, blue, _ = image.to_rgba(value)
            ink = ON_DARK if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else ON_LIGHT
            axes.text(column, row, number(value), ha="center", va="center", color=ink)


def number(value: float) -> str:
    """A number with two decimals, no negative zero, and a dash for NaN."""
    return "–" if np.isnan(value) else f"{round(float(value), 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")


def draw_picture(axes: Axes, picture: Image.Image, **options: Any) -> None:
    """Draw a picture without axes, in coordinates of its own pixels, no finer than print needs."""
    width, height = picture.size
    fine = picture.copy()
    fine.thumbnail((FINEST, FINEST))
    axes.imshow(fine, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="none", **options)
    axes.set_axis_off()


def _ticks(axis: Any, names: Sequence[Any], inches: int | float, least: float = LINE) -> None:
    """Name rows or columns, as many as there is room for."""
    shown = [i for i, name in enumerate(names) if name != ""]
    step = max(1, int(np.ceil(least * len(names) / inches)))
    shown = shown[::step] if len(shown) == len(names) else shown
    axis.set_ticks(shown, [str(names[i]) for i in shown])


def legend_below(figure: Figure, axes: Axes, title: str = "") -> None:
    """Put the legend of `axes` under the figure, outside its panels, in rows of equal length."""
    handles, names = axes.get_legend_handles_labels()
    longest = max(map(len, names), default=0)
    fitting = max(1, int(figure.get_figwidth() / (0.55 + 0.062 * longest)))
    columns = -(-len(names) // -(-max(1, len(names)) // fitting))
    figure.legend(handles, names, loc="outside lower center", ncols=max(1, columns), title=title or None)


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name lines right of the panel at the height of their ends (height, name, colour), moved apart where too near."""
    low, high = axes.get_ylim()
    box = axes.get_position()
    least = (high - low) * LINE / (axes.get_figure().get_figheight() * box.height)  # pyright: ignore
    ordered = sorted(ends)
    heights = [height for height, _, _ in ordered]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + least)
    excess = heights[-1] - max(high, ordered[-1][0]) if heights else 0
    for height, (_, name, colour) in zip(heights, ordered, strict=True):
        axes.annotate(
            name, (1.02, height - max(0, excess)), xycoords=("axes fraction", "data"), va="center", color=colour,
            annotation_clip=False,
        )  # fmt: skip


def values_beside(axes: Axes, heights: Sequence[int | float], texts: Sequence[str]) -> None:
    """Write numbers right of the panel, at the height of their bars."""
    for height, text in zip(heights, texts, strict=True):
        axes.annotate(
            text, (1.0, height), xytext=(3, 0), textcoords="offset points", xycoords=("axes fraction", "data"),
            va="center", annotation_clip=False,
        )  # fmt: skip
