"""Figures of the study."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from hooked_vlm.experiments.common import plots
from hooked_vlm.experiments.common.figures import (
    COLOURS,
    DOUBLE,
    INK,
    SEQUENTIAL,
    SINGLE,
    line_styles,
    new_figure,
    styled,
)
from hooked_vlm.experiments.common.plots import ROW, draw_picture, legend_below, number, values_beside
from hooked_vlm.experiments.ocr_heads.examples import Box, Example
from hooked_vlm.experiments.ocr_heads.scoring import Scores

EVIDENCE, LOOKS = COLOURS[0], COLOURS[1]
SCORE = (0.0, 1.0)
"""Ends of the colour scale of scores, the same in every figure."""
SMALLEST = 0.05
"""Changes smaller than this look like none: the axis reaches at least so far."""


def heatmap(scores: Float[np.ndarray, "layer head"], selected: Bool[np.ndarray, "layer head"], label: str) -> Figure:
    """Draw the score of every head, selected heads framed."""
    n_layers, n_heads = scores.shape
    return plots.heatmap(scores, range(n_layers), range(n_heads), ("layer", "head", label), SCORE, selected)


def grid(values: Float[np.ndarray, "row column"], rows: Sequence[str], columns: Sequence[str], label: str) -> Figure:
    """Draw the scores of heads (columns) for each character (rows)."""
    return plots.heatmap(values, rows, columns, ("character", "head", label), SCORE)


@styled
def sample_pages(examples: Sequence[Example], looks: Sequence[Sequence[Box]], titles: Sequence[str]) -> Figure:
    """Draw pages with the evidence boxes and the boxes of the tokens the top head attends to."""
    columns = min(3, len(examples))
    rows = -(-len(examples) // columns)
    pages = [e.images[e.evidence[0].image] for e in examples]
    pictures = [page if isinstance(page, Image.Image) else Image.open(page) for page in pages]
    tallest = max(picture.height / picture.width for picture in pictures)
    width = DOUBLE / 3
    figure = new_figure(max(SINGLE, width * columns), rows * (0.5 + width * min(tallest, 1.4)) + 0.3)
    for i, (example, picture, boxes, title) in enumerate(zip(examples, pictures, looks, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        draw_picture(axes, picture)
        for evidence in example.evidence:
            if evidence.image == example.evidence[0].image:
                _frame(axes, evidence.box, EVIDENCE, "-")
        for box in boxes:
            _frame(axes, box, LOOKS, "--")
        lines = [line for text in title.splitlines() for line in textwrap.wrap(text, 38)]
        axes.set_title("\n".join(lines[:3]))
    keys = [
        Patch(fill=False, edgecolor=EVIDENCE, label="characters of the answer"),
        Patch(fill=False, edgecolor=LOOKS, linestyle="--", label="most attended tokens of the top head"),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(2, columns))
    return figure


@styled
def shares(table: pd.DataFrame) -> Figure:
    """Draw the share of heads per score range, one bar for each set of heads (a `sparsity_table`)."""
    sets, ranges = list(dict.fromkeys(table["heads"])), list(dict.fromkeys(table["score range"]))
    figure = new_figure(DOUBLE, 1.0 + ROW * len(sets))
    axes = figure.subplots()
    left = np.zeros(len(sets))
    for i, interval in enumerate(ranges):
        part = table[table["score range"] == interval].set_index("heads").loc[sets, "share"].to_numpy()
        colour = matplotlib.colormaps[SEQUENTIAL](i / (len(ranges) - 1))
        axes.barh(sets, part, left=left, color=colour, edgecolor=INK, linewidth=0.3, label=interval)
        left = left + part
    axes.invert_yaxis()
    axes.set(xlabel="share of heads", xlim=(0, 1))
    axes.margins(y=0.02)
    legend_below(figure, axes, "score")
    return figure


@styled
def scatter(
    ocr: Float[np.ndarray, "layer head"], retrieval: Float[np.ndarray, "layer head"], threshold: float
) -> Figure:
    """Scatter both scores of every head; heads above the threshold in either are named, where there is room."""
    figure = new_figure(SINGLE, SINGLE)
    axes = figure.subplots()
    axes.axvline(threshold, color=COLOURS[-1], linewidth=0.8)
    axes.axhline(threshold, color=COLOURS[-1], linewidth=0.8)
    axes.scatter(ocr, retrieval, s=12, color=COLOURS[0], alpha=0.7, linewidth=0)
    above = [at for at in np.ndindex(ocr.shape) if max(ocr[at], retrieval[at]) > threshold]
    named: list[tuple[float, float]] = []
    for at in sorted(above, key=lambda at: -max(ocr[at], retrieval[at])):
        for below in (False, True):
            x, y = float(ocr[at]), float(retrieval[at]) - 0.07 * below
            if all(abs(x - other) > 0.13 or abs(y - height) > 0.05 for other, height in named):
                offset = (3, -9 if below else 3)
                axes.annotate(f"{at[0]}.{at[1]}", (ocr[at], retrieval[at]), xytext=offset, textcoords="offset points")
                named.append((x, y))
                break
    axes.set(xlabel="OCR score", ylabel="retrieval score", xlim=(-0.03, 1.1), ylim=(-0.03, 1.1), aspect="equal")
    axes.annotate(f"{threshold:g}", (threshold, 1.1), ha="center", va="bottom", annotation_clip=False)
    return figure


@styled
def activation(kinds: Mapping[str, Scores], threshold: float, most: int = 100) -> Figure:
    """Draw heads by activation frequency: frequency as a line, mean score as bars."""
    figure = new_figure(DOUBLE, 2.4)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, (name, scores) in zip(panels, kinds.items(), strict=True):
        frequency, mean = scores.frequency(threshold).ravel(), scores.mean.ravel()
        order = np.argsort(-frequency, kind="stable")[:most]
        axes.bar(range(len(order)), mean[order], width=0.9, color=COLOURS[5], label="mean score")
        label = f"share of {scores.granularity}s with a score above {threshold:g}"
        axes.plot(range(len(order)), frequency[order], color=COLOURS[1], drawstyle="steps-mid", label=label)
        title = f"{name}, {len(scores.instances)} {scores.granularity}s"
        axes.set(title=title, xlabel="rank of the head by frequency", ylim=(0, 1.02))
    panels[0].set_ylabel("frequency, score")
    legend_below(figure, panels[0])
    return figure


@styled
def bars(summary: pd.DataFrame) -> Figure:
    """Draw every condition's metric with its interval, one panel per task (`summarize`)."""
    tasks = list(dict.fromkeys(summary["task"]))
    conditions = list(dict.fromkeys(summary["condition"]))
    figure = new_figure(DOUBLE, 0.8 + ROW * len(conditions))
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(panels, tasks, strict=True):
        own = summary[summary["task"] == task].set_index("condition").loc[conditions]
        spread = np.stack([own["value"] - own["low"], own["high"] - own["value"]]).clip(0)
        colours = [_colour(condition) for condition in conditions]
        fills = ["none" if colour == INK else colour for colour in colours]
        error = {"capsize": 2, "error_kw": {"linewidth": 0.8}}
        axes.barh(conditions, own["value"], xerr=spread, color=fills, edgecolor=colours, linewidth=0.8, **error)
        values_beside(axes, range(len(conditions)), [number(value) for value in own["value"]])
        axes.set(title=f"{task}, n = {own['n'].iloc[0]}", xlabel=f"mean {own['metric'].iloc[0]}", xlim=(0, 1))
        axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
    panels[0].invert_yaxis()
    return figure


@styled
def over_beta(summary: pd.DataFrame) -> Figure:
    """Draw the change against the unmodified model by beta, one panel per task, one line per kind of heads."""
    tasks = list(dict.fromkeys(summary["task"]))
    figure = new_figure(DOUBLE, 2.5)
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(panels, tasks, strict=True):
        own = summary[summary["task"] == task]
        changed = own[own["condition"].str.contains(", beta ")]
        split = changed["condition"].str.rsplit(", beta ", n=1, expand=True)
        kinds = line_styles(list(dict.fromkeys(split[0])))
        for kind, style in kinds.items():
            part, betas = changed[split[0] == kind], split[split[0] == kind][1].astype(float)
            axes.fill_between(betas, part["change_low"], part["change_high"], color=style["color"], alpha=0.15)
            axes.plot(betas, part["change"], marker="o", markersize=2.5, label=kind, **style)
        axes.axhline(0, color=INK, linewidth=0.6)
        metric, n = own["metric"].iloc[0], own["n"].iloc[0]
        axes.set(title=f"{task} ({metric}), n = {n}", xlabel="beta: share the sink keeps")
    panels[0].set_ylabel("change of the metric")
    if max(map(abs, panels[0].get_ylim())) < SMALLEST:
        panels[0].set_ylim(-SMALLEST, SMALLEST)
    legend_below(figure, panels[0])
    return figure


def _colour(condition: str) -> str:
    for word, colour in (("random", COLOURS[-1]), ("OCR", COLOURS[1]), ("retrieval", COLOURS[0])):
        if word in condition:
            return colour
    return INK


def _frame(axes: Axes, box: Box, colour: str, style: str) -> None:
    x0, y0, x1, y1 = box
    # pixel centres lie at whole numbers, so the box's edges lie half a pixel before them
    corner = (x0 - 0.5, y0 - 0.5)
    axes.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=colour, linestyle=style, linewidth=1.2))
