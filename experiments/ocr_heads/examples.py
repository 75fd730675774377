"""Questions about pictures or texts, and the location of each part of the answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from hooked_vlm.experiments.ocr_heads.config import Protocol
from hooked_vlm.inputs.boxes import ImageSize
from hooked_vlm.inputs.images import load_image
from hooked_vlm.inputs.picture_processor import Bounds
from hooked_vlm.inputs.resizing import smart_resize
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.model.vlm import HookedVLM

MARKS = 3
"""Most tokens around a picture: its two marks and a line break."""
Box = tuple[int | float, int | float, int | float, int | float]
"""Half-open (x0, y0, x1, y1) in pixels of the picture."""
Picture = Image.Image | Path


@dataclass(frozen=True, eq=False)
class Evidence:
    """A part of the answer and its location."""

    start: int
    """The part is answer[start:stop]."""
    stop: int
    image: int
    """Index into the example's pictures."""
    box: Box


@dataclass(frozen=True, eq=False)
class Example:
    """One question, about pictures or about the text in front of it."""

    question: str
    answers: tuple[str, ...]
    """Accepted answers; `evidence` locates the first."""
    images: tuple[Picture, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    context: str = ""
    """Text in front of the question."""
    answer_at: int | None = None
    """Start of the answer in `context`; None for answers in pictures."""
    chat: bool = True
    """Whether it is asked in the checkpoint's chat template."""
    first_resize: int | None = None
    """Pictures are first resized to multiples of this many pixels; boxes are those of the pictures before it."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle with the pictures, because another machine may not have their files."""
        return vars(self) | {"images": tuple(load_image(image) for image in self.images)}

    @property
    def answer(self) -> str:
        return self.answers[0]

    @property
    def prompt(self) -> str:
        return self.context + self.question


def coarse(example: Example) -> Example:
    """Replace the evidence by one box around the whole answer, on the page where it starts."""
    if not example.evidence:
        return example
    page = example.evidence[0].image
    boxes = [e.box for e in example.evidence if e.image == page]
    corners = list(zip(*boxes, strict=True))
    whole: Box = (min(corners[0]), min(corners[1]), max(corners[2]), max(corners[3]))
    return replace(example, evidence=(Evidence(0, len(example.answer), page, whole),))


def as_asked(example: Example, protocol: Protocol) -> Example:
    """The example as a protocol puts it to a model: order of pages, first resizing, chat template.

    The evidence keeps its page numbers, so pages in the order of their names move away from under it from 11 pages on,
    as in the published code.
    """
    images = example.images
    if protocol.page_order == "name":
        images = tuple(images[i] for i in sorted(range(len(images)), key=str))
    return replace(example, images=images, chat=protocol.chat, first_resize=protocol.first_resize)


def to_inputs(model: HookedVLM, examples: Sequence[Example], pixels: int | None) -> VLMInputs:
    """Batch the examples, which are all asked in the chat template, or none.

    `pixels` fixes the area of every resized picture; a model that tiles pictures then sees each as one tile, as in the
    paper.
    """
    chat = all(e.chat for e in examples)
    prompts = [e.prompt if chat else _bare(model, e) for e in examples]
    if not any(e.images for e in examples):  # works with text-only models, too
        return model.to_inputs(prompts, chat=chat)
    bounds: dict[str, Any] = {} if model.image_processor is None else model.image_processor.bounds_for(pixels)
    images = [[first_resized(image, e.first_resize) for image in e.images] for e in examples]
    return model.to_inputs(prompts, images, chat=chat, **bounds)


def _bare(model: HookedVLM, example: Example) -> str:
    """A prompt without chat template as the published code writes it: beginning of text, pictures, a line break."""
    text = model.input_builder.text
    first = model.tokenizer.decode(model.tokenizer("")["input_ids"])
    if model.cfg.vision is None:
        return first + example.prompt
    pictures = text.marked(text.image_token) * len(example.images) or text.marked("")
    return f"{first}{pictures}\n{example.prompt}"


FIRST_BOUNDS = (4 * 28 * 28, 16384 * 28 * 28)
"""Area in pixels of a picture after its first resizing (qwen-vl-utils 0.0.8)."""


def first_resized(picture: Picture, multiple: int | None) -> Picture:
    """Resize a picture to the nearest multiples of so many pixels, as qwen-vl-utils' `fetch_image` does."""
    if multiple is None:
        return picture
    image = load_image(picture)
    height, width = smart_resize(image.height, image.width, multiple, *FIRST_BOUNDS)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def picture_size(picture: Picture) -> ImageSize:
    """Width and height of a picture, in pixels."""
    if isinstance(picture, Image.Image):
        return ImageSize(*picture.size)
    with Image.open(picture) as opened:
        return ImageSize(*opened.size)


def prompt_length(model: HookedVLM, example: Example, pixels: int | None) -> int:
    """Upper bound of the number of tokens of the example's prompt, within a few, without preparing its pictures."""
    text = model.to_inputs(example.prompt).shape[1]
    if not example.images:
        return text
    processor = model.image_processor
    assert processor is not None  # `check_takes_images`
    processor = processor.with_bounds(Bounds(**processor.bounds_for(pixels)))
    sizes: list[tuple[int, int]] = []
    for image in example.images:
        width, height = picture_size(image)
        if example.first_resize is not None:
            height, width = smart_resize(height, width, example.first_resize, *FIRST_BOUNDS)
        sizes.append((width, height))
    return text + sum(processor.n_tokens(size) + MARKS for size in sizes)


def batches(n_tokens: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group indices by length into batches of at most `tokens_per_batch` tokens, padding included."""
    groups: list[list[int]] = []
    for i in sorted(range(len(n_tokens)), key=lambda i: n_tokens[i]):
        if not groups or n_tokens[i] * (len(groups[-1]) + 1) > tokens_per_batch:
            groups.append([])
        groups[-1].append(i)
    return groups
