"""Boxes of the tokens or patches of one image, in the order of the activations."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_vlm.data.samples import NamedBox
from hooked_vlm.inputs.geometry import ImageLayout


@dataclass(frozen=True, eq=False)
class Places:
    """The tokens, or the patches, of one image."""

    layout: ImageLayout
    """Numbers them in an order of its own."""
    number: Int[np.ndarray, "place"]
    """Number of each in `layout`; -1 for class tokens, which have no box."""
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
            own = [self.layout.tokens_in_box(box.box, min_overlap) for box in boxes if box.name == name]
            for at in np.flatnonzero(np.isin(self.number, np.concatenate(own))):
                names[at].append(name)
        return names


@lru_cache(maxsize=256)
def token_places(layout: ImageLayout) -> Places:
    """The image's tokens."""
    return _places(layout, np.arange(layout.n_tokens), layout.tiles)


@lru_cache(maxsize=256)
def patch_places(layout: ImageLayout, class_tokens: int) -> Places:
    """As they leave the tower: tile by tile (a picture seen whole is one), class tokens before the patches of each."""
    order = layout.tower_order
    number = np.concatenate((np.full((len(order), class_tokens), -1), order), axis=1).ravel()
    tiles = np.arange(len(order)).repeat(order.shape[1] + class_tokens)
    return _places(layout.patches, number, tiles)


def _places(layout: ImageLayout, number: Int[np.ndarray, "place"], tile: Int[np.ndarray, "place"]) -> Places:
    boxes = np.concatenate((layout.boxes, np.full((1, 4), np.nan)))[number]  # the last row is that of number -1
    if not layout.thumbnail:
        return Places(layout, number, boxes, tile, np.zeros(len(number), dtype=bool))
    small = set(layout.tiles[layout.tokens_of("thumbnail")].tolist())
    return Places(layout, number, boxes, tile, np.isin(tile, list(small)))
