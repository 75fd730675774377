"""Boxes of the tokens or patches of one image, in the order of the activations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_vlm.activations.samples import NamedBox
from hooked_vlm.inputs.geometry import ImageGrid, TileGrid


@dataclass(frozen=True, eq=False)
class Places:
    """The tokens, or the patches, of one image."""

    grid: ImageGrid | TileGrid
    """Numbers them in an order of its own."""
    number: Int[np.ndarray, "place"]
    """Number of each in `grid`; -1 for class tokens, which have no box."""
    boxes: Float[np.ndarray, "place 4"]
    """x0, y0, x1, y1 in pixels of the original image."""
    tile: Int[np.ndarray, "place"]
    thumbnail: Bool[np.ndarray, "place"]

    def evidence(self, boxes: Sequence[NamedBox], min_overlap: float | int) -> list[list[str]]:
        """The names of the boxes that each one lies in.

        Raises:
            GeometryError: a box that does not lie in the image.
        """
        names: list[list[str]] = [[] for _ in self.number]
        for name in dict.fromkeys(box.name for box in boxes):
            own = [self.grid.tokens_in_box(box.box, min_overlap) for box in boxes if box.name == name]
            for at in np.flatnonzero(np.isin(self.number, np.concatenate(own))):
                names[at].append(name)
        return names


@lru_cache(maxsize=256)
def token_places(grid: ImageGrid | TileGrid) -> Places:
    """The image's tokens."""
    return _places(grid, np.arange(grid.n_tokens))


@lru_cache(maxsize=256)
def patch_places(grid: ImageGrid | TileGrid) -> Places:
    """As they leave the tower: merge block by merge block, or tile by tile in raster order behind class tokens."""
    if isinstance(grid, ImageGrid):
        fine = replace(grid, merge_size=1)
        return _places(fine, np.array([fine.index(row, col, frame) for frame, row, col in grid.patch_order().tolist()]))
    fine = replace(grid, merge_size=1, transposed_tokens=False)
    by_tile = np.arange(fine.n_tokens).reshape(fine.n_tiles, -1)
    return _places(fine, np.concatenate((np.full((len(by_tile), 1), -1), by_tile), axis=1).ravel())


def _places(grid: ImageGrid | TileGrid, number: Int[np.ndarray, "place"]) -> Places:
    boxes = np.array([grid.box_of(i) for i in range(grid.n_tokens)])
    boxes = np.concatenate((boxes, np.full((1, 4), np.nan)))[number]  # the last row is that of number -1
    tile, thumbnail = np.zeros(len(number), dtype=int), np.zeros(len(number), dtype=bool)
    if isinstance(grid, TileGrid):
        tile = np.arange(len(number)) // (len(number) // grid.n_tiles)
        thumbnail = (tile == grid.n_tiles - 1) & grid.thumbnail
    return Places(grid, number, boxes, tile, thumbnail)
