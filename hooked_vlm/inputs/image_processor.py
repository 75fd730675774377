"""Qwen2-VL's image processor: images and videos as the vision tower's patches, with Pillow and numpy only.

Pixel values equal those of `transformers`' `Qwen2VLImageProcessorPil` bit for bit (its torchvision processors
differ by up to one grey level). That class is not used itself because importing it takes seconds.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import CheckpointError, ImageError
from hooked_vlm.inputs.boxes import ImageSize
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.image_settings import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGES,
    PUBLISHED_TOGETHER,
    SILENT_IMAGES,
    SILENT_TOGETHER,
    SILENT_VIDEOS,
    TOKENS_TOGETHER,
    VIDEO_TOKENS,
    VIDEOS,
    Settings,
    area_bounds,
    colours,
    common_settings,
    normalisation_tables,
    processor_settings,
    whole,
)
from hooked_vlm.inputs.images import checked_images, load_named
from hooked_vlm.inputs.layouts import whole_layout
from hooked_vlm.inputs.picture_processor import Bounds, PictureProcessor, Prepared
from hooked_vlm.inputs.resizing import resize_together, smart_resize
from hooked_vlm.vision_config import VisionConfig

if TYPE_CHECKING:
    from hooked_vlm.inputs.token_layout import Grid

MOST_ENLARGED = 2**24
"""Largest area in pixels to which a small image is enlarged; a little above the published `max_pixels`."""


@dataclass(frozen=True)
class ImageProcessor(PictureProcessor):
    """Turn images and videos into the rows of `pixel_values`; the defaults are the published checkpoints'."""

    bounds: ClassVar[tuple[str, ...]] = ("min_pixels", "max_pixels")
    resizes_single: ClassVar[bool] = True
    takes_videos: ClassVar[bool] = True
    sees: ClassVar[str] = "this model sees images whole"

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    """Smaller images are enlarged to about this area (in pixels; a token covers `pixels_per_token`**2)."""
    max_pixels: int = 12845056
    """Larger images are reduced to this area at most."""
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    video_tokens: int | None = None
    """Tokens of a whole video, nine tenths of which bound the area of its frames (`together`: tokens of a frame); None:
    each frame is bounded alone."""
    together: bool = False
    """Whether bounds on a video hold for the area of all its frames together."""
    for_videos: "ImageProcessor | None" = None
    """The processor of videos, where the checkpoint has other settings for them."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            whole(name, getattr(self, name))
        if self.min_pixels > self.max_pixels:
            raise ImageError(
                f"expected 1 <= min_pixels <= max_pixels, got min_pixels={self.min_pixels} "
                f"and max_pixels={self.max_pixels}: set both"
            )
        if self.max_pixels < self.pixels_per_token**2:
            raise ImageError(f"max_pixels={self.max_pixels} is less than one token's {self.pixels_per_token**2} pixels")
        if max(self.min_pixels, self.pixels_per_token**2) > MOST_ENLARGED:
            raise ImageError(
                f"min_pixels={self.min_pixels} and tokens of {self.pixels_per_token**2} pixels would enlarge every "
                f"image to more than {MOST_ENLARGED} pixels: lower them"
            )
        colours("image_mean", self.image_mean)
        colours("image_std", self.image_std)

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of resized pixels that one token covers."""
        return self.patch_size * self.merge_size

    def layout(self, size: tuple[int, int]) -> ImageLayout:
        """The layout of an image of (width, height) pixels."""
        height, width = smart_resize(size[1], size[0], self.pixels_per_token, self.min_pixels, self.max_pixels)
        return self.layout_of((1, height // self.patch_size, width // self.patch_size), size)

    def n_tokens(self, size: tuple[int, int]) -> int:
        """Image tokens of an image of (width, height) pixels."""
        height, width = smart_resize(size[1], size[0], self.pixels_per_token, self.min_pixels, self.max_pixels)
        return height * width // self.pixels_per_token**2

    def layout_of(self, grid: "Grid", size: tuple[int, int] | None = None, kind: str = "image") -> ImageLayout:
        """The layout of an image or video that the tower sees as `grid`; without a size, in resized pixels."""
        resized = (grid[2] * self.patch_size, grid[1] * self.patch_size)
        return whole_layout(size or resized, grid, self.patch_size, self.merge_size, size_known=size is not None)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **defaults: Any) -> "ImageProcessor":
        """From the contents of `preprocessor_config.json` (or of `processor_config.json`, as saved by 5.x).

        The bounds may be given as `min_pixels` and `max_pixels` (as published), as `size` with
        `shortest_edge` and `longest_edge` (4.57 and 5.x; areas, despite their names) or `min_pixels` and
        `max_pixels` (4.45). Where both are given, `min_pixels` and `max_pixels` count, as in every `transformers`:
        folders saved after `from_pretrained(base, max_pixels=...)` keep the base's `size`. Absent settings have the
        values of `defaults`, or those published.

        Raises:
            ImageError: a `size` that contradicts itself, or a setting that is not supported.
        """
        config = processor_settings(config)
        fields: dict[str, Any] = {**defaults, **area_bounds(config), **common_settings(config)}
        for key in ("patch_size", "temporal_patch_size", "merge_size"):
            if config.get(key) is not None:
                fields[key] = whole(key, config[key])
        if config.get("cap_pixels_per_frame"):
            silent = TOKENS_TOGETHER if fields.get("together") else VIDEO_TOKENS
            fields["video_tokens"] = whole("max_video_tokens", config.get("max_video_tokens", silent))
        return cls(**fields)

    def __call__(
        self,
        images: Sequence[Any],
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        *,
        resized: Sequence[tuple[int, int] | None] | None = None,
    ) -> Prepared:
        """Prepare images (anything `load_image` takes).

        Args:
            images: a list of images; sizes may differ.
            min_pixels, max_pixels: bounds on the area of each resized image, in place of this processor's.
            resized: the (height, width) of each resized image in whole tokens, or None where the bounds decide.

        Returns:
            pixel_values: float32, the patches of all images one after the other, in each image in merge-block
                order (`ImageLayout.patch_order`); a patch is (channel, frame, y, x) flattened, a still image being
                repeated for all `temporal_patch_size` frames.
            image_grid_thw: int64, (1, rows, columns) of patches per image.
            layouts: where the tokens of each image lie in the original (after EXIF orientation).

        Raises:
            ImageError: see `load_image` and `smart_resize`; the message starts with the number of the image.
        """
        bounded = self.bounded(min_pixels, max_pixels)
        sizes = resized or [None] * len(checked_images(images, "images"))
        prepared = [
            bounded._prepare(image, f"image {i}", size)
            for i, (image, size) in enumerate(zip(images, sizes, strict=True))
        ]
        pixel_values, grid_thw = bounded._pack([[patches] for _, patches in prepared])
        grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
        layouts = [self.layout_of(grid, size) for grid, (size, _) in zip(grids, prepared, strict=True)]
        return pixel_values, grid_thw, layouts

    def video(
        self,
        frames: Iterable[Any],
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        *,
        resized: tuple[int, int] | None = None,
    ) -> tuple[Float[torch.Tensor, "patches d_patch"], Int[torch.Tensor, "1 3"], list[ImageSize]]:
        """Prepare one video.

        All frames are used, none is sampled; if their number is no multiple of `temporal_patch_size`, the
        last one is repeated. The bounds hold for each frame, as in `transformers` (4.x and 5.x) and, for frames, in
        `qwen-vl-utils`; the budget over all frames is applied only where the checkpoint sets `cap_pixels_per_frame`,
        so long videos need a smaller `max_pixels`. Settings are those of `for_videos`, if there are any.

        Args:
            frames: images of one size, in order: a list, or an iterator that makes them one by one.
            min_pixels, max_pixels: bounds on the area of each resized frame, in place of this processor's.
            resized: the (height, width) of each resized frame in whole tokens, in place of bounds.

        Returns:
            As for images: `pixel_values_videos`, `video_grid_thw` (one row: temporal patches, rows, columns)
            and the list of the one original frame size.

        Raises:
            ImageError: no frames, frames of different sizes, or as for images.
        """
        each = frames if isinstance(frames, Iterator) else checked_images(frames, "frames")
        bounded = self.bounded(min_pixels, max_pixels)
        bounded = bounded.for_videos or bounded
        if bounded.together and resized is None:
            each = list(each)
            resized = bounded._size_together(each) if each else None
        elif bounded.video_tokens is not None:
            each = list(each)
            bounded = bounded._sharing(len(each))
        prepared = [bounded._prepare(frame, f"frame {i}", resized) for i, frame in enumerate(each)]
        if not prepared:
            raise ImageError("a video needs at least one frame, got none")
        first = prepared[0][0]
        for i, (size, _) in enumerate(prepared):
            if size != first:
                raise ImageError(
                    f"all frames of a video must have one size, but frame {i} is {size.width} x "
                    f"{size.height} and frame 0 is {first.width} x {first.height}: resize or pad them first"
                )
        pixel_values, grid_thw = bounded._pack([[patches for _, patches in prepared]])
        return pixel_values, grid_thw, [first]

    def bounded(self, min_pixels: int | None, max_pixels: int | None) -> "ImageProcessor":
        """The same processor with other bounds, on each frame of videos too; None keeps one."""
        videos = self.for_videos
        if videos is not None and videos.together and (min_pixels, max_pixels) != (None, None):
            videos = replace(videos, together=False, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        return replace(
            self,
            min_pixels=self.min_pixels if min_pixels is None else min_pixels,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
            for_videos=None if videos is None else videos.bounded(min_pixels, max_pixels),
        )

    def _bounded(self, bounds: Bounds) -> "ImageProcessor":
        return self.bounded(bounds.min_pixels, bounds.max_pixels)

    def bounds_for(self, pixels: int | None) -> dict[str, int | None]:
        """Arguments of `to_inputs` with which every picture has about this area."""
        return {"min_pixels": pixels, "max_pixels": pixels}

    def bounds_below(self, n_tokens: int, n_tiles: int) -> dict[str, int]:
        """Arguments of `to_inputs` with which a picture has at most so many tokens, where the checkpoint allows it."""
        return {"max_pixels": max(min(n_tokens * self.pixels_per_token**2, self.max_pixels), self.min_pixels)}

    def tighter(
        self, n_text: list[int], pictures: Sequence[Sequence[Any]], n_ctx: int, given: Bounds
    ) -> Iterator[tuple[str, "ImageProcessor"]]:
        """Smaller and smaller areas."""
        area, least = self.pixels_per_token**2, self.min_pixels
        now = "the checkpoint's own" if given.max_pixels is None else str(given.max_pixels)
        # tokens for each picture if all take their full share; a narrow picture takes more, as no side is below a
        # token's
        rows = zip(n_text, pictures, strict=True)
        shares = [(n_ctx - n) // sum(frames for _, frames in row) for n, row in rows if row]
        for most in range(min(shares, default=0) * area, 0, -area):
            lower = f"min_pixels={most} and " if least > most else ""
            yield f"{lower}max_pixels={most} (now {now})", self.bounded(min(least, most), most)

    def patch_colours(self, pixels: Float[np.ndarray, "patch d_patch"]) -> Float[np.ndarray, "patch 3 side side"]:
        """The first frame of each patch."""
        sides = (3, self.temporal_patch_size, self.patch_size, self.patch_size)
        return pixels.reshape(len(pixels), *sides)[:, :, 0]

    @classmethod
    def from_checkpoint(cls, cfg: VLMConfig, images: Settings, videos: Settings) -> "ImageProcessor":
        """The checkpoint's processor of images and, where they have settings of their own, of videos.

        Raises:
            CheckpointError: settings that are not supported, or that contradict config.json.
        """
        assert cfg.vision is not None
        if cfg.vision.video_times:  # Qwen3-VL
            processor = cls._from_settings(images, SILENT_IMAGES, cfg.vision, PUBLISHED_TOGETHER)
            of_videos = cls._from_settings(videos, SILENT_TOGETHER, cfg.vision, PUBLISHED_TOGETHER, together=True)
            return replace(processor, for_videos=of_videos)
        processor = cls._from_settings(images, SILENT_IMAGES, cfg.vision)
        if videos.file is None:
            return processor
        silent = SILENT_IMAGES if videos.file == IMAGES else SILENT_VIDEOS
        of_videos = cls._from_settings(videos, silent, cfg.vision)
        return processor if of_videos == processor else replace(processor, for_videos=of_videos)

    @classmethod
    def _from_settings(
        cls,
        settings: Settings,
        silent: Mapping[str, Any],
        vision: VisionConfig,
        published: Mapping[str, Any] = {},
        together: bool = False,
    ) -> "ImageProcessor":
        """With the `silent` settings where a file does not state them, with the `published` ones without any file."""
        sizes = {name: getattr(vision, name) for name in ("patch_size", "temporal_patch_size", "merge_size")}
        others = published if settings.file is None else silent
        try:
            processor = cls.from_dict(settings.values, **sizes, **others, together=together)
        except ImageError as error:
            raise settings.refusal(error) from error
        for name, size in sizes.items():
            if getattr(processor, name) != size:
                raise CheckpointError(f"{settings.file} says {name} = {getattr(processor, name)}, config.json {size}")
        return processor

    def to_files(self) -> dict[str, dict[str, Any]]:
        """Settings of images, and of videos where they are others."""
        files = {IMAGES: {"image_processor_type": "Qwen2VLImageProcessor", **self._settings()}}
        if self.for_videos is not None:
            kind = "Qwen3VLVideoProcessor" if self.for_videos.together else "Qwen2VLVideoProcessor"
            files[VIDEOS] = {**self.for_videos._settings(), "video_processor_type": kind}
        return files

    def _settings(self) -> dict[str, Any]:
        budget, bounds = self.video_tokens, {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        if self.together:
            bounds = {"size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}}
        return {
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
            **bounds,
            **({} if budget is None else {"cap_pixels_per_frame": True, "max_video_tokens": budget}),
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }

    def _sharing(self, n_frames: int) -> "ImageProcessor":
        """The processor of a frame that shares the budget of `video_tokens` with the others.

        As in `transformers` (models/qwen2_vl/video_processing_qwen2_vl.py, `resize`).
        """
        if self.video_tokens is None or n_frames == 0:
            return self
        budget = int(self.video_tokens * self.pixels_per_token**2 * 0.9)
        share = max(min(self.max_pixels, budget * self.temporal_patch_size // n_frames), int(self.min_pixels * 1.05))
        return replace(self, max_pixels=share)

    def _size_together(self, frames: Sequence[Any]) -> tuple[int, int]:
        """The (height, width) of every frame, where the bounds hold for all of them together."""
        n, least, most = len(frames), self.min_pixels, self.max_pixels
        if self.video_tokens is not None:
            most = n * max(min(self.video_tokens * self.pixels_per_token**2, most // n), int(least * 1.05))
        width, height = load_named(frames[0], "frame 0").size
        return resize_together(height, width, self.pixels_per_token, least, most, n, self.temporal_patch_size)

    def _prepare(
        self, image: object, name: str, resized: tuple[int, int] | None = None
    ) -> tuple[ImageSize, UInt8[np.ndarray, "rows cols merge merge 3 side side"]]:
        """The image's size, and its resized pixels cut into patches, block by block."""
        rgb = load_named(image, name)
        try:
            height, width = resized or smart_resize(
                rgb.height, rgb.width, self.pixels_per_token, self.min_pixels, self.max_pixels
            )
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from error
        size = ImageSize(*rgb.size)
        if size != (width, height):
            rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
        blocks = np.asarray(rgb).reshape(
            height // self.pixels_per_token, self.merge_size, self.patch_size,
            width // self.pixels_per_token, self.merge_size, self.patch_size,
            3,
        )  # fmt: skip
        return size, np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5))

    def _pack(
        self, clips: list[list[np.ndarray]]
    ) -> tuple[Float[torch.Tensor, "patches d_patch"], Int[torch.Tensor, "clips 3"]]:
        """Normalise the patches of clips (lists of prepared frames; an image is a clip of one), in one pass."""
        tables = normalisation_tables(self.image_mean, self.image_std)
        side, merge = self.patch_size, self.merge_size
        grid_thw = [
            (-(-len(clip) // self.temporal_patch_size), clip[0].shape[0] * merge, clip[0].shape[1] * merge)
            for clip in clips
        ]
        n_patches = [math.prod(grid) for grid in grid_thw]
        # [patch, channel, frame, y, x]
        packed = np.empty((sum(n_patches), 3, self.temporal_patch_size, side, side), dtype=np.float32)
        start = 0
        for clip, (_, rows, cols), n in zip(clips, grid_thw, n_patches, strict=True):
            rows_of_clip = packed[start : start + n].reshape(-1, rows * cols, *packed.shape[1:])
            for number, frame in enumerate(clip):
                t, within = divmod(number, self.temporal_patch_size)
                # the last frame also fills the rest of its temporal patch
                slots = slice(within, None if number == len(clip) - 1 else within + 1)
                frame = frame.reshape(rows * cols, 3, 1, side, side)
                for colour, table in enumerate(tables):
                    rows_of_clip[t, :, colour, slots] = table.take(frame[:, colour])
            start += n
        pixel_values = torch.from_numpy(packed.reshape(len(packed), 3 * self.temporal_patch_size * side**2))
        return pixel_values, torch.tensor(grid_thw, dtype=torch.int64).reshape(-1, 3)
