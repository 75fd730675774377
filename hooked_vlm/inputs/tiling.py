"""What image processors share that show a picture as square tiles, in a number that may be bounded."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from hooked_vlm.inputs.image_settings import normalised
from hooked_vlm.inputs.picture_processor import Bounds, PictureProcessor, Prepared, each_image


class TilingProcessor(PictureProcessor):
    """An image processor that cuts pictures into tiles."""

    bounds: ClassVar[tuple[str, ...]] = ("max_tiles",)
    sees: ClassVar[str] = "this model cuts images into tiles"

    @property
    @abstractmethod
    def tile_side(self) -> int:
        """Of a tile in pixels."""

    @property
    @abstractmethod
    def tile_counts(self) -> Sequence[int]:
        """Bounds on the tiles of an image that this processor can keep, from the one it has down to the lowest."""

    @abstractmethod
    def with_most_tiles(self, max_tiles: int) -> "TilingProcessor":
        """The same processor with a lower bound on the tiles of an image.

        Raises:
            ImageError: it cannot be kept.
        """

    @abstractmethod
    def tiles_of(self, rgb: Image.Image) -> UInt8[np.ndarray, "tile side side 3"]:
        """The tiles that a picture is shown as, and the picture as a whole where it is shown, too."""

    def __call__(self, images: Sequence[Any], *, resized: Sequence[tuple[int, int] | None] | None = None) -> Prepared:
        """Prepare images (anything `load_image` takes).

        Returns:
            pixel_values: float32 [tile, 3, side, side], the tiles of all images one after the other.
            grids: int64, (tiles with the whole picture, rows, columns) of patches per image.
            layouts: where the tokens of each image lie in the original (after EXIF orientation).

        Raises:
            ImageError: see `load_image`; the message starts with the number of the image.
        """
        tiles, layouts = [np.zeros((0, self.tile_side, self.tile_side, 3), np.uint8)], []
        for _, rgb in each_image(images):
            tiles.append(self.tiles_of(rgb))
            layouts.append(self.layout(rgb.size))
        grids = torch.tensor([layout.grid for layout in layouts], dtype=torch.int64).reshape(-1, 3)
        pixels = normalised(np.concatenate(tiles), self.image_mean, self.image_std)
        return torch.from_numpy(pixels), grids, layouts

    def _bounded(self, bounds: Bounds) -> "TilingProcessor":
        return self if bounds.max_tiles is None else self.with_most_tiles(bounds.max_tiles)

    def bounds_for(self, pixels: int | None) -> dict[str, int | None]:
        """Arguments of `to_inputs` with which every picture has the fewest tiles, if an area is given."""
        return {"max_tiles": None if pixels is None else self.tile_counts[-1]}

    def bounds_below(self, n_tokens: int, n_tiles: int) -> dict[str, int]:
        """Arguments of `to_inputs` with which a picture has at most so many tiles, if it can have as few."""
        return {"max_tiles": max(min(n_tiles, self.tile_counts[0]), self.tile_counts[-1])}

    def tighter(
        self, n_text: list[int], pictures: Sequence[Sequence[Any]], n_ctx: int, given: Bounds
    ) -> Iterator[tuple[str, "TilingProcessor"]]:
        """Fewer and fewer tiles."""
        for fewer in self.tile_counts[1:]:
            yield f"max_tiles={fewer} (now {self.tile_counts[0]})", self.with_most_tiles(fewer)


def cut(picture: Image.Image, side: int) -> UInt8[np.ndarray, "tile side side 3"]:
    """The tiles of a picture of whole ones, row by row."""
    cols, rows = picture.width // side, picture.height // side
    return np.asarray(picture).reshape(rows, side, cols, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
