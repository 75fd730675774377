"""Gemma 3's image preparation: the whole image stretched to a square, and crops along its longer side if asked for.

Pixel values equal those of `transformers`' `Gemma3ImageProcessorPil` bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Int
from PIL import Image
from torch import Tensor

from hooked_vlm.errors import ImageError, InputError
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.image_settings import IMAGES, whole
from hooked_vlm.inputs.layouts import Area, unplaced_layout
from hooked_vlm.inputs.stretched import StretchProcessor

if TYPE_CHECKING:
    from hooked_vlm.inputs.token_layout import Grid, InputSpec

SETTINGS = {
    "do_pan_and_scan": "pan_and_scan",
    "pan_and_scan_min_crop_size": "min_crop_size",
    "pan_and_scan_max_num_crops": "max_crops",
    "pan_and_scan_min_ratio_to_activate": "min_ratio",
}
"""Names of the settings in files, and here."""


@dataclass(frozen=True)
class PanScanProcessor(StretchProcessor):
    """A `StretchProcessor` that may show crops of a long image behind the whole: `replace(..., pan_and_scan=True)`."""

    files: ClassVar[dict[str, str]] = {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
    }

    side: int = 896
    token_size: int = 4
    resample: int = Image.Resampling.BILINEAR.value
    pan_and_scan: bool = False
    """Whether long images are cropped, too; published settings leave it to the user."""
    min_crop_size: int = 256
    """Of the shorter side of a crop, in pixels of the original image."""
    max_crops: int = 4
    min_ratio: float = 1.2
    """Of the longer side to the shorter one, from which on an image is cropped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_crop_size", "max_crops"):
            whole(name, getattr(self, name))
        if self.max_crops > self.min_crop_size:
            raise ImageError(
                f"there may be at most as many crops as a crop has pixels, got max_crops={self.max_crops} and "
                f"min_crop_size={self.min_crop_size}"
            )
        if not self.min_ratio >= 1:
            raise ImageError(f"min_ratio must be at least 1, got {self.min_ratio}")

    def areas(self, size: tuple[int, int]) -> tuple[Area, ...]:
        """The whole image of (width, height) pixels, then its crops from left to right or from top to bottom."""
        return (*super().areas(size), *(self._crops(size) if self.pan_and_scan else ()))

    def _crops(self, size: tuple[int, int]) -> tuple[Area, ...]:
        """Pieces along the longer side, all of one length but the last, which ends with the image.

        As `Gemma3ImageProcessorPil.pan_and_scan` (image_processing_pil_gemma3.py:82).
        """
        short, long = sorted(size)
        if long / short < self.min_ratio:
            return ()
        n = min(floor(long / self.min_crop_size), floor(long / short + 0.5))
        n = min(self.max_crops, max(2, n))
        step = ceil(long / n)
        if min(step, short) < self.min_crop_size:
            return ()
        spans = [(i * step, min((i + 1) * step, long)) for i in range(n)]
        width, height = size
        return tuple((a, 0, b, height) if width >= height else (0, a, width, b) for a, b in spans)

    def between(self, n_squares: int) -> tuple[str, ...]:
        """The published text around the whole image and its crops."""
        if n_squares == 1:
            return ()
        crops = (" and here are some crops to help you see better ", *(" ",) * (n_squares - 2))
        return ("Here is the original image ", *crops, "")

    def layout_of(self, grid: "Grid", size: tuple[int, int] | None = None, kind: str = "image") -> ImageLayout:
        """The layout of an image of `grid[0]` squares: without its size, it is not known where crops lie.

        Raises:
            InputError: this processor makes no such grid of a picture of this size.
        """
        side = self.side // self.patch_size
        if size is None and grid[0] > 1 and grid[1:] == (side, side):
            return unplaced_layout(grid[0], side, self.token_size, runs=grid[0])
        return super().layout_of(grid, size, kind)

    def read_batch(
        self, tokens: Int[Tensor, "batch pos"], batch: Mapping[str, Tensor | None], spec: "InputSpec"
    ) -> tuple[Tensor | None, Tensor | None, list[ImageLayout] | None]:
        """Pixels and grids, from `num_crops` or else every square as an image by itself.

        Raises:
            InputError: `num_crops` counts other squares than there are.
        """
        pixels, grids, layouts = super().read_batch(tokens, batch, spec)
        crops = batch.get("num_crops")
        if pixels is None or crops is None:
            return pixels, grids, layouts
        n_squares = [int(n) + 1 for n in crops.reshape(-1).tolist()]
        if sum(n_squares) != len(pixels) or min(n_squares) < 1:
            raise InputError(f"got {len(pixels)} squares, but num_crops counts {n_squares} for the images")
        return pixels, self._grids(n_squares).to(pixels.device), None

    @classmethod
    def _own_settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: config[key] for key, name in SETTINGS.items() if config.get(key) is not None}
        switch, ratio = own.get("pan_and_scan", False), own.get("min_ratio", 1.2)
        if not isinstance(switch, bool):
            raise ImageError(f"do_pan_and_scan must be true or false, got {switch!r}")
        if isinstance(ratio, bool) or not isinstance(ratio, int | float):
            raise ImageError(f"pan_and_scan_min_ratio_to_activate must be a number, got {ratio!r}")
        return {**super()._own_settings(config), **own, "min_ratio": float(ratio)}

    def to_files(self) -> dict[str, dict[str, Any]]:
        """Settings of images."""
        own = {key: getattr(self, name) for key, name in SETTINGS.items()}
        return {IMAGES: {**super().to_files()[IMAGES], **own}}
