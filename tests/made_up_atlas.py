"""Atlases with structure, made up: few heads do a thing, in the layers where it is done."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from hooked_vlm.atlas.definitions import SCORES, Kind, Score
from hooked_vlm.atlas.page import SIGNED, Picture
from hooked_vlm.atlas.result import Atlas, Observed

STIMULI: dict[Kind, tuple[str, ...]] = {
    "page": tuple(f"page-{i}" for i in range(20)),
    "text": tuple(f"text-{i}" for i in range(20)),
    "object": tuple(f"object-{i}" for i in range(20)),
    "repeated": tuple(f"repeated-{i}" for i in range(20)),
}
WHERE = {
    "ocr": (0.6, 12, 0.9),
    "text_retrieval": (0.6, 12, 0.9),
    "localisation": (0.55, 20, 0.7),
    "induction": (0.4, 30, 0.95),
    "previous_token": (0.15, 10, 0.95),
    "duplicate_token": (0.2, 8, 0.6),
    "transfer": (0.5, 25, 0.6),
    "transfer_in_groups": (0.5, 25, 0.5),
    "direct_logit": (0.85, 40, 1.2),
    "text_region": (0.5, 30, 0.5),
    "answer_without": (0.7, 20, 0.4),
    "sink_patches": (0.7, 60, 0.6),
}
"""Depth of the layers, number of heads and size of what they do."""


def made_up_atlas(
    model: str = "made-up/28-layers",
    language: tuple[int, int] = (28, 28),
    vision: tuple[int, int] | None = (32, 16),
    seed: int = 0,
    edit: Callable[[str, np.ndarray], None] = lambda name, values: None,
) -> Atlas:
    """An atlas of heads of both towers.

    Args:
        edit: changes the values [stimulus, layer, head] of a score in place.
    """
    shapes = {"language": language, "vision": vision}
    observed = {}
    for number, score in enumerate(SCORES):
        shape = shapes[score.tower]
        if shape is not None:
            values, nulls = made_up_values(score, shape, np.random.default_rng([seed, number]))
            edit(score.name, values)
            stimuli = tuple(name for kind in score.kinds for name in STIMULI[kind])
            observed[score.name] = Observed(stimuli, values, nulls)
    return Atlas(model, observed, {"seed": 0, "stimuli": 48, "answered correctly": 0.91})


def made_up_values(
    score: Score, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[Float[np.ndarray, "stimulus layer head"], Float[np.ndarray, "stimulus layer head"]]:
    """Values and nulls of a score."""
    layers, heads = shape
    n = sum(len(STIMULI[kind]) for kind in score.kinds)
    depth = np.linspace(0, 1, layers)[:, None]
    signed = score.unit in SIGNED
    base = 0 if signed else 0.05 + 0.04 * rng.random((layers, heads))
    if score.name in WHERE:
        centre, count, size = WHERE[score.name]
        weight = np.exp(-(((depth - centre) / 0.12) ** 2)) * np.ones((1, heads))
        count = min(count, layers * heads // 4)
        chosen = rng.choice(layers * heads, count, replace=False, p=(weight / weight.sum()).ravel())
        strength = np.zeros(layers * heads)
        strength[chosen] = size * rng.beta(1.5, 2.0, count)
        mean = base + strength.reshape(shape)
        if signed:
            mean = mean * np.where(rng.random(shape) < 0.2, -0.5, 1) + 0.01 * rng.standard_normal(shape)
    else:
        wave = 0.45 + 0.35 * np.sin(4 * depth + rng.random() * 6)
        mean = np.clip(wave + 0.12 * rng.standard_normal(shape) * (1 + depth), 0.01, None)
        mean = mean * (8 * (0.3 + depth) if score.unit == "norm" else 1)
    noise = 0.15 * np.abs(mean) + 0.02
    values = mean + noise * rng.standard_normal((n, layers, heads))
    values = values if signed else np.clip(values, 0, 1 if score.unit == "share" else None)
    nulls = np.zeros_like(values) if signed else np.clip(0.07 + 0.02 * rng.standard_normal(values.shape), 0, 1)
    return values, nulls


def made_up_pictures() -> list[Picture]:
    """A picture of every page and object, with the pages of the viewer that it links to."""
    rng = np.random.default_rng(3)
    return [_page(name, rng) for name in STIMULI["page"]] + [_object(name, rng) for name in STIMULI["object"]]


def _page(name: str, rng: np.random.Generator) -> Picture:
    image = Image.new("RGB", (320, 240), "#fbfaf6")
    pen, lines = ImageDraw.Draw(image), [(word, f"{rng.integers(1, 99)}.{rng.integers(10, 99)}") for word in WORDS]
    for i, (word, price) in enumerate(lines):
        pen.text((24, 20 + 34 * i), word, fill="#222", font_size=20)
        pen.text((220, 20 + 34 * i), price, fill="#222", font_size=20)
    word, price = lines[int(rng.integers(len(lines)))]
    links = (f"pictures/{name}.html", f"pictures/{name}-vision.html")
    return Picture(name, image, f"What does the {word.lower()} cost? {price}", *links)


def _object(name: str, rng: np.random.Generator) -> Picture:
    colour, shape = COLOURS[int(rng.integers(len(COLOURS)))], ("circle", "square")[int(rng.integers(2))]
    image = Image.new("RGB", (240, 240), "#dfe6ea")
    x, y, size = (int(v) for v in rng.integers(20, 110, 3))
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)((x, y, x + size, y + size), fill=colour)
    return Picture(name, image, f"Which colour is the {shape}? {colour}", f"pictures/{name}.html")


WORDS = ("Bread", "Coffee", "Apples", "Paper", "Total")
COLOURS = ("red", "green", "blue", "orange")
