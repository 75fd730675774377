"""Advice for a prompt that does not fit the context: the bound on its pictures with which it would."""

from collections.abc import Iterator, Sequence

from hooked_vlm.config import VLMConfig
from hooked_vlm.inputs.geometry import ImageSize
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.tiles import TileProcessor

Picture = tuple[ImageSize, int]
"""The size of an image or of a video's frames, and its number of temporal patches."""


def too_long_message(
    rows: list[list[int]],
    pictures: Sequence[Sequence[Picture]],
    processor: ImageProcessor | TileProcessor | None,
    max_pixels: int | None,
    cfg: VLMConfig,
) -> str:
    """The error message for a prompt longer than the context, with the largest bound on pictures that fits every row.

    Args:
        rows: token ids with all placeholders.
        pictures: for each row, its images and videos that bounds of the call resize.
        max_pixels: the user's bound on the pictures, if any.
    """
    n_ctx = cfg.n_ctx_limit
    longest = max(rows, key=len)
    n_image = sum(i in cfg.placeholder_ids for i in longest)
    message = f"the prompt has {len(longest)} tokens but the context holds {n_ctx}"
    if processor is None or n_image == 0 or len(longest) - n_image > n_ctx:
        return f"{message}: shorten the text"
    n_text = [
        len(row) - sum(frames * processor.n_tokens(size) for size, frames in its_pictures)
        for row, its_pictures in zip(rows, pictures, strict=True)
    ]
    for advice, bounded in _tighter_bounds(processor, n_text, pictures, max_pixels, n_ctx):
        n_visual = [sum(frames * bounded.n_tokens(size) for size, frames in row) for row in pictures]
        if max(a + b for a, b in zip(n_text, n_visual, strict=True)) <= n_ctx:
            return f"{message} ({n_image} of them for images): pass {advice}"
    return f"{message} ({n_image} of them for images): shorten the text, or give fewer images or frames"


def _tighter_bounds(
    processor: ImageProcessor | TileProcessor,
    n_text: list[int],
    pictures: Sequence[Sequence[Picture]],
    max_pixels: int | None,
    n_ctx: int,
) -> Iterator[tuple[str, ImageProcessor | TileProcessor]]:
    """Smaller and smaller bounds on the pictures, with the arguments that set them."""
    if isinstance(processor, TileProcessor):
        for fewer in range(processor.max_tiles - 1, 0, -1):
            yield f"max_tiles={fewer} (now {processor.max_tiles})", processor.bounded(None, fewer)
        return
    area, least = processor.pixels_per_token**2, processor.min_pixels
    now = "the checkpoint's own" if max_pixels is None else str(max_pixels)
    # tokens for each picture if all take their full share; a narrow picture takes more, as no side is below a token's
    shares = [(n_ctx - n) // sum(frames for _, frames in row) for n, row in zip(n_text, pictures, strict=True) if row]
    for most in range(min(shares, default=0) * area, 0, -area):
        lower = f"min_pixels={most} and " if least > most else ""
        yield f"{lower}max_pixels={most} (now {now})", processor.bounded(min(least, most), most)
