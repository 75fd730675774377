"""`FeaturePage`: the features of a dictionary, each with the pictures that activate it most, as one HTML page."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float
from PIL import Image

from hooked_vlm.errors import InputError
from hooked_vlm.runtime.files import atomic_write
from hooked_vlm.viewer.view import IFRAME, Facts, page_file

LARGEST = 20_000_000
"""Characters of a page."""
LONGEST = 256
"""Longer side of pictures in the page, to which larger ones are reduced."""
N_BINS = 24

Logits = tuple[tuple[str, float], ...]
"""Tokens, and what a unit of the feature adds to their logits."""


@dataclass(frozen=True)
class Mark:
    """A picture with the tokens that activate a feature."""

    picture: int
    """Its number among the pictures of the page."""
    tokens: tuple[tuple[float, float, float, float, float], ...]
    """Box (x0, y0, x1, y1) in pixels of the picture, and activation."""
    largest: float
    """Largest activation of its tokens, those included that stand for no place."""
    frames: tuple[tuple[float, ...], ...] = ()
    """Boxes of what the feature stands for."""


@dataclass(frozen=True)
class FeatureEntry:
    """What the page says of one feature."""

    feature: int
    label: str
    """What it stands for, or the nearest label; "" where no label chose it."""
    said: str
    """The same with its numbers, in a sentence."""
    found: bool
    """Whether it stands for the label."""
    score: float | None
    """F1 for the label."""
    active: float
    """Share of tokens on which it is active."""
    largest: float
    counts: tuple[int, ...]
    """Histogram of its activations above 0: numbers of tokens in bins of equal width up to the largest."""
    marks: tuple[Mark, ...]
    """The pictures with the largest activations, largest first."""
    raised: Logits = ()
    lowered: Logits = ()
    effect: str = ""
    """What ablating it does to the answer."""


@dataclass(frozen=True, eq=False)
class FeaturePage:
    """A page; a notebook shows it, `save` writes it."""

    title: str
    note: str
    """How meanings were found, in a sentence or two."""
    entries: tuple[FeatureEntry, ...]
    pictures: tuple[Image.Image, ...]
    facts: Facts = ()

    @cached_property
    def html(self) -> str:
        """The page as one self-contained document.

        Raises:
            InputError: it would be too large, or an entry names a picture that is not there.
        """
        if any(not 0 <= mark.picture < len(self.pictures) for entry in self.entries for mark in entry.marks):
            raise InputError(f"an entry names a picture that is not there: {len(self.pictures)} came")
        parts = {name: page_file(name) for name in ("look.css", "feature.css", "feature.js")}
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        text = environment.from_string(page_file("feature.html.jinja")).render(
            view=self, data=self._data(), parts=parts
        )
        if len(text) > LARGEST:
            raise InputError(
                f"the page would have {len(text) / 1e6:.0f} MB, more than the {LARGEST / 1e6:.0f} MB that browsers "
                "open quickly: show fewer features"
            )
        return text

    def save(self, path: str | Path) -> Path:
        """Write the page.

        Raises:
            InputError: it would be too large.
            OutputError: it cannot be written.
        """
        text = self.html
        atomic_write(Path(path), lambda aside: aside.write_text(text, encoding="utf-8"))
        return Path(path)

    def _repr_html_(self) -> str:
        return IFRAME.format(title=html.escape(self.title), page=html.escape(self.html))

    def _data(self) -> dict[str, Any]:
        pictures = [
            {"src": _thumbnail(picture), "width": picture.width, "height": picture.height} for picture in self.pictures
        ]
        return {"pictures": pictures, "features": [asdict(entry) for entry in self.entries]}


def histogram(values: Float[np.ndarray, "token"]) -> tuple[int, ...]:
    """Numbers of values above 0 in bins of equal width up to the largest."""
    active = values[values > 0]
    if not len(active):
        return (0,) * N_BINS
    return tuple(np.histogram(active, bins=N_BINS, range=(0, float(active.max())))[0].tolist())


def top_marks(
    values: Float[np.ndarray, "token"],
    picture: Sequence[int] | np.ndarray,
    boxes: Float[np.ndarray, "token 4"],
    n: int,
) -> list[Mark]:
    """The pictures with the largest activations, largest first, and the tokens of each that are active.

    Args:
        picture: the number of each token's picture.
        boxes: NaN for tokens that stand for no place, which are not drawn.
    """
    numbers = np.asarray(picture)
    active = np.flatnonzero(values > 0)
    ordered = active[np.argsort(-values[active], kind="stable")]
    chosen = list(dict.fromkeys(numbers[ordered].tolist()))[:n]
    drawn = active[np.isfinite(boxes[active]).all(1)]
    marks = []
    for number in chosen:
        own = drawn[numbers[drawn] == number]
        rows = np.column_stack([boxes[own].round(1), [float(f"{value:.4g}") for value in values[own]]])
        largest = float(values[numbers == number].max())
        marks.append(Mark(number, tuple(tuple(row) for row in rows.tolist()), largest))
    return marks


def _thumbnail(picture: Image.Image) -> str:
    shown = picture.convert("RGB")
    shown.thumbnail((LONGEST, LONGEST))
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
