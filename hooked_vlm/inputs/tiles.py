"""InternVL2's image preparation: an image as square tiles and a thumbnail, with Pillow and numpy only.

Equal to the published `dynamic_preprocess` with its bicubic resizing and ImageNet normalisation, tile for
tile. `hooked_vlm.inputs.images` reads the pictures (orientation, transparency, 16-bit greyscale).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import ImageError, InputError
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.image_settings import (
    IMAGES,
    Settings,
    colours,
    common_settings,
    processor_settings,
    whole,
)
from hooked_vlm.inputs.layouts import tiled_layout, unplaced_layout
from hooked_vlm.inputs.tiling import TilingProcessor, cut

if TYPE_CHECKING:
    from hooked_vlm.inputs.token_layout import Grid, InputSpec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SILENT_TILES = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
"""Where a file for `transformers` is silent (GotOcr2ImageProcessorPil)."""
MOST_TILES, MOST_PIXELS = 256, 2**26
"""Limits for one image; published checkpoints cut it into at most 40 tiles of 448 x 448 pixels."""


@dataclass(frozen=True)
class TileProcessor(TilingProcessor):
    """Turn images into `pixel_values` [tile, 3, tile_size, tile_size]; the defaults are the published checkpoints'."""

    tile_size: int = 448
    """Side of a tile in pixels."""
    patch_size: int = 14
    merge_size: int = 2
    min_tiles: int = 1
    max_tiles: int = 12
    """Largest number of tiles of an image, without its thumbnail; 1: every image is one tile."""
    thumbnail: bool = True
    """Whether a thumbnail of the whole image follows the tiles of an image that has several."""
    transposed_tokens: bool = False
    """The tokens of a tile are numbered column by column (pixel shuffle "v1")."""
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("tile_size", "patch_size", "merge_size", "min_tiles", "max_tiles"):
            whole(name, getattr(self, name))
        if self.tile_size % self.pixels_per_token:
            raise ImageError(
                f"tile_size must be a multiple of patch_size * merge_size = {self.pixels_per_token}, "
                f"got {self.tile_size}"
            )
        if self.max_tiles > MOST_TILES or self.max_tiles * self.tile_size**2 > MOST_PIXELS:
            raise ImageError(
                f"an image may have at most {MOST_TILES} tiles and {MOST_PIXELS} pixels of tiles, got "
                f"max_tiles={self.max_tiles} of {self.tile_size} x {self.tile_size}"
            )
        if self.min_tiles > self.max_tiles:
            raise ImageError(
                f"expected 1 <= min_tiles <= max_tiles, got min_tiles={self.min_tiles}, max_tiles={self.max_tiles}"
            )
        colours("image_mean", self.image_mean)
        colours("image_std", self.image_std)

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of tile pixels that one token covers."""
        return self.patch_size * self.merge_size

    @property
    def tokens_per_tile(self) -> int:
        return (self.tile_size // self.pixels_per_token) ** 2

    def tiling(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of tiles for an image of these pixels.

        The grid of `min_tiles` to `max_tiles` tiles with the aspect ratio closest to the image's; of two equally
        close, the one with more tiles if the image has more than half of that one's pixels.
        """
        best, least = (1, 1), math.inf
        for cols, rows in _grids(self.min_tiles, self.max_tiles):
            difference = abs(width / height - cols / rows)
            enough = width * height > 0.5 * self.tile_size**2 * cols * rows
            if difference < least or (difference == least and enough):
                best, least = (cols, rows), difference
        return best

    def layout(self, size: tuple[int, int]) -> ImageLayout:
        """The layout of an image of (width, height) pixels."""
        return self._layout((size[0], size[1]), self.tiling(*size))

    def layout_of(self, grid: "Grid", size: tuple[int, int] | None = None, kind: str = "image") -> ImageLayout:
        """The layout of an image of `grid[0]` tiles: without its size only that of a single tile is known.

        Raises:
            InputError: this processor makes no such grid of a picture of this size.
        """
        n_tiles, side = grid[0], grid[1] * self.patch_size
        if size is None:
            alone = replace(self, tile_size=side)
            return alone._layout((side, side), (1, 1), False) if n_tiles == 1 else self._unplaced(grid)
        layout = self.layout(size)
        if layout.n_tiles != n_tiles or self.tile_size != side:
            raise InputError(
                f"an image of {size[0]} x {size[1]} pixels has {n_tiles} tiles {side} wide, but this processor makes "
                f"{layout.n_tiles} tiles {self.tile_size} wide"
            )
        return layout

    def _layout(self, size: tuple[int, int], tiling: tuple[int, int], size_known: bool = True) -> ImageLayout:
        thumbnail = self.thumbnail and tiling != (1, 1)
        sizes = (self.patch_size, self.merge_size, self.tile_size)
        return tiled_layout(size, tiling, thumbnail, *sizes, self.transposed_tokens, size_known)

    def _unplaced(self, grid: "Grid") -> ImageLayout:
        return unplaced_layout(grid[0], grid[1], self.merge_size)

    def read_batch(
        self, tokens: Int[Tensor, "batch pos"], batch: Mapping[str, Tensor | None], spec: "InputSpec"
    ) -> tuple[Tensor | None, Tensor | None, list[ImageLayout] | None]:
        """Pixels and grids, from `num_tiles` or else the runs of placeholders."""
        pixels = batch["pixel_values"]
        return pixels, None if pixels is None else tile_grids(tokens, pixels, batch["num_tiles"], spec), None

    def tiles_of(self, rgb: Image.Image) -> UInt8[np.ndarray, "tile side side 3"]:
        """The tiles row by row, the thumbnail last."""
        side = self.tile_size
        cols, rows = self.tiling(*rgb.size)
        tiles = cut(rgb.resize((cols * side, rows * side), Image.Resampling.BICUBIC), side)
        if self.thumbnail and cols * rows > 1:
            small = np.asarray(rgb.resize((side, side), Image.Resampling.BICUBIC))
            tiles = np.concatenate([tiles, small[None]])
        return tiles

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **defaults: Any) -> "TileProcessor":
        """From `preprocessor_config.json` of either layout, over `defaults` from the model's configuration.

        The published repositories keep tiling in config.json (`defaults`); those for transformers' own classes
        name it `min_patches`, `max_patches` and `crop_to_patches` here.

        Raises:
            ImageError: a setting that is not supported.
        """
        config = processor_settings(config)
        fields = {**defaults, **common_settings(config)}
        for key, name in (("min_patches", "min_tiles"), ("max_patches", "max_tiles")):
            if config.get(key) is not None:
                fields[name] = whole(key, config[key])
        if config.get("use_thumbnail") is not None:
            if not isinstance(config["use_thumbnail"], bool):
                raise ImageError(f"use_thumbnail must be true or false, got {config['use_thumbnail']!r}")
            fields["thumbnail"] = config["use_thumbnail"]
        size = config.get("size")
        if isinstance(size, Mapping) and size.get("height") is not None:
            if size["height"] != size.get("width"):
                raise ImageError(f"unsupported image processor: expected square tiles, got a size of {dict(size)}")
            fields["tile_size"] = whole("size", size["height"])
        return cls(**fields)

    def bounded(self, min_tiles: int | None, max_tiles: int | None) -> "TileProcessor":
        """The same processor with other bounds; None keeps one. `max_tiles` below `min_tiles` lowers both."""
        most = self.max_tiles if max_tiles is None else whole("max_tiles", max_tiles)
        least = min(self.min_tiles, most) if min_tiles is None else min_tiles
        return replace(self, min_tiles=least, max_tiles=most)

    def with_most_tiles(self, max_tiles: int) -> "TileProcessor":
        return self.bounded(None, max_tiles)

    @property
    def tile_counts(self) -> range:
        return range(self.max_tiles, 0, -1)

    @property
    def tile_side(self) -> int:
        return self.tile_size

    @classmethod
    def from_checkpoint(cls, cfg: VLMConfig, images: Settings, videos: Settings) -> "TileProcessor":
        """The checkpoint's processor of images; it takes no videos.

        Raises:
            CheckpointError: settings that are not supported.
        """
        names = ("tile_size", "patch_size", "merge_size", "min_tiles", "max_tiles", "thumbnail", "transposed_tokens")
        assert cfg.vision is not None
        sizes = {name: getattr(cfg.vision, name) for name in names} | {"merge_size": cfg.vision.token_size}
        of_transformers = images.file is not None and cfg.original_architecture.endswith("ForConditionalGeneration")
        try:
            return cls.from_dict(images.values, **sizes, **(SILENT_TILES if of_transformers else {}))
        except ImageError as error:
            raise images.refusal(error) from error

    def to_files(self) -> dict[str, dict[str, Any]]:
        """Settings of images."""
        return {
            IMAGES: {
                "image_processor_type": "GotOcr2ImageProcessor",
                "processor_class": "InternVLProcessor",
                "crop_to_patches": self.max_tiles > 1,
                "min_patches": self.min_tiles,
                "max_patches": self.max_tiles,
                "use_thumbnail": self.thumbnail,
                "size": {"height": self.tile_size, "width": self.tile_size},
                "image_mean": list(self.image_mean),
                "image_std": list(self.image_std),
            }
        }


@lru_cache(maxsize=32)
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Every (columns, rows) with `least` to `most` tiles, by rising number of tiles.

    Grids with equally many tiles stay in the order of a set built as the published code builds it, because
    that order decides between two that are equally close.
    """
    every = {
        (cols, rows)
        for n in range(least, most + 1)
        for cols in range(1, n + 1)
        for rows in range(1, n + 1)
        if least <= cols * rows <= most
    }
    return tuple(sorted(every, key=lambda grid: grid[0] * grid[1]))


def tile_grids(
    tokens: Int[Tensor, "batch pos"],
    pixels: Float[Tensor, "tile ..."],
    num_tiles: Int[Tensor, "image"] | None,
    spec: "InputSpec",
) -> Int[Tensor, "image 3"]:
    """Grids of the images of a model that tiles them: (tiles, rows, columns) of patches.

    Without `num_tiles`, every run of placeholders is one image.

    Raises:
        InputError: tiles that are not square, or do not fit the placeholders.
    """
    if pixels.ndim != 4 or pixels.shape[2] != pixels.shape[3] or pixels.shape[2] % (spec.patch_size * spec.token_size):
        side = spec.patch_size * spec.token_size
        raise InputError(
            f"pixel_values must be [tile, channels, side, side] with a side that is a multiple of {side}, got "
            f"{tuple(pixels.shape)}"
        )
    side = pixels.shape[2] // spec.patch_size
    per_tile = (side // spec.token_size) ** 2
    if num_tiles is None:
        runs = _runs(tokens == spec.image_token_id)
        if any(n % per_tile for n in runs):
            raise InputError(
                f"a tile has {per_tile} placeholders, but their runs are {runs} long: pass num_tiles, the number of "
                "tiles of each image"
            )
        counts = [n // per_tile for n in runs]
    else:
        if num_tiles.dtype.is_floating_point:
            raise InputError(f"num_tiles must be whole numbers, got {num_tiles.dtype}")
        counts = [int(n) for n in num_tiles.reshape(-1).tolist()]
    if sum(counts) != len(pixels) or min(counts, default=1) < 1:
        source = "num_tiles" if num_tiles is not None else "the runs of placeholders"
        raise InputError(f"got {len(pixels)} tiles, but {source} count {counts} for the images")
    return torch.tensor([[n, side, side] for n in counts], device=tokens.device).reshape(-1, 3)


def _runs(marked: Tensor) -> list[int]:
    """Lengths of the runs of true values in the rows of a [batch, pos] tensor, in order."""
    lengths: list[int] = []
    for row in marked.tolist():
        for is_one, run in groupby(row):
            if is_one:
                lengths.append(len(list(run)))
    return lengths
