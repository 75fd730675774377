"""Figure style and output: column widths of journals, one font size, one palette; the same bytes on every run."""

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from hooked_vlm.runtime.files import atomic_write

SINGLE, DOUBLE = 3.5, 7.2
"""Width of a figure in inches: one column of a paper, or two."""
TALLEST = 8.5
"""Height in inches of a figure that fills a page."""
FONT_SIZE, DPI = 8, 300
INK, PAPER = "#222222", "#ffffff"
"""Text and lines; background."""
ON_LIGHT, ON_DARK = "#111111", "#fefefe"
"""Text on coloured cells, the same on light and dark pages."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
"""Colour-blind safe (Okabe and Ito 2008); grey comes last, for controls."""
MORE_COLOURS = ("#882255", "#117733", "#aa7744")
"""For figures of more than seven lines (after Tol's schemes)."""
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
DARK: dict[str, str] = dict(
    zip(
        (INK, "#000000", PAPER, *COLOURS, *MORE_COLOURS),
        (
            "#e8e8ea",
            "#e8e8ea",
            "#17181a",
            "#4a9fe0",
            "#ff8a3d",
            "#2fc598",
            "#e39bc4",
            "#f2b632",
            "#8fd3ff",
            "#8b8f96",
            "#e0709f",
            "#6fcf7f",
            "#d9a877",
        ),
        strict=True,
    )
)
"""Colour on a light page -> colour on a dark one."""
LINES = (*COLOURS[:-1], INK, *MORE_COLOURS)
DASHES: tuple[Any, ...] = (
    "-", (0, (4, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1)), (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 1)),
    (0, (8, 1, 2, 1)), (0, (3, 3)), (0, (6, 1, 1, 1, 1, 1)),
)  # fmt: skip
CONTROL = "random"
"""Lines whose name begins with this are controls: grey, and dotted widely."""

STYLE: dict[Any, Any] = {
    "font.size": FONT_SIZE,
    **dict.fromkeys(("axes.titlesize", "axes.labelsize", "figure.titlesize", "figure.labelsize"), FONT_SIZE),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), FONT_SIZE),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2.5),
    "lines.linewidth": 1.2,
    "legend.handlelength": 3.2,
    "axes.titlelocation": "left",
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a function that draws a figure in the studies' style."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def new_figure(width: int | float, height: int | float) -> Figure:
    """Figure of `width` x `height` inches with constrained layout."""
    return Figure(figsize=(width, min(height, TALLEST)), layout="constrained")


def line_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and dash of every line; no two lines have the same pair, and up to ten share neither."""
    styles, n = {}, 0
    for name in names:
        if name.startswith(CONTROL):
            styles[name] = {"color": COLOURS[-1], "linestyle": (0, (1, 2))}
        else:
            dash = DASHES[(n + n // len(LINES)) % len(DASHES)]
            styles[name] = {"color": LINES[n % len(LINES)], "linestyle": dash}
            n += 1
    return styles


@dataclass(frozen=True)
class Rendered:
    """A figure as files: suffix of the file's name -> its bytes."""

    files: dict[str, bytes]
    width: float
    """In inches."""

    @property
    def light(self) -> bytes:
        """SVG for light pages."""
        return self.files[".svg"]

    @property
    def dark(self) -> bytes:
        """SVG for dark pages."""
        return self.files["-dark.svg"]


# no timestamps or versions in the files: reruns give the same bytes
_FORMATS: dict[str, dict[str, Any]] = {
    "png": {"facecolor": PAPER, "metadata": {"Software": None}},
    "svg": {"metadata": {"Date": None, "Creator": None}},
    "pdf": {"metadata": {"CreationDate": None, "Creator": None, "Producer": None}},
}


def render(figure: Figure) -> Rendered:
    """Render a figure as PNG (300 dpi, white), SVG, PDF, and SVG in the colours of dark pages."""
    files = {}
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "hooked_vlm", "svg.fonttype": "none", "pdf.fonttype": 42}):
        for suffix, options in _FORMATS.items():
            buffer = BytesIO()
            figure.savefig(buffer, dpi=DPI, format=suffix, **options)
            files[f".{suffix}"] = buffer.getvalue() if suffix != "svg" else _compact(buffer.getvalue())
            figure.set_layout_engine("none")  # arranged once, alike in every format and when rendered again
    files["-dark.svg"] = darkened(files[".svg"])
    return Rendered(files, float(figure.get_size_inches()[0]))


def darkened(svg: bytes) -> bytes:
    """An SVG of this style in the colours of dark pages."""
    return re.sub(rb"#[0-9a-f]{6}\b", lambda found: DARK.get(found[0].decode(), found[0].decode()).encode(), svg)


def _compact(svg: bytes) -> bytes:
    """The SVG with opaque pictures as JPEG where that is smaller: photographs take a fifth of the space."""

    def smaller(found: re.Match[bytes]) -> bytes:
        picture, buffer = Image.open(BytesIO(base64.b64decode(found[1]))), BytesIO()
        if picture.mode == "RGBA" and picture.getchannel("A").getextrema() != (255, 255):
            return found[0]
        picture.convert("RGB").save(buffer, "JPEG", quality=90)
        content = base64.b64encode(buffer.getvalue())
        return b"data:image/jpeg;base64," + content if len(content) < 0.8 * len(found[1]) else found[0]

    return re.sub(rb"data:image/png;base64,([A-Za-z0-9+/=\s]*)", smaller, svg)


def save_figure(figure: Figure, path: Path) -> Rendered:
    """Write `path`.png, .svg, .pdf and `path`-dark.svg, and return them.

    Raises:
        OutputError: they cannot be written.
    """
    rendered = render(figure)
    for suffix, content in rendered.files.items():
        atomic_write(path.with_name(path.name + suffix), lambda aside, data=content: aside.write_bytes(data))
    return rendered
