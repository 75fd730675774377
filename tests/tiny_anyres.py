"""Small random models of LLaVA-NeXT and LLaVA-OneVision: `transformers`' own, and batches like their processors'.

In a row, ("image", (width, height)) is a picture of so many pixels and ("video", n) one of n frames. Tiles are 3 x 3
patches; of OneVision's tiles two pixels at the right and at the bottom are in no patch.
"""

from functools import lru_cache
from typing import Any

import torch
import transformers
from tiny import reference, spelled
from tiny_llava import CLIP, for_hf, text_config
from torch import Tensor, nn
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from hooked_vlm.inputs.anyres import AnyresProcessor
from hooked_vlm.inputs.onevision import OneVisionProcessor

__all__ = ["for_hf"]

IMAGE, VIDEO = 193, 194
SIDE, OV_SIDE, N = 21, 23, 3
"""Pixels of the side of a tile of either family, and patches of both."""
PINPOINTS = [[SIDE * rows, SIDE * cols] for rows, cols in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
OV_PINPOINTS = [[OV_SIDE * rows, OV_SIDE * cols] for rows in range(1, 4) for cols in range(1, 4)]
"""As the published ones, with smaller tiles."""
MOST = 2
"""Tiles' worth of tokens above which OneVision's grids are resampled."""
Size = tuple[int, int]


def with_packed(hf: Any) -> Any:
    """The reference with a module, `packed`, that the features of its images and videos pass as tokens."""
    of_images: Any = hf.model.pack_image_features
    of_videos: Any = getattr(hf.model, "get_video_features", None)
    hf.model.packed = nn.Identity()

    def pack(*args: Any, **kwargs: Any) -> Any:
        features, lengths = of_images(*args, **kwargs)
        return list(hf.model.packed(torch.cat(features)).split(lengths.tolist())), lengths

    def videos(*args: Any, **kwargs: Any) -> Any:
        out = of_videos(*args, **kwargs)
        hf.model.packed(out.pooler_output.flatten(0, 1))
        return out

    hf.model.pack_image_features = pack
    if of_videos is not None:
        hf.model.get_video_features = videos
    return hf


@lru_cache(maxsize=8)
def tiny_next(text: str = "mistral", siglip: bool = False) -> Any:
    """LLaVA-NeXT, with its own or another language model and tower. Shared: tests must not change its weights."""
    window = {"sliding_window": None} if text == "mistral" else {}
    tower = {**CLIP, "image_size": SIDE}
    config = transformers.LlavaNextConfig(
        vision_config={**tower, "model_type": "siglip_vision_model", "vision_use_head": False} if siglip else tower,
        text_config={**text_config(text, **window), "max_position_embeddings": 256},
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full" if siglip else "default",
    )
    return with_packed(reference(transformers.LlavaNextForConditionalGeneration, config))


@lru_cache(maxsize=2)
def tiny_onevision(tied: bool = False) -> Any:
    """LLaVA-OneVision. Shared: tests must not change its weights."""
    tower = {**CLIP, "model_type": "siglip_vision_model", "image_size": OV_SIDE, "num_hidden_layers": 2}
    config = transformers.LlavaOnevisionConfig(
        vision_config={**tower, "vision_use_head": False},
        text_config={**text_config("qwen2"), "max_position_embeddings": 256, "tie_word_embeddings": tied},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=OV_PINPOINTS,
        vision_aspect_ratio=f"anyres_max_{MOST}",
        tie_word_embeddings=tied,
    )
    return with_packed(reference(transformers.LlavaOnevisionForConditionalGeneration, config))


def n_tiles(hf: Any, size: Size) -> int:
    """Tiles of an image of (width, height) pixels, the whole picture among them."""
    config = hf.config
    return image_size_to_num_patches(size[::-1], config.image_grid_pinpoints, config.vision_config.image_size)


def n_tokens(hf: Any, size: Size) -> int:
    """Placeholders of an image of (width, height) pixels: as many as the reference's own packing makes features."""
    config, features = hf.config, torch.zeros(n_tiles(hf, size), N**2, 1)
    options: dict[str, Any] = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    if config.model_type == "llava_onevision":
        options = {"vision_aspect_ratio": config.vision_aspect_ratio}
    packed, _ = type(hf.model).pack_image_features(
        hf.model, [features], torch.tensor([size[::-1]]), image_newline=torch.zeros(1), **options
    )
    return len(packed[0])


def next_batch(rows: list[list[Any]], seed: int = 0) -> dict[str, Tensor]:
    """A batch as LLaVA-NeXT's processor returns it, padded on the left."""
    hf = tiny_next()
    batch = spelled(rows, lambda item: [IMAGE] * n_tokens(hf, item[1]))
    sizes = [item[1] for row in rows for item in row if isinstance(item, tuple)]
    return {**batch, **_pixels(hf, sizes, [n_tiles(hf, size) for size in sizes], seed)}


def onevision_batch(rows: list[list[Any]], seed: int = 0) -> dict[str, Tensor]:
    """A batch as LLaVA-OneVision's processor returns it, padded on the left; several images in a row are one tile
    each."""
    hf = tiny_onevision()
    images = [[item[1] for item in row if isinstance(item, tuple) and item[0] == "image"] for row in rows]
    several = {id(row): len(own) > 1 for row, own in zip(rows, images, strict=True)}
    of_row = iter([several[id(row)] for row in rows for item in row if isinstance(item, tuple)])
    half = -(-N // 2)

    def placeholders(item: tuple[str, Any]) -> list[int]:
        together = next(of_row)
        if item[0] == "video":
            return [VIDEO] * (item[1] * half**2 + 1)
        return [IMAGE] * (N**2 + 1 if together else n_tokens(hf, item[1]))

    batch = spelled(rows, placeholders)
    sizes = [size for own in images for size in own]
    counts = [1 if len(own) > 1 else n_tiles(hf, size) for own in images for size in own]
    batch |= _pixels(hf, sizes, counts, seed)
    if sizes:
        batch["batch_num_images"] = torch.tensor([len(own) for own in images if own])
    if frames := [item[1] for row in rows for item in row if isinstance(item, tuple) and item[0] == "video"]:
        generator = torch.Generator().manual_seed(seed + 1)
        shape = (len(frames), frames[0], 3, OV_SIDE, OV_SIDE)
        batch["pixel_values_videos"] = torch.randn(*shape, generator=generator)
    return batch


def _pixels(hf: Any, sizes: list[Size], counts: list[int], seed: int) -> dict[str, Tensor]:
    """Tiles of images, those that one has less than another being zeros, and (height, width) of each."""
    if not sizes:
        return {}
    generator, side = torch.Generator().manual_seed(seed), hf.config.vision_config.image_size
    pixels = torch.zeros(len(sizes), max(counts), 3, side, side)
    for own, n in zip(pixels, counts, strict=True):
        own[:n] = torch.randn(n, 3, side, side, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([size[::-1] for size in sizes])}


WIDE, TALL, SMALL = (60, 33), (20, 90), (29, 30)
NEXT_CASES: dict[str, list[list[Any]]] = {
    "one-image": [[5, 6, ("image", WIDE), 7, 8, 9, 10]],
    "images-of-two-sizes": [[5, ("image", TALL), 7, ("image", SMALL), 8, 9]],
    "text": [[5, 6, 7, 8, 9, 10, 11]],
    "left-padded": [[5, ("image", WIDE), 7, 8], [11, 12, 13], [("image", SMALL), ("image", TALL), 9]],
}
LARGE = (70, 62)
"""Nine tiles, resampled."""
ONEVISION_CASES: dict[str, list[list[Any]]] = {
    **NEXT_CASES,
    "one-image": [[5, 6, ("image", LARGE), 7, 8, 9, 10]],
    "alone-and-together": [[5, ("image", WIDE), 6], [5, ("image", TALL), 7, ("image", LARGE), 8]],
    "video": [[5, ("video", 3), 6, 7], [("video", 3), 8]],
    "image-and-video": [[5, ("image", LARGE), 6, ("video", 2), 7, 8]],
}
NEXT_PROCESSOR = LlavaNextImageProcessorPil(
    size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
)
ONEVISION_PROCESSOR = LlavaOnevisionImageProcessorPil(
    size={"height": OV_SIDE, "width": OV_SIDE},
    image_grid_pinpoints=OV_PINPOINTS,
    image_mean=[0.5, 0.4, 0.3],
    image_std=[0.5, 0.6, 0.7],
)


def pairs(pinpoints: list[list[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((high, wide) for high, wide in pinpoints)


NEXT = AnyresProcessor(pairs(PINPOINTS), side=SIDE, patch_size=7)
ONEVISION = OneVisionProcessor(
    pairs(OV_PINPOINTS),
    side=OV_SIDE,
    patch_size=7,
    max_grid=MOST,
    image_mean=(0.5, 0.4, 0.3),
    image_std=(0.5, 0.6, 0.7),
)
BATCHES = {"llava-next": next_batch, "llava-onevision": onevision_batch}
