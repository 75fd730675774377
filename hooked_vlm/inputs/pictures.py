"""The pictures of a batch of prompts as pixel tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.geometry import ImageSize
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.prompts import Prompt
from hooked_vlm.inputs.tiles import TileProcessor


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pixels and grids of all images and of all videos (None without any), and the sizes of the originals."""

    pixels: Tensor | None = None
    grids: Tensor | None = None
    sizes: list[ImageSize] = field(default_factory=list)
    video_pixels: Tensor | None = None
    video_grids: Tensor | None = None
    video_sizes: list[ImageSize] = field(default_factory=list)

    def by_prompt(self, prompts: Sequence[Prompt]) -> list[list[tuple[ImageSize, int]]]:
        """For each prompt, the size and the number of temporal patches of its images, then of its videos."""
        n_frames = [] if self.video_grids is None else self.video_grids[:, 0].tolist()
        images = iter([(size, 1) for size in self.sizes])
        videos = zip(self.video_sizes, n_frames, strict=True)
        return [[*islice(images, len(p.images)), *islice(videos, len(p.videos))] for p in prompts]


def prepare_pictures(prompts: Sequence[Prompt], processor: ImageProcessor | TileProcessor | None) -> Pictures:
    """Preprocess the images and videos of all prompts.

    Raises:
        InputError: there are pictures but no image processor, or videos for a model that tiles images.
        ImageError: a picture cannot be read.
    """
    images = [image for prompt in prompts for image in prompt.images]
    videos = [video for prompt in prompts for video in prompt.videos]
    if not images and not videos:
        return Pictures()
    if processor is None:
        raise InputError("this model has no image processor: set model.image_processor")
    prepared = Pictures(*processor(images)) if images else Pictures()
    if not videos:
        return prepared
    if not isinstance(processor, ImageProcessor):
        raise InputError("this model takes no videos: give their frames as images")
    parts = [processor.video(frames) for frames in videos]
    return replace(
        prepared,
        video_pixels=torch.cat([pixels for pixels, _, _ in parts]),
        video_grids=torch.cat([grids for _, grids, _ in parts]),
        video_sizes=[size for _, _, (size,) in parts],
    )


def bound_pixels(
    processor: ImageProcessor | TileProcessor, min_pixels: int | None, max_pixels: int | None, max_tiles: int | None
) -> ImageProcessor | TileProcessor:
    """The processor with other bounds on the size of images; None keeps one.

    Raises:
        InputError: a bound that this kind of processor does not have.
        ImageError: bounds that contradict each other.
    """
    if isinstance(processor, TileProcessor):
        if min_pixels is not None or max_pixels is not None:
            raise InputError("this model cuts images into tiles: bound them by max_tiles, not min_pixels or max_pixels")
        return processor.bounded(None, max_tiles)
    if max_tiles is not None:
        raise InputError("this model sees images whole: bound them by min_pixels and max_pixels, not max_tiles")
    return processor.bounded(min_pixels, max_pixels)
