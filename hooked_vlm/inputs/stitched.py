"""Layouts of pictures seen twice, whole and in tiles that are stitched to one grid, and of pooled frames.

A picture is fitted into its pinpoint with its aspect ratio kept, so the grid has a margin: rows or columns of tokens
that are cut off again. In a grid that is resampled, a token mixes the outputs of up to 2 x 2 patches; its box is their
union.
"""

import math
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
from jaxtyping import Float, Int

from hooked_vlm.errors import GeometryError
from hooked_vlm.inputs.boxes import ImageSize, LayoutPart
from hooked_vlm.inputs.geometry import ImageLayout

RESAMPLED_FROM = 1.1
"""A stitched grid is resampled where its side exceeds that of the largest grid by more than this factor."""

Mix = tuple[Int[np.ndarray, "... _"], Float[np.ndarray, "... _"]]
"""The outputs of the projector that a token is a mix of (-1: the line break), and their shares."""


def fitted(size: tuple[int, int], pinpoint: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a picture in a pinpoint of (height, width) pixels, its aspect ratio kept."""
    (width, height), (high, wide) = size, pinpoint
    across, down = wide / width, high / height
    if across < down:
        return wide, min(math.ceil(height * across), high)
    return min(math.ceil(width * down), wide), high


def unpadded(size: tuple[int, int], grid: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of a grid of (rows, columns) that a picture of (width, height) in its middle keeps."""
    (width, height), (rows, cols) = size, grid
    if width / height > cols / rows:
        cut = (rows - int(round(height * (cols / width), 7))) // 2
        return slice(cut, rows - cut), slice(0, cols)
    cut = (cols - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(cut, cols - cut)


def resampled_size(grid: tuple[int, ...], most: int | None) -> tuple[int, int]:
    """Rows and columns of a stitched grid that may have about `most` tokens (None: any number)."""
    rows, cols = grid
    factor = 1.0 if most is None else math.sqrt(rows * cols / most)
    return (int(rows // factor), int(cols // factor)) if factor > RESAMPLED_FROM else (rows, cols)


def bilinear(n: int, n_out: int) -> tuple[Int[np.ndarray, "cell 2"], Float[np.ndarray, "cell 2"]]:
    """The two of `n` cells that each of `n_out` is a mix of, and their shares: as `F.interpolate` with its defaults."""
    at = np.clip((np.arange(n_out) + 0.5) * n / n_out - 0.5, 0, None)
    first = at.astype(int)
    return np.stack((first, np.minimum(first + 1, n - 1)), 1), np.stack((first + 1 - at, at - first), 1)


def mixed(outputs: Int[np.ndarray, "row col"], size: tuple[int, int]) -> Mix:
    """The outputs that each token of a grid of another size is a mix of; each of one where the size is the same."""
    if outputs.shape == size:
        return outputs[..., None], np.ones((*size, 1))
    (rows, down), (cols, across) = (bilinear(n, n_out) for n, n_out in zip(outputs.shape, size, strict=True))
    sources = outputs[rows[:, None, :, None], cols[None, :, None, :]]
    shares = down[:, None, :, None] * across[None, :, None, :]
    return sources.reshape(*size, 4), shares.reshape(*size, 4)


def footprints(spans: Int[np.ndarray, "cell 2"], n_out: int) -> Int[np.ndarray, "cell_out 2"]:
    """Where the cells that each of `n_out` resampled ones is a mix of begin and end."""
    if len(spans) == n_out:
        return spans
    sources, shares = bilinear(len(spans), n_out)
    last = np.where(shares[:, 1] > 0, sources[:, 1], sources[:, 0])
    return np.stack((spans[sources[:, 0], 0], spans[last, 1]), axis=1)


def _spans(n_tiles: int, tile_size: int, patch_size: int) -> Int[np.ndarray, "patch 2"]:
    """Where the patches of tiles side by side begin and end; a rest of pixels of each tile is in none."""
    starts = np.arange(n_tiles)[:, None] * tile_size + np.arange(tile_size // patch_size) * patch_size
    return np.stack((starts, starts + patch_size), axis=-1).reshape(-1, 2)


def _in_a_row(parts: list[Mix]) -> Mix:
    """Tokens of several grids one after the other; those of fewer outputs have one of them again, with no share."""
    widest = max(features.shape[-1] for features, _ in parts)
    features, shares = [], []
    for own, weights in parts:
        missing = [(0, 0)] * (own.ndim - 1) + [(0, widest - own.shape[-1])]
        features.append(np.pad(own, missing, mode="edge").reshape(-1, widest))
        shares.append(np.pad(weights, missing).reshape(-1, widest))
    return np.concatenate(features), np.concatenate(shares)


def _with_breaks(rows: Mix) -> Mix:
    """A grid with a line break behind each row."""
    features, shares = rows
    breaks = np.full((len(features), 1, features.shape[-1]), -1)
    alone = np.eye(1, features.shape[-1])[None].repeat(len(features), axis=0)
    return np.concatenate((features, breaks), 1), np.concatenate((shares, alone), 1)


def _layout(
    image_size: tuple[int, int],
    parts: tuple[LayoutPart, ...],
    fine_parts: tuple[LayoutPart, ...],
    tokens: list[Mix],
    grid: tuple[int, int, int],
    size_known: bool = True,
) -> ImageLayout:
    """A layout whose tokens are these; `fine_parts` are the parts of the layout of patches."""
    (features, shares), n_patches = _in_a_row(tokens), grid[1] * grid[2]
    strongest = np.take_along_axis(features, shares.argmax(1)[:, None], 1)[:, 0]
    order = np.arange(grid[0] * n_patches).reshape(grid[0], n_patches)
    patches = partial(
        ImageLayout, ImageSize(*image_size), fine_parts, order.size, grid, np.arange(grid[0]).repeat(n_patches), order,
        size_known=size_known,
    )  # fmt: skip
    alone = features.shape[1] == 1
    return ImageLayout(
        ImageSize(*image_size),
        parts,
        len(features),
        grid,
        np.where(strongest < 0, -1, strongest // n_patches),
        order,
        patches,
        features=features[:, 0] if alone else features,
        shares=None if alone else shares,
        size_known=size_known,
    )


@lru_cache(maxsize=512)
def stitched_layout(
    image_size: tuple[int, int],
    pinpoint: tuple[int, int],
    tile_size: int,
    patch_size: int,
    most: int | None = None,
) -> ImageLayout:
    """A picture that is stretched to a first tile (the thumbnail), and fitted into a grid of more tiles.

    The tokens of the first tile come first, row by row. Those of the stitched grid follow, without the rows or columns
    of its margin, with a line break behind each row. (A picture so narrow that no row or column of it is left is in the
    first tile alone.)

    Args:
        image_size: (width, height) of the original image in pixels.
        pinpoint: (height, width) of all tiles but the first, in pixels.
        most: tokens above which the stitched grid is resampled; None: never.

    Raises:
        GeometryError: a pinpoint that is not made of tiles.
    """
    (width, height), (high, wide), side = image_size, pinpoint, tile_size // patch_size
    if min(*image_size, *pinpoint, side) < 1 or high % tile_size or wide % tile_size:
        raise GeometryError(f"a pinpoint of {pinpoint} pixels is not made of tiles of {tile_size} x {tile_size}")
    tile_rows, tile_cols = high // tile_size, wide // tile_size
    first = np.arange(side**2).reshape(side, side)
    tiles = np.arange(tile_rows * tile_cols * side**2).reshape(tile_rows, tile_cols, side, side) + side**2
    grid = tiles.swapaxes(1, 2).reshape(tile_rows * side, tile_cols * side)
    rows, cols = unpadded(image_size, grid.shape)
    kept = grid[rows, cols]
    size = resampled_size(kept.shape, most)

    new_width, new_height = fitted(image_size, pinpoint)
    left, top = (wide - new_width) // 2, (high - new_height) // 2
    x, y = width / new_width, height / new_height
    area = (-left * x, -top * y, (wide - left) * x, (high - top) * y)
    down, across = _spans(tile_rows, tile_size, patch_size), _spans(tile_cols, tile_size, patch_size)
    fine = LayoutPart("tiles", grid[None], area, ImageSize(wide, high), across, down, (tile_cols, tile_rows))
    own = _spans(1, tile_size, patch_size)
    thumbnail = LayoutPart("thumbnail", first[None], (0, 0, width, height), ImageSize(tile_size, tile_size), own, own)
    tokens, parts = [mixed(first, first.shape), _with_breaks(mixed(kept, size))], (thumbnail,)
    if kept.size:
        cells = np.arange(size[0] * (size[1] + 1)).reshape(1, size[0], size[1] + 1)[:, :, :-1] + side**2
        spans = {"columns": footprints(across[cols], size[1]), "rows": footprints(down[rows], size[0])}
        parts = (replace(fine, cells=cells, **spans), thumbnail)
    return _layout(image_size, parts, (fine, thumbnail), tokens, (1 + tile_rows * tile_cols, side, side))


@lru_cache(maxsize=512)
def square_with_break(
    image_size: tuple[int, int], tile_size: int, patch_size: int, size_known: bool = True
) -> ImageLayout:
    """A picture in the middle of a square, every patch of which is a token, and a line break at the end."""
    (width, height), side, longest = image_size, tile_size // patch_size, max(image_size)
    left, top = (longest - width) // 2, (longest - height) // 2
    cells, spans = np.arange(side**2).reshape(1, side, side), _spans(1, tile_size, patch_size)
    area = (-left, -top, longest - left, longest - top)
    part = LayoutPart("tiles", cells, area, ImageSize(tile_size, tile_size), spans, spans)
    tokens = [mixed(cells[0], cells[0].shape), (np.full((1, 1), -1), np.ones((1, 1)))]
    return _layout(image_size, (part,), (part,), tokens, (1, side, side), size_known)


@lru_cache(maxsize=64)
def pooled_layout(
    image_size: tuple[int, int], n_frames: int, tile_size: int, patch_size: int, size_known: bool = True
) -> ImageLayout:
    """Frames of a video, each stretched to a square whose grid is pooled to half its side, and one line break at the
    end."""
    side = tile_size // patch_size
    half = -(-side // 2)
    outputs = np.arange(n_frames * side**2).reshape(n_frames, side, side)
    spans, seen = _spans(1, tile_size, patch_size), ImageSize(tile_size, tile_size)
    fine = LayoutPart("tiles", outputs, (0, 0, *image_size), seen, spans, spans)
    cells, pooled = np.arange(n_frames * half**2).reshape(n_frames, half, half), footprints(spans, half)
    part = replace(fine, cells=cells, columns=pooled, rows=pooled)
    tokens = [*(mixed(frame, (half, half)) for frame in outputs), (np.full((1, 1), -1), np.ones((1, 1)))]
    return _layout(image_size, (part,), (fine,), tokens, (n_frames, side, side), size_known)
