"""Image preparation of PaliGemma: the whole image, stretched to a square.

Pixel values equal those of `transformers`' `SiglipImageProcessorPil` bit for bit.
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
    HALF,
    IMAGES,
    Settings,
    colours,
    common_settings,
    normalised,
    processor_settings,
    whole,
)
from hooked_vlm.inputs.layouts import Area, squares_layout
from hooked_vlm.inputs.picture_processor import PictureProcessor, Prepared, each_image

if TYPE_CHECKING:
    from hooked_vlm.inputs.token_layout import Grid, InputSpec


@dataclass(frozen=True)
class StretchProcessor(PictureProcessor):
    """Turn images into `pixel_values` [square, 3, side, side]; the defaults are the published checkpoints'."""

    sees: ClassVar[str] = "this model sees every picture stretched to a square"
    files: ClassVar[dict[str, str]] = {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
    }

    side: int = 224
    """Of the square in pixels."""
    patch_size: int = 14
    token_size: int = 1
    """Side in patches of the square that a token covers."""
    resample: int = Image.Resampling.BICUBIC.value
    """Pillow's number of the filter that resizes."""
    image_mean: tuple[float, float, float] = HALF
    image_std: tuple[float, float, float] = HALF

    def __post_init__(self) -> None:
        for name in ("side", "patch_size", "token_size"):
            whole(name, getattr(self, name))
        if self.resample not in [filter.value for filter in Image.Resampling]:
            raise ImageError(f"resample must be the number of one of Pillow's filters, 0 to 5, got {self.resample!r}")
        colours("image_mean", self.image_mean)
        colours("image_std", self.image_std)

    # ---------------------------------------------------------------- layouts

    def areas(self, size: tuple[int, int]) -> tuple[Area, ...]:
        """The rectangles of an image of (width, height) pixels that become squares."""
        return ((0, 0, *size),)

    def between(self, n_squares: int) -> tuple[str, ...]:
        """Texts around the runs of tokens of an image of so many squares."""
        return ()

    def layout(self, size: tuple[int, int]) -> ImageLayout:
        """The layout of an image of (width, height) pixels."""
        return self._squares((size[0], size[1]), self.areas(size))

    def _squares(self, size: tuple[int, int], areas: tuple[Area, ...], size_known: bool = True) -> ImageLayout:
        sizes = (self.side, self.patch_size, self.token_size)
        return squares_layout(size, areas, *sizes, self.between(len(areas)), size_known)

    def layout_of(self, grid: "Grid", size: tuple[int, int] | None = None, kind: str = "image") -> ImageLayout:
        """The layout of an image; without its size, in the pixels of the square that the tower sees.

        Raises:
            InputError: this processor makes no such grid of a picture of this size.
        """
        seen = (self.side, self.side)
        layout = self._squares(seen, ((0, 0, *seen),), size_known=False) if size is None else self.layout(size)
        if grid != layout.grid:
            of = "every picture" if size is None else f"a picture of {size[0]} x {size[1]} pixels"
            raise InputError(f"this model sees {of} as {layout.grid} (squares, rows, columns), got a grid of {grid}")
        return layout

    # ---------------------------------------------------------------- pixels

    def __call__(self, images: Sequence[Any], *, resized: Sequence[tuple[int, int] | None] | None = None) -> Prepared:
        """Prepare images (anything `load_image` takes).

        Returns:
            pixel_values: float32 [square, 3, side, side], of each image the whole first.
            grids: int64, (squares, rows, columns) of patches per image.
            layouts: where the tokens of each image lie in the original (after EXIF orientation).

        Raises:
            ImageError: see `load_image`. The message starts with the number of the image.
        """
        squares, layouts = [np.zeros((0, self.side, self.side, 3), np.uint8)], []
        for _, rgb in each_image(images):
            squares += [np.asarray(self._square(rgb, area))[None] for area in self.areas(rgb.size)]
            layouts.append(self.layout(rgb.size))
        pixels = normalised(np.concatenate(squares), self.image_mean, self.image_std)
        return torch.from_numpy(pixels), self._grids([layout.n_tiles for layout in layouts]), layouts

    def _square(self, rgb: Image.Image, area: Area) -> Image.Image:
        piece = rgb.crop((int(area[0]), int(area[1]), int(area[2]), int(area[3])))
        return piece.resize((self.side, self.side), Image.Resampling(self.resample))

    def _grids(self, n_squares: list[int]) -> Int[Tensor, "image 3"]:
        side = self.side // self.patch_size
        return torch.tensor([[n, side, side] for n in n_squares], dtype=torch.int64).reshape(-1, 3)

    def read_batch(
        self, tokens: Int[Tensor, "batch pos"], batch: Mapping[str, Tensor | None], spec: "InputSpec"
    ) -> tuple[Tensor | None, Tensor | None, list[ImageLayout] | None]:
        """Pixels and grids: every square is an image."""
        pixels = batch["pixel_values"]
        if pixels is None:
            return None, None, None
        if tuple(pixels.shape[-3:]) != (3, self.side, self.side) or pixels.ndim != 4:
            raise InputError(
                f"pixel_values must be [square, 3, {self.side}, {self.side}] for this model, got {tuple(pixels.shape)}"
            )
        return pixels, self._grids([1] * len(pixels)).to(pixels.device), None

    # ---------------------------------------------------------------- settings

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **defaults: Any) -> "StretchProcessor":
        """From `preprocessor_config.json`, over `defaults` from the model's configuration.

        Raises:
            ImageError: a setting that is not supported.
        """
        config = processor_settings(config)
        made = cls(**{**defaults, **common_settings(config, resample=None), **cls._own_settings(config)})
        for key in ("do_center_crop", "do_pad"):
            if config.get(key):
                raise ImageError(f"unsupported image processor: expected {key} = False, got {config[key]!r}")
        size = config.get("size")
        stated = set(size.values()) if isinstance(size, Mapping) else {size}
        if stated - {None, made.side}:
            raise ImageError(
                f"unsupported image processor: expected a size of {made.side} x {made.side} pixels, the vision tower's "
                f"image_size, got {size!r}"
            )
        n_tokens = (made.side // made.patch_size // made.token_size) ** 2
        if config.get("image_seq_length") not in (None, n_tokens):
            got = config["image_seq_length"]
            raise ImageError(f"image_seq_length must be the {n_tokens} tokens of a picture of this model, got {got!r}")
        return made

    @classmethod
    def _own_settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that only some of these processors have."""
        return {} if config.get("resample") is None else {"resample": config["resample"]}

    @classmethod
    def from_checkpoint(cls, cfg: VLMConfig, images: Settings, videos: Settings) -> "StretchProcessor":
        """The checkpoint's processor of images; it takes no videos.

        Raises:
            CheckpointError: settings that are not supported, or that contradict config.json.
        """
        assert cfg.vision is not None
        sizes = {
            "side": cfg.vision.tile_size,
            "patch_size": cfg.vision.patch_size,
            "token_size": cfg.vision.token_size,
        }
        try:
            return cls.from_dict(images.values, **sizes)
        except ImageError as error:
            raise images.refusal(error) from error

    def to_files(self) -> dict[str, dict[str, Any]]:
        """Settings of images."""
        return {
            IMAGES: {
                **self.files,
                "size": {"height": self.side, "width": self.side},
                "image_seq_length": (self.side // self.patch_size // self.token_size) ** 2,
                "resample": self.resample,
                "image_mean": list(self.image_mean),
                "image_std": list(self.image_std),
            }
        }
