"""Inputs of a model: images, prompts, tokens, and the batch that carries them."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.inputs.boxes import Box
    from hooked_vlm.inputs.geometry import ImageLayout
    from hooked_vlm.inputs.image_processor import ImageProcessor
    from hooked_vlm.inputs.images import load_image
    from hooked_vlm.inputs.picture_processor import PictureProcessor
    from hooked_vlm.inputs.templates import TEMPLATES, ChatTemplate
    from hooked_vlm.inputs.tiles import TileProcessor
    from hooked_vlm.inputs.tokenization import load_tokenizer
    from hooked_vlm.inputs.vlm_inputs import VLMInputs

__all__ = [
    "TEMPLATES", "Box", "ChatTemplate", "ImageLayout", "ImageProcessor", "PictureProcessor", "TileProcessor",
    "VLMInputs", "load_image", "load_tokenizer",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
