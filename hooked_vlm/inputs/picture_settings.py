"""Settings that a message gives one image or video beside its source, with the meaning they have in Qwen's messages.

The rules are those of `qwen-vl-utils` (`vision_process.py`: `fetch_image`, `fetch_video`, `smart_nframes`). Its areas
are multiples of a published token's 28 x 28 pixels; here they are multiples of the checkpoint's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from PIL import Image

from hooked_vlm.errors import ImageError
from hooked_vlm.inputs.image_processor import MOST_ENLARGED, ImageProcessor
from hooked_vlm.inputs.image_settings import whole
from hooked_vlm.inputs.picture_processor import PictureProcessor, Prepared
from hooked_vlm.inputs.resizing import smart_resize

IMAGE_SETTINGS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
VIDEO_SETTINGS = (*IMAGE_SETTINGS, "total_pixels", "fps", "nframes", "min_frames", "max_frames")

FILE_MIN_TOKENS, FILE_MAX_TOKENS, FILE_TOTAL_TOKENS = 128, 768, 115200
"""Bounds on a frame of a video file, and on all its temporal patches together, in tokens."""
FPS, MIN_FRAMES, MAX_FRAMES = 2.0, 4, 768
"""Frames sampled per second of a video file, and bounds on their number."""


@dataclass(frozen=True)
class PictureSettings:
    """Settings of one image or video; None: as for all others.

    Raises:
        ImageError: settings that exclude or contradict each other, or enlarge the picture without bounds.
    """

    min_pixels: int | None = None
    """Least area of the resized image or frame, in pixels."""
    max_pixels: int | None = None
    """Largest area of the resized image or frame."""
    resized_height: int | None = None
    """Height to resize to, rounded to whole tokens; with `resized_width`, in place of bounds."""
    resized_width: int | None = None
    total_pixels: int | None = None
    """Largest area of all temporal patches of a video together, though each may have 1.05 * `min_pixels`."""
    fps: float | int | None = None
    """Frames sampled per second of a video file. Of a video given as frames all are used, whatever their rate."""
    nframes: int | None = None
    """Number of frames sampled from a video file, in place of a rate."""
    min_frames: int | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if ("resized_height" in given) != ("resized_width" in given):
            raise ImageError("resized_height and resized_width go together: give both, or bounds on the area")
        for name, others in (
            ("resized_height", ("min_pixels", "max_pixels", "total_pixels")),
            ("nframes", ("fps", "min_frames", "max_frames")),
        ):
            if name in given and (excluded := [other for other in others if other in given]):
                raise ImageError(f"{name} leaves nothing to {excluded[0]}: give one or the other")
        enlarged = max(given.get("min_pixels", 0), given.get("resized_height", 0) * given.get("resized_width", 0))
        if enlarged > MOST_ENLARGED:
            raise ImageError(f"the settings enlarge a picture to {enlarged} pixels, more than {MOST_ENLARGED}")
        if given.get("min_pixels", 0) > given.get("max_pixels", math.inf):
            raise ImageError(f"expected min_pixels <= max_pixels, got {self.min_pixels} and {self.max_pixels}")

    @classmethod
    def from_part(cls, part: Mapping[str, Any], names: tuple[str, ...]) -> "PictureSettings":
        """The settings `names` among the entries of a message's part; an entry that is None is not there.

        Raises:
            ImageError: a value that is no size, number or rate, or as for the class.
        """
        given = {name: part[name] for name in names if part.get(name) is not None}
        for name in given.keys() - {"fps"}:
            whole(name, given[name])
        fps = given.get("fps", FPS)
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf:
            raise ImageError(f"fps must be a number of frames per second above 0, got {fps!r}")
        return cls(**given)

    @property
    def resizes(self) -> bool:
        """Whether a setting decides the size of the image or frame."""
        return any(getattr(self, name) is not None for name in (*IMAGE_SETTINGS, "total_pixels"))

    def over(self, min_pixels: int | None, max_pixels: int | None) -> "PictureSettings":
        """These settings, completed by the bounds of a call."""
        if self.resized_height is not None:
            return self
        least = min_pixels if self.min_pixels is None else self.min_pixels
        most = max_pixels if self.max_pixels is None else self.max_pixels
        return replace(self, min_pixels=least, max_pixels=most)

    def image_size(self, width: int, height: int, processor: ImageProcessor) -> tuple[int, int]:
        """The (height, width) to which `processor` resizes an image of these pixels.

        Raises:
            ImageError: bounds that contradict each other or the processor's; an image that is too narrow.
        """
        bounded = processor.bounded(self.min_pixels, self.max_pixels)
        return self._size(width, height, processor, bounded.min_pixels, bounded.max_pixels)

    def frame_size(
        self, width: int, height: int, processor: ImageProcessor, n_frames: int, from_file: bool
    ) -> tuple[int, int]:
        """The (height, width) to which each of `n_frames` frames is resized.

        Frames given as such have the bounds of images. Frames of a file have bounds of their own, and the processor's
        `max_pixels` above them: in the published code it resizes them once more.

        Raises:
            ImageError: as for an image.
        """
        area, total = processor.pixels_per_token**2, self.total_pixels
        bounded = processor.bounded(None if from_file else self.min_pixels, None if from_file else self.max_pixels)
        least, most = bounded.min_pixels, float(bounded.max_pixels)
        if from_file:
            least, most = self.min_pixels or FILE_MIN_TOKENS * area, float(FILE_MAX_TOKENS * area)
            total = total or FILE_TOTAL_TOKENS * area
        if total is not None:
            n_temporal = math.ceil(n_frames / processor.temporal_patch_size)
            most = max(min(most, total / n_temporal), int(least * 1.05))
        if from_file:
            most = min(most, self.max_pixels or most, processor.max_pixels)
        return self._size(width, height, processor, min(least, most), most)

    def _size(
        self, width: int, height: int, processor: ImageProcessor, least: float | int, most: float | int
    ) -> tuple[int, int]:
        token = processor.pixels_per_token
        if self.resized_height is None or self.resized_width is None:
            return smart_resize(height, width, token, least, most)
        height, width = max(self.resized_height, token), max(self.resized_width, token)
        return smart_resize(height, width, token, processor.min_pixels, processor.max_pixels)

    def frame_numbers(self, n_frames: int, rate: float | int | None, factor: int) -> list[int]:
        """Number the frames to sample from a video file of `n_frames`: evenly spaced, first to last.

        Args:
            rate: frames per second of the file.
            factor: frames of a temporal patch; the number of sampled frames is a multiple of it.

        Raises:
            ImageError: fewer frames than that, or more sampled frames than there are; no rate to sample by.
        """
        if self.nframes is not None:
            n = round(self.nframes / factor) * factor
        elif rate is None or not rate > 0:
            raise ImageError("the video does not say its frames per second: give nframes, the number to sample")
        else:
            least = math.ceil((self.min_frames or MIN_FRAMES) / factor) * factor
            most = math.floor((self.max_frames or min(MAX_FRAMES, n_frames)) / factor) * factor
            n = min(max(n_frames / rate * (self.fps or FPS), least), most, n_frames)
            n = math.floor(n / factor) * factor
        if not factor <= n <= n_frames:
            raise ImageError(f"expected {factor} to {n_frames} sampled frames, got {n}: the video has {n_frames}")
        return torch.linspace(0, n_frames - 1, n).round().long().tolist()  # in float32, as published


def process_images(
    images: Sequence[Image.Image], settings: Sequence[PictureSettings], processor: PictureProcessor
) -> Prepared:
    """Pixels, grids and layouts of images, each resized by its own settings where it has any.

    Raises:
        ImageError: settings that cannot be met, or of one image for a model that does not resize single images.
    """
    resized: list[tuple[int, int] | None] = []
    if not isinstance(processor, ImageProcessor):
        if any(own.resizes for own in settings):
            instead = f"bound all by {' and '.join(processor.bounds)}" if processor.bounds else "they have one size"
            raise ImageError(f"{processor.sees}: {instead}, not by settings of one")
        return processor(images)
    for i, (image, own) in enumerate(zip(images, settings, strict=True)):
        with naming(f"image {i}"):
            resized.append(own.image_size(*image.size, processor) if own.resizes else None)
    return processor(images, resized=resized)


@contextmanager
def naming(picture: str) -> Iterator[None]:
    """Begin the message of an `ImageError` with the name of the picture."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{picture}: {error}") from error
