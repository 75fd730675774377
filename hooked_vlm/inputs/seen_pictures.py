"""Images of inputs as pictures again, from the pixels that the model saw."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.boxes import ImageSize
from hooked_vlm.inputs.vlm_inputs import VLMInputs


def seen_picture(inputs: VLMInputs, i: int) -> Image.Image:
    """Image `i` as the model saw it, stretched back to the size of the original.

    Raises:
        InputError: the inputs carry no pixels, or no processor that says how they were normalised.
    """
    processor, pixels = inputs.spec.image_processor, inputs.pixel_values
    if processor is None or pixels is None or inputs.image_grid_thw is None:
        raise InputError(
            "these inputs do not say what their images look like: pass the originals (images=... of the viewer, "
            "picture=... of cache.show)"
        )
    rows = [inputs.spec.n_pixel_rows((t, h, w)) for t, h, w in inputs.image_grid_thw.tolist()]
    layout, own = inputs.image_grid(i), pixels.split(rows)[i].to("cpu", torch.float32).numpy()
    patches = np.empty((layout.n_patches, 3, processor.patch_size, processor.patch_size), np.float32)
    patches[layout.tower_order.ravel()] = processor.patch_colours(own)
    part = layout.patches.parts[0]
    colours = np.zeros((part.seen.height, part.seen.width, 3), np.float32)  # pixels of no patch have the mean colour
    y, x = (starts[:, :1] + np.arange(processor.patch_size) for starts in (part.rows, part.columns))
    # [row, y, column, x, colour] from [row, column, colour, y, x]
    colours[y[:, :, None, None], x[None, None]] = patches[part.cells[0]].transpose(0, 3, 1, 4, 2)
    colours = colours * np.array(processor.image_std) + np.array(processor.image_mean)
    picture = Image.fromarray(np.clip(np.rint(colours * 255), 0, 255).astype(np.uint8))
    return _placed(picture, part.area, layout.image_size)


def _placed(picture: Image.Image, area: Sequence[float | int], size: ImageSize) -> Image.Image:
    """A picture of a rectangle of the original, at its place; grey where the model does not see it."""
    x0, y0, x1, y1 = (round(corner) for corner in area)
    shown = picture.resize((max(1, x1 - x0), max(1, y1 - y0)), Image.Resampling.BICUBIC)
    if (x0, y0, *shown.size) == (0, 0, *size):
        return shown
    whole = Image.new("RGB", size, (128, 128, 128))
    whole.paste(shown, (x0, y0))
    return whole
