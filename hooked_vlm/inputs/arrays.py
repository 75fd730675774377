"""Arrays and tensors of colours as pictures; what could mean two things is refused."""

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import Image

from hooked_vlm.errors import ImageError

Pixels = np.ndarray | torch.Tensor
_CHANNELS = (1, 3, 4)
_LAYOUTS = "(height, width), (height, width, channels) or (channels, height, width) with 1, 3 or 4 channels"


def picture_of(array: Pixels) -> Image.Image:
    """One picture: mode L, RGB or RGBA.

    Args:
        array: [height, width], [height, width, channel] or [channel, height, width]; uint8 0 to 255, floats 0 to 1, or
            floats that are whole numbers 0 to 255.

    Raises:
        ImageError: another shape or dtype, no pixels, or values or axes that could mean two things.
    """
    levels = _levels(_numpy(array))
    if levels.ndim not in (2, 3):
        raise ImageError(f"expected one picture as an array of shape {_LAYOUTS}, got {tuple(levels.shape)}")
    return Image.fromarray(_channels_last(levels))


def frames_of(array: Shaped[Pixels, "frame _ _ _"]) -> list[Image.Image]:
    """The frames of a video [frame, height, width, channel] or [frame, channel, height, width], values as `picture_of`.

    Raises:
        ImageError: as `picture_of`.
    """
    levels = _levels(_numpy(array))
    return [Image.fromarray(_channels_last(frame)) for frame in levels]


def _numpy(array: Pixels) -> np.ndarray:
    if not isinstance(array, torch.Tensor):
        return array
    array = array.detach().cpu()
    return (array.float() if array.is_floating_point() else array).numpy()


def _levels(array: np.ndarray) -> UInt8[np.ndarray, "..."]:
    """8-bit levels; floats 0 to 1 are rounded to the nearest, so that level / 255 is that level again."""
    if 0 in array.shape:
        raise ImageError(f"the array of shape {tuple(array.shape)} has no pixels: an image needs at least 1 x 1")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(
            f"expected an array of uint8 values 0 to 255 or of floats 0 to 1, got {array.dtype}: scale and convert it "
            "first"
        )
    low, high = float(array.min()), float(array.max())  # nan where there is one
    if not (low >= 0 and high <= 255):
        raise ImageError(f"expected float values 0 to 1, got {low:g} to {high:g}: scale or clip them first")
    whole = bool((array == np.rint(array)).all())
    if whole and high == 1:
        raise ImageError("floats that are all 0 or 1 may be 0 to 1 or 0 to 255: convert the array to uint8 first")
    if not whole and high > 1:
        raise ImageError(
            f"expected float values 0 to 1, or whole numbers 0 to 255, got {low:g} to {high:g} with fractions: clip "
            "or round them"
        )
    return (array if whole else np.rint(array * np.float32(255))).astype(np.uint8)


def _channels_last(levels: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "height width ..."]:
    if levels.ndim == 2:
        return levels
    first, last = levels.shape[0] in _CHANNELS, levels.shape[2] in _CHANNELS
    if first and last:
        raise ImageError(
            f"an array of shape {levels.shape} may be (height, width, channels) or (channels, height, width): "
            "convert it with PIL.Image.fromarray first"
        )
    if not first and not last:
        raise ImageError(f"expected a picture as an array of shape {_LAYOUTS}, got {levels.shape}")
    levels = levels if last else levels.transpose(1, 2, 0)
    return np.ascontiguousarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
