"""Questions about pictures with text, and where in the pictures each part of the answer is written."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from hooked_vlm.tiles import TileProcessor

MARKS = 3
"""Tokens around a picture at most: its two marks and a line break."""
Box = tuple[int | float, int | float, int | float, int | float]
"""Half-open (x0, y0, x1, y1) in pixels of the picture."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """A part of the answer, and where it is written."""

    start: int
    """The part is answer[start:stop]."""
    stop: int
    image: int
    """Which of the example's pictures."""
    box: Box


@dataclass(frozen=True, eq=False)
class Example:
    """One question."""

    question: str
    answer: str
    images: tuple[Image.Image, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    exact: bool = True
    """Right means the reply is the answer; otherwise, that it contains it (as the paper judges passkeys)."""

    def is_right(self, reply: str) -> bool:
        return reply.strip() == self.answer if self.exact else self.answer in reply


def coarse(example: Example) -> Example:
    """The same question with one box around all of the answer, on the page where it starts."""
    if not example.evidence:
        return example
    page = example.evidence[0].image
    boxes = [e.box for e in example.evidence if e.image == page]
    corners = list(zip(*boxes, strict=True))
    whole: Box = (min(corners[0]), min(corners[1]), max(corners[2]), max(corners[3]))
    evidence = (Evidence(0, len(example.answer), page, whole),)
    return Example(example.question, example.answer, example.images, evidence, example.exact)


def to_inputs(model: Any, examples: Sequence[Example], pixels: int | None) -> Any:
    """The examples as one batch.

    `pixels` fixes the area of every resized picture; a model that tiles pictures then sees each as one tile,
    as the paper has it.
    """
    images = [list(e.images) for e in examples] if any(e.images for e in examples) else None
    if isinstance(model.image_processor, TileProcessor):
        bounds = {"max_tiles": None if pixels is None else 1}
    else:
        bounds = {"min_pixels": pixels, "max_pixels": pixels}
    return model.to_inputs([e.question for e in examples], images, **bounds)


def prompt_length(model: Any, example: Example, pixels: int | None) -> int:
    """How many tokens the example's prompt has, a few more at most, without preparing its pictures."""
    text = model.to_inputs(example.question).shape[1]
    processor = model.image_processor
    if isinstance(processor, TileProcessor) and pixels is not None:
        processor = processor.bounded(1, 1)
    elif pixels is not None:
        processor = replace(processor, min_pixels=pixels, max_pixels=pixels)
    return text + sum(processor.n_tokens(image.size) + MARKS for image in example.images)


def batches(n_tokens: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices grouped into batches of at most so many tokens, padding counted; rows of like length together."""
    groups: list[list[int]] = []
    for i in sorted(range(len(n_tokens)), key=lambda i: n_tokens[i]):
        if not groups or n_tokens[i] * (len(groups[-1]) + 1) > tokens_per_batch:
            groups.append([])
        groups[-1].append(i)
    return groups
