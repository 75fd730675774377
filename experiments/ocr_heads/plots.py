"""Figures of the study."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from hooked_vlm.experiments.common.figures import COLOURS, SEQUENTIAL, new_figure
from hooked_vlm.experiments.ocr_heads.examples import Box, Example
from hooked_vlm.experiments.ocr_heads.scoring import Scores

INK, PAPER, EVIDENCE, LOOKS = "#222222", "#ffffff", COLOURS[0], COLOURS[1]


def heatmap(scores: Float[np.ndarray, "layer head"], selected: Bool[np.ndarray, "layer head"], label: str) -> Figure:
    """Draw the score of every head, selected heads framed."""
    n_layers, n_heads = scores.shape
    figure = new_figure(min(12, 2.6 + 0.42 * n_heads), min(12, 1.6 + 0.36 * n_layers))
    axes = figure.subplots()
    image = axes.imshow(scores, vmin=0, vmax=max(1e-9, float(scores.max())), cmap=SEQUENTIAL, aspect="auto")
    for layer, head in np.argwhere(selected):
        axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=LOOKS, linewidth=2))
    if scores.size <= 64:
        for (layer, head), score in np.ndenumerate(scores):
            dark = score < 0.6 * scores.max()
            axes.text(
                head,
                layer,
                f"{score:.2f}",
                ha="center",
                va="center",
                color=PAPER if dark else INK,
                fontsize=9,
            )
    axes.set(xlabel="head", ylabel="layer")
    axes.set_xticks(range(0, n_heads, max(1, n_heads // 16)))
    axes.set_yticks(range(0, n_layers, max(1, n_layers // 16)))
    figure.colorbar(image, ax=axes, label=label)
    return figure


def sample_pages(examples: Sequence[Example], looks: Sequence[Sequence[Box]], titles: Sequence[str]) -> Figure:
    """Draw pages with the evidence boxes and the boxes of the tokens the top head attends to."""
    columns = min(3, len(examples))
    rows = -(-len(examples) // columns)
    figure = new_figure(4.2 * columns, 4.0 * rows)
    for i, (example, boxes, title) in enumerate(zip(examples, looks, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        page = example.evidence[0].image
        picture = example.images[page]
        axes.imshow(picture if isinstance(picture, Image.Image) else Image.open(picture), interpolation="nearest")
        for evidence in example.evidence:
            if evidence.image == page:
                _frame(axes, evidence.box, EVIDENCE, "-")
        for box in boxes:
            _frame(axes, box, LOOKS, "--")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.supxlabel("blue: the answer · orange, dashed: argmax of the top head's attention", fontsize=9)
    return figure


def shares(table: pd.DataFrame) -> Figure:
    """Draw the share of heads per score range, one bar for each set of heads (a `sparsity_table`)."""
    sets, ranges = list(dict.fromkeys(table["heads"])), list(dict.fromkeys(table["score range"]))
    figure = new_figure(9, 1.2 + 0.4 * len(sets))
    axes = figure.subplots()
    left = np.zeros(len(sets))
    for i, interval in enumerate(ranges):
        part = table[table["score range"] == interval].set_index("heads").loc[sets, "share"].to_numpy()
        axes.barh(sets, part, left=left, color=matplotlib.colormaps[SEQUENTIAL](i / (len(ranges) - 1)), label=interval)
        left = left + part
    axes.invert_yaxis()
    axes.set(xlabel="share of heads", xlim=(0, 1))
    figure.legend(loc="outside upper center", ncols=len(ranges), fontsize=8)
    return figure


def scatter(
    ocr: Float[np.ndarray, "layer head"], retrieval: Float[np.ndarray, "layer head"], threshold: float
) -> Figure:
    """Scatter both scores of every head; heads above the threshold in either are named."""
    figure = new_figure(5, 4.4)
    axes = figure.subplots()
    axes.scatter(ocr, retrieval, s=18, color=COLOURS[0], alpha=0.7)
    named = [at for at in np.ndindex(ocr.shape) if max(ocr[at], retrieval[at]) > threshold]
    for at in sorted(named, key=lambda at: -max(ocr[at], retrieval[at]))[:30]:
        axes.annotate(
            f"{at[0]}.{at[1]}", (ocr[at], retrieval[at]), xytext=(3, 3), textcoords="offset points", fontsize=7
        )
    axes.axvline(threshold, color=COLOURS[-1], linewidth=0.8)
    axes.axhline(threshold, color=COLOURS[-1], linewidth=0.8)
    axes.set(xlabel="OCR score", ylabel="retrieval score")
    return figure


def activation(kinds: Mapping[str, Scores], threshold: float, most: int = 100) -> Figure:
    """Draw heads by activation frequency: frequency as a line, mean score as bars."""
    figure = new_figure(5 * len(kinds), 3.2)
    for axes, (name, scores) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        frequency, mean = scores.frequency(threshold).ravel(), scores.mean.ravel()
        order = np.argsort(-frequency, kind="stable")[:most]
        axes.bar(range(len(order)), mean[order], width=1, color=COLOURS[5], label="mean score")
        axes.plot(range(len(order)), frequency[order], color=COLOURS[1], drawstyle="steps-mid", label="frequency")
        axes.set(
            title=f"{name}, {len(scores.instances)} {scores.granularity}s", xlabel="heads by frequency", ylim=(0, 1.02)
        )
        axes.legend(fontsize=8)
    return figure


def bars(summary: pd.DataFrame) -> Figure:
    """Draw every condition's metric with its interval, one panel per task (`summarize`)."""
    tasks = list(dict.fromkeys(summary["task"]))
    conditions = list(dict.fromkeys(summary["condition"]))
    figure = new_figure(2.2 + 2.4 * len(tasks), 1.2 + 0.32 * len(conditions))
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(panels, tasks, strict=True):
        own = summary[summary["task"] == task].set_index("condition").loc[conditions]
        spread = np.stack([own["value"] - own["low"], own["high"] - own["value"]]).clip(0)
        colours = [_colour(condition) for condition in conditions]
        axes.barh(conditions, own["value"], xerr=spread, color=colours, capsize=2, error_kw={"linewidth": 0.9})
        axes.set(title=f"{task}\n{own['metric'].iloc[0]}, n = {own['n'].iloc[0]}", xlim=(0, 1.02))
    panels[0].invert_yaxis()
    return figure


def over_beta(summary: pd.DataFrame) -> Figure:
    """Draw the change against the unmodified model by beta, one panel per task, one line per kind of heads."""
    tasks = list(dict.fromkeys(summary["task"]))
    figure = new_figure(1.0 + 3.0 * len(tasks), 3.2)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        own = summary[summary["task"] == task]
        changed = own[own["condition"].str.contains(", beta ")]
        split = changed["condition"].str.rsplit(", beta ", n=1, expand=True)
        for kind in dict.fromkeys(split[0]):
            part, betas = changed[split[0] == kind], split[split[0] == kind][1].astype(float)
            axes.fill_between(betas, part["change_low"], part["change_high"], color=_colour(kind), alpha=0.15)
            axes.plot(betas, part["change"], marker="o", markersize=3, color=_colour(kind), label=kind)
        axes.axhline(0, color=INK, linewidth=0.8)
        metric, n = own["metric"].iloc[0], own["n"].iloc[0]
        axes.set(title=f"{task}, n = {n}", xlabel="beta: share the sink keeps", ylabel=f"change of {metric}")
    panels[0].legend(fontsize=8)
    return figure


def grid(values: Float[np.ndarray, "row column"], rows: Sequence[str], columns: Sequence[str], label: str) -> Figure:
    """Draw a matrix as colours."""
    figure = new_figure(2.0 + 0.4 * len(columns), 1.4 + 0.22 * len(rows))
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=max(1e-9, float(values.max())), cmap=SEQUENTIAL, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def _colour(condition: str) -> str:
    for word, colour in (("random", COLOURS[-1]), ("OCR", COLOURS[1]), ("retrieval", COLOURS[0])):
        if word in condition:
            return colour
    return INK


def _frame(axes, box: Box, colour: str, style: str) -> None:
    x0, y0, x1, y1 = box
    # pixel centres lie at whole numbers, so the box's edges lie half a pixel before them
    axes.add_patch(
        Rectangle(
            (x0 - 0.5, y0 - 0.5),
            x1 - x0,
            y1 - y0,
            fill=False,
            edgecolor=colour,
            linestyle=style,
            linewidth=1.3,
        )
    )
