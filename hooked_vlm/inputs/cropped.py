"""LLaVA-1.5's image preparation: the middle square of an image, or the whole image padded to a square.

Pixel values equal those of `transformers`' `LlavaImageProcessorPil` (and `CLIPImageProcessorPil`) bit for bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import ImageError, InputError
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.image_settings import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGES,
    Settings,
    colours,
    common_settings,
    normalised,
    processor_settings,
    whole,
)
from hooked_vlm.inputs.layouts import squares_layout
from hooked_vlm.inputs.picture_processor import PictureProcessor, Prepared, each_image

if TYPE_CHECKING:
    from hooked_vlm.inputs.token_layout import Grid, InputSpec

MOST_PIXELS = 2**26
"""Largest area of a resized image before it is cropped."""


def padded_square(rgb: Image.Image, mean: tuple[float, float, float], side: int) -> Image.Image:
    """A picture in the middle of a square in the mean colour, resized to `side` pixels."""
    longest = max(rgb.size)
    background = Image.new("RGB", (longest, longest), tuple(int(255 * value) for value in mean))
    background.paste(rgb, ((longest - rgb.width) // 2, (longest - rgb.height) // 2))
    return background.resize((side, side), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class CropProcessor(PictureProcessor):
    """Turn images into `pixel_values` [image, 3, side, side]; the defaults are the published checkpoints'."""

    sees: ClassVar[str] = "this model sees the middle square of a picture"

    side: int = 336
    """Length in pixels of the shorter edge of a resized image, and of the square cut from its middle."""
    patch_size: int = 14
    pad: bool = False
    """Whether images are padded to a square in the mean colour, as in LLaVA's original code; then nothing is cut."""
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        for name in ("side", "patch_size"):
            whole(name, getattr(self, name))
        colours("image_mean", self.image_mean)
        colours("image_std", self.image_std)

    def layout(self, size: tuple[int, int]) -> ImageLayout:
        """The layout of an image of (width, height) pixels."""
        width, height = size
        if self.pad:
            longest = max(size)
            left, top = (longest - width) // 2, (longest - height) // 2
            area = (-left, -top, longest - left, longest - top)
        else:
            wide, high = self._resized(size)
            left, top = (wide - self.side) // 2, (high - self.side) // 2
            area = (
                left * width / wide,
                top * height / high,
                (left + self.side) * width / wide,
                (top + self.side) * height / high,
            )
        return squares_layout((width, height), (area,), self.side, self.patch_size)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height with a shorter edge of `side` pixels.

        Raises:
            ImageError: the longer one would be far too long.
        """
        shortest, longest = min(size), max(size)
        long = int(self.side * longest / shortest)
        if long * self.side > MOST_PIXELS:
            raise ImageError(
                f"an image of {size[0]} x {size[1]} pixels (width x height) is too narrow: its shorter edge is resized "
                f"to {self.side} pixels, the longer one would have {long}; crop or pad it"
            )
        return (self.side, long) if size[0] <= size[1] else (long, self.side)

    def layout_of(self, grid: "Grid", size: tuple[int, int] | None = None, kind: str = "image") -> ImageLayout:
        """The layout of an image; without its size, in the pixels of the square that the tower sees.

        Raises:
            InputError: the tower sees no such grid.
        """
        side = self.side // self.patch_size
        if grid != (1, side, side):
            raise InputError(f"this model sees every picture as (1, {side}, {side}) patches, got a grid of {grid}")
        if size is not None:
            return self.layout(size)
        seen = (self.side, self.side)
        return squares_layout(seen, ((0, 0, *seen),), self.side, self.patch_size, size_known=False)

    def __call__(self, images: Sequence[Any], *, resized: Sequence[tuple[int, int] | None] | None = None) -> Prepared:
        """Prepare images (anything `load_image` takes).

        Returns:
            pixel_values: float32 [image, 3, side, side].
            grids: int64, (1, rows, columns) of patches per image.
            layouts: where the tokens of each image lie in the original (after EXIF orientation).

        Raises:
            ImageError: see `load_image`; an image that is too narrow. The message starts with the number of the image.
        """
        squares, layouts = [np.zeros((0, self.side, self.side, 3), np.uint8)], []
        for name, rgb in each_image(images):
            try:
                squares.append(np.asarray(self._square(rgb))[None])
            except ImageError as error:
                raise ImageError(f"{name}: {error}") from error
            layouts.append(self.layout(rgb.size))
        pixels = normalised(np.concatenate(squares), self.image_mean, self.image_std)
        return torch.from_numpy(pixels), self._grids(len(layouts)), layouts

    def _square(self, rgb: Image.Image) -> Image.Image:
        """The square that the tower sees."""
        if self.pad:
            return padded_square(rgb, self.image_mean, self.side)
        wide, high = self._resized(rgb.size)
        left, top = (wide - self.side) // 2, (high - self.side) // 2
        resized = rgb.resize((wide, high), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + self.side, top + self.side))

    def _grids(self, n_images: int) -> Int[Tensor, "image 3"]:
        side = self.side // self.patch_size
        return torch.tensor([[1, side, side]] * n_images, dtype=torch.int64).reshape(-1, 3)

    def read_batch(
        self, tokens: Int[Tensor, "batch pos"], batch: Mapping[str, Tensor | None], spec: "InputSpec"
    ) -> tuple[Tensor | None, Tensor | None, list[ImageLayout] | None]:
        """Pixels and grids: every square is an image."""
        pixels = batch["pixel_values"]
        if pixels is None:
            return None, None, None
        if tuple(pixels.shape[-3:]) != (3, self.side, self.side) or pixels.ndim != 4:
            raise InputError(
                f"pixel_values must be [image, 3, {self.side}, {self.side}] for this model, got {tuple(pixels.shape)}"
            )
        return pixels, self._grids(len(pixels)).to(pixels.device), None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **defaults: Any) -> "CropProcessor":
        """From `preprocessor_config.json`, over `defaults` from the model's configuration.

        Raises:
            ImageError: a setting that is not supported.
        """
        config = processor_settings(config)
        fields: dict[str, Any] = {**defaults, **common_settings(config), "pad": config.get("do_pad") is True}
        if not fields["pad"] and config.get("do_center_crop") is False:
            raise ImageError("unsupported image processor: expected do_center_crop = True, got False")
        for key in ("size", "crop_size"):
            sides = set(config[key].values()) if isinstance(config.get(key), Mapping) else {config.get(key)}
            if sides - {None, fields["side"]}:
                raise ImageError(
                    f"unsupported image processor: expected a {key} of {fields['side']} pixels, the vision tower's "
                    f"image_size, got {config[key]!r}"
                )
        return cls(**fields)

    @classmethod
    def from_checkpoint(cls, cfg: VLMConfig, images: Settings, videos: Settings) -> "CropProcessor":
        """The checkpoint's processor of images; it takes no videos.

        Raises:
            CheckpointError: settings that are not supported, or that contradict config.json.
        """
        assert cfg.vision is not None
        try:
            return cls.from_dict(images.values, side=cfg.vision.tile_size, patch_size=cfg.vision.patch_size)
        except ImageError as error:
            raise images.refusal(error) from error

    def to_files(self) -> dict[str, dict[str, Any]]:
        """Settings of images."""
        return {
            IMAGES: {
                "image_processor_type": "LlavaImageProcessor",
                "processor_class": "LlavaProcessor",
                "do_center_crop": True,
                "do_pad": self.pad,
                "size": {"shortest_edge": self.side},
                "crop_size": {"height": self.side, "width": self.side},
                "image_mean": list(self.image_mean),
                "image_std": list(self.image_std),
            }
        }
