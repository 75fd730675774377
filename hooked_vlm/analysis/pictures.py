"""Figures of results: heatmaps, and values of image tokens laid over the picture.

They return matplotlib figures (`figure.savefig("page.png")`) that a notebook shows.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.images import load_image

SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
WRITTEN = 80
"""Heatmaps of at most this number of cells show their values as text."""


class Picture(Figure):
    """A figure that a notebook shows by itself: matplotlib's own needs pyplot to be imported for that."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def heatmap(
    values: Float[np.ndarray, "row col"],
    rows: Sequence[Any],
    columns: Sequence[Any],
    names: tuple[str, str],
    label: str,
    title: str = "",
) -> Picture:
    """Draw values as colours; zero is the middle of the scale if any value is negative."""
    n_rows, n_columns = values.shape
    figure = Picture(figsize=(min(14, 2.8 + 0.5 * n_columns), min(12, 1.7 + 0.38 * n_rows)), layout="constrained")
    axes = figure.subplots()
    norm, colours = _scale(values)
    image = axes.imshow(values, norm=norm, cmap=colours, aspect="auto")
    if values.size <= WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                ink = "#ffffff" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "#222222"
                shown = f"{round(float(value), 2) + 0.0:.2f}"  # no negative zero
                axes.text(column, row, shown, ha="center", va="center", color=ink, fontsize=8)
    axes.set(xlabel=names[1], ylabel=names[0], title=title)
    _ticks(axes.set_xticks, columns, 24)
    _ticks(axes.set_yticks, rows, 24)
    if any(isinstance(c, str) for c in columns):
        axes.tick_params(axis="x", labelrotation=30)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def overlay(
    picture: Any,
    panels: Float[np.ndarray | Tensor, "*maps"] | Sequence[Float[np.ndarray | Tensor, "row col"]],
    titles: Sequence[str] = (),
    label: str = "",
    columns: int = 5,
) -> Picture:
    """Draw each panel of values over the picture, stretched to its size. NaN is transparent.

        overlay(page.image, cache.on_image(2, 1))  # head 2.1, over the page
        overlay(page.image, [cache.on_image(2, 1), cache.on_image(2, 0)], ["head 2.1", "head 2.0"])

    Args:
        picture: the original image, as for `model.to_inputs`.
        panels: values as returned by `inputs.on_image` or `cache.on_image`: one map, or several in one array or in a
            sequence of maps.
        titles: one for each map; by default their numbers, where there are several.
        label: name of the values.
        columns: largest number of maps side by side.

    Raises:
        InputError: values that are no maps, or another number of titles.
    """
    shown = load_image(picture)
    values = _array(panels)
    if values.ndim not in (2, 3):
        raise InputError(f"overlay draws maps [row, col] or [map, row, col], got values of shape {values.shape}")
    panels = values.reshape(-1, *values.shape[-2:])
    if not titles:
        titles = [""] if len(panels) == 1 else [str(i) for i in range(len(panels))]
    if len(titles) != len(panels):
        raise InputError(f"overlay needs a title for each of {len(panels)} maps, got {len(titles)}")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width, height = shown.size
    figure = Picture(figsize=(3.2 * columns + 0.9, (3.2 * height / width + 0.4) * rows), layout="constrained")
    norm, colours = _scale(panels)
    largest = max(abs(norm.vmin or 0.0), abs(norm.vmax or 0.0))
    image = None
    for i, (own, title) in enumerate(zip(panels, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(shown.convert("L"), cmap="gray", vmin=0, vmax=255)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        alpha = np.nan_to_num(np.clip(np.abs(own) / largest, 0, 1)) * 0.75
        image = axes.imshow(own, norm=norm, cmap=colours, extent=extent, alpha=alpha, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    if image is not None:
        bar: Any = figure.colorbar(image, ax=figure.axes, label=label, shrink=0.8)
        bar.solids.set_alpha(1)
    return figure


def _array(panels: Any) -> Float[np.ndarray, "*maps"]:
    if isinstance(panels, Tensor):
        return panels.detach().cpu().float().numpy()
    if isinstance(panels, np.ndarray):
        return panels
    maps = [_array(own) for own in panels]
    if shapes := {own.shape for own in maps} - {maps[0].shape} if maps else {()}:
        raise InputError(f"overlay draws maps of one shape, got {maps[0].shape if maps else 'none'} and {min(shapes)}")
    return np.stack(maps)


def _scale(values: Float[np.ndarray, "..."]) -> tuple[Normalize, str]:
    finite = values[np.isfinite(values)]
    largest = max(float(np.abs(finite).max(initial=0.0)), 1e-9)
    if (finite < 0).any():
        return TwoSlopeNorm(0.0, -largest, largest), DIVERGING
    return Normalize(0.0, largest), SEQUENTIAL


def _ticks(set_ticks: Any, labels: Sequence[Any], most: int) -> None:
    step = max(1, -(-len(labels) // most))
    set_ticks(range(0, len(labels), step), [str(label) for label in labels[::step]])
