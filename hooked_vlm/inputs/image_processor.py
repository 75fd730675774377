"""Qwen2-VL's image processor: images and videos as the vision tower's patches, with Pillow and numpy only.

Pixel values equal those of `transformers`' `Qwen2VLImageProcessorPil` bit for bit (its torchvision processors
differ by up to one grey level). That class is not used itself because importing it takes seconds (it loads
`transformers.modeling_utils`, SciPy and SymPy).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image

from hooked_vlm.config import VisionConfig, VLMConfig
from hooked_vlm.errors import CheckpointError, ImageError
from hooked_vlm.inputs.boxes import ImageSize
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.image_settings import (
    IMAGES,
    VIDEOS,
    Settings,
    colours,
    common_settings,
    normalisation_tables,
    processor_settings,
    whole,
)
from hooked_vlm.inputs.images import checked_images, load_image
from hooked_vlm.inputs.layouts import whole_layout
from hooked_vlm.inputs.picture_processor import Bounds, PictureProcessor, Prepared
from hooked_vlm.inputs.resizing import smart_resize

if TYPE_CHECKING:
    from hooked_vlm.inputs.token_layout import Grid

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Where a file is silent, the class of transformers decides: Qwen2VLImageProcessorPil, Qwen2VLVideoProcessor (if videos
# have settings of their own; else 4.x prepared them as images, with which the models were published)
SILENT_IMAGES = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
SILENT_VIDEOS = {"min_pixels": 128 * 28 * 28, "max_pixels": 28 * 28 * 768}
VIDEO_TOKENS = 128_000  # `max_video_tokens` of transformers' Qwen2VLVideoProcessor
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
    """Tokens of a whole video, nine tenths of which bound the area of its frames; None: each frame is bounded alone."""
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
        fields: dict[str, Any] = {**defaults, **_bounds(config), **common_settings(config)}
        for key in ("patch_size", "temporal_patch_size", "merge_size"):
            if config.get(key) is not None:
                fields[key] = whole(key, config[key])
        if config.get("cap_pixels_per_frame"):
            fields["video_tokens"] = whole("max_video_tokens", config.get("max_video_tokens", VIDEO_TOKENS))
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
        bounded = (self.for_videos or self).bounded(min_pixels, max_pixels)
        if bounded.video_tokens is not None:
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
        """The same processor with other bounds, on videos too; None keeps one."""
        return replace(
            self,
            min_pixels=self.min_pixels if min_pixels is None else min_pixels,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
            for_videos=None if self.for_videos is None else self.for_videos.bounded(min_pixels, max_pixels),
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
        processor = cls._from_settings(images, SILENT_IMAGES, cfg.vision)
        if videos.file is None:
            return processor
        silent = SILENT_IMAGES if videos.file == IMAGES else SILENT_VIDEOS
        of_videos = cls._from_settings(videos, silent, cfg.vision)
        return processor if of_videos == processor else replace(processor, for_videos=of_videos)

    @classmethod
    def _from_settings(cls, settings: Settings, silent: Mapping[str, int], vision: VisionConfig) -> "ImageProcessor":
        """Without any file, with the published bounds."""
        sizes = {name: getattr(vision, name) for name in ("patch_size", "temporal_patch_size", "merge_size")}
        bounds = {} if settings.file is None else silent
        try:
            processor = cls.from_dict(settings.values, **sizes, **bounds)
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
            files[VIDEOS] = {**self.for_videos._settings(), "video_processor_type": "Qwen2VLVideoProcessor"}
        return files

    def _settings(self) -> dict[str, Any]:
        budget = self.video_tokens
        return {
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
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

    def _prepare(
        self, image: object, name: str, resized: tuple[int, int] | None = None
    ) -> tuple[ImageSize, UInt8[np.ndarray, "rows cols merge merge 3 side side"]]:
        """The image's size, and its resized pixels cut into patches, block by block."""
        try:
            rgb = load_image(image)
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


def _bounds(config: Mapping[str, Any]) -> dict[str, int]:
    """`min_pixels` and `max_pixels` from the keys that versions of transformers have used for them."""
    size = config.get("size") or {}
    if not isinstance(size, Mapping) or set(size) - {
        "shortest_edge",
        "longest_edge",
        "min_pixels",
        "max_pixels",
    }:
        raise ImageError(
            "unsupported image processor: expected a `size` of shortest_edge and longest_edge (areas in "
            f"pixels), got {size!r}"
        )
    bounds = {}
    for bound, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        stated = {f"size.{name}": size[name] for name in (edge, bound) if size.get(name) is not None}
        if config.get(bound) is not None:
            stated = {bound: config[bound]}
        values = {whole(name, value) for name, value in stated.items()}
        if len(values) > 1:
            raise ImageError(f"the image processor's `size` contradicts itself: {stated}; make both agree")
        if values:
            bounds[bound] = values.pop()
    return bounds
