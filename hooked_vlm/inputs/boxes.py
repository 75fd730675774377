"""Boxes in pixels, and a part of a layout: a grid of tokens over a rectangle of the picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, SupportsFloat

import numpy as np
from jaxtyping import Float, Int, Shaped

Box = Sequence[SupportsFloat]
"""`(x0, y0, x1, y1)`, half-open, in pixels of the original image."""

Part = str
""""tiles" (the picture, or its tiles put together), "thumbnail" (a small copy of the whole picture), a name that a
layout gives to another part; "all" of them."""


class ImageSize(NamedTuple):
    """Pixels."""

    width: int
    height: int


@dataclass(frozen=True, eq=False)
class LayoutPart:
    """A grid of tokens over a rectangle of the picture.

    Cells need not touch (pixels that no patch covers) and may overlap (features that were resampled).
    """

    name: Part
    cells: Int[np.ndarray, "frame row col"]
    """Number of the token at each cell."""
    area: tuple[float | int, float | int, float | int, float | int]
    """The rectangle, in pixels of the original image: less than the image where it was cropped, more where it was
    padded."""
    seen: ImageSize
    """The rectangle as the vision tower sees it, in pixels."""
    columns: Shaped[np.ndarray, "col 2"]
    """Where each column of cells begins and ends, in seen pixels."""
    rows: Shaped[np.ndarray, "row 2"]
    tiles: tuple[int, int] = (1, 1)
    """(columns, rows) of tiles that it is put together of."""

    def edges(
        self, of: Literal["image", "seen"] = "image"
    ) -> tuple[Float[np.ndarray, "col 2"], Float[np.ndarray, "row 2"]]:
        """Where columns and rows of cells begin and end: x, y in pixels of the original image or in seen pixels."""
        if of == "seen":
            return self.columns.astype(float), self.rows.astype(float)
        x0, y0, x1, y1 = self.area
        return x0 + self.columns * (x1 - x0) / self.seen.width, y0 + self.rows * (y1 - y0) / self.seen.height

    def shares(
        self,
        box: tuple[float | int, float | int, float | int, float | int],
        of: Literal["box", "token"],
        edges: Literal["image", "seen"],
    ) -> Float[np.ndarray, "row col"]:
        """Area of the intersection of a box with each cell / area of the box, or of the cell."""
        low, high = box[:2], box[2:]
        # area(intersection) / area(box) is a product of a share in x and a share in y
        by_column, by_row = (
            np.clip(np.minimum(spans[:, 1], high[axis]) - np.maximum(spans[:, 0], low[axis]), 0, None)
            / (high[axis] - low[axis] if of == "box" else spans[:, 1] - spans[:, 0])
            for axis, spans in enumerate(self.edges(edges))
        )
        return np.outer(by_row, by_column)


def truncated(
    box: tuple[float, float, float, float], part: LayoutPart
) -> tuple[float | int, float | int, float | int, float | int]:
    """A box in seen pixels, its corners truncated to whole ones."""
    x0, y0, x1, y1 = part.area
    x_scale, y_scale = part.seen.width / (x1 - x0), part.seen.height / (y1 - y0)
    return (
        int((box[0] - x0) * x_scale), int((box[1] - y0) * y_scale),
        int((box[2] - x0) * x_scale), int((box[3] - y0) * y_scale),
    )  # fmt: skip


def shown(box: Sequence[float | int]) -> str:
    return "(" + ", ".join(f"{corner:g}" for corner in box) + ")"
