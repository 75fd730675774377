"""Small random models of the LLaVA family: `transformers`' own, and batches as their processors make them."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tiny import LANGUAGE_MODEL, reference, spelled

IMAGE = 193
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
"""Three blocks, the second of which is read; 16 patches to a picture."""


def text_config(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **LANGUAGE_MODEL, "max_position_embeddings": 128, **changes}


SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}


@lru_cache(maxsize=8)
def tiny_llava(text: str = "llama", siglip: bool = False) -> Any:
    """LLaVA-1.5, with its own or another language model and tower. Shared: tests must not change its weights."""
    config = transformers.LlavaConfig(
        vision_config=SIGLIP if siglip else CLIP,
        text_config=text_config(text),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if siglip else "default",
    )
    return reference(transformers.LlavaForConditionalGeneration, config)


def llava_batch(rows: list[list[Any]], seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch as LLaVA-1.5's processor returns it, padded on the left.

    A row is a list of token ids and of "image", every one of another picture.
    """
    n_images = sum(item == "image" for row in rows for item in row)
    batch = spelled(rows, lambda _: [IMAGE] * 16)
    if n_images:
        batch["pixel_values"] = torch.randn(n_images, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    return batch


def picture(width: int, height: int) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def for_hf(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the reference takes of a batch: positions count real tokens only."""
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


LLAVA_CASES: dict[str, list[list[Any]]] = {
    "one-image": [[5, 6, "image", 7, 8, 9, 10]],
    "images-of-two-sizes": [[5, "image", 7, "image", 8, 9]],
    "text": [[5, 6, 7, 8, 9, 10, 11]],
    "left-padded": [[5, "image", 7, 8], [11, 12, 13], ["image", "image", 9]],
}
