"""Image geometry: from pixels of the original image to patches and tokens, and back.

Coordinates are pixels of the displayed image (after EXIF orientation, before resizing), x to the right
and y down; boxes are half-open, `(x0, y0, x1, y1)` covers x0 <= x < x1 and y0 <= y < y1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, SupportsFloat

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped

from hooked_vlm.errors import GeometryError

Box = Sequence[SupportsFloat]
"""`(x0, y0, x1, y1)`, half-open, in pixels of the original image."""


Part = Literal["all", "tiles", "thumbnail"]
"""A part of a tiled image: the tokens of its tiles, those of its thumbnail, or both."""


class ImageSize(NamedTuple):
    """Pixels."""

    width: int
    height: int


class _TokensInBox:
    """Tokens by the boxes that they overlap, for every kind of grid."""

    def tokens_of(self, part: Part) -> range:
        """Numbers of the tokens of a part."""
        raise NotImplementedError

    def overlaps(
        self, box: Box, of: Literal["box", "token"] = "box", truncate: bool = False
    ) -> Float[np.ndarray, "tokens"]:
        """The share of the box that lies in each token."""
        raise NotImplementedError

    def tokens_in_box(
        self,
        box: Box,
        min_overlap: float | int = 0.0,
        of: Literal["box", "token"] = "box",
        truncate: bool = False,
        part: Part = "all",
    ) -> list[int]:
        """Tokens of a part whose `overlaps(box, of, truncate)` is greater than `min_overlap`, in rising order.

        With 0, every token that shares any area with the box. The OCR-heads paper uses 0.1; its code 0.001
        with `truncate=True`. A box that covers many tokens may leave none above a threshold `of="box"`.

        Raises:
            GeometryError: see `overlaps`; `min_overlap` is not in [0, 1); or there is no such part.
        """
        if not 0 <= min_overlap < 1:
            raise GeometryError(f"min_overlap is a share of the {of}'s area, 0 <= min_overlap < 1, got {min_overlap}")
        tokens = self.tokens_of(part)
        shares = self.overlaps(box, of, truncate)[tokens.start : tokens.stop]
        return (np.flatnonzero(shares > min_overlap) + tokens.start).tolist()


@dataclass(frozen=True)
class ImageGrid(_TokensInBox):
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

    def tokens_of(self, part: Part) -> range:
        """Numbers of the tokens of a part; all of them, since an image seen whole has no thumbnail."""
        _check_part(part)
        if part == "thumbnail":
            raise GeometryError("this model sees images whole: there is no thumbnail")
        return range(self.n_tokens)

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
        """The share of the box that lies in each token: area of the intersection / area of the box.

        Args:
            box: half-open, in pixels of the original image. It is first clipped to the image, so the overlaps
                of a frame sum to 1.
            of: "token" divides by the token's area instead (the share of the token that lies in the box).
            truncate: exactly as the code published with the OCR-heads paper (arXiv 2505.15865;
                `return_weights` and `compute_tile_weights`): the box is scaled to the resized image and its
                corners truncated to whole pixels; it is not clipped to the image; a box left without area
                overlaps nothing. (That code then multiplies by 100.)

        Raises:
            GeometryError: the box is empty, reversed, not finite, or entirely outside the image.
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
        self, values: Shaped[np.ndarray | torch.Tensor, "*lead tokens"], part: Part = "all"
    ) -> Shaped[np.ndarray, "*lead frames rows cols"]:
        """Lay one value per token out as the picture (a tensor is moved to the CPU, bfloat16 as float32)."""
        self.tokens_of(part)  # refuses a thumbnail
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
        """x of the column edges and y of the row edges in an image of this (width, height)."""
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
                f"the box {shown} lies outside the image, which is {width} x {height} pixels "
                "(width x height, original size after EXIF orientation)"
            )
        return corners


def _check_part(part: Part) -> None:
    if part not in ("all", "tiles", "thumbnail"):
        raise GeometryError(f'part must be "all", "tiles" or "thumbnail", got {part!r}')


@dataclass(frozen=True)
class TileGrid(_TokensInBox):
    """One image cut into tiles, as tokens.

    The processor stretches the image to `layout` square tiles; each becomes a square of tokens. Tokens are
    numbered tile by tile (tiles row by row), in a tile row by row, and those of the thumbnail, a small copy
    of the whole image, come last. A box of the image lies both in tokens of tiles and in tokens of the
    thumbnail: `part` chooses between them.
    """

    image_size: tuple[int, int]
    """(width, height) of the original image in pixels."""
    layout: tuple[int, int]
    """(columns, rows) of tiles, the thumbnail not counted."""
    thumbnail: bool
    patch_size: int = 14
    """Side of a patch in pixels of a tile."""
    merge_size: int = 2
    tile_size: int = 448
    """Side of a tile in pixels."""
    transposed_tokens: bool = False
    """The tokens of a tile are numbered column by column (pixel shuffle "v1")."""

    @property
    def n_tiles(self) -> int:
        """Number of tiles, with the thumbnail."""
        return self.layout[0] * self.layout[1] + self.thumbnail

    @property
    def tile_side(self) -> int:
        """Tokens along the side of a tile."""
        return self.tile_size // (self.patch_size * self.merge_size)

    @property
    def rows(self) -> int:
        """Rows of tokens in all tiles put together."""
        return self.layout[1] * self.tile_side

    @property
    def cols(self) -> int:
        """Columns of tokens in all tiles put together."""
        return self.layout[0] * self.tile_side

    @property
    def n_tokens(self) -> int:
        return self.n_tiles * self.tile_side**2

    @property
    def whole(self) -> ImageGrid:
        """The tiles put together: one grid over the image, in raster order."""
        return self._grid(*self.layout)

    @property
    def overview(self) -> ImageGrid:
        """The thumbnail: one tile over the whole image. Raises `GeometryError` if there is none."""
        if not self.thumbnail:
            raise GeometryError("this image has one tile and no thumbnail")
        return self._grid(1, 1)

    # tokens

    def tokens_of(self, part: Part) -> range:
        """Numbers of the tokens of a part."""
        _check_part(part)
        of_tiles = self.rows * self.cols
        return range(of_tiles if part == "thumbnail" else 0, of_tiles if part == "tiles" else self.n_tokens)

    def is_thumbnail(self, index: int) -> bool:
        """Whether a token belongs to the thumbnail."""
        self._check(index)
        return index in self.tokens_of("thumbnail")

    def tile_of(self, index: int) -> int:
        """Number of the tile of a token; the thumbnail's is the last."""
        self._check(index)
        return index // self.tile_side**2

    def box_of(self, index: int) -> tuple[float, float, float, float]:
        """The pixels a token covers; tokens of the tiles cover the image once, those of the thumbnail again."""
        if self.is_thumbnail(index):
            return self.overview.box_of(int(self._raster_of_thumbnail()[index - self.rows * self.cols]))
        return self.whole.box_of(int(self._raster_of_tiles()[index]))

    # boxes

    def overlaps(
        self, box: Box, of: Literal["box", "token"] = "box", truncate: bool = False
    ) -> Float[np.ndarray, "tokens"]:
        """As `ImageGrid.overlaps`; of="box" they sum to 1 over the tiles, and over the thumbnail again."""
        shares = [self.whole.overlaps(box, of, truncate)[self._raster_of_tiles()]]
        if self.thumbnail:
            shares.append(self.overview.overlaps(box, of, truncate)[self._raster_of_thumbnail()])
        return np.concatenate(shares)

    # pictures

    def to_image(
        self, values: Shaped[np.ndarray | torch.Tensor, "*lead tokens"], part: Literal["tiles", "thumbnail"] = "tiles"
    ) -> Shaped[np.ndarray, "*lead 1 rows cols"]:
        """Lay one value per token of the image out as the picture of a part."""
        if values.shape[-1] != self.n_tokens:
            raise GeometryError(
                f"expected one value for each of the image's {self.n_tokens} tokens ({self.n_tiles} tiles of "
                f"{self.tile_side} x {self.tile_side}), got shape {tuple(values.shape)}"
            )
        order = self._raster_of_tiles() if part == "tiles" else self._raster_of_thumbnail()
        tokens = self.tokens_of(part)
        in_raster = values[..., tokens.start : tokens.stop][..., np.argsort(order)]
        return (self.whole if part == "tiles" else self.overview).to_image(in_raster)

    def _grid(self, cols: int, rows: int) -> ImageGrid:
        side = self.tile_size // self.patch_size
        return ImageGrid(self.image_size, (1, rows * side, cols * side), self.patch_size, self.merge_size)

    def _raster_of_thumbnail(self) -> Int[np.ndarray, "tokens"]:
        """Raster index of each token of the thumbnail."""
        places = np.arange(self.tile_side**2).reshape(self.tile_side, self.tile_side)
        return (places.T if self.transposed_tokens else places).ravel()

    def _raster_of_tiles(self) -> Int[np.ndarray, "tokens"]:
        """Raster index, in all tiles put together, of each token of the tiles."""
        (cols, rows), side = self.layout, self.tile_side
        places = np.arange(self.rows * self.cols).reshape(rows, side, cols, side).swapaxes(1, 2)
        return (places.swapaxes(2, 3) if self.transposed_tokens else places).ravel()

    def _check(self, index: int) -> None:
        if not 0 <= index < self.n_tokens:
            raise GeometryError(f"no token {index}: the image has {self.n_tokens} tokens, counted from 0")
