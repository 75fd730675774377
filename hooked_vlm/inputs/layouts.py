"""Layouts of pictures that are seen whole, and of pictures that are cut into tiles."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
from jaxtyping import Int

from hooked_vlm.errors import GeometryError
from hooked_vlm.inputs.boxes import ImageSize, LayoutPart, Part
from hooked_vlm.inputs.geometry import ImageLayout


def even_part(
    name: Part,
    cells: Int[np.ndarray, "frame row col"],
    area: Sequence[float | int],
    pixels_per_token: int,
    tiles: tuple[int, int] = (1, 1),
    tile_size: int | None = None,
) -> LayoutPart:
    """A part whose tokens are squares of so many seen pixels, side by side.

    Args:
        tiles: (columns, rows) of tiles that it is put together of.
        tile_size: their side in pixels, of which a rest at the right and at the bottom is in no token; None: no rest.
    """
    per_tile = [n // of for n, of in zip(cells.shape[:0:-1], tiles, strict=True)]  # columns, rows
    sizes = [n * pixels_per_token if tile_size is None else tile_size for n in per_tile]
    begins = [
        (np.arange(of)[:, None] * size + np.arange(n) * pixels_per_token).ravel()
        for of, size, n in zip(tiles, sizes, per_tile, strict=True)
    ]
    columns, rows = (np.stack((begin, begin + pixels_per_token), axis=1) for begin in begins)
    x0, y0, x1, y1 = area
    seen = ImageSize(tiles[0] * sizes[0], tiles[1] * sizes[1])
    return LayoutPart(name, cells, (x0, y0, x1, y1), seen, columns, rows, tiles)


@lru_cache(maxsize=512)
def whole_layout(
    image_size: tuple[int, int],
    grid_thw: tuple[int, int, int],
    patch_size: int = 14,
    merge_size: int = 2,
    blocks: bool = True,
    size_known: bool = True,
) -> ImageLayout:
    """A picture (or video) that is stretched to whole patches, `merge_size` x `merge_size` of which become a token.

    Tokens are numbered frame by frame, and in a frame row by row (raster order).

    Args:
        image_size: (width, height) of the original image in pixels.
        grid_thw: (frames, rows, columns) of patches; a frame is one temporal patch.
        patch_size: side of a patch in pixels of the resized image.
        blocks: the tower sees patches merge block by merge block, and in a block row by row; otherwise row by row.

    Raises:
        GeometryError: a size below 1, or a grid that cannot be cut into merge blocks.
    """
    frames, high, wide = grid_thw
    if min(*image_size, *grid_thw, patch_size, merge_size) < 1:
        raise GeometryError(
            f"sizes must be at least 1, got an image of {tuple(image_size)} pixels, a grid of {tuple(grid_thw)}, "
            f"patches of {patch_size} and blocks of {merge_size}"
        )
    if high % merge_size or wide % merge_size:
        raise GeometryError(
            f"a grid of {tuple(grid_thw)} (frames, rows, columns of patches) cannot be cut into blocks "
            f"of {merge_size} x {merge_size}: rows and columns must be multiples of that"
        )
    rows, cols = high // merge_size, wide // merge_size
    cells = np.arange(frames * rows * cols).reshape(frames, rows, cols)
    order = np.arange(frames * high * wide).reshape(frames, rows, merge_size, cols, merge_size)
    if blocks:
        order = order.swapaxes(2, 3)
    return ImageLayout(
        ImageSize(*image_size),
        (even_part("tiles", cells, (0, 0, *image_size), patch_size * merge_size),),
        cells.size,
        (frames, high, wide),
        np.arange(frames).repeat(rows * cols),
        order.reshape(frames, high * wide),
        None if merge_size == 1 else partial(whole_layout, image_size, grid_thw, patch_size, 1, blocks, size_known),
        size_known=size_known,
    )


def by_frames(layout: ImageLayout, times: Sequence[float] | None = None) -> ImageLayout:
    """A video each of whose frames is a picture by itself in the token stream, behind its time in seconds."""
    n = layout.n_tokens // layout.frames
    texts = () if times is None else (*(f"<{time:.1f} seconds>" for time in times), "")
    return replace(layout, runs=(n,) * layout.frames, between=texts)


@lru_cache(maxsize=512)
def tiled_layout(
    image_size: tuple[int, int],
    layout: tuple[int, int],
    thumbnail: bool,
    patch_size: int = 14,
    merge_size: int = 2,
    tile_size: int = 448,
    transposed_tokens: bool = False,
    size_known: bool = True,
) -> ImageLayout:
    """A picture that is stretched to square tiles, each of which becomes a square of tokens.

    Tokens are numbered tile by tile (tiles row by row), in a tile row by row, and those of the thumbnail, a small copy
    of the whole picture, come last. A box of the image lies both in tokens of tiles and in tokens of the thumbnail.

    Args:
        image_size: (width, height) of the original image in pixels.
        layout: (columns, rows) of tiles, the thumbnail not counted.
        patch_size: side of a patch in pixels of a tile.
        tile_size: side of a tile in pixels; a rest at its right and at its bottom is in no token.
        transposed_tokens: the tokens of a tile are numbered column by column (pixel shuffle "v1").
    """
    (tile_cols, tile_rows), side = layout, tile_size // (patch_size * merge_size)
    n_tiles = tile_cols * tile_rows + thumbnail
    numbers = np.arange(n_tiles * side**2).reshape(n_tiles, side, side)
    if transposed_tokens:
        numbers = numbers.swapaxes(1, 2)
    of_tiles = numbers[: tile_cols * tile_rows].reshape(tile_rows, tile_cols, side, side).swapaxes(1, 2)
    area, pixels = (0, 0, *image_size), patch_size * merge_size
    of_tiles = of_tiles.reshape(1, tile_rows * side, tile_cols * side)
    parts = [even_part("tiles", of_tiles, area, pixels, layout, tile_size)]
    if thumbnail:
        parts.append(even_part("thumbnail", numbers[-1:], area, pixels, tile_size=tile_size))
    patches = (tile_size // patch_size) ** 2
    fine = partial(tiled_layout, image_size, layout, thumbnail, patch_size, 1, tile_size, False, size_known)
    return ImageLayout(
        ImageSize(*image_size),
        tuple(parts),
        numbers.size,
        (n_tiles, tile_size // patch_size, tile_size // patch_size),
        np.arange(n_tiles).repeat(side**2),
        np.arange(n_tiles * patches).reshape(n_tiles, patches),
        None if merge_size == 1 and not transposed_tokens else fine,
        size_known=size_known,
    )


Area = tuple[float | int, float | int, float | int, float | int]


@lru_cache(maxsize=512)
def squares_layout(
    image_size: tuple[int, int],
    areas: tuple[Area, ...],
    side: int,
    patch_size: int,
    token_size: int = 1,
    between: tuple[str, ...] = (),
    size_known: bool = True,
) -> ImageLayout:
    """Squares made of rectangles of a picture, each a run of tokens: the main one, then crops of it.

    A rectangle is less than the picture where it was cropped, more where it was padded.

    Args:
        image_size: (width, height) of the original image in pixels.
        areas: the rectangles, in pixels of the original image.
        side: of each square in pixels, as the vision tower sees it.
        patch_size: a rest of pixels at the right and at the bottom is in no patch.
        token_size: side in patches of the square that a token covers.
        between: texts around the runs.
    """
    n, patches = side // patch_size // token_size, side // patch_size
    spans = np.stack((np.arange(n), np.arange(n) + 1), axis=1) * patch_size * token_size
    cells, seen = np.arange(len(areas) * n * n).reshape(-1, 1, n, n), ImageSize(side, side)
    names = ("tiles", *(f"crop {i}" for i in range(len(areas) - 1)))
    own = zip(names, cells, areas, strict=True)
    fine = partial(squares_layout, image_size, areas, side, patch_size, size_known=size_known)
    return ImageLayout(
        ImageSize(*image_size),
        tuple(LayoutPart(name, squares, area, seen, spans, spans) for name, squares, area in own),
        cells.size,
        (len(areas), patches, patches),
        np.arange(len(areas)).repeat(n * n),
        np.arange(len(areas) * patches**2).reshape(len(areas), -1),
        None if token_size == 1 else fine,
        runs=(n * n,) * len(areas),
        between=between,
        size_known=size_known,
    )


def unplaced_layout(n_tiles: int, side: int, merge_size: int, runs: int = 1) -> ImageLayout:
    """Tiles of `side` x `side` patches whose arrangement is not known, in so many equal runs of tokens."""
    n_tokens = n_tiles * (side // merge_size) ** 2
    return ImageLayout(
        ImageSize(0, 0),
        (),
        n_tokens,
        (n_tiles, side, side),
        np.arange(n_tiles).repeat(n_tokens // n_tiles),
        np.arange(n_tiles * side**2).reshape(n_tiles, side**2),
        runs=(n_tokens // runs,) * runs,
        size_known=False,
    )
