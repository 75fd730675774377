"""Small random models of LLaVA-NeXT and LLaVA-OneVision: `transformers`' own, and batches like their processors'.

A picture in a row is ("image", (width, height)) in pixels. Tiles are 3 x 3 patches; of OneVision's tiles two pixels at
the right and at the bottom are in no patch.
"""

from functools import lru_cache
from typing import Any

import torch
import transformers
from tiny import reference, spelled
from tiny_llava import CLIP, for_hf, text_config
from torch import Tensor, nn
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

IMAGE, VIDEO = 193, 194
SIDE, N = 21, 3
"""Pixels and patches of the side of a tile."""
PINPOINTS = [[SIDE * rows, SIDE * cols] for rows, cols in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
"""LLaVA-NeXT's own, with smaller tiles."""


def shown(hf: Any) -> Any:
    """The reference with a module that its packed image features pass."""
    pack, hf.model.packed = hf.model.pack_image_features, nn.Identity()

    def packed(*args: Any, **kwargs: Any) -> Any:
        features, lengths = pack(*args, **kwargs)
        return list(hf.model.packed(torch.cat(features)).split(lengths.tolist())), lengths

    hf.model.pack_image_features = packed
    return hf


@lru_cache(maxsize=8)
def tiny_next(text: str = "mistral", siglip: bool = False) -> Any:
    """LLaVA-NeXT, with one of its language models. Shared: tests must not change its weights."""
    window = {"sliding_window": None} if text == "mistral" else {}
    tower = {**CLIP, "image_size": SIDE}
    config = transformers.LlavaNextConfig(
        vision_config={**tower, "model_type": "siglip_vision_model", "vision_use_head": False} if siglip else tower,
        text_config={**text_config(text, **window), "max_position_embeddings": 256},
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full" if siglip else "default",
    )
    return shown(reference(transformers.LlavaNextForConditionalGeneration, config))


def n_tokens(hf: Any, size: tuple[int, int]) -> int:
    """Placeholders of an image of (width, height) pixels: as many as the reference's own packing makes features."""
    width, height = size
    config = hf.config
    side = config.vision_config.image_size
    tiles = transformers.models.llava_next.modeling_llava_next.image_size_to_num_patches(
        (height, width), config.image_grid_pinpoints, side
    )
    features = torch.zeros(tiles, (side // config.vision_config.patch_size) ** 2, 1)
    options = {"image_newline": torch.zeros(1)}
    if config.model_type == "llava_next":
        options["vision_feature_select_strategy"] = config.vision_feature_select_strategy
    else:
        options["vision_aspect_ratio"] = config.vision_aspect_ratio
    packed, _ = type(hf.model).pack_image_features(hf.model, [features], torch.tensor([[height, width]]), **options)
    return len(packed[0])


def next_batch(rows: list[list[Any]], seed: int = 0) -> dict[str, Tensor]:
    """A batch as LLaVA-NeXT's processor returns it, padded on the left, tiles that an image lacks being zeros."""
    hf = tiny_next()
    sizes: list[tuple[int, int]] = []

    def placeholders(item: tuple[str, tuple[int, int]]) -> list[int]:
        sizes.append(item[1])
        return [IMAGE] * n_tokens(hf, item[1])

    batch = spelled(rows, placeholders)
    if sizes:
        batch |= tiles_of(hf, sizes, seed)
    return batch


def tiles_of(hf: Any, sizes: list[tuple[int, int]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    side = hf.config.vision_config.image_size
    pinpoints = hf.config.image_grid_pinpoints
    counts = [
        transformers.models.llava_next.modeling_llava_next.image_size_to_num_patches((h, w), pinpoints, side)
        for w, h in sizes
    ]
    pixels = torch.zeros(len(sizes), max(counts), 3, side, side)
    for own, n in zip(pixels, counts, strict=True):
        own[:n] = torch.randn(n, 3, side, side, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width] for width, height in sizes])}


WIDE, TALL, SMALL = (60, 33), (20, 90), (29, 30)
NEXT_CASES: dict[str, list[list[Any]]] = {
    "one-image": [[5, 6, ("image", WIDE), 7, 8, 9, 10]],
    "images-of-two-sizes": [[5, ("image", TALL), 7, ("image", SMALL), 8, 9]],
    "text": [[5, 6, 7, 8, 9, 10, 11]],
    "left-padded": [[5, ("image", WIDE), 7, 8], [11, 12, 13], [("image", SMALL), ("image", TALL), 9]],
}
NEXT_PROCESSOR = LlavaNextImageProcessorPil(
    size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
)
__all__ = ["IMAGE", "NEXT_CASES", "NEXT_PROCESSOR", "PINPOINTS", "VIDEO", "for_hf", "next_batch", "tiny_next"]
