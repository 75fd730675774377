"""Images and video frames as the vision tower's input, with Pillow and numpy only.

Pixel values equal those of `transformers`' `Qwen2VLImageProcessorPil` bit for bit (its torchvision processors
differ by up to one grey level). What comes before, where it differs from `transformers` on purpose:

- EXIF orientation is always applied (`transformers`: for paths, not for PIL images);
- transparent pixels are laid on white, also in files (`transformers` 4 and its `load_image` drop the alpha);
- 16-bit greyscale is scaled to 8 bits (`transformers` clips at 255, which turns most of it white);
- bounds on the pixels that contradict each other are refused (`transformers` obeys one of them).

CMYK, palettes, 1-bit etc. are converted as Pillow does. Of an animated file the first frame is used; of a PIL
image the frame it stands at.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, UnidentifiedImageError

from hooked_vlm.errors import ImageError
from hooked_vlm.inputs.geometry import ImageSize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_ASPECT_RATIO = 200  # as in the reference's smart_resize
MOST_ENLARGED = 2**24
"""Pixels up to which a small image is enlarged at most: the published bound on large ones, and some more."""

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ---- reading ----


def load_image(image: object) -> Image.Image:
    """Any image as an upright RGB image; the argument itself if it is one already (and it is never changed).

    Args:
        image: a path; a PIL image of any mode; a uint8 array or tensor [height, width], [height, width, 1],
            [height, width, 3] (RGB) or [height, width, 4] (RGBA).

    Raises:
        ImageError: the file is missing, empty, truncated, corrupt or no image; the image has no pixels, or so
            many that Pillow takes it for a decompression bomb; the array has another type or shape.
    """
    if isinstance(image, str | os.PathLike):
        return _from_file(image)
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the PIL image")
    if isinstance(image, torch.Tensor):
        return _from_array(image.detach().cpu().numpy())
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise ImageError(
        f"expected an image as a path, a PIL image, or a uint8 array or tensor, got {type(image).__name__}"
    )


def load_image_bytes(data: bytes, name: str) -> Image.Image:
    """The contents of an image file as an upright RGB image.

    Args:
        name: what messages call it.

    Raises:
        ImageError: as `load_image` of a file.
    """
    if not data:
        raise ImageError(_empty(repr(name)))
    return _opened(io.BytesIO(data), repr(name))


def _from_file(source: str | os.PathLike[str]) -> Image.Image:
    path = os.fspath(source)
    name = repr(path if len(path) <= 200 else path[:200] + "...")
    if path.startswith(("http://", "https://", "data:")):
        raise ImageError(f"expected the path of an image file, got {name}: download it first")
    # os.path, unlike pathlib, answers False to a string that cannot be a path (base64 data, say)
    if not os.path.isfile(path):
        what = (
            "is a folder" if os.path.isdir(path)
            else "is not a regular file" if os.path.exists(path)
            else "does not exist"
        )  # fmt: skip
        raise ImageError(f"expected the path of an image file, but {name} {what}: check the path")
    if os.path.getsize(path) == 0:
        raise ImageError(_empty(name))
    return _opened(path, name)


def _empty(name: str) -> str:
    return f"{name} is empty (0 bytes): write or download it again"


def _opened(file: str | io.BytesIO, name: str) -> Image.Image:
    try:
        image = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(_too_large(name, error)) from error
    except PermissionError as error:
        raise ImageError(f"{name} may not be read: change its permissions") from error
    except Exception as error:  # on damaged files Pillow's plugins raise whatever their parsers do
        why = "of no format it knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ImageError(
            f"{name} is not an image that Pillow can read ({why}): expected PNG, JPEG, TIFF, GIF, WebP, ..."
        ) from error
    with image:
        return _to_rgb(image, name)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(f"expected an array of uint8 values 0 to 255, got {array.dtype}: scale and convert it first")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = " (channels come last: use numpy.moveaxis(array, 0, -1) or tensor.permute(1, 2, 0))"
        raise ImageError(
            f"expected an array of shape (height, width), (height, width, 3) or (height, width, 4), "
            f"got {array.shape}{hint}"
        )
    name = f"the array of shape {array.shape}"
    if 0 in array.shape:
        raise ImageError(f"{name} has no pixels: an image needs at least 1 x 1")
    return _to_rgb(Image.fromarray(array), name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decode, turn upright, convert. `name` is for messages."""
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels ({image.width} x {image.height}): an image needs at least 1 x 1")
    if image.format == "EPS":
        raise ImageError(f"{name} is PostScript, a program that would have to be run: convert it to PNG first")
    try:
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(_too_large(name, error)) from error
    except Exception as error:  # on damaged files Pillow's decoders raise whatever their parsers do
        raise ImageError(f"{name} is truncated or corrupt ({error}): write or download it again") from error

    upright = _UPRIGHT.get(_orientation(image))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = _from_16_bit(image)
    elif image.mode in ("I", "F"):
        raise ImageError(
            f"{name} has mode {image.mode!r} (32-bit numbers), whose white is not known: "
            "scale it to 0 to 255 and convert it to mode 'L' first"
        )
    if upright is not None:
        image = image.transpose(upright)
    elif image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    try:
        # transformers.image_transforms.convert_to_rgb (5.23)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"{name} has mode {image.mode!r}, which cannot be converted to RGB ({error})") from error
    image.info = {}  # its EXIF orientation and transparency are applied: loading it again must change nothing
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels; viewers ignore it too
        return 1


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Greyscale of 0 to 65535 to the nearest of 0 to 255; the level named transparent becomes white."""
    levels = np.asarray(image).astype(np.int32)
    grey = ((levels.clip(0, 65535) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[levels == transparent] = 255
    return Image.fromarray(grey)


def _too_large(name: str, error: Exception) -> str:
    return f"{name} has too many pixels ({error}): make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"


# ---- resizing and cutting into patches ----


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) to which an image is stretched: multiples of `factor`, an area within bounds,
    about the same aspect ratio.

    As in `transformers` (models/qwen2_vl/image_processing_pil_qwen2_vl.py), banker's rounding included; an
    extreme aspect ratio can exceed `max_pixels`, since no side gets shorter than `factor`.

    Raises:
        ImageError: a side is 0, or the aspect ratio exceeds 200.
    """
    if min(height, width) < 1:
        raise ImageError(f"an image needs at least 1 x 1 pixels, got {width} x {height} (width x height)")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"an image of {width} x {height} pixels (width x height) is too narrow: one side may be at most "
            f"{MAX_ASPECT_RATIO} times the other; crop or pad it"
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


@dataclass(frozen=True)
class ImageProcessor:
    """Images and videos to the rows of `pixel_values`; the defaults are the published checkpoints'."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    """Smaller images are enlarged to about this area (in pixels; a token covers `pixels_per_token`**2)."""
    max_pixels: int = 12845056
    """Larger images are reduced to this area at most."""
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

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

    def n_tokens(self, size: tuple[int, int]) -> int:
        """Image tokens of an image of (width, height) pixels."""
        height, width = smart_resize(size[1], size[0], self.pixels_per_token, self.min_pixels, self.max_pixels)
        return height * width // self.pixels_per_token**2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ImageProcessor":
        """From the contents of `preprocessor_config.json` (or of `processor_config.json`, as saved by 5.x).

        The bounds may be given as `min_pixels` and `max_pixels` (as published), as `size` with
        `shortest_edge` and `longest_edge` (4.57 and 5.x; areas, despite their names) or `min_pixels` and
        `max_pixels` (4.45), or several times if all agree. What is absent has the published value.

        Raises:
            ImageError: bounds that contradict each other, or a setting that this processor does not have.
        """
        config = processor_settings(config)
        fields: dict[str, Any] = {**_bounds(config), **common_settings(config)}
        for key in ("patch_size", "temporal_patch_size", "merge_size"):
            if config.get(key) is not None:
                fields[key] = whole(key, config[key])
        return cls(**fields)

    def __call__(
        self, images: Sequence[Any], min_pixels: int | None = None, max_pixels: int | None = None
    ) -> tuple[Float[torch.Tensor, "patches d_patch"], Int[torch.Tensor, "images 3"], list[ImageSize]]:
        """Prepare images (anything `load_image` takes).

        Args:
            images: a list of images; sizes may differ.
            min_pixels, max_pixels: bounds on the area of each resized image, in place of this processor's.

        Returns:
            pixel_values: float32, the patches of all images one after the other, in each image in merge-block
                order (`ImageGrid.patch_order`); a patch is (channel, frame, y, x) flattened, the still image
                being repeated for all `temporal_patch_size` frames.
            image_grid_thw: int64, (1, rows, columns) of patches per image.
            sizes: width and height of each original image (after EXIF orientation).

        Raises:
            ImageError: see `load_image` and `smart_resize`; the message starts with the number of the image.
        """
        bounded = self._bounded(min_pixels, max_pixels)
        prepared = [bounded._prepare(image, f"image {i}") for i, image in enumerate(checked_images(images, "images"))]
        pixel_values, grid_thw = bounded._pack([[patches] for _, patches in prepared])
        return pixel_values, grid_thw, [size for size, _ in prepared]

    def video(
        self, frames: Sequence[Any], min_pixels: int | None = None, max_pixels: int | None = None
    ) -> tuple[Float[torch.Tensor, "patches d_patch"], Int[torch.Tensor, "1 3"], list[ImageSize]]:
        """Prepare one video.

        All frames are used, none is sampled; if their number is no multiple of `temporal_patch_size`, the
        last one is repeated. The bounds hold for each frame, as in `transformers` (4.x, and 5.x unless its
        `cap_pixels_per_frame` is asked for); the budget over all frames that `qwen-vl-utils` adds is not
        applied, so long videos want a smaller `max_pixels`.

        Args:
            frames: a list of images of one size, in order.
            min_pixels, max_pixels: bounds on the area of each resized frame, in place of this processor's.

        Returns:
            As for images: `pixel_values_videos`, `video_grid_thw` (one row: temporal patches, rows, columns)
            and the list of the one original frame size.

        Raises:
            ImageError: no frames, frames of different sizes, or as for images.
        """
        bounded = self._bounded(min_pixels, max_pixels)
        prepared = [bounded._prepare(frame, f"frame {i}") for i, frame in enumerate(checked_images(frames, "frames"))]
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

    def _bounded(self, min_pixels: int | None, max_pixels: int | None) -> "ImageProcessor":
        return replace(
            self,
            min_pixels=self.min_pixels if min_pixels is None else min_pixels,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
        )

    def _prepare(
        self, image: object, name: str
    ) -> tuple[ImageSize, UInt8[np.ndarray, "rows cols merge merge 3 side side"]]:
        """The image's size, and its resized pixels cut into patches, block by block."""
        try:
            rgb = load_image(image)
            height, width = smart_resize(rgb.height, rgb.width, self.pixels_per_token, self.min_pixels, self.max_pixels)
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
                # the last frame also fills what is left of its temporal patch
                slots = slice(within, None if number == len(clip) - 1 else within + 1)
                frame = frame.reshape(rows * cols, 3, 1, side, side)
                for colour, table in enumerate(tables):
                    rows_of_clip[t, :, colour, slots] = table.take(frame[:, colour])
            start += n
        pixel_values = torch.from_numpy(packed.reshape(len(packed), 3 * self.temporal_patch_size * side**2))
        return pixel_values, torch.tensor(grid_thw, dtype=torch.int64).reshape(-1, 3)


def processor_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings themselves, which `processor_config.json` keeps in a section.

    Raises:
        ImageError: they are not an object.
    """
    settings = config.get("image_processor", config)
    if not isinstance(settings, Mapping):
        raise ImageError(f"image_processor must be an object, got {settings!r}")
    return settings


def whole(name: str, value: Any) -> int:
    """`value` itself if it is a whole number of at least 1.

    Raises:
        ImageError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ImageError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def common_settings(config: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of the colours, if stated, of any of the families' `preprocessor_config.json`.

    Raises:
        ImageError: a step is switched off or set to what is not done here.
    """
    for key, expected in (
        ("do_resize", True),
        ("do_rescale", True),
        ("do_normalize", True),
        ("resample", Image.Resampling.BICUBIC.value),
        ("rescale_factor", 1 / 255),
    ):
        if config.get(key) not in (None, expected):
            raise ImageError(f"unsupported image processor: expected {key} = {expected}, got {config[key]!r}")
    fields = {}
    for key in ("image_mean", "image_std"):
        if config.get(key) is not None:
            fields[key] = colours(key, config[key])
    return fields


def colours(name: str, values: Any) -> tuple[float, ...]:
    """The three numbers of `image_mean` or of `image_std`, which must be positive; colours lie between 0 and 1.

    Raises:
        ImageError: they are something else.
    """
    numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) and abs(v) <= 1e3 for v in values)
    if not numbers or len(values) != 3 or (name == "image_std" and min(values) < 1e-6):
        positive = "positive " if name == "image_std" else ""
        raise ImageError(f"expected three {positive}numbers for {name}, one per colour, got {values!r}")
    return tuple(float(value) for value in values)


def normalisation_tables(
    mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[np.ndarray, "3 256"]:
    """What each 8-bit value of each colour becomes.

    The same bits as the reference's arithmetic (transformers.image_transforms.rescale and normalize: a product
    in float64, the rest in float32).
    """
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    means, stds = (np.asarray(v, dtype=np.float32)[:, None] for v in (mean, std))
    return (levels - means) / stds


def _bounds(config: Mapping[str, Any]) -> dict[str, int]:
    """`min_pixels` and `max_pixels` from the several places where a preprocessor's settings may have them."""
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
        places = {
            bound: config.get(bound),
            f"size.{edge}": size.get(edge),
            f"size.{bound}": size.get(bound),
        }
        given = {place: value for place, value in places.items() if value is not None}
        if any(value != other for value in given.values() for other in given.values()):
            raise ImageError(f"the image processor's settings contradict each other: {given}; make them agree")
        if given:
            bounds[bound] = whole(bound, next(iter(given.values())))
    return bounds


def checked_images(images: Sequence[Any], what: str) -> Sequence[Any]:
    """`images` itself if it is a list."""
    if not isinstance(images, list | tuple):
        raise ImageError(f"expected a list of {what}, got {type(images).__name__}: put a single one in a list")
    return images
