"""Figures of the study."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from hooked_vlm.analysis.statistics import Estimate
from hooked_vlm.experiments.common.figures import (
    COLOURS,
    DIVERGING,
    DOUBLE,
    INK,
    SEQUENTIAL,
    SINGLE,
    line_styles,
    new_figure,
    styled,
)
from hooked_vlm.experiments.common.plots import (
    ROW,
    draw_picture,
    heatmap,
    label_ends,
    legend_below,
    number,
    values_beside,
)

__all__ = ["Band", "bands", "bars", "heatmap", "over_depth", "pictures", "predicted", "scatter"]

Band = tuple[Float[np.ndarray, "x"], Float[np.ndarray, "x"], Float[np.ndarray, "x"]]
"""Mean, lower and upper end of the interval."""
MANY = 1000
"""Points beyond this number are drawn as an image in vector formats."""


@styled
def predicted(
    panels: Sequence[tuple[str, Float[np.ndarray, "mask"], Float[np.ndarray, "mask"]]], target: str
) -> Figure:
    """Scatter measured against predicted values of held-out masks; panels are (title, predicted, measured)."""
    figure = new_figure(DOUBLE if len(panels) > 2 else SINGLE, 2.1)
    for axes, (title, x, y) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.axline((float(y.mean()), float(y.mean())), slope=1, color=COLOURS[-1], linewidth=1)
        axes.plot(x, y, ".", color=COLOURS[0], markersize=4, alpha=0.7, rasterized=len(x) > MANY)
        axes.set(title=title, xlabel=f"predicted {target}")
    figure.axes[0].set_ylabel(f"measured {target}")
    return figure


@styled
def bands(
    x: Shaped[np.ndarray, "x"],
    panels: Mapping[str, Mapping[str, Band]],
    x_label: str,
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """Draw lines with their intervals, one panel per measure, the same lines in each; `levels` are marked."""
    named = len(next(iter(panels.values()))) > 1
    figure = new_figure(DOUBLE if len(panels) > 1 else SINGLE, 2.9 if named else 2.2)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        if levels is not None and title in levels:
            axes.axhline(levels[title], color=COLOURS[-1], linewidth=0.8, linestyle=":")
        for (name, (mean, low, high)), style in zip(lines.items(), line_styles(list(lines)).values(), strict=True):
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
            axes.plot(x, mean, label=name, marker=".", markersize=3, **style)
        axes.set(xlabel=x_label, ylabel=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=np.issubdtype(x.dtype, np.integer)))
    if named:
        legend_below(figure, all_axes[0])
    return figure


@styled
def over_depth(lines: Mapping[str, tuple[np.ndarray, ...]], y_label: str) -> Figure:
    """Draw (relative depth, mean, low, high) of models with different numbers of layers."""
    figure = new_figure(DOUBLE, 2.6)
    axes = figure.subplots()
    styles = line_styles(list(lines))
    for name, (x, mean, low, high) in lines.items():
        axes.fill_between(x, low, high, color=styles[name]["color"], alpha=0.12, linewidth=0)
        axes.plot(x, mean, marker=".", markersize=3, **styles[name])
    axes.set(xlabel="relative depth (0: first layer, 1: last)", ylabel=y_label)
    label_ends(axes, [(float(mean[-1]), name, styles[name]["color"]) for name, (_, mean, _, _) in lines.items()])
    return figure


@styled
def bars(groups: Mapping[str, Mapping[str, Estimate]], label: str) -> Figure:
    """Draw bars with intervals and their numbers: one cluster per key, one colour per inner key."""
    kinds = list(dict.fromkeys(kind for own in groups.values() for kind in own))
    n_bars = sum(map(len, groups.values()))
    named = len(kinds) > 1
    figure = new_figure(DOUBLE, 0.6 + 0.3 * named + 0.75 * ROW * n_bars + 0.25 * ROW * len(groups))
    axes = figure.subplots()
    width = 0.8 / len(kinds)
    for c, kind in enumerate(kinds):
        own = [(i, group[kind]) for i, group in enumerate(groups.values()) if kind in group]
        y = np.array([i for i, _ in own]) + (c - (len(kinds) - 1) / 2) * width
        values = np.array([e.value for _, e in own])
        spread = np.array([[e.value - e.low for _, e in own], [e.high - e.value for _, e in own]]).clip(0)
        bar = {"height": 0.92 * width, "capsize": 1.5, "error_kw": {"linewidth": 0.8}}
        axes.barh(y, values, color=COLOURS[c % len(COLOURS)], label=kind, xerr=spread, **bar)
        values_beside(axes, y.tolist(), [number(value) for value in values])
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.axvline(0, color=INK, linewidth=0.6)
    axes.set(xlabel=label)
    if named:
        legend_below(figure, axes)
    return figure


@styled
def scatter(
    x: Float[np.ndarray, "head"], y: Float[np.ndarray, "head"], layers: Int[np.ndarray, "head"], labels: tuple[str, str]
) -> Figure:
    """Scatter one point per head, coloured by layer."""
    figure = new_figure(SINGLE, 2.6)
    axes = figure.subplots()
    points = axes.scatter(x, y, c=layers, cmap=SEQUENTIAL, s=18, edgecolor=INK, linewidth=0.4)
    axes.axhline(0, color=COLOURS[-1], linewidth=0.8)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    figure.colorbar(points, ax=axes, label="layer", ticks=MaxNLocator(integer=True))
    return figure


@styled
def pictures(shown: Sequence[tuple[str, Image.Image, Sequence[tuple[tuple[float, ...], float]]]], label: str) -> Figure:
    """Draw pictures with boxes coloured by a number: (title, picture, [(box, number)])."""
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    width = (DOUBLE - 0.8) / 4
    tallest = max(image.height / image.width for _, image, _ in shown)
    figure = new_figure(DOUBLE if columns == 4 else 0.8 + width * columns, rows * (0.25 + width * min(tallest, 1.5)))
    top = max(1e-9, max(abs(value) for _, _, boxes in shown for _, value in boxes))
    colours = ScalarMappable(Normalize(-top, top), DIVERGING)
    for i, (title, image, boxes) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, i + 1)
        draw_picture(axes, image.convert("L"), cmap="gray")
        painted = np.full((image.height, image.width), np.nan)
        for (x0, y0, x1, y1), value in boxes:
            painted[max(0, round(y0)) : max(0, round(y1)), max(0, round(x0)) : max(0, round(x1))] = value
        axes.imshow(painted, cmap=DIVERGING, vmin=-top, vmax=top, alpha=0.6, interpolation="none")
        axes.set_title(title)
    figure.colorbar(colours, ax=figure.axes, label=label, shrink=0.8, alpha=0.6)
    return figure
