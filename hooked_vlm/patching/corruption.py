"""Corrupt images: a region masked, two regions swapped, noise. Boxes are pixels of the original image.

corrupt = clean.with_image(0, masked(picture, box))
"""

import math
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from hooked_vlm.errors import GeometryError
from hooked_vlm.inputs.boxes import Box
from hooked_vlm.inputs.images import load_image

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""


def masked(image: Any, box: Box, fill: Colour | None = None) -> Image.Image:
    """The image with a region painted over.

    Args:
        image: as for `model.to_inputs` (path, PIL image, array); what comes back is upright RGB of the same size.
        box: half-open (x0, y0, x1, y1) in pixels of the original image.
        fill: a colour; by default the mean of the pixels around the region, one pixel wide.

    Raises:
        GeometryError: the box holds no pixel of the image.
    """
    pixels, (rows, cols) = _pixels_and_region(image, box)
    pixels[rows, cols] = _around(pixels, rows, cols) if fill is None else fill
    return Image.fromarray(pixels)


def swapped(image: Any, box: Box, other: Box) -> Image.Image:
    """The image with two regions of one size in each other's place.

    Raises:
        GeometryError: a box holds no pixel of the image, the regions overlap, or they have different sizes.
    """
    pixels, (rows, cols) = _pixels_and_region(image, box)
    other_rows, other_cols = _region(pixels, other)
    first, second = pixels[rows, cols].copy(), pixels[other_rows, other_cols].copy()
    if first.shape != second.shape:
        sizes = [f"{part.shape[1]} x {part.shape[0]}" for part in (first, second)]
        raise GeometryError(f"regions of {sizes[0]} and {sizes[1]} pixels cannot be swapped: give both one size")
    if _meet(rows, other_rows) and _meet(cols, other_cols):
        raise GeometryError("the regions overlap: swapping them would write some pixels twice")
    pixels[rows, cols], pixels[other_rows, other_cols] = second, first
    return Image.fromarray(pixels)


def noised(image: Any, std: int | float, seed: int, box: Box | None = None) -> Image.Image:
    """The image with Gaussian noise on every colour of every pixel, clipped to 0 to 255.

    Args:
        std: standard deviation, of 255.
        box: only there, as in `masked`; the whole image by default.

    Raises:
        GeometryError: see `masked`; or a negative `std`.
    """
    if std < 0:
        raise GeometryError(f"the noise's standard deviation must not be negative, got {std}")
    pixels = _pixels(image)
    rows, cols = (slice(None), slice(None)) if box is None else _region(pixels, box)
    part = pixels[rows, cols]
    noise = np.random.default_rng(seed).normal(0, std, part.shape)
    pixels[rows, cols] = np.clip(np.rint(part + noise), 0, 255)
    return Image.fromarray(pixels)


def _pixels(image: Any) -> UInt8[np.ndarray, "row col 3"]:
    return np.array(load_image(image))


def _pixels_and_region(image: Any, box: Box) -> tuple[UInt8[np.ndarray, "row col 3"], tuple[slice, slice]]:
    pixels = _pixels(image)
    return pixels, _region(pixels, box)


def _region(pixels: UInt8[np.ndarray, "row col 3"], box: Box) -> tuple[slice, slice]:
    """Rows and columns of the pixels whose upper left corner lies in the box."""
    x0, y0, x1, y1 = (float(c) for c in box)
    height, width = pixels.shape[:2]
    rows = slice(max(math.ceil(y0), 0), min(math.ceil(y1), height))
    cols = slice(max(math.ceil(x0), 0), min(math.ceil(x1), width))
    if rows.start >= rows.stop or cols.start >= cols.stop:
        raise GeometryError(
            f"the box ({x0:g}, {y0:g}, {x1:g}, {y1:g}) holds no pixel of the image, which is {width} x {height} "
            "(width x height): expected (x0, y0, x1, y1) with x0 < x1 and y0 < y1"
        )
    return rows, cols


def _around(pixels: UInt8[np.ndarray, "row col 3"], rows: slice, cols: slice) -> UInt8[np.ndarray, "3"]:
    height, width = pixels.shape[:2]
    frame = np.zeros((height, width), dtype=bool)
    frame[max(rows.start - 1, 0) : rows.stop + 1, max(cols.start - 1, 0) : cols.stop + 1] = True
    frame[rows, cols] = False
    if not frame.any():  # the region is the whole image
        frame[:] = True
    return np.rint(pixels[frame].mean(0)).astype(np.uint8)


def _meet(a: slice, b: slice) -> bool:
    return a.start < b.stop and b.start < a.stop
