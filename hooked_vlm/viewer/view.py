"""`View`: values on image tokens as one HTML page that opens from disk."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.colors import to_hex

from hooked_vlm.analysis.pictures import DIVERGING, SEQUENTIAL
from hooked_vlm.errors import InputError
from hooked_vlm.runtime.files import atomic_write
from hooked_vlm.viewer.quantisation import CLEAR, TEXT_BUDGET, Packed, encoded, pack
from hooked_vlm.viewer.scene import Scene, data_url

Head = tuple[int, int]
"""Layer and head."""
IFRAME = '<iframe title="{title}" srcdoc="{page}" style="width: 100%; height: 48rem; border: 0"></iframe>'


Facts = tuple[tuple[str, str], ...]
"""Names and texts in the head of a page: model, prompt, answer."""


@dataclass(frozen=True)
class Chip:
    """A piece of text in the page."""

    text: str
    kind: Literal["prompt", "image", "answer", "row"]
    row: int | None = None
    """The row of values it shows when clicked; None: it cannot be clicked."""
    column: int | None = None
    """The column of the values on text that stands for it; None: it has no such value."""


@dataclass(frozen=True, eq=False)
class View:
    """A page; a notebook shows it, `save` writes it."""

    title: str
    note: str
    """Description of the values, in a sentence or two."""
    quantity: str
    """Name of the values."""
    scene: Scene
    chips: tuple[Chip, ...]
    layers: tuple[str, ...]
    heads: tuple[str, ...]
    packed: Packed
    has_shares: bool = False
    """Whether each map comes with the share of attention that goes elsewhere."""
    ranked: tuple[Head, ...] = ()
    """Heads to step through, as places among `layers` and `heads`."""
    layer: int = 0
    """Layer shown first."""
    picks: tuple[tuple[int, tuple[float, ...]], ...] = ()
    """For each row a panel and a box in it: a click there shows the row."""
    elsewhere: str = "text"
    """Name of the shares."""
    text: Packed | None = None
    """Values on the text, [row, layer, head, column]: with what weight a row's token attends to each text token."""
    unit: str = "token"
    """What a value stands for: a token or a patch of an image."""
    facts: Facts = ()
    """What the page is about."""

    @property
    def error(self) -> float:
        """The largest error of a value in the page, as a share of its map's largest magnitude."""
        return max(packed.error for packed in (self.packed, self.text) if packed is not None)

    @cached_property
    def html(self) -> str:
        """The page as one self-contained document."""
        parts = {name: page_file(name) for name in ("look.css", "page.css", "draw.js", "paper.js", "page.js")}
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(page_file("page.html.jinja"))
        texts = () if self.text is None else self.text.rows
        return template.render(view=self, data=self._data(), texts=texts, boxes=self._boxes(), parts=parts)

    def save(self, path: str | Path) -> Path:
        """Write the page.

        Raises:
            OutputError: it cannot be written.
        """
        atomic_write(Path(path), lambda aside: aside.write_text(self.html, encoding="utf-8"))
        return Path(path)

    def _repr_html_(self) -> str:
        return IFRAME.format(title=html.escape(self.title), page=html.escape(self.html))

    def _data(self) -> dict[str, Any]:
        scene = self.scene
        colours = colormaps[DIVERGING if self.packed.zero else SEQUENTIAL]
        return {
            "quantity": self.quantity,
            "pictures": [
                {"src": data_url(picture), "width": picture.width, "height": picture.height, "evidence": evidence}
                for picture, evidence in zip(scene.pictures, scene.evidence, strict=True)
            ],
            "panels": [
                {"label": p.label, "picture": p.picture, "tokens": p.tokens.tolist(), "at": int(at), "tiles": p.tiles}
                for p, at in zip(scene.panels, np.cumsum([0, *(len(p.tokens) for p in scene.panels)]), strict=False)
            ],
            "chips": [{"text": c.text, "kind": c.kind, "row": c.row, "column": c.column} for c in self.chips],
            "nColumns": sum(c.column is not None for c in self.chips),
            "unit": self.unit,
            "nRows": len(self.packed.rows),
            "nTokens": scene.n_tokens,
            "layers": self.layers,
            "heads": self.heads,
            "ranked": self.ranked,
            "layer": self.layer,
            "picks": self.picks,
            "elsewhere": self.elsewhere,
            "zero": self.packed.zero,
            "clear": CLEAR,
            "error": self.packed.error,
            "hasShares": self.has_shares,
            "evidenceTokens": scene.evidence_tokens,
            "colours": [to_hex(colours(i / 255)) for i in range(256)],
        }

    def _boxes(self) -> str:
        return encoded(np.concatenate([panel.boxes for panel in self.scene.panels]).astype("<f4").tobytes())


def view_of(
    scene: Scene,
    values: Float[np.ndarray, "row layer head token"],
    chips: Sequence[Chip],
    layers: Sequence[Any],
    heads: Sequence[Any],
    shares: Float[np.ndarray, "row layer head"] | None = None,
    ranked: Sequence[Head] = (),
    text: Float[np.ndarray, "row layer head column"] | None = None,
    **texts: Any,
) -> View:
    """A view of values on the image tokens of a scene, in the order of its panels.

    Args:
        shares: the attention that goes elsewhere.
        text: the values on text, a column for each chip that names one.
        texts: the other fields of `View`.

    Raises:
        InputError: labels or values that do not fit together, or too many of them for a page.
    """
    expected = (values.shape[0], len(layers), len(heads), scene.n_tokens)
    if values.shape != expected or 0 in expected:
        raise InputError(
            f"values must be [row, layer, head, image token] = {list(expected)} by their labels and by the images, got "
            f"{list(values.shape)}"
        )
    for layer, head in ranked:
        if not (0 <= layer < len(layers) and 0 <= head < len(heads)):
            raise InputError(f"there is no head {layer}.{head}: there are {len(layers)} layers of {len(heads)} heads")
    packed = pack(values, shares)
    names = (tuple(map(str, layers)), tuple(map(str, heads)))
    return View(
        scene=scene,
        chips=tuple(chips),
        layers=names[0],
        heads=names[1],
        packed=packed,
        has_shares=shares is not None,
        text=None if text is None else pack(text, budget=TEXT_BUDGET),
        ranked=tuple((int(layer), int(head)) for layer, head in ranked),
        **texts,
    )


def page_file(name: str) -> str:
    """The text of an asset of the pages; `look.css` is shared by all."""
    return resources.files(str(__package__)).joinpath(name).read_text(encoding="utf-8")
