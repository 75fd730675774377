"""InternVL2's image preparation: an image as square tiles and a thumbnail, with Pillow and numpy only.

Equal to the published `dynamic_preprocess` with its bicubic resizing and ImageNet normalisation, tile for
tile. `hooked_vlm.inputs.images` reads the pictures (orientation, transparency, 16-bit greyscale).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image

from hooked_vlm.errors import ImageError
from hooked_vlm.inputs.geometry import ImageSize, TileGrid
from hooked_vlm.inputs.image_settings import colours, common_settings, normalisation_tables, processor_settings, whole
from hooked_vlm.inputs.images import checked_images, load_image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_TILES, MOST_PIXELS = 256, 2**26
"""Limits for one image; published checkpoints cut it into at most 40 tiles of 448 x 448 pixels."""


@dataclass(frozen=True)
class TileProcessor:
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

    def layout(self, width: int, height: int) -> tuple[int, int]:
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

    def grid(self, size: tuple[int, int]) -> TileGrid:
        """The geometry of an image of (width, height) pixels."""
        layout = self.layout(*size)
        return TileGrid(
            image_size=(size[0], size[1]),
            layout=layout,
            thumbnail=self.thumbnail and layout != (1, 1),
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            tile_size=self.tile_size,
            transposed_tokens=self.transposed_tokens,
        )

    def n_tokens(self, size: tuple[int, int]) -> int:
        """Image tokens of an image of (width, height) pixels."""
        return self.grid(size).n_tokens

    def __call__(
        self, images: Sequence[Any]
    ) -> tuple[Float[torch.Tensor, "tile 3 side side"], Int[torch.Tensor, "image 3"], list[ImageSize]]:
        """Prepare images (anything `load_image` takes).

        Returns:
            pixel_values: float32, the tiles of all images one after the other: row by row, the thumbnail last.
            grids: int64, (tiles with the thumbnail, rows, columns) of patches per image.
            sizes: width and height of each original image (after EXIF orientation).

        Raises:
            ImageError: see `load_image`; the message starts with the number of the image.
        """
        sizes, tiles, counts = [], [], []
        for i, image in enumerate(checked_images(images, "images")):
            try:
                rgb = load_image(image)
            except ImageError as error:
                raise ImageError(f"image {i}: {error}") from error
            tiles.append(self._cut(rgb))
            sizes.append(ImageSize(*rgb.size))
            counts.append(len(tiles[-1]))
        side = self.tile_size // self.patch_size
        grids = torch.tensor([[n, side, side] for n in counts], dtype=torch.int64).reshape(-1, 3)
        pixels = np.concatenate(tiles) if tiles else np.zeros((0, self.tile_size, self.tile_size, 3), np.uint8)
        return torch.from_numpy(self._normalised(pixels)), grids, sizes

    def _cut(self, rgb: Image.Image) -> UInt8[np.ndarray, "tile side side 3"]:
        side = self.tile_size
        cols, rows = self.layout(*rgb.size)
        whole = np.asarray(rgb.resize((cols * side, rows * side), Image.Resampling.BICUBIC))
        tiles = whole.reshape(rows, side, cols, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        if self.thumbnail and cols * rows > 1:
            small = np.asarray(rgb.resize((side, side), Image.Resampling.BICUBIC))
            tiles = np.concatenate([tiles, small[None]])
        return tiles

    def _normalised(self, tiles: UInt8[np.ndarray, "tile side side 3"]) -> Float[np.ndarray, "tile 3 side side"]:
        tables = normalisation_tables(self.image_mean, self.image_std)
        return np.stack([table[tiles[..., colour]] for colour, table in enumerate(tables)], axis=1)

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
