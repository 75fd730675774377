"""Where the tokens of an image lie: from pixels of the original image to patches and tokens, and back.

Coordinates are pixels of the image as it is seen (after EXIF orientation, before resizing), x to the right
and y down; boxes are half-open, `(x0, y0, x1, y1)` covers x0 <= x < x1 and y0 <= y < y1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, SupportsFloat

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped

Box = Sequence[SupportsFloat]
"""`(x0, y0, x1, y1)`, half-open, in pixels of the original image."""


class GeometryError(ValueError):
    """A box or a token that is not in the image."""


class ImageSize(NamedTuple):
    """Pixels."""

    width: int
    height: int


@dataclass(frozen=True)
class ImageGrid:
    """One image (or video) as tokens.

    The processor stretches the image to whole patches; a `merge_size` x `merge_size` block of patches becomes
    one token. Tokens are numbered frame by frame, and in a frame row by row (raster order). A box covers all
    frames of a video.
    """

    image_size: tuple[int, int]
    """(width, height) of the original image in pixels."""
    grid_thw: tuple[int, int, int]
    """(frames, rows, columns) of patches; a frame is one temporal patch."""
    patch_size: int = 14
    """Side of a patch in pixels of the resized image."""
    merge_size: int = 2

    def __post_init__(self) -> None:
        if min(*self.image_size, *self.grid_thw, self.patch_size, self.merge_size) < 1:
            raise GeometryError(f"sizes must be at least 1, got {self}")
        if self.grid_thw[1] % self.merge_size or self.grid_thw[2] % self.merge_size:
            raise GeometryError(
                f"a grid of {self.grid_thw} (frames, rows, columns of patches) cannot be cut into blocks "
                f"of {self.merge_size} x {self.merge_size}: rows and columns must be multiples of that"
            )

    @property
    def frames(self) -> int:
        return self.grid_thw[0]

    @property
    def rows(self) -> int:
        """Rows of tokens in a frame."""
        return self.grid_thw[1] // self.merge_size

    @property
    def cols(self) -> int:
        """Columns of tokens in a frame."""
        return self.grid_thw[2] // self.merge_size

    @property
    def n_tokens(self) -> int:
        return self.frames * self.rows * self.cols

    @property
    def n_patches(self) -> int:
        return math.prod(self.grid_thw)

    @property
    def resized_size(self) -> ImageSize:
        """The image as the vision tower sees it."""
        return ImageSize(self.grid_thw[2] * self.patch_size, self.grid_thw[1] * self.patch_size)

    # tokens

    def index(self, row: int, col: int, frame: int = 0) -> int:
        """Number of a token in the image. Raises `GeometryError` if there is no such token."""
        if not (0 <= frame < self.frames and 0 <= row < self.rows and 0 <= col < self.cols):
            raise GeometryError(
                f"no token at row {row}, column {col}, frame {frame}: counted from 0, the image has "
                f"{self.rows} rows, {self.cols} columns and {self.frames} frame(s)"
            )
        return (frame * self.rows + row) * self.cols + col

    def row_col(self, index: int) -> tuple[int, int]:
        """Row and column of a token within its frame (the frame is `index // (rows * cols)`)."""
        if not 0 <= index < self.n_tokens:
            raise GeometryError(f"no token {index}: the image has {self.n_tokens} tokens, counted from 0")
        return divmod(index % (self.rows * self.cols), self.cols)

    def box_of(self, index: int) -> tuple[float, float, float, float]:
        """The pixels a token covers.

        Neighbours share their edge to the last bit, so the boxes of a frame tile the image.
        """
        row, col = self.row_col(index)
        x, y = self._edges(self.image_size)
        return float(x[col]), float(y[row]), float(x[col + 1]), float(y[row + 1])

    # boxes

    def overlaps(
        self, box: Box, of: Literal["box", "token"] = "box", truncate: bool = False
    ) -> Float[np.ndarray, "tokens"]:
        """How much of the box lies in each token: area of the intersection / area of the box.

        Args:
            box: half-open, in pixels of the original image. What sticks out of the image is cut off first,
                so the overlaps of a frame sum to 1.
            of: "token" divides by the token's area instead (how much of the token lies in the box).
            truncate: exactly as the code published with the OCR-heads paper (arXiv 2505.15865;
                `return_weights` and `compute_tile_weights`): the box is scaled to the resized image and its
                corners truncated to whole pixels; nothing is cut off at the image's border; a box that is
                thus left without area overlaps nothing. (That code then multiplies by 100.)

        Raises:
            GeometryError: the box is empty, reversed, not finite, or wholly outside of the image.
        """
        if of not in ("box", "token"):
            raise GeometryError(f'overlap is measured of="box" or of="token", got of={of!r}')
        x0, y0, x1, y1 = self._checked(box)
        if truncate:
            size = self.resized_size
            x_scale, y_scale = size.width / self.image_size[0], size.height / self.image_size[1]
            x0, y0, x1, y1 = int(x0 * x_scale), int(y0 * y_scale), int(x1 * x_scale), int(y1 * y_scale)
        else:
            size = self.image_size
            x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, size[0]), min(y1, size[1])
        if x0 == x1 or y0 == y1:
            return np.zeros(self.n_tokens)
        # area(intersection) / area(box) is a product of a share in x and a share in y
        col_shares, row_shares = (
            np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None)
            / (high - low if of == "box" else np.diff(edges))
            for edges, low, high in zip(self._edges(size), (x0, y0), (x1, y1), strict=True)
        )
        return np.tile(np.outer(row_shares, col_shares).ravel(), self.frames)

    def tokens_in_box(
        self,
        box: Box,
        min_overlap: float | int = 0.0,
        of: Literal["box", "token"] = "box",
        truncate: bool = False,
    ) -> list[int]:
        """Tokens whose `overlaps(box, of, truncate)` is greater than `min_overlap`, in rising order.

        With 0, every token that shares any area with the box. The OCR-heads paper uses 0.1; its code 0.001
        with `truncate=True`. A box that covers many tokens may leave none above a threshold `of="box"`.

        Raises:
            GeometryError: see `overlaps`; or `min_overlap` is not in [0, 1).
        """
        if not 0 <= min_overlap < 1:
            raise GeometryError(f"min_overlap is a share of the {of}'s area, 0 <= min_overlap < 1, got {min_overlap}")
        return np.flatnonzero(self.overlaps(box, of, truncate) > min_overlap).tolist()

    # patches and pictures

    def patch_order(self) -> Int[np.ndarray, "patches 3"]:
        """(frame, row, column) of each row of `pixel_values`.

        The checkpoint's order: block by block, and within a block row by row, so that the patches of token i
        are the rows `i * merge_size**2` up to `(i + 1) * merge_size**2`.
        """
        blocks = (self.frames, self.rows, self.merge_size, self.cols, self.merge_size)
        places = np.indices(self.grid_thw).reshape(3, *blocks)
        return places.transpose(1, 2, 4, 3, 5, 0).reshape(-1, 3)

    def to_image(
        self, values: Shaped[np.ndarray | torch.Tensor, "*lead tokens"]
    ) -> Shaped[np.ndarray, "*lead frames rows cols"]:
        """One value per token, laid out as the picture (a tensor comes to the CPU, bfloat16 as float32)."""
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        if values.shape[-1] != self.n_tokens:
            raise GeometryError(
                f"expected one value for each of the image's {self.n_tokens} tokens "
                f"({self.frames} frame(s) of {self.rows} x {self.cols}), got shape {values.shape}"
            )
        return values.reshape(*values.shape[:-1], self.frames, self.rows, self.cols)

    def _edges(
        self, size: tuple[int, int]
    ) -> tuple[Float[np.ndarray, "cols_plus_1"], Float[np.ndarray, "rows_plus_1"]]:
        """x of the columns' edges and y of the rows' edges in an image of this (width, height)."""
        return (
            np.arange(self.cols + 1) * size[0] / self.cols,
            np.arange(self.rows + 1) * size[1] / self.rows,
        )

    def _checked(self, box: Box) -> tuple[float, float, float, float]:
        if len(box) != 4:
            raise GeometryError(f"a box is four numbers (x0, y0, x1, y1), got {len(box)}: {box}")
        x0, y0, x1, y1 = corners = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
        shown = f"({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if not all(map(math.isfinite, corners)):
            raise GeometryError(f"the corners of a box must be finite numbers, got {shown}")
        if x0 >= x1 or y0 >= y1:
            raise GeometryError(
                f"the box {shown} has no area: expected (x0, y0, x1, y1) with x0 < x1 and y0 < y1, in pixels"
            )
        width, height = self.image_size
        if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
            raise GeometryError(
                f"the box {shown} lies outside of the image, which is {width} x {height} pixels "
                "(width x height, original size after EXIF orientation)"
            )
        return corners
