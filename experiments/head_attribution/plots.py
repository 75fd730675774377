"""Figures of the study."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from hooked_vlm.analysis.statistics import Estimate
from hooked_vlm.experiments.common.figures import COLOURS, DIVERGING, SEQUENTIAL, new_figure

Band = tuple[Float[np.ndarray, "x"], Float[np.ndarray, "x"], Float[np.ndarray, "x"]]
"""Mean, lower and upper end of the interval."""
INK, PAPER = "#222222", "#ffffff"


def matrix(
    values: Float[np.ndarray, "row column"],
    rows: Sequence[Any],
    columns: Sequence[Any],
    labels: tuple[str, str, str],
    signed: bool = True,
) -> Figure:
    """Draw a matrix as colours, with the numbers in the cells where they are few.

    `labels` are those of rows, columns and colours. Rows and columns named "" have no tick.
    """
    height, width = values.shape
    figure = new_figure(min(9, 2.6 + 0.5 * width), min(8, 1.5 + 0.42 * height))
    axes = figure.subplots()
    top = max(1e-9, float(np.nanmax(np.abs(values))))
    colours = axes.imshow(
        values, cmap=DIVERGING if signed else SEQUENTIAL, vmin=-top if signed else 0, vmax=top, aspect="auto"
    )
    if values.size <= 64:
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                strong = abs(value) > 0.6 * top if signed else value < 0.6 * top
                colour = PAPER if strong else INK
                axes.text(x, y, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", color=colour, fontsize=9)
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        shown = [i for i, name in enumerate(names) if name != ""]
        shown = shown[:: max(1, len(shown) // 16)]
        axis.set_ticks(shown, [str(names[i]) for i in shown])
    if any(len(str(name)) > 3 for name in columns):
        axes.tick_params(axis="x", rotation=60)
    axes.set(ylabel=labels[0], xlabel=labels[1])
    figure.colorbar(colours, ax=axes, label=labels[2])
    return figure


def predicted(
    panels: Sequence[tuple[str, Float[np.ndarray, "mask"], Float[np.ndarray, "mask"]]], target: str
) -> Figure:
    """Scatter measured against predicted values of held-out masks; panels are (title, predicted, measured)."""
    figure = new_figure(2.9 * len(panels), 3.1)
    for axes, (title, x, y) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        axes.axline((float(y.mean()), float(y.mean())), slope=1, color=COLOURS[-1], linewidth=1)
        axes.plot(x, y, ".", color=COLOURS[0], markersize=6, alpha=0.7)
        axes.set(title=title, xlabel=f"predicted {target}", ylabel=f"measured {target}")
    return figure


def bands(
    x: Shaped[np.ndarray, "x"],
    panels: Mapping[str, Mapping[str, Band]],
    x_label: str,
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """Draw lines with their intervals, one panel per measure, the same lines in each; `levels` are marked."""
    figure = new_figure(4.6 * len(panels) + 1.4, 3.6)
    all_axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        if levels is not None and title in levels:
            axes.axhline(levels[title], color=COLOURS[-1], linewidth=0.8, linestyle=":")
        for index, (name, (mean, low, high)) in enumerate(lines.items()):
            colour = COLOURS[-1] if name == "random" else COLOURS[index % (len(COLOURS) - 1)]
            style = "--" if name == "random" else "-" if index < len(COLOURS) - 1 else "-."
            axes.plot(x, mean, color=colour, linestyle=style, label=name, marker=".", markersize=4)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel=x_label, ylabel=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=np.issubdtype(x.dtype, np.integer)))
    if len(next(iter(panels.values()))) > 1:
        all_axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def over_depth(lines: Mapping[str, tuple[np.ndarray, ...]], y_label: str) -> Figure:
    """Draw (relative depth, mean, low, high) of models with different numbers of layers."""
    figure = new_figure(5.2, 3.6)
    axes = figure.subplots()
    for colour, (name, (x, mean, low, high)) in zip(COLOURS * len(lines), lines.items(), strict=False):
        axes.plot(x, mean, color=colour, label=name, marker=".")
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="relative depth", ylabel=y_label)
    axes.legend(fontsize=8)
    return figure


def bars(groups: Mapping[str, Mapping[str, Estimate]], y_label: str) -> Figure:
    """Draw bars with intervals: one cluster per key, one colour per inner key."""
    kinds = list(dict.fromkeys(kind for own in groups.values() for kind in own))
    figure = new_figure(2.2 + max(0.55, 0.42 * len(kinds)) * len(groups), 4.2)
    axes = figure.subplots()
    width = 0.8 / len(kinds)
    for c, kind in enumerate(kinds):
        own = [(i, group[kind]) for i, group in enumerate(groups.values()) if kind in group]
        x = np.array([i for i, _ in own]) + (c - (len(kinds) - 1) / 2) * width
        values = np.array([e.value for _, e in own])
        spread = np.array([[e.value - e.low for _, e in own], [e.high - e.value for _, e in own]]).clip(0)
        axes.bar(x, values, width=0.92 * width, color=COLOURS[c], label=kind, yerr=spread, capsize=2)
    turned = any(len(name) > 10 for name in groups)
    axes.set_xticks(range(len(groups)), list(groups), rotation=50 if turned else 0, ha="right" if turned else "center")
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(ylabel=y_label)
    if len(kinds) > 1:
        axes.legend(fontsize=8)
    return figure


def scatter(
    x: Float[np.ndarray, "head"], y: Float[np.ndarray, "head"], layers: Int[np.ndarray, "head"], labels: tuple[str, str]
) -> Figure:
    """Scatter one point per head, coloured by layer."""
    figure = new_figure(4.6, 3.6)
    axes = figure.subplots()
    points = axes.scatter(x, y, c=layers, cmap=SEQUENTIAL, s=26, edgecolor=INK, linewidth=0.4)
    axes.axhline(0, color=COLOURS[-1], linewidth=0.8)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    figure.colorbar(points, ax=axes, label="layer", ticks=MaxNLocator(integer=True))
    return figure


def pictures(shown: Sequence[tuple[str, Image.Image, Sequence[tuple[tuple[float, ...], float]]]], label: str) -> Figure:
    """Draw pictures with boxes coloured by a number: (title, picture, [(box, number)])."""
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(2.7 * columns + 0.8, 2.6 * rows)
    top = max(1e-9, max(abs(value) for _, _, boxes in shown for _, value in boxes))
    colours = ScalarMappable(Normalize(-top, top), DIVERGING)
    for i, (title, image, boxes) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(image.convert("L"), cmap="gray", interpolation="nearest")
        painted = np.full((image.height, image.width), np.nan)
        for (x0, y0, x1, y1), value in boxes:
            painted[round(y0) : round(y1), round(x0) : round(x1)] = value
        axes.imshow(painted, cmap=DIVERGING, vmin=-top, vmax=top, alpha=0.6, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.colorbar(colours, ax=figure.axes, label=label, shrink=0.8, alpha=0.6)
    return figure
