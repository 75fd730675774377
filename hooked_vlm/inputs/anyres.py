"""LLaVA-NeXT's image preparation: a picture stretched to one square, and fitted into a grid of tiles.

Pixel values equal those of `transformers`' `LlavaNextImageProcessorPil` bit for bit. Sizes of settings and of Hugging
Face batches are (height, width); everything else here is (width, height), as Pillow has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import ImageError, InputError
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.image_processor import CLIP_MEAN, CLIP_STD
from hooked_vlm.inputs.image_settings import (
    IMAGES,
    Settings,
    colours,
    common_settings,
    processor_settings,
    whole,
)
from hooked_vlm.inputs.stitched import fitted, stitched_layout
from hooked_vlm.inputs.tiling import TilingProcessor

if TYPE_CHECKING:
    from hooked_vlm.inputs.token_layout import Grid, InputSpec

Pinpoints = tuple[tuple[int, int], ...]
MOST_PIXELS = 2**26
"""Largest area of a pinpoint."""


def best_pinpoint(size: tuple[int, int], pinpoints: Pinpoints) -> tuple[int, int]:
    """The (height, width) that shows most pixels of a picture of (width, height), and of these the one with the least
    margin.

    As `transformers`' `select_best_resolution` (image_processing_utils.py): of equals the first.
    """
    width, height = size

    def worth(pinpoint: tuple[int, int]) -> tuple[int, int]:
        high, wide = pinpoint
        scale = min(wide / width, high / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - high * wide

    return max(pinpoints, key=worth)


@dataclass(frozen=True)
class AnyresProcessor(TilingProcessor):
    """Turn images into `pixel_values` [tile, 3, side, side], the whole picture first of each image's tiles."""

    files: ClassVar[dict[str, str]] = {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
    }

    pinpoints: Pinpoints
    """(height, width) in pixels of the grids of tiles that a picture may be fitted into."""
    side: int = 336
    """Of a tile in pixels."""
    patch_size: int = 14
    max_grid: int | None = None
    """Tiles' worth of tokens above which the stitched grid is resampled; None: never."""
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        for name in ("side", "patch_size"):
            whole(name, getattr(self, name))
        colours("image_mean", self.image_mean)
        colours("image_std", self.image_std)
        for high, wide in self.pinpoints:
            if min(high, wide) < 1 or high % self.side or wide % self.side or high * wide > MOST_PIXELS:
                raise ImageError(
                    f"image_grid_pinpoints must be (height, width) in multiples of the {self.side} pixels of a tile, "
                    f"of at most {MOST_PIXELS} pixels, got {[high, wide]}"
                )
        if not self.pinpoints:
            raise ImageError("image_grid_pinpoints must name the sizes that a picture may be fitted into, got none")

    # ---------------------------------------------------------------- layouts

    def layout(self, size: tuple[int, int]) -> ImageLayout:
        """The layout of an image of (width, height) pixels."""
        most = None if self.max_grid is None else self.max_grid * (self.side // self.patch_size) ** 2
        return stitched_layout(
            (size[0], size[1]), best_pinpoint(size, self.pinpoints), self.side, self.patch_size, most
        )

    def layout_of(self, grid: "Grid", size: tuple[int, int] | None = None, kind: str = "image") -> ImageLayout:
        """The layout of an image of `grid[0]` tiles.

        Raises:
            InputError: its size is not known, or this processor makes no such grid of it.
        """
        if size is None:
            raise InputError(
                "how many tokens a picture has follows from its size: give image_sizes, (height, width) in pixels, or "
                "make the inputs with model.to_inputs(...)"
            )
        layout = self.layout(size)
        if layout.grid != grid:
            raise InputError(
                f"an image of {size[0]} x {size[1]} pixels (width x height) is seen as {layout.grid} (tiles, rows, "
                f"columns of patches), got a grid of {grid}"
            )
        return layout

    # ---------------------------------------------------------------- pixels

    def tiles_of(self, rgb: Image.Image) -> UInt8[np.ndarray, "tile side side 3"]:
        """The picture stretched to a square, and the tiles of the pinpoint that it lies in the middle of, on black."""
        side, (high, wide) = self.side, best_pinpoint(rgb.size, self.pinpoints)
        new_width, new_height = fitted(rgb.size, (high, wide))
        left, top = (wide - new_width) // 2, (high - new_height) // 2
        padded = np.zeros((high, wide, 3), np.uint8)
        resized = rgb.resize((new_width, new_height), Image.Resampling.BICUBIC)
        padded[top : top + new_height, left : left + new_width] = np.asarray(resized)
        tiles = padded.reshape(high // side, side, wide // side, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        return np.concatenate((self._stretched(rgb), tiles))

    def _stretched(self, rgb: Image.Image) -> UInt8[np.ndarray, "1 side side 3"]:
        return np.asarray(rgb.resize((self.side, self.side), Image.Resampling.BICUBIC))[None]

    # ---------------------------------------------------------------- Hugging Face batches

    def read_batch(
        self, tokens: Int[Tensor, "batch pos"], batch: Mapping[str, Tensor | None], spec: "InputSpec"
    ) -> tuple[Tensor | None, Tensor | None, list[ImageLayout] | None]:
        """Pixels without the tiles that pad a batch, grids and layouts, which follow from `image_sizes`.

        Raises:
            InputError: pixels, `image_sizes` and placeholders do not fit each other.
        """
        pixels, stated = batch["pixel_values"], batch["image_sizes"]
        if pixels is None:
            return None, None, None
        sizes = self._sizes(stated)
        layouts = self._layouts(sizes, batch)
        counts = [layout.grid[0] for layout in layouts]
        if tuple(pixels.shape[-3:]) != (3, self.side, self.side) or pixels.ndim not in (4, 5):
            raise InputError(
                f"pixel_values must be [image, tile, 3, {self.side}, {self.side}] for this model, got "
                f"{tuple(pixels.shape)}"
            )
        if pixels.ndim == 5:
            if len(pixels) != len(counts) or pixels.shape[1] < max(counts):
                raise InputError(self._misfit(sizes, counts, f"pixel_values are {tuple(pixels.shape)}"))
            pixels = torch.cat([own[:n] for own, n in zip(pixels, counts, strict=True)])
        if len(pixels) != sum(counts):
            raise InputError(self._misfit(sizes, counts, f"pixel_values are of {len(pixels)} tiles"))
        n_tokens, n_placeholders = (
            sum(layout.n_tokens for layout in layouts),
            int((tokens == spec.image_token_id).sum()),
        )
        if n_tokens != n_placeholders:
            raise InputError(
                self._misfit(sizes, counts, f"they need {n_tokens} placeholders, the tokens have {n_placeholders}")
            )
        grids = torch.tensor([layout.grid for layout in layouts], device=pixels.device)
        return pixels, grids, layouts

    def _sizes(self, stated: Tensor | None) -> list[tuple[int, int]]:
        """(width, height) of each image."""
        whole_numbers = stated is not None and not stated.dtype.is_floating_point and stated.dtype != torch.bool
        if stated is None or not whole_numbers or stated.ndim != 2 or stated.shape[1] != 2 or int(stated.min()) < 1:
            got = "none" if stated is None else f"{tuple(stated.shape)} of {stated.dtype}: {str(stated.tolist())[:80]}"
            raise InputError(f"image_sizes must be whole numbers [image, (height, width)], got {got}")
        return [(width, height) for height, width in stated.tolist()]

    def _layouts(self, sizes: list[tuple[int, int]], batch: Mapping[str, Tensor | None]) -> list[ImageLayout]:
        return [self.layout(size) for size in sizes]

    def _misfit(self, sizes: list[tuple[int, int]], counts: list[int], but: str) -> str:
        shown = [(height, width) for width, height in sizes]
        return (
            f"images of image_sizes (height, width) {shown} have {counts} tiles under image_grid_pinpoints "
            f"{[list(own) for own in self.pinpoints]}, but {but}: both must be those that the batch was made with"
        )

    # ---------------------------------------------------------------- bounds

    def with_most_tiles(self, max_tiles: int) -> "AnyresProcessor":
        """The same processor with the pinpoints of at most so many tiles, the whole picture not counted."""
        most = whole("max_tiles", max_tiles) * self.side**2
        kept = tuple(own for own in self.pinpoints if own[0] * own[1] <= most)
        if not kept:
            least = self.tile_counts[-1]
            raise ImageError(f"max_tiles must be at least {least}, the fewest tiles of this model, got {max_tiles}")
        return replace(self, pinpoints=kept)

    @property
    def tile_counts(self) -> list[int]:
        """Numbers of tiles of the pinpoints, each once, from the most to the fewest."""
        return sorted({high * wide // self.side**2 for high, wide in self.pinpoints}, reverse=True)

    @property
    def tile_side(self) -> int:
        return self.side

    # ---------------------------------------------------------------- settings

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **defaults: Any) -> "AnyresProcessor":
        """From `preprocessor_config.json`, over `defaults` from the model's configuration.

        Raises:
            ImageError: a setting that is not supported, or that contradicts config.json.
        """
        return cls(**_checked(processor_settings(config), defaults))

    @classmethod
    def from_checkpoint(cls, cfg: VLMConfig, images: Settings, videos: Settings) -> "AnyresProcessor":
        """The checkpoint's processor of images.

        Raises:
            CheckpointError: settings that are not supported, or that contradict config.json.
        """
        return cls._from_settings(cfg, images)

    @classmethod
    def _from_settings(cls, cfg: VLMConfig, settings: Settings, **silent: Any) -> "AnyresProcessor":
        vision = cfg.vision
        assert vision is not None
        sizes = {"side": vision.tile_size, "patch_size": vision.patch_size}
        try:
            return cls.from_dict(
                settings.values, pinpoints=vision.pinpoints, max_grid=vision.max_grid, **sizes, **silent
            )
        except ImageError as error:
            raise settings.refusal(error) from error

    def to_files(self) -> dict[str, dict[str, Any]]:
        """Settings of images."""
        return {IMAGES: {**self.files, **self._settings()}}

    def _settings(self) -> dict[str, Any]:
        return {
            "image_grid_pinpoints": [list(own) for own in self.pinpoints],
            "size": {"shortest_edge": self.side},
            "crop_size": {"height": self.side, "width": self.side},
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }


def _checked(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a processor with these settings.

    Raises:
        ImageError: a setting that is not supported, or that contradicts config.json.
    """
    fields: dict[str, Any] = {**defaults, **common_settings(config)}
    for key in ("size", "crop_size"):
        sides = config[key].values() if isinstance(config.get(key), Mapping) else (config.get(key),)
        if any(own not in (None, fields["side"]) for own in sides):
            raise ImageError(
                f"unsupported image processor: expected a {key} of {fields['side']} pixels, the vision tower's "
                f"image_size, got {config[key]!r}"
            )
    stated, known = config.get("image_grid_pinpoints"), [list(own) for own in fields["pinpoints"]]
    if stated is not None and stated != known:
        raise ImageError(
            f"image_grid_pinpoints must be those of config.json, {known}, after which the model counts its tokens, "
            f"got {stated!r:.200}"
        )
    return fields
