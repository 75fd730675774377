"""Resizing to whole tokens: the size that an image gets within bounds on its area."""

import math

from hooked_vlm.errors import ImageError

MAX_ASPECT_RATIO = 200  # as in the reference's smart_resize


def smart_resize(
    height: int,
    width: int,
    factor: int,
    min_pixels: float | int,
    max_pixels: float | int,
    n_frames: int = 1,
    n_counted: int = 1,
) -> tuple[int, int]:
    """The (height, width) to resize an image to: multiples of `factor`, an area within bounds, about the same
    aspect ratio.

    As in `transformers` (models/qwen2_vl/image_processing_pil_qwen2_vl.py), banker's rounding included; an
    extreme aspect ratio can exceed `max_pixels`, since no side gets shorter than `factor`.

    Args:
        n_frames: frames of a video, for all of which together the bounds hold.
        n_counted: the number of them that decides whether the bounds are met.

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
    if n_counted * new_height * new_width > max_pixels:
        shrink = math.sqrt((n_frames * height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif n_counted * new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (n_frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def resize_together(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, n_frames: int, temporal: int
) -> tuple[int, int]:
    """The (height, width) of each of a video's frames, where bounds hold for the area of all of them together.

    As in `transformers` (models/qwen3_vl/video_processing_qwen3_vl.py), where whole temporal patches of `temporal`
    frames count.

    Raises:
        ImageError: as `smart_resize`.
    """
    if 0 < min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    n_counted = max(1, round(n_frames / temporal)) * temporal
    return smart_resize(height, width, factor, min_pixels, max_pixels, n_frames, n_counted)
