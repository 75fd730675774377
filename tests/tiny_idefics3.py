"""Small random models of Idefics3 and SmolVLM: `transformers`' own, and batches like their processors'.

In a row, ("image", (columns, rows)) is a picture of so many tiles, seen whole behind them if they are several. Tiles
are 4 x 4 patches, of which 2 x 2 become a token; two pixels at the right and at the bottom are in no patch.
"""

from functools import lru_cache
from typing import Any

import torch
import transformers
from tiny import LANGUAGE_MODEL, reference, spelled
from tiny_llava import for_hf
from torch import Tensor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from hooked_vlm.inputs.idefics3 import Idefics3Processor

__all__ = ["for_hf"]

IMAGE, MARK, WHOLE, LINE, TWO_LINES, FIRST_TAG = 193, 194, 195, 196, 197, 180
"""Placeholder, what stands around images, before the whole picture, line breaks, before the tile of row 1, column 1."""
SIDE, N_TOKENS, LONGEST = 34, 4, 100
"""Pixels of the side of a tile, its tokens, and pixels of the longest edge of an enlarged picture: three tiles."""
Size = tuple[int, int]
CLASSES = {
    "idefics3": (transformers.Idefics3Config, transformers.Idefics3ForConditionalGeneration),
    "smolvlm": (transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration),
}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": 8,
}  # fmt: skip


@lru_cache(maxsize=4)
def tiny_hf(name: str, tied: bool = False) -> Any:
    """The reference. Shared: tests must not change its weights."""
    make, model_class = CLASSES[name]
    rope = {"rope_type": "default", "rope_theta": 1e5}
    text = {"model_type": "llama", **LANGUAGE_MODEL, "max_position_embeddings": 256, "rope_parameters": rope}
    config = make(
        text_config=text, vision_config=VISION, scale_factor=2, image_token_id=IMAGE, tie_word_embeddings=tied
    )
    return reference(model_class, config)


def n_tiles(tiling: Size) -> int:
    """Tiles of an image of (columns, rows) of them, the whole picture among them."""
    return tiling[0] * tiling[1] + (tiling != (1, 1))


def around_tiles(tiling: Size) -> list[int]:
    """Placeholders of an image, and the tokens between them."""
    cols, rows = tiling
    tokens: list[int] = []
    if tiling != (1, 1):
        for row in range(rows):
            for col in range(cols):
                tokens += [MARK, FIRST_TAG + 3 * row + col, *[IMAGE] * N_TOKENS]
            tokens.append(LINE if row < rows - 1 else TWO_LINES)
    return [*tokens, MARK, WHOLE, *[IMAGE] * N_TOKENS, MARK]


def hf_batch(rows: list[list[Any]], seed: int = 0) -> dict[str, Tensor]:
    """A batch as a Hugging Face processor returns it, padded on the left; rows with fewer tiles are padded with zeros,
    rows without images are left out of the pixels."""
    batch = spelled(rows, lambda item: around_tiles(item[1]))
    of_rows = [sum(n_tiles(item[1]) for item in row if isinstance(item, tuple)) for row in rows]
    if counts := [n for n in of_rows if n]:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.zeros(len(counts), max(counts), 3, SIDE, SIDE)
        mask = torch.zeros(len(counts), max(counts), SIDE, SIDE, dtype=torch.int64)
        for own, seen, n in zip(pixels, mask, counts, strict=True):
            own[:n], seen[:n] = torch.randn(n, 3, SIDE, SIDE, generator=generator), 1
        batch |= {"pixel_values": pixels, "pixel_attention_mask": mask}
    return batch


SMALL, LARGE = (2, 1), (2, 2)
CASES: dict[str, list[list[Any]]] = {
    "one-image": [[5, 6, ("image", (3, 2)), 7, 8, 9, 10]],
    "images-of-two-sizes": [[5, ("image", LARGE), ("image", (1, 1)), 7, ("image", SMALL), 8, 9]],
    "text": [[5, 6, 7, 8, 9, 10, 11]],
    "left-padded": [[5, ("image", (1, 3)), 7, 8], [11, 12, 13], [("image", SMALL), ("image", (1, 1)), 9]],
}
OF_TRANSFORMERS = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}
SETTINGS: dict[str, Any] = {"size": {"longest_edge": LONGEST}, "max_image_size": {"longest_edge": SIDE}}
OURS = Idefics3Processor(side=SIDE, patch_size=8, merge_size=2, longest_edge=LONGEST)
