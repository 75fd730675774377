"""What to advise when a prompt with its pictures does not fit the context."""

import math

from hooked_vlm.config import VLMConfig
from hooked_vlm.inputs.geometry import ImageSize
from hooked_vlm.inputs.images import ImageProcessor, smart_resize
from hooked_vlm.inputs.tiles import TileProcessor

Picture = tuple[ImageSize, int]
"""The size of an image or of a video's frames, and how many temporal patches it has."""


def too_long(
    rows: list[list[int]],
    pictures: list[list[Picture]],
    processor: ImageProcessor | TileProcessor | None,
    max_pixels: int | None,
    cfg: VLMConfig,
) -> str:
    """What to say of a prompt longer than the context: the largest `max_pixels` with which every row fits.

    Args:
        rows: token ids with all placeholders.
        pictures: of each row.
        max_pixels: what the user bounded the pictures with.
    """
    n_ctx = cfg.n_ctx_limit
    n_text = [sum(i not in cfg.placeholder_ids for i in row) for row in rows]
    longest = max(range(len(rows)), key=lambda row: len(rows[row]))
    n_image = len(rows[longest]) - n_text[longest]
    message = f"the prompt has {len(rows[longest])} tokens but the context holds {n_ctx}"
    if processor is None or n_image == 0 or max(n_text) > n_ctx:
        return f"{message}: shorten the text"
    if isinstance(processor, TileProcessor):
        return _too_many_tiles(message, n_image, n_text, pictures, processor, n_ctx)
    side, area = processor.pixels_per_token, processor.pixels_per_token**2
    least = processor.min_pixels

    def fit(row: int, most: int) -> bool:
        sizes = [
            frames * math.prod(smart_resize(height, width, side, min(least, most), most))
            for (width, height), frames in pictures[row]
        ]
        return n_text[row] + sum(sizes) // area <= n_ctx

    # tokens for each picture, if all took what they may; a narrow one takes more, no side being below a token's
    shares = [
        (n_ctx - n_text[row]) // sum(frames for _, frames in pictures[row]) for row in range(len(rows)) if pictures[row]
    ]
    for fitting in range(min(shares) * area, 0, -area):
        if all(fit(row, fitting) for row in range(len(rows))):
            now = "the checkpoint's own" if max_pixels is None else str(max_pixels)
            lower = f"min_pixels={fitting} and " if least > fitting else ""
            return f"{message} ({n_image} stand for images): pass {lower}max_pixels={fitting} (now {now})"
    return f"{message} ({n_image} stand for images): shorten the text, or give fewer images or frames"


def _too_many_tiles(
    message: str,
    n_image: int,
    n_text: list[int],
    pictures: list[list[Picture]],
    processor: TileProcessor,
    n_ctx: int,
) -> str:
    for fewer in range(processor.max_tiles - 1, 0, -1):
        bounded = processor.bounded(None, fewer)
        lengths = [n + sum(bounded.n_tokens(s) for s, _ in row) for n, row in zip(n_text, pictures, strict=True)]
        if max(lengths) <= n_ctx:
            return f"{message} ({n_image} stand for images): pass max_tiles={fewer} (now {processor.max_tiles})"
    return f"{message} ({n_image} stand for images): shorten the text, or give fewer images"
