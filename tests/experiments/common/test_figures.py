"""Figures of both studies: width, font size, colours on light and dark pages, equal bytes."""

import re
from collections.abc import Callable
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from hooked_vlm.analysis.statistics import Estimate
from hooked_vlm.experiments.common.figures import (
    COLOURS,
    DARK,
    DOUBLE,
    DPI,
    FONT_SIZE,
    INK,
    PAPER,
    SINGLE,
    TALLEST,
    darkened,
    line_styles,
    new_figure,
    render,
)
from hooked_vlm.experiments.common.plots import FINEST, draw_picture, heatmap
from hooked_vlm.experiments.head_attribution import plots as attribution_plots
from hooked_vlm.experiments.head_attribution.rankings import RANKINGS
from hooked_vlm.experiments.ocr_heads import plots as ocr_plots
from hooked_vlm.experiments.ocr_heads.examples import Evidence, Example

RNG = np.random.default_rng(0)
ONE, TWO = Estimate(0.5, 0.4, 0.6, 9), Estimate(-0.1, -0.2, 0.1, 9)


def changed() -> pd.DataFrame:
    conditions = [
        "unchanged",
        *(f"{kind}, beta {b}" for kind in ("top 2 OCR", "top 2 retrieval", "random 2") for b in (0, 0.4)),
    ]
    rows = [
        {"task": task, "condition": condition, "metric": "exact", "value": 0.9, "low": 0.8, "high": 1.0, "n": 20}
        | {"change": -0.1, "change_low": -0.2, "change_high": 0.0}
        for task in ("page", "text", "naming")
        for condition in conditions
    ]  # fmt: skip
    return pd.DataFrame(rows)


def page(n: int) -> Figure:
    image = Image.new("RGB", (60, 40), "white")
    example = Example("What is it?", ("a",), (image,), (Evidence(0, 1, 0, (2, 2, 9, 9)),))
    return ocr_plots.sample_pages([example] * n, [[(1, 1, 20, 20)]] * n, ["What is the value of it?\nanswer a"] * n)


def sparsity() -> pd.DataFrame:
    ranges = ["[0, 0.1]", "(0.1, 0.5]", "(0.5, 1]"]
    return pd.DataFrame([(s, r, x) for s in ("OCR", "retrieval") for r, x in zip(ranges, (0.5, 0.3, 0.2), strict=True)],
                        columns=["heads", "score range", "share"])  # fmt: skip


LINE = (np.linspace(0, 1, 5), np.linspace(-0.1, 0.9, 5), np.linspace(0.1, 1.1, 5))
TWO_PANELS = {kind: dict.fromkeys(RANKINGS.values(), LINE) for kind in ("faithfulness", "completeness")}
DEPTH: dict[str, tuple[np.ndarray, ...]] = dict.fromkeys(("model a", "model b"), (np.linspace(0, 1, 5), *LINE))
HEADS = [f"{i}.3" for i in range(20)]
CHARACTERS = list("0123456789abcdefghijklmnopqrstuvwxyz")
EDGES = ["question → assistant header", "image → final"]
GROUPS = {"question": {"lost": ONE, "kept": TWO}, "answer": {"lost": TWO}}
DRAWN: dict[str, Callable[[], Figure]] = {
    "heatmap": lambda: ocr_plots.heatmap(RNG.random((4, 4)), RNG.random((4, 4)) > 0.7, "OCR score"),
    "large heatmap": lambda: ocr_plots.heatmap(RNG.random((28, 28)), RNG.random((28, 28)) > 0.9, "OCR score"),
    "grid": lambda: ocr_plots.grid(RNG.random((36, 20)), CHARACTERS, HEADS, "OCR score"),
    "signed": lambda: heatmap(RNG.normal(size=(2, 5)), EDGES, ["0-1"] * 5, ("", "layers", "share lost")),
    "pages": lambda: page(4),
    "one page": lambda: page(1),
    "shares": lambda: ocr_plots.shares(sparsity()),
    "scatter": lambda: ocr_plots.scatter(RNG.random((4, 4)), RNG.random((4, 4)), 0.1),
    "masking": lambda: ocr_plots.bars(changed()),
    "over beta": lambda: ocr_plots.over_beta(changed()),
    "predicted": lambda: attribution_plots.predicted([("cat", RNG.random(9), RNG.random(9))] * 4, "logit"),
    "bands": lambda: attribution_plots.bands(np.arange(5), TWO_PANELS, "k (heads)", {"faithfulness": 0.8}),
    "one band": lambda: attribution_plots.bands(np.arange(5), {"share": {"": LINE}}, "layer"),
    "over depth": lambda: attribution_plots.over_depth(DEPTH, "share"),
    "bars": lambda: attribution_plots.bars(GROUPS, "share of the effect"),
    "scatter by layer": lambda: attribution_plots.scatter(
        RNG.random(16), RNG.normal(size=16), np.arange(16) // 4, ("attention", "coefficient")
    ),
    "pictures": lambda: attribution_plots.pictures(
        [("cat", Image.new("L", (30, 20)), [((0.0, 0.0, 9.0, 9.0), 0.5)])] * 5, "coefficient"
    ),
}


FURTHER = ("grid", "shares", "one page", "over beta", "one band", "scatter by layer", "predicted", "pictures")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) if n in FURTHER else n for n in DRAWN])
def test_a_figure_of_a_report_has_a_column_width_one_font_size_and_no_legend_over_data(name: str) -> None:
    with matplotlib.rc_context({"font.size": 13, "axes.labelsize": 20, "text.color": "red"}):
        figure = DRAWN[name]()
    width, height = figure.get_size_inches()
    assert width == pytest.approx(SINGLE) or width == pytest.approx(DOUBLE) or "page" in name
    assert width <= DOUBLE and height <= TALLEST
    render(figure)
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]  # pyright: ignore
    assert {text.get_fontsize() for text in texts} == {FONT_SIZE}  # pyright: ignore
    figure.dpi = DPI
    drawn = figure.get_tightbbox().padded(-0.03)
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height
    for axes in figure.axes:
        assert axes.get_legend() is None
    for legend in figure.legends:
        frame = legend.get_window_extent()
        assert not any(frame.overlaps(axes.bbox) for axes in figure.axes)


@pytest.mark.parametrize("name", ["heatmap", "bands", "pages", pytest.param("masking", marks=pytest.mark.full)])
def test_rendering_a_report_twice_gives_the_same_bytes_in_all_formats(name: str) -> None:
    state = RNG.bit_generator.state
    first = render(DRAWN[name]())
    RNG.bit_generator.state = state
    figure = DRAWN[name]()
    again, third = render(figure), render(figure)
    assert set(first.files) == {".png", ".svg", ".pdf", "-dark.svg"}
    assert first.files == again.files == third.files
    png = Image.open(BytesIO(first.files[".png"]))
    assert png.width == pytest.approx(first.width * 300, abs=1)
    assert first.files[".pdf"].startswith(b"%PDF")


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_stand_out_on_their_page_and_differ() -> None:
    assert contrast(INK, PAPER) > 7 and contrast(DARK[INK], DARK[PAPER]) > 7
    for colour in COLOURS:
        assert contrast(DARK[colour], DARK[PAPER]) > 4.5
    assert len({DARK[colour] for colour in COLOURS}) == len(COLOURS)


@pytest.mark.parametrize("name", ["heatmap", "masking", "pages"])
def test_the_dark_figure_of_a_report_is_the_light_one_in_other_colours(name: str) -> None:
    rendered = render(DRAWN[name]())
    light, dark = (ElementTree.fromstring(svg) for svg in (rendered.light, rendered.dark))
    assert [element.tag for element in light.iter()] == [element.tag for element in dark.iter()]
    light_texts, dark_texts = (
        ["".join(e.itertext()) for e in root.iter() if e.tag.endswith("text")] for root in (light, dark)
    )
    assert light_texts and light_texts == dark_texts
    colours = set(re.findall(rb"(?:fill|stroke): (#[0-9a-f]{6})", rendered.dark))
    assert INK.encode() not in colours and DARK[INK].encode() in colours
    images = re.compile(rb'xlink:href="(data:image/[^"]*)"')
    assert images.findall(rendered.light) == images.findall(rendered.dark)


def test_darkened_leaves_references_alone() -> None:
    svg = b'<use xlink:href="#m222222ab"/><path style="fill: #222222; stroke: #123456" clip-path="url(#p000000)"/>'
    assert darkened(svg) == svg.replace(b"fill: #222222", b"fill: " + DARK[INK].encode())


def test_every_ranking_has_its_own_colour_and_dash() -> None:
    styles = line_styles(list(RANKINGS.values()))
    assert len({to_hex(style["color"]) for style in styles.values()}) == len(RANKINGS)
    assert len({str(style["linestyle"]) for style in styles.values()}) == len(RANKINGS)
    assert styles["random"]["color"] == COLOURS[-1]
    many = line_styles([f"model {i}" for i in range(40)])
    assert len({(style["color"], str(style["linestyle"])) for style in many.values()}) == 40


def test_scores_share_their_colour_scale_and_values_outside_are_marked() -> None:
    for scores in (0.1 * RNG.random((4, 4)), RNG.random((4, 4))):
        image: Any = ocr_plots.heatmap(scores, scores > 0.9, "OCR score").axes[0].images[0]
        assert image.get_clim() == (0, 1)
    outside = heatmap(np.array([[-0.5, 0.5]]), [0], [0, 1], ("", "", "score"), (0, 1))
    assert outside.axes[0].images[0].colorbar.extend == "min"  # pyright: ignore
    signed: Any = heatmap(np.array([[-0.5, 0.2]]), [0], [0, 1], ("", "", "")).axes[0].images[0]
    assert signed.get_clim() == (-0.5, 0.5)


def test_photographs_in_figures_are_small_and_flat_pictures_exact() -> None:
    noise = Image.fromarray(RNG.integers(256, size=(1400, 900, 3), dtype=np.uint8))
    example = Example("What?", ("a",), (noise,), (Evidence(0, 1, 0, (2, 2, 90, 90)),))
    rendered = render(ocr_plots.sample_pages([example], [[]], ["What?"]))
    assert b"data:image/jpeg" in rendered.light and len(rendered.light) < 500_000
    flat = render(heatmap(np.eye(3), [0, 1, 2], [0, 1, 2], ("", "", ""), (0, 1)))
    assert b"data:image/jpeg" not in flat.light


def test_boxes_lie_on_the_picture_where_it_was_made_smaller() -> None:
    axes = new_figure(3, 3).subplots()
    draw_picture(axes, Image.new("RGB", (1400, 700)))
    assert axes.get_xlim() == (-0.5, 1399.5) and axes.get_ylim() == (699.5, -0.5)
    assert axes.images[0].get_array().shape[:2] == (FINEST // 2, FINEST)  # pyright: ignore
