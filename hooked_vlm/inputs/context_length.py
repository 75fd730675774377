"""Advice for a prompt that does not fit the context: the bound on its pictures with which it would."""

from collections.abc import Sequence

from hooked_vlm.config import VLMConfig
from hooked_vlm.inputs.boxes import ImageSize
from hooked_vlm.inputs.picture_processor import Bounds, PictureProcessor

Picture = tuple[ImageSize, int]
"""The size of an image or of a video's frames, and its number of temporal patches."""


def too_long_message(
    rows: list[list[int]],
    pictures: Sequence[Sequence[Picture]],
    processor: PictureProcessor | None,
    given: Bounds,
    cfg: VLMConfig,
) -> str:
    """The error message for a prompt longer than the context, with the largest bound on pictures that fits every row.

    Args:
        rows: token ids with all placeholders.
        pictures: for each row, its images and videos that bounds of the call resize.
        given: the user's bounds on the pictures.
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
    for advice, bounded in processor.tighter(n_text, pictures, n_ctx, given):
        n_visual = [sum(frames * bounded.n_tokens(size) for size, frames in row) for row in pictures]
        if max(a + b for a, b in zip(n_text, n_visual, strict=True)) <= n_ctx:
            return f"{message} ({n_image} of them for images): pass {advice}"
    return f"{message} ({n_image} of them for images): shorten the text, or give fewer images or frames"
