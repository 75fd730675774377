"""The demo as one HTML page that opens from disk: it picks among what the model computed."""

from collections.abc import Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from jaxtyping import UInt8

from hooked_vlm.experiments.demo.story import as_data, changed_words, name, pair, rank_words, score_words
from hooked_vlm.experiments.demo.turning import FACTORS, Reply, TurnedDown
from hooked_vlm.experiments.ocr_heads.changed import UNCHANGED
from hooked_vlm.experiments.ocr_heads.effects import interval
from hooked_vlm.experiments.ocr_heads.examples import Example
from hooked_vlm.runtime.files import atomic_write
from hooked_vlm.viewer.quantisation import encoded
from hooked_vlm.viewer.scene import data_url
from hooked_vlm.viewer.view import page_file

if TYPE_CHECKING:
    from hooked_vlm.experiments.demo.pipeline import Demo

COLOURS = ("#d55e00", "#0072b2")
"""Of the two heads, told apart by readers who see few colours."""
CODES = 255
"""Code of the largest attention weight in the page; others are rounded to its 255th parts."""


def write_page(demo: "Demo") -> Path:
    """Write demo.html.

    Raises:
        OutputError: it cannot be written.
    """
    atomic_write(demo.page, lambda aside: aside.write_text(page_of(demo), encoding="utf-8"))
    return demo.page


def page_of(demo: "Demo") -> str:
    """The page as one self-contained document."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    reach = max(float(reply.attention.max(initial=0.0)) for one in _all(demo) for reply in one.replies)
    parts = {part: page_file(part) for part in ("look.css", "draw.js")}
    parts |= {part: _file(part) for part in ("demo.css", "demo.js")}
    return environment.from_string(_file("demo.html.jinja")).render(
        demo=demo,
        story=as_data(demo),
        heads=[
            {"name": name(h), "score": score_words(demo, h), "colour": c}
            for h, c in zip(demo.heads, COLOURS, strict=True)
        ],
        shares=_shares(demo),
        rank=rank_words(demo),
        changes=changed_words(demo),
        origin=demo.pages.control.origin,
        data=_data(demo, reach),
        maps=encoded(np.concatenate([_codes(reply, reach) for one in _all(demo) for reply in one.replies]).tobytes()),
        parts=parts,
    )


def spans_of_tokens(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Where each token stands in the text of all, which begins with its first character that is no white space."""
    whole = "".join(tokens)
    ends = np.cumsum([0, *map(len, tokens)]) - (len(whole) - len(whole.lstrip()))
    return list(pairwise(ends.clip(0).tolist()))


def boxes_in(example: Example, start: int, stop: int) -> list[tuple[float, ...]]:
    """Boxes of the answer's characters from `start` to `stop`."""
    return [tuple(map(float, e.box)) for e in example.evidence if e.start < stop and start < e.stop]


def _all(demo: "Demo") -> list[TurnedDown]:
    return [demo.reading, *demo.random]


def _codes(reply: Reply, reach: float) -> UInt8[np.ndarray, "map token"]:
    """Maps of a reply, token after token and of each token head after head, in parts of the largest weight."""
    maps = reply.attention.swapaxes(0, 1).reshape(-1, reply.attention.shape[-1])
    return np.rint(maps / (reach or 1) * CODES).astype(np.uint8)


def _data(demo: "Demo", reach: float) -> dict[str, Any]:
    """What the page's script picks from."""
    scene, first, settings = demo.scene, 0, []
    for one in _all(demo):
        steps = []
        for reply in one.replies:
            spans = spans_of_tokens(reply.tokens)
            steps.append(
                {
                    "tokens": list(reply.tokens),
                    "probabilities": [float(f"{p:.4g}") for p in reply.probabilities],
                    "text": reply.text,
                    "expected": [demo.example.answer[start:stop] for start, stop in spans],
                    "boxes": [boxes_in(demo.example, *span) for span in spans],
                    "first": first,
                }
            )
            first += len(reply.tokens) * len(demo.heads)
        settings.append(
            {
                "heads": [name(h) for h in one.heads],
                "steps": steps,
                "expected": [float(f"{p:.4g}") for p in one.expected],
            }
        )
    picture = scene.pictures[0]
    return {
        "answer": demo.example.answer,
        "factors": [round(100 * factor) for factor in FACTORS],
        "settings": settings,
        "watched": [{"name": name(h), "colour": c} for h, c in zip(demo.heads, COLOURS, strict=True)],
        "picture": {"src": data_url(picture), "width": picture.width, "height": picture.height},
        "boxes": np.concatenate([panel.boxes for panel in scene.panels]).ravel().round(2).tolist(),
        "tokens": np.concatenate([panel.tokens for panel in scene.panels]).tolist(),
        "nTokens": scene.n_tokens,
        "reach": reach,
    }


def _shares(demo: "Demo") -> list[dict[str, Any]]:
    """Shares of pages answered right, as rows of the chart; random pairs have a dot for each draw."""
    pages = demo.pages
    rows = [("all heads", UNCHANGED.name, []), (f"without {pair(demo.heads)}", pages.name, [])]
    rows.append(("without two random heads", pages.control.name, _dots(demo)))
    return [
        {"label": label, "said": interval(pages.share(key)), "dots": dots}
        | {end: 100 * float(getattr(pages.share(key), end)) for end in ("value", "low", "high")}
        for label, key, dots in rows
    ]


def _dots(demo: "Demo") -> list[dict[str, Any]]:
    """A dot for each random pair; dots of equal shares are stacked."""
    below: dict[float, int] = {}
    dots = []
    for number, (one, share) in enumerate(zip(demo.random, demo.pages.random_shares, strict=True), 1):
        stacked = below[share] = below.get(share, -1) + 1
        dots.append({"pair": number, "heads": pair(one.heads), "at": 100 * share, "row": stacked})
    return dots


def _file(asset: str) -> str:
    return resources.files(str(__package__)).joinpath(asset).read_text(encoding="utf-8")
