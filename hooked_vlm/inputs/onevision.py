"""LLaVA-OneVision's image preparation: as LLaVA-NeXT's, but for several images in a prompt, and for videos.

Each of several images in one prompt is padded to a square in the mean colour and seen once. Frames of a video are
stretched to squares, the tokens of which are pooled. Pixel values of images equal those of `transformers`'
`LlavaOnevisionImageProcessorPil` bit for bit (its video processor needs torchvision; frames are resized here as images
are).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import ImageError, InputError
from hooked_vlm.inputs.anyres import AnyresProcessor
from hooked_vlm.inputs.boxes import ImageSize
from hooked_vlm.inputs.cropped import padded_square
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.image_processor import CLIP_MEAN, CLIP_STD
from hooked_vlm.inputs.image_settings import VIDEOS, Settings, normalised
from hooked_vlm.inputs.stitched import pooled_layout, square_with_break

if TYPE_CHECKING:
    from hooked_vlm.inputs.token_layout import Grid

PUBLISHED = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
"""SigLIP's, with which the checkpoints are published: their conversion takes SigLIP's processor."""
SILENT = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
"""Where a file is silent, the class of transformers decides."""


@dataclass(frozen=True)
class OneVisionProcessor(AnyresProcessor):
    """Turn images and videos into pictures [tile or frame, 3, side, side]."""

    takes_videos: ClassVar[bool] = True
    files: ClassVar[dict[str, str]] = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
    }

    squares: bool = False
    """Whether images are padded to a square each, as several in one prompt are."""
    for_videos: "OneVisionProcessor | None" = None
    """The processor of videos, where the checkpoint has other settings for them."""

    def among(self, n_images: int) -> "OneVisionProcessor":
        """The processor of each of so many images in one prompt."""
        return self if n_images < 2 else replace(self, squares=True)

    def layout(self, size: tuple[int, int]) -> ImageLayout:
        """The layout of an image of (width, height) pixels."""
        if self.squares:
            return square_with_break((size[0], size[1]), self.side, self.patch_size)
        return super().layout(size)

    def layout_of(self, grid: "Grid", size: tuple[int, int] | None = None, kind: str = "image") -> ImageLayout:
        """The layout of a video of `grid[0]` frames, or of an image of as many tiles: one alone is a padded square.

        Raises:
            InputError: tiles of an image whose size is not known, or that this processor does not make.
        """
        side = self.side // self.patch_size
        if grid[1:] != (side, side):
            raise InputError(f"this model sees pictures of {side} x {side} patches, got a grid of {grid}")
        width, height = size or (self.side, self.side)
        if kind == "video":
            return pooled_layout((width, height), grid[0], self.side, self.patch_size, size is not None)
        if grid[0] == 1:
            return square_with_break((width, height), self.side, self.patch_size, size is not None)
        return AnyresProcessor.layout_of(replace(self, squares=False), grid, size)

    def tiles_of(self, rgb: Image.Image) -> UInt8[np.ndarray, "tile side side 3"]:
        if self.squares:
            return np.asarray(padded_square(rgb, self.image_mean, self.side))[None]
        return super().tiles_of(rgb)

    # ---------------------------------------------------------------- videos

    def video(
        self, frames: Iterable[Any], *, resized: tuple[int, int] | None = None
    ) -> tuple[Float[Tensor, "frame 3 side side"], Int[Tensor, "1 3"], list[ImageSize]]:
        """Prepare one video: all frames, each stretched to a square.

        Args:
            frames: images of one size, in order.

        Raises:
            ImageError: no frames, or frames of different sizes.
        """
        if self.for_videos is not None:
            return self.for_videos.video(frames)
        squares, first = [], None
        for i, frame in enumerate(frames):
            first = first or ImageSize(*frame.size)
            if frame.size != first:
                raise ImageError(
                    f"all frames of a video must have one size, but frame {i} is {frame.width} x {frame.height} and "
                    f"frame 0 is {first.width} x {first.height}: resize or pad them first"
                )
            squares.append(self._stretched(frame))
        if first is None:
            raise ImageError("a video needs at least one frame, got none")
        pixels = normalised(np.concatenate(squares), self.image_mean, self.image_std)
        side = self.side // self.patch_size
        return torch.from_numpy(pixels), torch.tensor([[len(squares), side, side]]), [first]

    # ---------------------------------------------------------------- Hugging Face batches

    def _layouts(self, sizes: list[tuple[int, int]], batch: Mapping[str, Tensor | None]) -> list[ImageLayout]:
        """Of images alone in their prompt, and of others: `batch_num_images` says how many each prompt has."""
        stated = batch["batch_num_images"]
        counts = [1] * len(sizes) if stated is None else [int(n) for n in stated.reshape(-1).tolist()]
        if sum(counts) != len(sizes) or min(counts, default=1) < 1:
            raise InputError(
                f"batch_num_images must be the number of images of each prompt that has some, {len(sizes)} together, "
                f"got {counts}"
            )
        together = [n for n in counts for _ in range(n)]
        return [self.among(n).layout(size) for n, size in zip(together, sizes, strict=True)]

    def read_videos(self, pixels: Tensor | None, grids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Frames and grids, from pixels [video, frame, 3, side, side]."""
        if pixels is None:
            return None, None
        if pixels.ndim != 5 or tuple(pixels.shape[2:]) != (3, self.side, self.side):
            raise InputError(
                f"pixel_values_videos must be [video, frame, 3, {self.side}, {self.side}] for this model, got "
                f"{tuple(pixels.shape)}"
            )
        side = self.side // self.patch_size
        return pixels.flatten(0, 1), torch.tensor([[pixels.shape[1], side, side]] * len(pixels), device=pixels.device)

    # ---------------------------------------------------------------- settings

    @classmethod
    def from_checkpoint(cls, cfg: VLMConfig, images: Settings, videos: Settings) -> "OneVisionProcessor":
        """The checkpoint's processor of images and, where they have settings of their own, of videos.

        Raises:
            CheckpointError: settings that are not supported, or that contradict config.json.
        """
        processor: Any = cls._from_settings(cfg, images, **(PUBLISHED if images.file is None else SILENT))
        if videos.file is None:
            return processor
        of_videos = cls._from_settings(cfg, videos, **SILENT)
        return processor if of_videos == processor else replace(processor, for_videos=of_videos)

    def to_files(self) -> dict[str, dict[str, Any]]:
        """Settings of images, and of videos where they are others."""
        files = super().to_files()
        if self.for_videos is not None:
            own = self.for_videos._settings()
            del own["image_grid_pinpoints"]
            files[VIDEOS] = {**own, "video_processor_type": "LlavaOnevisionVideoProcessor"}
        return files

    def _settings(self) -> dict[str, Any]:
        settings = {**super()._settings(), "size": {"height": self.side, "width": self.side}}
        del settings["crop_size"]
        return settings
