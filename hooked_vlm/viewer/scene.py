"""Pictures in original pixels, and the box of every image token in them: the background of values."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.boxes import Box
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.images import load_image
from hooked_vlm.inputs.seen_pictures import seen_picture
from hooked_vlm.inputs.vlm_inputs import VLMInputs

LONGEST = 1600
"""Longer side of pictures in the page, to which larger ones are reduced; boxes stay in original pixels."""
SMALL = 512 * 512
"""Pictures of at most this number of pixels are stored without loss."""
MIN_OVERLAP = 0.1
"""A token is evidence if more than this share of a box lies in it, as in the OCR-heads paper, or if more than half of
it lies in a box."""

Boxes = Mapping[int, Sequence[Box]] | Sequence[Box]
"""Boxes of each image by its number, or those of the first image; in pixels of the original image."""


@dataclass(frozen=True, eq=False)
class Panel:
    """A picture with image tokens over it: an image, the tiles of an image, or its thumbnail."""

    label: str
    picture: int
    tokens: Int[np.ndarray, "token"]
    """Numbers of its tokens among the image tokens of the inputs."""
    boxes: Float[np.ndarray, "token 4"]
    """(x0, y0, x1, y1) of each token in pixels of the original image."""
    tiles: tuple[int, int] = (1, 1)
    """Columns and rows of tiles."""


@dataclass(frozen=True, eq=False)
class Scene:
    """The images of one prompt."""

    pictures: tuple[Image.Image, ...]
    panels: tuple[Panel, ...]
    evidence: tuple[tuple[tuple[float, ...], ...], ...]
    """Boxes of each picture."""
    evidence_tokens: tuple[int, ...]
    """Numbers of the image tokens that are evidence."""
    n_tokens: int
    """Number of image tokens, those that stand for no place included."""

    def place_of(self, token: int) -> tuple[int, tuple[float, ...]]:
        """The panel of an image token, and its box."""
        for i, panel in enumerate(self.panels):
            if len(found := np.flatnonzero(panel.tokens == token)):
                return i, tuple(panel.boxes[found[0]].tolist())
        raise InputError(f"image token {token} stands for no place in a picture: it is a line break or a marker")


def one_row(inputs: VLMInputs) -> VLMInputs:
    """The inputs, if a page can show them.

    Raises:
        InputError: several rows, a video, or no image.
    """
    if len(inputs) != 1:
        raise InputError(f"a page shows one prompt, got a batch of {len(inputs)}: take a row, inputs[0]")
    if len(inputs.visuals) != inputs.n_images:
        raise InputError("a page shows images, and these inputs have a video")
    if not inputs.n_images:
        raise InputError("there is no image to look at: make inputs with model.to_inputs(prompt, images=...)")
    return inputs


def image_columns(inputs: VLMInputs) -> list[int]:
    """Positions of all image tokens, image after image: the order of values in a page."""
    return [int(pos) for i in range(inputs.n_images) for pos in inputs.image_tokens(i)]


def scene_of(inputs: VLMInputs, images: Any = None, boxes: Boxes = ()) -> Scene:
    """Pictures and boxes of a prompt's images.

    Args:
        images: the original pictures, one or a list. Without them they are made from the pixels the model saw,
            which are as coarse as the model's resizing left them.

    Raises:
        InputError: other pictures than those of the inputs, boxes of an image that is not there, or tiles of which it
            is not known where they lie.
        GeometryError: a box outside its image.
    """
    by_image = dict(boxes) if isinstance(boxes, Mapping) else {0: boxes} if len(boxes) else {}
    if extra := sorted(set(by_image) - set(range(inputs.n_images))):
        raise InputError(f"boxes came for image {extra[0]}, but there are {inputs.n_images}, numbered from 0")
    first, panels, held = 0, [], []
    for i in range(inputs.n_images):
        grid = inputs.image_grid(i)
        panels += _panels(f"image {i}", i, grid, first)
        held += [first + token for token in _held(grid, by_image.get(i, ()))]
        first += grid.n_tokens
    evidence = tuple(_plain(by_image.get(i, ())) for i in range(inputs.n_images))
    return Scene(_pictures(inputs, images), tuple(panels), evidence, tuple(held), first)


def patch_scene(inputs: VLMInputs, image: int, grid: ImageLayout, images: Any = None, boxes: Boxes = ()) -> Scene:
    """One image of a prompt and its patches, the tokens of `grid`; otherwise as `scene_of`."""
    own = (boxes.get(image, ()) if isinstance(boxes, Mapping) else boxes) if len(boxes) else ()
    picture = seen_picture(inputs, image) if images is None else _pictures(inputs, images)[image]
    panels = tuple(_panels(f"image {image}", 0, grid, 0))
    return Scene((picture,), panels, (_plain(own),), tuple(_held(grid, own)), grid.n_tokens)


def _plain(boxes: Sequence[Box]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(corner) for corner in box) for box in boxes)


def _held(grid: ImageLayout, boxes: Sequence[Box]) -> list[int]:
    in_small = {token for box in boxes for token in grid.tokens_in_box(box, MIN_OVERLAP)}
    in_large = {token for box in boxes for token in grid.tokens_in_box(box, 0.5, of="token")}
    return sorted(in_small | in_large)


def _panels(label: str, picture: int, grid: ImageLayout, first: int) -> list[Panel]:
    """A panel for each part.

    Raises:
        InputError: it is not known where the tokens lie.
    """
    if not grid.parts:
        raise InputError(
            f"where the tiles of {label} lie is not known, as these inputs come from a Hugging Face batch: make them "
            "with model.to_inputs(prompt, images=...)"
        )
    several = len(grid.parts) > 1
    panels = []
    for part in grid.parts:
        tokens = grid.tokens_of(part.name)
        name = f"{label}, {part.name}" if several else label
        panels.append(Panel(name, picture, first + tokens, grid.boxes[tokens], part.tiles if several else (1, 1)))
    return panels


# ---------------------------------------------------------------- pictures


def _pictures(inputs: VLMInputs, images: Any) -> tuple[Image.Image, ...]:
    if images is None:
        return tuple(seen_picture(inputs, i) for i in range(inputs.n_images))
    several = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    pictures = tuple(load_image(image) for image in several)
    if len(pictures) != inputs.n_images:
        raise InputError(f"{len(pictures)} pictures came for {inputs.n_images} images")
    for i, picture in enumerate(pictures):
        expected = inputs.image_grid(i).image_size
        if inputs.image_sizes is not None and picture.size != tuple(expected):
            raise InputError(
                f"picture {i} is {picture.width} x {picture.height} pixels, but image {i} of the inputs was "
                f"{expected[0]} x {expected[1]}"
            )
    return pictures


def data_url(picture: Image.Image) -> str:
    """A picture as a data URL."""
    shown = picture.copy()
    shown.thumbnail((LONGEST, LONGEST))
    kind = "png" if shown.width * shown.height <= SMALL else "jpeg"
    file = io.BytesIO()
    shown.save(file, kind.upper(), **({} if kind == "png" else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
