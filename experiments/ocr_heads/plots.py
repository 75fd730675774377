"""The study's pictures: the layer x head heatmap, and pages with their evidence and where the best head looks."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hooked_vlm.experiments.ocr_heads.examples import Box, Example

INK, PAPER, EVIDENCE, LOOKS = "#222222", "#ffffff", "#0072b2", "#d55e00"  # colour-blind safe


def heatmap(scores: Float[np.ndarray, "layer head"], selected: Bool[np.ndarray, "layer head"], title: str) -> Figure:
    """OCR score of every head; the selected ones are framed."""
    n_layers, n_heads = scores.shape
    figure = Figure(figsize=(min(12, 2.6 + 0.42 * n_heads), min(12, 1.6 + 0.36 * n_layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(scores, vmin=0, vmax=max(1e-9, float(scores.max())), cmap="viridis", aspect="auto")
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
    axes.set(xlabel="head", ylabel="layer", title=title)
    axes.set_xticks(range(0, n_heads, max(1, n_heads // 16)))
    axes.set_yticks(range(0, n_layers, max(1, n_layers // 16)))
    figure.colorbar(image, ax=axes, label="OCR score")
    return figure


def sample_pages(examples: Sequence[Example], looks: Sequence[Sequence[Box]], titles: Sequence[str]) -> Figure:
    """Pages with the evidence boxes, and with the boxes of the tokens the best head looks at."""
    columns = min(3, len(examples))
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(4.2 * columns, 4.0 * rows), layout="constrained")
    for i, (example, boxes, title) in enumerate(zip(examples, looks, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        page = example.evidence[0].image
        axes.imshow(example.images[page], interpolation="nearest")
        for evidence in example.evidence:
            if evidence.image == page:
                _frame(axes, evidence.box, EVIDENCE, "-")
        for box in boxes:
            _frame(axes, box, LOOKS, "--")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.supxlabel("blue: where the answer is written · orange, dashed: where the top head looks", fontsize=9)
    return figure


def masking_bars(rows: Sequence[tuple[str, str, float, float, float]]) -> Figure:
    """Share answered rightly per task and condition, with intervals: (task, condition, exact, low, high)."""
    tasks = list(dict.fromkeys(row[0] for row in rows))
    conditions = list(dict.fromkeys(row[1] for row in rows))
    figure = Figure(figsize=(1.8 + 1.7 * len(tasks), 3.2), layout="constrained")
    axes = figure.subplots()
    colours = ["#999999", LOOKS, EVIDENCE]
    for c, condition in enumerate(conditions):
        chosen = [row for row in rows if row[1] == condition]
        x = np.array([tasks.index(row[0]) for row in chosen]) + (c - (len(conditions) - 1) / 2) * 0.27
        exact = np.array([row[2] for row in chosen])
        spread = np.array([[row[2] - row[3] for row in chosen], [row[4] - row[2] for row in chosen]]).clip(0)
        axes.bar(x, exact, width=0.25, color=colours[c % 3], label=condition, yerr=spread, capsize=3)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set(ylabel="answered rightly", ylim=(0, 1.05))
    axes.legend(fontsize=8)
    return figure


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
