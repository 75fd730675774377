"""Resizing to whole tokens: the size that an image gets within bounds on its area."""

import math

from hooked_vlm.errors import ImageError

MAX_ASPECT_RATIO = 200  # as in the reference's smart_resize


def smart_resize(
    height: int, width: int, factor: int, min_pixels: float | int, max_pixels: float | int
) -> tuple[int, int]:
    """The (height, width) to resize an image to: multiples of `factor`, an area within bounds, about the same
    aspect ratio.

    As in `transformers` (models/qwen2_vl/image_processing_pil_qwen2_vl.py), banker's rounding included; an
    extreme aspect ratio can exceed `max_pixels`, since no side gets shorter than `factor`.

    Raises:
        ImageError: a side is 0, or the aspect ratio exceeds 200.
    """
    if min(height, width) < 1:
        raise ImageError(f"an image needs at least 1 x 1 pixels, got {width} x {height} (width x height)")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"an image of {width} x {height} pixels (width x height) is too narrow: one side may be at most "
            f"{MAX_ASPECT_RATIO} times the other; crop or pad it"
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width
