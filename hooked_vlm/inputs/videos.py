"""Videos: lists of frames, arrays, and files (through PyAV, the extra `video`)."""

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image

from hooked_vlm.errors import ImageError
from hooked_vlm.inputs.arrays import frames_of
from hooked_vlm.inputs.boxes import ImageSize
from hooked_vlm.inputs.files import is_file_source, open_source
from hooked_vlm.inputs.images import is_picture, load_image
from hooked_vlm.inputs.picture_processor import PictureProcessor
from hooked_vlm.inputs.picture_settings import FPS, PictureSettings, naming

_CONTAINERS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,ogg,flv,asf,gif,apng"
"""Formats of one file. Playlists, which name other files and addresses, are not among them."""

_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".flv", ".wmv", ".asf", ".ogv", ".3gp")
"""Names by which a video file in a list is told from an image file."""


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video, upright RGB images of one size, made as they are asked for."""

    size: ImageSize
    n_frames: int
    frames: Iterator[Image.Image]
    from_file: bool
    rate: float
    """Frames per second, of those that are used."""
    times: tuple[float, ...]
    """When each frame is shown, in seconds."""

    def times_of_patches(self, n: int) -> list[float]:
        """When each temporal patch of `n` frames is shown: the middle between its first and its last frame, the last
        frame being repeated to fill its patch."""
        last = self.n_frames - 1
        ends = [(first, min(first + n - 1, last)) for first in range(0, self.n_frames, n)]
        return [(self.times[first] + self.times[end]) / 2 for first, end in ends]


def is_video(x: Any) -> bool:
    """Whether one entry of a list of videos is a video by itself: frames, a 4-D array, the name of a video file."""
    if isinstance(x, np.ndarray | torch.Tensor):
        return x.ndim == 4
    if isinstance(x, str | os.PathLike):
        name = os.fsdecode(x).lower()
        return name.startswith("data:video/") or name.partition("?")[0].endswith(_SUFFIXES)
    return isinstance(x, Iterable) and not is_picture(x)


def open_video(video: Any, settings: PictureSettings, processor: PictureProcessor, allow_remote: bool = False) -> Clip:
    """Load a video's frames; of a file, sample them.

    Args:
        video: a list of frames (anything `load_image` takes); an array or tensor [frame, height, width, channel] or
            [frame, channel, height, width]; or a video file as `load_image` takes image files.
        allow_remote: fetch http(s) addresses.

    Raises:
        ImageError: no frames, a frame or file that cannot be read, sampling that has no effect or cannot be met; PyAV
            is not installed.
    """
    if is_file_source(video):
        return _from_file(video, settings, processor, allow_remote)
    for name in ("nframes", "min_frames", "max_frames"):
        if getattr(settings, name) is not None:
            raise ImageError(f"{name} samples video files, but this video is given as frames: give those to be used")
    if isinstance(video, np.ndarray | torch.Tensor):
        if video.ndim != 4:
            raise ImageError(f"expected a video as an array of 4 axes, frames first, got shape {tuple(video.shape)}")
        frames = frames_of(video)
    elif isinstance(video, Iterable) and not is_picture(video):
        frames = list(video)
    else:
        raise ImageError(f"expected a video as frames, a 4-D array or a file, got {type(video).__name__}")
    if not frames:
        raise ImageError("a video needs at least one frame, got none")
    loaded = []
    for i, frame in enumerate(frames):
        with naming(f"frame {i}"):
            loaded.append(load_image(frame, allow_remote))
    rate = settings.fps or FPS
    times = tuple(number / rate for number in range(len(loaded)))
    return Clip(ImageSize(*loaded[0].size), len(loaded), iter(loaded), from_file=False, rate=rate, times=times)


def _from_file(video: Any, settings: PictureSettings, processor: PictureProcessor, allow_remote: bool) -> Clip:
    file, name = open_source(video, "a video", allow_remote)
    if find_spec("av") is None:
        raise ImageError(
            f"{name}: video files need PyAV: pip install 'hooked-vlm[video]', or give the frames as a list"
        )
    # a header may misstate the number of frames or leave it out, so they are counted
    n_frames, first = 0, None
    for decoded in _decoded(file, name):
        n_frames, first = n_frames + 1, first or decoded
    if first is None:
        raise ImageError(f"{name} has no frames: write or download it again")
    with naming(name):
        numbers = settings.frame_numbers(n_frames, first.rate, processor.temporal_patch_size)
    rate = FPS if first.rate is None else first.rate * len(numbers) / n_frames
    if first.rate is None:
        times = tuple(i / FPS for i in range(len(numbers)))
    else:
        times = tuple(number / first.rate for number in numbers)
    frames = _sampled(file, name, numbers)
    return Clip(ImageSize(*first.picture().size), len(numbers), frames, from_file=True, rate=rate, times=times)


def _sampled(file: str | io.BytesIO, name: str, numbers: list[int]) -> Iterator[Image.Image]:
    wanted = set(numbers)
    for number, decoded in enumerate(_decoded(file, name)):
        if number in wanted:
            yield decoded.picture()


@dataclass(frozen=True, eq=False)
class _Decoded:
    """A frame as PyAV decodes it, and the average rate of its stream in frames per second."""

    frame: Any
    rate: float | None

    def picture(self) -> Image.Image:
        """The frame as RGB, turned as players turn it."""
        picture = Image.fromarray(self.frame.to_ndarray(format="rgb24"))
        return picture.rotate(self.frame.rotation, expand=True) if self.frame.rotation else picture


def _decoded(source: str | io.BytesIO, name: str) -> Iterator[_Decoded]:
    """Decode the frames of a file's first video stream.

    Raises:
        ImageError: no video that PyAV can read; frames larger than Pillow's limit.
    """
    import av  # pyright: ignore[reportMissingImports] (the extra `video`)

    try:
        with ExitStack() as stack:
            # FFmpeg gets an open file, never a name: to it a name may be an address or a program for its filters
            file = stack.enter_context(open(source, "rb")) if isinstance(source, str) else source
            file.seek(0)
            options = {"format_whitelist": _CONTAINERS}
            container: Any = stack.enter_context(av.open(file, container_options=options, io_open=_refuse_other_files))
            stream = container.streams.video[0]
            rate = None if stream.average_rate is None else float(stream.average_rate)
            _check_pixels(stream.codec_context.width, stream.codec_context.height)
            for frame in container.decode(stream):
                _check_pixels(frame.width, frame.height)
                yield _Decoded(frame, rate)
    except Exception as error:  # PyAV raises many kinds on damaged files, and IndexError where there is no video
        why = "it has no video stream" if isinstance(error, IndexError) else str(error)
        raise ImageError(
            f"{name} is not a video that PyAV can read ({why}): expected MP4, MKV, WebM, AVI, ..."
        ) from error


def _check_pixels(width: int, height: int) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ImageError(f"frames of {width} x {height} pixels exceed PIL.Image.MAX_IMAGE_PIXELS")


def _refuse_other_files(url: str, flags: int, options: Mapping[str, str]) -> NoReturn:
    raise OSError(f"it refers to another file, {url!r}")
