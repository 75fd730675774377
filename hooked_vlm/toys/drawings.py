"""Drawn objects on cluttered backgrounds, for the naming task."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

OBJECTS = ("circle", "square", "triangle", "star", "cross", "heart", "moon", "arrow", "tree", "fish")

Points = list[tuple[float, float]]


def _regular(corners: int, radius: float = 1.0, phase: float = -math.pi / 2) -> Points:
    angles = [phase + 2 * math.pi * i / corners for i in range(corners)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _star() -> Points:
    outer, inner = _regular(5), _regular(5, 0.42, -math.pi / 2 + math.pi / 5)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _heart() -> Points:
    points = []
    for i in range(40):
        t = 2 * math.pi * i / 40
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -y / 17))
    return points


def _moon() -> Points:
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(0.7, 2 * math.pi - 0.7, 30)]
    tip_x, tip_y = math.cos(0.7), math.sin(0.7)
    centre, radius = 0.55, math.hypot(tip_x - 0.55, tip_y)
    start = math.atan2(tip_y, tip_x - centre)
    inner = [(centre + radius * math.cos(a), radius * math.sin(a)) for a in np.linspace(2 * math.pi - start, start, 24)]
    return outer + inner


def _fish() -> Points:
    body = [(0.65 * math.cos(a) - 0.3, 0.42 * math.sin(a)) for a in np.linspace(0.35, 2 * math.pi - 0.35, 28)]
    return [*body, (0.95, -0.55), (0.75, 0.0), (0.95, 0.55)]


# Outlines in a unit disc, y downwards.
SHAPES: dict[str, Points] = {
    "circle": _regular(40, 0.9),
    "square": _regular(4, 1.1, math.pi / 4),
    "triangle": _regular(3, 1.1),
    "star": _star(),
    "cross": [
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ],
    "heart": _heart(),
    "moon": _moon(),
    "arrow": [(-1, -0.22), (0.1, -0.22), (0.1, -0.65), (1, 0), (0.1, 0.65), (0.1, 0.22), (-1, 0.22)],
    "tree": [
        (0, -1), (0.45, -0.4), (0.2, -0.4), (0.7, 0.4), (0.15, 0.4), (0.15, 1),
        (-0.15, 1), (-0.15, 0.4), (-0.7, 0.4), (-0.2, 0.4), (-0.45, -0.4),
    ],
    "fish": _fish(),
}  # fmt: skip


def _colour(rng: np.random.Generator, low: int, high: int) -> tuple[int, int, int]:
    red, green, blue = (int(c) for c in rng.integers(low, high, size=3))
    return red, green, blue


def draw_object(rng: np.random.Generator, name: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one object, filled or outlined, of random colour, size, position and tilt, on clutter.

    The clutter is thin strokes, dots, a few characters and grain, never another object.

    Returns:
        (pixels, mask): uint8 [height, width, 3], and bool [height, width], True on the object and inside its outline.
    """
    width, height = size
    light = rng.random() < 0.7
    background = _colour(rng, 150, 256) if light else _colour(rng, 0, 90)
    image = Image.new("RGB", size, background)
    draw = ImageDraw.Draw(image)
    _clutter(rng, draw, size)

    scale = rng.uniform(0.26, 0.46) * min(size)
    angle = rng.uniform(-0.5, 0.5)  # up to 29 degrees: a square never becomes another shape
    stretch = rng.uniform(0.85, 1.18)
    centre_x = rng.uniform(scale, width - scale)
    centre_y = rng.uniform(scale, height - scale)
    mirror = -1 if rng.random() < 0.5 else 1
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    points = []
    for x, y in SHAPES[name]:
        x, y = x * mirror * stretch, y / stretch
        points.append((centre_x + cos * x - sin * y, centre_y + sin * x + cos * y))
    colour = _colour(rng, 0, 110) if light else _colour(rng, 140, 256)
    if rng.random() < 0.3:
        draw.line([*points, points[0], points[1]], fill=colour, width=int(rng.integers(3, 6)), joint="curve")
    else:
        draw.polygon(points, fill=colour)
    mask = Image.new("1", size)
    ImageDraw.Draw(mask).polygon(points, fill=1)
    pixels = np.asarray(image, np.float32) + rng.normal(0, rng.uniform(0, 8), size=(height, width, 1))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), np.array(mask)


def _clutter(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    width, height = size
    for _ in range(int(rng.integers(0, 8))):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        dx, dy = (int(d) for d in rng.integers(-30, 31, size=2))
        draw.line((x, y, x + dx, y + dy), fill=_colour(rng, 40, 220), width=int(rng.integers(1, 3)))
    for _ in range(int(rng.integers(0, 10))):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        radius = int(rng.integers(1, 4))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_colour(rng, 40, 220))
    for _ in range(int(rng.integers(0, 4))):
        x, y = int(rng.integers(width - 8)), int(rng.integers(height - 12))
        char = "0123456789abcdefghijklmnopqrstuvwxyz"[int(rng.integers(36))]
        font = ImageFont.load_default(size=int(rng.integers(10, 15)))
        draw.text((x, y), char, fill=_colour(rng, 40, 220), font=font)
