"""The pictures of a batch of prompts as pixel tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby

import torch
from torch import Tensor

from hooked_vlm.errors import ImageError, InputError
from hooked_vlm.inputs.boxes import ImageSize
from hooked_vlm.inputs.files import is_file_source
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.images import load_image
from hooked_vlm.inputs.layouts import by_frames
from hooked_vlm.inputs.messages import Picture
from hooked_vlm.inputs.picture_processor import Bounds, PictureProcessor, Prepared
from hooked_vlm.inputs.picture_settings import naming, process_images
from hooked_vlm.inputs.prompts import Prompt
from hooked_vlm.inputs.videos import open_video


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pixels and grids of all images and of all videos (None without any), and where their tokens lie."""

    pixels: Tensor | None = None
    grids: Tensor | None = None
    layouts: list[ImageLayout] = field(default_factory=list)
    video_pixels: Tensor | None = None
    video_grids: Tensor | None = None
    video_layouts: list[ImageLayout] = field(default_factory=list)

    def bounded_by_call(self, prompts: Sequence[Prompt], any_size: bool) -> list[list[tuple[ImageSize, int]]]:
        """For each prompt, size and number of temporal patches of its pictures that bounds of the call resize.

        Without `any_size`, bounds are on the tiles of an image: neither on frames nor on images of one tile.
        """
        n_frames = [] if self.video_grids is None else self.video_grids[:, 0].tolist()
        images = iter([((layout.image_size, 1), layout.n_tiles) for layout in self.layouts])
        videos = zip([layout.image_size for layout in self.video_layouts], n_frames, strict=True)
        by_prompt = []
        for prompt in prompts:
            own = zip(prompt.images, images, strict=False)
            of_images = [size for image, (size, n) in own if (any_size or n > 1) and not image.settings.resizes]
            of_videos = [
                size
                for video, size in zip(prompt.videos, videos, strict=False)
                if any_size and not (video.settings.resizes or is_file_source(video.source))
            ]
            by_prompt.append([*of_images, *of_videos])
        return by_prompt


def prepare_pictures(
    prompts: Sequence[Prompt],
    processor: PictureProcessor | None,
    bounds: Bounds,
    allow_remote: bool = False,
    video_times: bool = False,
) -> Pictures:
    """Preprocess the images and videos of all prompts.

    Args:
        processor: the model's, with the bounds of the call.
        allow_remote: fetch http(s) addresses.
        video_times: whether each temporal patch of a video is a picture by itself, behind its time.

    Raises:
        InputError: there are pictures but no image processor, or videos for a model that takes none.
        ImageError: a picture cannot be read, or has settings that cannot be met.
    """
    images = [image for prompt in prompts for image in prompt.images]
    videos = [video for prompt in prompts for video in prompt.videos]
    if not images and not videos:
        return Pictures()
    if processor is None:
        raise InputError("this model has no image processor: set model.image_processor")
    prepared = Pictures(*_images(prompts, processor, allow_remote)) if images else Pictures()
    if not videos:
        return prepared
    if not processor.takes_videos:
        raise InputError("this model takes no videos: give their frames as images")
    parts = [_video(video, i, processor, bounds, allow_remote, video_times) for i, video in enumerate(videos)]
    return replace(
        prepared,
        video_pixels=torch.cat([pixels for pixels, _, _ in parts]),
        video_grids=torch.cat([grids for _, grids, _ in parts]),
        video_layouts=[layout for _, _, layout in parts],
    )


def _images(prompts: Sequence[Prompt], processor: PictureProcessor, allow_remote: bool) -> Prepared:
    """The images of all prompts; those of prompts in a row are prepared together where they are prepared alike."""
    parts: list[Prepared] = []
    with_images = [prompt for prompt in prompts if prompt.images]
    numbers = count()
    for own, alike in groupby(with_images, key=lambda prompt: processor.among(len(prompt.images))):
        images, loaded = [image for prompt in alike for image in prompt.images], []
        for image, i in zip(images, numbers, strict=False):
            with naming(f"image {i}"):
                loaded.append(load_image(image.source, allow_remote))
        parts.append(process_images(loaded, [image.settings for image in images], own))
    if len(parts) == 1:
        return parts[0]
    pixels, grids, layouts = zip(*parts, strict=True)
    return torch.cat(pixels), torch.cat(grids), [layout for own in layouts for layout in own]


def _video(
    video: Picture, number: int, processor: PictureProcessor, bounds: Bounds, allow_remote: bool, times: bool
) -> tuple[Tensor, Tensor, ImageLayout]:
    with naming(f"video {number}"):
        clip = open_video(video.source, video.settings, processor, allow_remote)
        settings = video.settings.over(bounds.min_pixels, bounds.max_pixels) if clip.from_file else video.settings
        resized = None
        if not isinstance(processor, ImageProcessor):
            if video.settings.resizes:
                raise ImageError(f"{processor.sees}: frames have one size, none by settings of a video")
        elif clip.from_file or settings.resizes:
            resized = settings.frame_size(*clip.size, processor, clip.n_frames, clip.from_file)
        pixels, grid, _ = processor.video(clip.frames, resized=resized)
        t, h, w = grid[0].tolist()
        layout = processor.layout_of((t, h, w), clip.size, "video")
        layout = replace(layout, seconds=processor.temporal_patch_size / clip.rate)
        of_patches = clip.times_of_patches(processor.temporal_patch_size)
        return pixels, grid, by_frames(layout, of_patches) if times else layout
