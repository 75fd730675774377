"""Prompts and drawn pictures for comparing both libraries."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hooked_vlm.inputs.picture_processor import Bounds, PictureProcessor
from hooked_vlm.inputs.prompt_styles import STYLES
from hooked_vlm.inputs.vlm_inputs import VLMInputs

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

MOST_TOKENS = 256
"""Largest area of a picture that is not tiled; small, so that passes are short on a CPU."""
MOST_TILES = 2
"""Most tiles of a picture, without its thumbnail."""
LINES = ("INVOICE 20417", "paper   12.50", "ink     31.99", "total   44.49")


@dataclass(frozen=True)
class Prompt:
    """One question with its pictures."""

    name: str
    text: str
    pictures: tuple[Image.Image, ...] = ()


QUICK = ("text only", "wide picture")
"""Names of the prompts of a quick comparison."""


def prompts(seed: int = 0, quick: bool = False) -> list[Prompt]:
    """Prompts: text alone, a page of text, a wide picture, a transparent one, and two pictures of different sizes;
    `quick`: the first and the third."""
    page, wide, transparent = page_of_text(), wide_picture(seed), transparent_picture()
    every = [
        Prompt("text only", "Name three colours of the rainbow."),
        Prompt("page of text", "What is the total?", (page,)),
        Prompt("wide picture", "Which colours are in this picture?", (wide,)),
        Prompt("transparent picture", "Which shape is this?", (transparent,)),
        Prompt("two pictures", "What do these pictures have in common?", (transparent, page)),
    ]
    return [prompt for prompt in every if not quick or prompt.name in QUICK]


def page_of_text() -> Image.Image:
    """Draw a receipt in black on white, 240 x 200 pixels."""
    page = Image.new("RGB", (240, 200), "white")
    for row, line in enumerate(LINES):
        ImageDraw.Draw(page).text((16, 16 + 44 * row), line, fill="black", font=ImageFont.load_default(26))
    return page


def wide_picture(seed: int) -> Image.Image:
    """Draw blocks of random colours, 420 x 90 pixels."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 14, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(30, axis=0).repeat(30, axis=1))


def transparent_picture() -> Image.Image:
    """Draw a half-transparent ring on a transparent background, 150 x 150 pixels."""
    picture = Image.new("RGBA", (150, 150), (0, 0, 0, 0))
    ImageDraw.Draw(picture).ellipse((20, 20, 130, 130), fill=(200, 30, 60, 128), outline=(0, 0, 120, 255), width=12)
    return picture


def inputs_for(model: "HookedVLM", prompt: Prompt) -> VLMInputs:
    """Inputs of a prompt, with bounded pictures; a model that has chats, but no template of them, gets bare text."""
    tokenizer, processor = model.tokenizer, model.image_processor
    templates = (getattr(tokenizer, "chat_template", None), model.cfg.chat_template)
    chat = any(templates) or STYLES[model.cfg.prompt_style].plain
    bounds: dict[str, Any] = {}
    if prompt.pictures:
        bounds = processor.bounds_below(MOST_TOKENS, MOST_TILES)
    return model.to_inputs(prompt.text, images=list(prompt.pictures) or None, chat=chat, **bounds)


def bounded_processor(model: "HookedVLM") -> PictureProcessor:
    """The image processor with the bounds of `inputs_for`."""
    processor: Any = model.image_processor
    return processor.with_bounds(Bounds(**processor.bounds_below(MOST_TOKENS, MOST_TILES)))
