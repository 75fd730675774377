"""Idefics3's and SmolVLM's image preparation: a picture enlarged and cut into square tiles, and then seen whole.

Pixel values equal those of `transformers`' `Idefics3ImageProcessorPil` and `SmolVLMImageProcessorPil` bit for bit; the
two differ in nothing. Where a batch has fewer tiles than its longest row, these pad it with tiles of zeros, which the
model drops; none are made here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import ImageError, InputError
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.image_settings import (
    HALF,
    IMAGES,
    PROCESSOR,
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

MOST_PIXELS = 4096
"""Of a side of an enlarged picture (`MAX_IMAGE_SIZE` in image_processing_pil_idefics3.py)."""
SILENT: dict[str, Any] = {"size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364}}
"""Where a file is silent, the class of transformers decides."""
MARK, WHOLE = "<fake_token_around_image>", "<global-img>"
LANCZOS = Image.Resampling.LANCZOS


@lru_cache(maxsize=512)
def idefics3_layout(
    image_size: tuple[int, int],
    tiling: tuple[int, int],
    patch_size: int,
    merge_size: int,
    side: int,
    size_known: bool = True,
) -> ImageLayout:
    """A picture that is stretched to square tiles and, if these are several, seen whole behind them.

    Each tile is a run of placeholders with a text in front that says its row and column.

    Args:
        image_size: (width, height) of the original image in pixels.
        tiling: (columns, rows) of tiles.
        side: of a tile in pixels.
    """
    cols, rows = tiling
    layout = tiled_layout(image_size, tiling, tiling != (1, 1), patch_size, merge_size, side, False, size_known)
    runs = (layout.n_tokens // layout.n_tiles,) * layout.n_tiles
    return replace(layout, runs=runs, between=_texts(cols, rows))


def _texts(cols: int, rows: int) -> tuple[str, ...]:
    """Texts before the placeholders of each tile and of the whole picture, and behind them (processing_idefics3.py,
    `replace_image_token`)."""
    if cols == rows == 1:
        return f"{MARK}{WHOLE}", MARK
    places = [(row, col) for row in range(1, rows + 1) for col in range(1, cols + 1)]
    tiles = [("\n" if row > 1 and col == 1 else "") + f"{MARK}<row_{row}_col_{col}>" for row, col in places]
    return (*tiles, f"\n\n{MARK}{WHOLE}", MARK)


@dataclass(frozen=True)
class Idefics3Processor(TilingProcessor):
    """Turn images into `pixel_values` [tile, 3, side, side], the whole picture last of each image's tiles."""

    side: int
    """Of a tile in pixels."""
    patch_size: int
    merge_size: int
    longest_edge: int
    """Of an enlarged (or reduced) picture in pixels."""
    splits: bool = True
    """Whether pictures are cut into tiles; otherwise each is stretched to one."""
    max_tiles: int | None = None
    """Largest number of tiles of an image, the whole one not counted: its longest edge is that of fewer tiles where it
    would have more. None: `longest_edge` alone decides."""
    image_mean: tuple[float, float, float] = HALF
    image_std: tuple[float, float, float] = HALF

    def __post_init__(self) -> None:
        for name in ("side", "patch_size", "merge_size", "longest_edge"):
            whole(name, getattr(self, name))
        if self.max_tiles is not None:
            whole("max_tiles", self.max_tiles)
        colours("image_mean", self.image_mean)
        colours("image_std", self.image_std)

    # ---------------------------------------------------------------- layouts

    @property
    def tokens_per_tile(self) -> int:
        return (self.side // self.patch_size // self.merge_size) ** 2

    def tiling(self, size: tuple[int, int]) -> tuple[int, int]:
        """Columns and rows of tiles of an image of (width, height) pixels."""
        if not self.splits:
            return 1, 1
        wide, high = whole_tiles(self._enlarged(size), self.side)
        return wide // self.side, high // self.side

    def _enlarged(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) of an enlarged picture: with the longest edge that leaves it few enough tiles."""
        edges = [self.longest_edge]
        if self.max_tiles is not None and self.splits:
            edges += range((self.longest_edge - 1) // self.side * self.side, 0, -self.side)
        for edge in edges:
            resized = enlarged(size, edge)
            if self.max_tiles is None or math.prod(whole_tiles(resized, self.side)) <= self.max_tiles * self.side**2:
                return resized
        return enlarged(size, self.side)

    def layout(self, size: tuple[int, int]) -> ImageLayout:
        """The layout of an image of (width, height) pixels."""
        return self._layout((size[0], size[1]), self.tiling(size))

    def _layout(self, size: tuple[int, int], tiling: tuple[int, int], size_known: bool = True) -> ImageLayout:
        return idefics3_layout(size, tiling, self.patch_size, self.merge_size, self.side, size_known)

    def layout_of(self, grid: "Grid", size: tuple[int, int] | None = None, kind: str = "image") -> ImageLayout:
        """The layout of an image of `grid[0]` tiles: without its size only that of a single tile is known.

        Raises:
            InputError: this processor makes no such grid of a picture of this size.
        """
        n_patches = self.side // self.patch_size
        if grid[1:] != (n_patches, n_patches):
            raise InputError(f"this model sees tiles of {n_patches} x {n_patches} patches, got a grid of {grid}")
        if size is None and grid[0] == 1:
            return self._layout((self.side, self.side), (1, 1), size_known=False)
        if size is None:
            return unplaced_layout(grid[0], n_patches, self.merge_size, runs=grid[0])
        layout = self.layout(size)
        if layout.n_tiles != grid[0]:
            raise InputError(
                f"an image of {size[0]} x {size[1]} pixels has {grid[0]} tiles, but this processor makes "
                f"{layout.n_tiles} of it"
            )
        return layout

    # ---------------------------------------------------------------- pixels

    def tiles_of(self, rgb: Image.Image) -> UInt8[np.ndarray, "tile side side 3"]:
        """The tiles row by row, the whole picture last."""
        side = self.side
        picture = rgb.resize(self._enlarged(rgb.size), LANCZOS)
        if not self.splits:
            return np.asarray(picture.resize((side, side), LANCZOS))[None]
        picture = picture.resize(whole_tiles(picture.size, side), LANCZOS)
        tiles = cut(picture, side)
        if len(tiles) == 1:
            return tiles
        return np.concatenate((tiles, np.asarray(picture.resize((side, side), LANCZOS))[None]))

    # ---------------------------------------------------------------- Hugging Face batches

    def read_batch(
        self, tokens: Int[Tensor, "batch pos"], batch: Mapping[str, Tensor | None], spec: "InputSpec"
    ) -> tuple[Tensor | None, Tensor | None, list[ImageLayout] | None]:
        """Pixels without the tiles of zeros that pad a batch, grids, and layouts in the pixels of the tiles.

        Raises:
            InputError: pixels and placeholders do not fit each other, or pixels of a tile are masked.
        """
        pixels, mask = batch["pixel_values"], batch["pixel_attention_mask"]
        if pixels is None:
            return None, None, None
        if pixels.ndim != 5 or tuple(pixels.shape[2:]) != (3, self.side, self.side):
            raise InputError(
                f"pixel_values must be [row, tile, 3, {self.side}, {self.side}] for this model, got "
                f"{tuple(pixels.shape)}"
            )
        real = (pixels != 0).flatten(2).any(-1)  # as transformers finds them
        if mask is not None and (mask.shape[:2] != real.shape or not bool(mask[real].all())):
            raise InputError("pixel_attention_mask hides pixels of a tile, which this model's pictures never have")
        by_row = [self._images_of(row, spec.image_token_id) for row in tokens.tolist()]
        counts = [sum(layout.n_tiles for layout in own) for own in by_row if own]
        found = [n for n in real.sum(1).tolist() if n]
        if counts != found:
            raise InputError(
                f"rows with images have {found} tiles that are not all zeros, but their placeholders are those of "
                f"{counts} tiles of {self.tokens_per_tile}"
            )
        layouts = [layout for own in by_row for layout in own]
        return pixels[real], torch.tensor([layout.grid for layout in layouts], device=pixels.device), layouts

    def _images_of(self, row: list[int], image_token_id: int | None) -> list[ImageLayout]:
        """Layouts of the images of a row.

        Each tile is a run of placeholders. The token that stands around images follows at once, but for a line break
        behind each row of tiles; between images it stands twice.
        """
        bounds = np.flatnonzero(np.diff([False, *(token == image_token_id for token in row), False]))
        starts, stops = bounds[::2].tolist(), bounds[1::2].tolist()
        mark = row[stops[-1]] if stops and stops[-1] < len(row) else -1
        images: list[list[int]] = []  # numbers of tiles side by side
        for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            if stop - start != self.tokens_per_tile:
                raise InputError(
                    f"a tile has {self.tokens_per_tile} placeholders, but a run of them has {stop - start}"
                )
            gap = row[stops[i - 1] : start] if i else []
            if not i or gap.count(mark) > 1:
                images.append([1])
            elif gap[0] == mark:
                images[-1][-1] += 1
            else:
                images[-1].append(1)
        return [self._of_lines(*lines) for lines in images]

    def _of_lines(self, *lines: int) -> ImageLayout:
        """The layout of an image with so many tiles side by side in each line, the whole picture being the last."""
        *tiles, last = lines
        tiling = (tiles[0], len(tiles)) if tiles else (1, 1)
        if last != 1 or len(set(tiles)) > 1 or (tiles and tiling == (1, 1)):
            n_tiles = sum(lines)
            return unplaced_layout(n_tiles, self.side // self.patch_size, self.merge_size, runs=n_tiles)
        return self._layout((tiling[0] * self.side, tiling[1] * self.side), tiling, size_known=False)

    # ---------------------------------------------------------------- bounds

    def with_most_tiles(self, max_tiles: int) -> "Idefics3Processor":
        """The same processor with a bound on the tiles of an image, the whole one not counted."""
        return replace(self, max_tiles=max_tiles)

    @property
    def tile_counts(self) -> range:
        """From the tiles of a square picture down."""
        return range(math.prod(self.tiling((1, 1))), 0, -1)

    @property
    def tile_side(self) -> int:
        return self.side

    # ---------------------------------------------------------------- settings

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **sizes: int) -> "Idefics3Processor":
        """From `preprocessor_config.json`, with the vision tower's sizes.

        Raises:
            ImageError: a setting that is not supported, or that contradicts config.json.
        """
        config = SILENT | {name: value for name, value in processor_settings(config).items() if value is not None}
        if not isinstance(config.get("do_image_splitting", True), bool):
            raise ImageError(f"do_image_splitting must be true or false, got {config['do_image_splitting']!r}")
        tile, edge = _longest_edge(config, "max_image_size"), _longest_edge(config, "size")
        if tile != sizes["side"]:
            raise ImageError(
                f"max_image_size must be the vision tower's image_size of {sizes['side']} pixels (others are not "
                f"supported), got {config['max_image_size']!r}"
            )
        common: dict[str, Any] = common_settings(config, LANCZOS)
        return cls(**sizes, longest_edge=edge, splits=config.get("do_image_splitting", True), **common)

    @classmethod
    def from_checkpoint(cls, cfg: VLMConfig, images: Settings, videos: Settings) -> "Idefics3Processor":
        """The checkpoint's processor of images; where no file has settings, a longest edge of four tiles, as published.

        Raises:
            CheckpointError: settings that are not supported, or that contradict config.json.
        """
        vision = cfg.vision
        assert vision is not None and vision.tile_size is not None
        sizes: dict[str, Any] = {
            "side": vision.tile_size,
            "patch_size": vision.patch_size,
            "merge_size": vision.merge_size,
        }
        if images.file is None:
            return cls(**sizes, longest_edge=4 * vision.tile_size)
        try:
            return cls.from_dict(images.values, **sizes)
        except ImageError as error:
            raise images.refusal(error) from error

    def to_files(self) -> dict[str, dict[str, Any]]:
        """Settings of images, and what transformers' processor has to know to write prompts."""
        return {
            IMAGES: {
                "image_processor_type": "Idefics3ImageProcessor",
                "processor_class": "Idefics3Processor",
                "do_image_splitting": self.splits,
                "size": {"longest_edge": self.longest_edge},
                "max_image_size": {"longest_edge": self.side},
                "image_mean": list(self.image_mean),
                "image_std": list(self.image_std),
            },
            PROCESSOR: {"processor_class": "Idefics3Processor", "image_seq_len": self.tokens_per_tile},
        }


def _longest_edge(config: Mapping[str, Any], name: str) -> int:
    stated = config[name]
    if not isinstance(stated, Mapping) or {key for key, value in stated.items() if value} != {"longest_edge"}:
        raise ImageError(f'unsupported image processor: expected {name} as {{"longest_edge": pixels}}, got {stated!r}')
    return whole(f"{name}.longest_edge", stated["longest_edge"])


def enlarged(size: tuple[int, int], longest_edge: int) -> tuple[int, int]:
    """The (width, height) of a picture whose longest edge becomes so long, the other one even.

    As `get_resize_output_image_size` of the reference, rounding included.
    """
    width, height = _scaled(size, longest_edge)
    if size[0] >= size[1]:
        height += height % 2
    else:
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    if max(width, height) > MOST_PIXELS:
        width, height = _scaled((width, height), MOST_PIXELS)
    return max(width, 1), max(height, 1)


def whole_tiles(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The (width, height), multiples of a tile's side, that a picture is stretched to (`resize_for_vision_encoder`)."""
    width, height = _scaled(size, math.ceil(max(size) / side) * side)
    return math.ceil(width / side) * side, math.ceil(height / side) * side


def _scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(width, height) with a longest edge of so many pixels, the other one rounded down."""
    width, height = size
    ratio = width / height
    return (longest, int(longest / ratio)) if width >= height else (int(longest * ratio), longest)
