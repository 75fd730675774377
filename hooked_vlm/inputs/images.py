"""Image files, PIL images and arrays as upright RGB images.

`files` resolves paths, addresses, bytes and open files, `arrays` reads arrays and tensors.

Where this differs from `transformers` on purpose:

- EXIF orientation is always applied (`transformers`: for paths, not for PIL images);
- transparent pixels are laid on white, also in files (`transformers` 4 and its `load_image` drop the alpha);
- 16-bit greyscale is scaled to 8 bits (`transformers` clips at 255, which turns most of it white).

CMYK, palettes, 1-bit etc. are converted as Pillow does. Of an animated file the first frame is used; of a PIL
image its current frame.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from hooked_vlm.errors import ImageError
from hooked_vlm.inputs.arrays import picture_of
from hooked_vlm.inputs.files import is_file_source, open_source

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


def load_image(image: object, allow_remote: bool = False) -> Image.Image:
    """Load any image as an upright RGB image; the argument itself if it is one already. It is never changed.

    Args:
        image: a path, a `file://` or `data:` URI, an http(s) address; the bytes of an image file, or an open one;
            {"bytes": ..., "path": ...} (an undecoded image of Hugging Face `datasets`); a PIL image of any mode; an
            array or tensor [height, width], or with 1, 3 (RGB) or 4 (RGBA) channels first or last, of uint8 or of
            floats 0 to 1.
        allow_remote: fetch http(s) addresses; they are refused otherwise.

    Raises:
        ImageError: the file is missing, empty, truncated, corrupt or no image, or may not be fetched; the image has no
            pixels, or more than Pillow's limit against decompression bombs; the array has another type or shape, or one
            that could mean two things.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the PIL image")
    if isinstance(image, torch.Tensor | np.ndarray):
        return _to_rgb(picture_of(image), f"the array of shape {tuple(image.shape)}")
    if is_file_source(image):
        return _opened(*open_source(image, "an image", allow_remote))
    raise ImageError(
        f"expected an image as a path, bytes, a file object, a PIL image, or an array or tensor, got "
        f"{type(image).__name__}"
    )


def load_named(image: object, name: str) -> Image.Image:
    """`load_image`; the message of an error starts with the image's name."""
    try:
        return load_image(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


def is_picture(x: object) -> bool:
    """Whether `load_image` takes `x`."""
    return isinstance(x, Image.Image | np.ndarray | torch.Tensor) or is_file_source(x)


def load_image_bytes(data: bytes, name: str) -> Image.Image:
    """Decode the contents of an image file as an upright RGB image.

    Args:
        name: the image's name in error messages.

    Raises:
        ImageError: as `load_image` of a file.
    """
    if not data:
        raise ImageError(f"{name!r} is empty (0 bytes): write or download it again")
    return _opened(io.BytesIO(data), repr(name))


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


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decode, turn upright, convert; `name` is the image's name in error messages."""
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
            f"{name} has mode {image.mode!r} (32-bit numbers), which has no known white level: "
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
    """Scale greyscale of 0 to 65535 to 0 to 255; the level marked transparent becomes white."""
    levels = np.asarray(image).astype(np.int32)
    grey = ((levels.clip(0, 65535) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[levels == transparent] = 255
    return Image.fromarray(grey)


def _too_large(name: str, error: Exception) -> str:
    return f"{name} has too many pixels ({error}): make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"


def checked_images(images: Any, name: str) -> Sequence[Any]:
    """Check that `images` is a list, and return it.

    Raises:
        ImageError: it is something else.
    """
    if not isinstance(images, list | tuple):
        raise ImageError(f"expected a list of {name}, got {type(images).__name__}: put a single one in a list")
    return images
