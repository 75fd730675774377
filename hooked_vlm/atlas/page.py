"""An atlas as one HTML page that opens from disk: maps of heads, a scatter, a table, pictures, all linked.

save_atlas_page("out/atlas.html", found, [Picture("page-3", image, "What is the total? 7", "pictures/page-3.html")])
"""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap, to_hex

from hooked_vlm.analysis.pictures import DIVERGING, SEQUENTIAL
from hooked_vlm.atlas.comparison import compare
from hooked_vlm.atlas.definitions import BY_NAME, KINDS, TOWERS
from hooked_vlm.atlas.result import Atlas
from hooked_vlm.atlas.show import ALPHA, no_power
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.images import load_image
from hooked_vlm.interventions.base import Tower
from hooked_vlm.runtime.files import atomic_write
from hooked_vlm.viewer.quantisation import encoded
from hooked_vlm.viewer.view import page_file

SHOWN_FIRST = (
    *("ocr", "text_retrieval", "localisation", "image_from_answer", "induction", "transfer"),
    *("distance", "sink_patches", "text_region", "answer_without", "class_token"),
)
"""Scores whose maps are shown first."""
SIGNED = ("nats", "logits")
"""Units of effects, whose colours have 0 in their middle."""
STRONGEST = 3
"""Pictures shown of a head."""
LONGEST = 220
"""Longer side of a thumbnail in pixels."""
NONE = 255
"""The number of no picture."""
MOST_PICTURES = NONE - 1
DOUBLES, SINGLES = ("p", "p_holm"), ("value", "low", "high", "null", "n")
"""Columns of the page: p are kept in 64 bits, which do not round them to 0."""
DARK_DIVERGING = LinearSegmentedColormap.from_list("dark", ["#7cc4ff", "#2f6ea3", "#26282b", "#a8492f", "#ffa07a"])
"""Zero is dark, as the page is."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A stimulus as the page shows it."""

    name: str
    """Of the stimulus, as in `Observed.stimuli`."""
    thumbnail: Any
    """An image as for `load_image`; it is reduced."""
    caption: str = ""
    """Question and answer."""
    link: str = ""
    """File, relative to the page, with a page of `viewer.attention` on it, which opens with the head in question."""
    vision_link: str = ""
    """The same of `viewer.vision_attention`, for heads of the vision tower."""


def atlas_page(found: Atlas, pictures: Sequence[Picture] = (), other: Atlas | None = None) -> str:
    """The page of an atlas, or of two: as one self-contained document.

    Args:
        pictures: stimuli of `found`, 254 at most; of each head those are shown on which it is strongest.
        other: a second atlas; where the two can be compared, the page has the differences too.

    Raises:
        InputError: a picture of no stimulus, two of one stimulus, or links that are not relative; an atlas without a
            score.
        ImageError: a thumbnail that is no image.
    """
    _check(found, pictures)
    sets, refused, few = [_as_set(found, found.table)], [], [_too_few(found)]
    if other is not None:
        sets.append(_as_set(other, other.table))
        few.append(_too_few(other))
        try:
            compared = compare(found, other)
            rows = compared.table.rename(columns={"difference": "value"}).assign(null=0.0)
            sets.append(_as_set(found, rows) | {"model": "difference"})
            refused = [*compared.refused.values()]
        except InputError as error:  # side by side, all the same
            refused = [str(error)]
    parts = {name: _asset(name) for name in ("atlas.css", "numbers.js", "maps.js", "card.js", "atlas.js", "table.js")}
    parts |= {name: page_file(name) for name in ("look.css", "draw.js")}
    blobs = [tower.pop("blob") for own in sets for tower in own["towers"].values()]
    data = {
        "sets": sets,
        "scores": {name: _definition(name) for name in BY_NAME if any(name in own["names"] for own in sets)},
        "first": SHOWN_FIRST,
        "level": ALPHA,
        "none": NONE,
        "pictures": [_shown(picture) for picture in pictures],
        "colours": _colours(),
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_asset("atlas.html.jinja"))
    return template.render(
        found=found,
        other=other,
        facts=[_facts("Model", found)] if other is None else [_facts("Model A", found), _facts("Model B", other)],
        kinds=KINDS,
        towers=TOWERS,
        data=data,
        blobs=blobs,
        warnings=[*refused, *filter(None, few)],
        strongest={tower: _strongest_blob(found, tower, pictures) for tower in found.towers} if pictures else {},
        parts=parts,
    )


def save_atlas_page(
    path: str | Path, found: Atlas, pictures: Sequence[Picture] = (), other: Atlas | None = None
) -> Path:
    """Write `atlas_page`.

    Raises:
        InputError, ImageError: as `atlas_page`.
        OutputError: it cannot be written.
    """
    page = atlas_page(found, pictures, other)
    atomic_write(Path(path), lambda aside: aside.write_text(page, encoding="utf-8"))
    return Path(path)


def strongest_pictures(
    found: Atlas, name: str, pictures: Sequence[Picture]
) -> tuple[UInt8[np.ndarray, "layer head rank"], Float[np.ndarray, "layer head rank"]]:
    """For every head, the pictures among these on which it scores highest above the null (as `Atlas.strongest`), best
    first, by their numbers, `NONE` where there is none; and the score there."""
    own = found.observed[name]
    layers, heads = own.values.shape[1:]
    numbers = {picture.name: number for number, picture in enumerate(pictures)}
    kept = [i for i, stimulus in enumerate(own.stimuli) if stimulus in numbers]
    places = np.full((layers, heads, STRONGEST), NONE, np.uint8)
    scores = np.full((layers, heads, STRONGEST), np.nan, np.float32)
    values = own.values[kept]
    above = np.nan_to_num(values - np.nan_to_num(own.nulls[kept]), nan=-np.inf)
    order = np.argsort(-above, axis=0, kind="stable")[:STRONGEST]
    for rank, best in enumerate(order):
        known = np.isfinite(np.take_along_axis(above, best[None], 0)[0])
        codes = np.array([numbers[own.stimuli[i]] for i in kept], np.uint8)[best]
        places[..., rank] = np.where(known, codes, NONE)
        scores[..., rank] = np.where(known, np.take_along_axis(values, best[None], 0)[0], np.nan)
    return places, scores


def _check(found: Atlas, pictures: Sequence[Picture]) -> None:
    if not found.scores:
        raise InputError("an atlas without a score has no page")
    names = [picture.name for picture in pictures]
    if len(names) > MOST_PICTURES:
        raise InputError(f"a page takes {MOST_PICTURES} pictures at most, got {len(names)}")
    stimuli = {stimulus for own in found.observed.values() for stimulus in own.stimuli}
    for picture in pictures:
        if picture.name not in stimuli:
            raise InputError(f"there is no stimulus {picture.name!r} in this atlas")
        if names.count(picture.name) > 1:
            raise InputError(f"there are two pictures of the stimulus {picture.name!r}")
        for link in (picture.link, picture.vision_link):
            if link.startswith("/") or "://" in link:
                raise InputError(f"links are files beside the page, as pictures/page-3.html, got {link!r}")


def _as_set(atlas: Atlas, rows: pd.DataFrame) -> dict[str, Any]:
    """Numbers that are shown together: of an atlas, or the differences of two."""
    present = [tower for tower in TOWERS if tower in set(rows["tower"])]
    towers = {tower: _of_tower(pd.DataFrame(rows[rows["tower"] == tower])) for tower in present}
    names = [name for tower in towers.values() for name in tower["scores"]]
    return {"model": atlas.model, "towers": towers, "names": names}


def _of_tower(rows: pd.DataFrame) -> dict[str, Any]:
    """Rows in the order of score, layer and head, as `Atlas.table` has them."""
    columns = [rows[list(names)].to_numpy(kind).T.tobytes() for names, kind in ((DOUBLES, "<f8"), (SINGLES, "<f4"))]
    return {
        "layers": int(rows["layer"].to_numpy().max()) + 1,
        "heads": int(rows["head"].to_numpy().max()) + 1,
        "scores": list(dict.fromkeys(rows["score"])),
        "blob": encoded(b"".join(columns)),
    }


def _strongest_blob(found: Atlas, tower: Tower, pictures: Sequence[Picture]) -> str:
    """Scores, then numbers of pictures, [score, head, rank] each, of all scores of the tower."""
    each = [strongest_pictures(found, score.name, pictures) for score in found.scores if score.tower == tower]
    values = b"".join(scores.astype("<f4").tobytes() for _, scores in each)
    return encoded(values + b"".join(numbers.tobytes() for numbers, _ in each))


def _definition(name: str) -> dict[str, Any]:
    score = BY_NAME[name]
    return {"title": score.title, "unit": score.unit, "tested": bool(score.null), "tower": score.tower} | {
        "signed": score.unit in SIGNED,
        "formula": score.formula,
        "null": score.null,
        "source": score.source,
        "kinds": score.kinds,
    }


def _facts(label: str, atlas: Atlas) -> dict[str, str]:
    facts = {label: atlas.model}
    for tower in atlas.towers:
        facts[TOWERS[tower].capitalize()] = "{} layers of {} heads".format(*atlas.shape(tower))
    kinds = Counter(atlas.settings.get("kinds", {}).values())
    if kinds:
        facts["Stimuli"] = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    for name, value in atlas.settings.items():
        if isinstance(value, str | int | float):
            facts[name.replace("_", " ")] = f"{value:.3g}" if isinstance(value, float) else _short(str(value))
    return facts


def _too_few(atlas: Atlas) -> str:
    """A sentence about scores whose tests no head can pass, on so few stimuli; nothing if there are none."""
    titles = [score.title for score in atlas.scores if no_power(atlas.rows(score.name))]
    return (
        f"{atlas.model} has too few stimuli for any head to be significant in: {'; '.join(titles)}." if titles else ""
    )


def _short(text: str) -> str:
    """The beginning of a digest."""
    return f"{text[:12]}…" if len(text) >= 32 and set(text) <= set("0123456789abcdef") else text


def _shown(picture: Picture) -> dict[str, str]:
    links = {"language": quote(picture.link), "vision": quote(picture.vision_link)}
    return {"name": picture.name, "src": _thumbnail(picture.thumbnail), "caption": picture.caption, **links}


def _thumbnail(image: Any) -> str:
    """A small picture as a data URL, in whichever format is shorter."""
    small = load_image(image).copy()
    small.thumbnail((LONGEST, LONGEST))
    urls = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        file = io.BytesIO()
        small.save(file, kind, **options)
        urls.append(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
    return min(urls, key=len)


def _colours() -> dict[str, list[str]]:
    maps = {"sequential": colormaps[SEQUENTIAL], "diverging": colormaps[DIVERGING], "dark": DARK_DIVERGING}
    return {name: [to_hex(colours(i / 255)) for i in range(256)] for name, colours in maps.items()}


def _asset(name: str) -> str:
    return resources.files(str(__package__)).joinpath(name).read_text(encoding="utf-8")
