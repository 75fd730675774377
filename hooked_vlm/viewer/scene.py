"""Pictures in original pixels, and the box of every image token in them: the background of values."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.geometry import Box, ImageGrid, TileGrid
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.images import load_image
from hooked_vlm.inputs.tiles import TileProcessor
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
    first: int
    """Number of its first token among the image tokens of the inputs."""
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

    @property
    def n_tokens(self) -> int:
        return sum(len(panel.boxes) for panel in self.panels)

    def place_of(self, token: int) -> tuple[int, tuple[float, ...]]:
        """The panel of an image token, and its box."""
        panel = max(i for i, panel in enumerate(self.panels) if panel.first <= token)
        return panel, tuple(self.panels[panel].boxes[token - self.panels[panel].first].tolist())


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
        InputError: other pictures than those of the inputs, or boxes of an image that is not there.
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
    return Scene(_pictures(inputs, images), tuple(panels), evidence, tuple(held))


def patch_scene(
    inputs: VLMInputs, image: int, grid: ImageGrid | TileGrid, images: Any = None, boxes: Boxes = ()
) -> Scene:
    """One image of a prompt and its patches, the tokens of `grid`; otherwise as `scene_of`."""
    own = (boxes.get(image, ()) if isinstance(boxes, Mapping) else boxes) if len(boxes) else ()
    picture = seen_picture(inputs, image) if images is None else _pictures(inputs, images)[image]
    panels = tuple(_panels(f"image {image}", 0, grid, 0))
    return Scene((picture,), panels, (_plain(own),), tuple(_held(grid, own)))


def _plain(boxes: Sequence[Box]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(corner) for corner in box) for box in boxes)


def _held(grid: ImageGrid | TileGrid, boxes: Sequence[Box]) -> list[int]:
    in_small = {token for box in boxes for token in grid.tokens_in_box(box, MIN_OVERLAP)}
    in_large = {token for box in boxes for token in grid.tokens_in_box(box, 0.5, of="token")}
    return sorted(in_small | in_large)


def _panels(label: str, picture: int, grid: ImageGrid | TileGrid, first: int) -> list[Panel]:
    boxes = np.array([grid.box_of(token) for token in range(grid.n_tokens)])
    if not isinstance(grid, TileGrid) or not grid.thumbnail:
        return [Panel(label, picture, first, boxes)]
    tiles, thumbnail = grid.tokens_of("tiles"), grid.tokens_of("thumbnail")
    return [
        Panel(f"{label}, tiles", picture, first, boxes[tiles.start : tiles.stop], grid.layout),
        Panel(f"{label}, thumbnail", picture, first + thumbnail.start, boxes[thumbnail.start :]),
    ]


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


def seen_picture(inputs: VLMInputs, i: int) -> Image.Image:
    """Image `i` as the model saw it, stretched back to the size of the original.

    Raises:
        InputError: the inputs carry no pixels, or no processor that says how they were normalised.
    """
    processor, pixels = inputs.spec.image_processor, inputs.pixel_values
    if processor is None or pixels is None or inputs.image_grid_thw is None:
        raise InputError("these inputs do not say what their images look like: pass the pictures as images=...")
    rows = [inputs.spec.n_pixel_rows((t, h, w)) for t, h, w in inputs.image_grid_thw.tolist()]
    grid, own = inputs.image_grid(i), pixels.split(rows)[i].to("cpu", torch.float32).numpy()
    colours = _from_tiles(own, grid) if isinstance(grid, TileGrid) else _from_patches(own, grid, processor)
    colours = colours * np.array(processor.image_std) + np.array(processor.image_mean)
    picture = Image.fromarray(np.clip(np.rint(colours * 255), 0, 255).astype(np.uint8))
    return picture.resize((grid.image_size[0], grid.image_size[1]), Image.Resampling.BICUBIC)


def _from_patches(
    pixels: Float[np.ndarray, "patch d_patch"], grid: ImageGrid, processor: ImageProcessor | TileProcessor
) -> Float[np.ndarray, "height width 3"]:
    """The first frame of each patch, laid out."""
    assert isinstance(processor, ImageProcessor)
    side, (_, rows, cols) = processor.patch_size, grid.grid_thw
    laid = np.zeros((rows, cols, 3, side, side))
    _, row, col = grid.patch_order().T
    laid[row, col] = pixels.reshape(len(pixels), 3, processor.temporal_patch_size, side, side)[:, :, 0]
    return laid.transpose(0, 3, 1, 4, 2).reshape(rows * side, cols * side, 3)


def _from_tiles(tiles: Float[np.ndarray, "tile 3 side side"], grid: TileGrid) -> Float[np.ndarray, "height width 3"]:
    (cols, rows), side = grid.layout, grid.tile_size
    laid = tiles[: cols * rows].reshape(rows, cols, 3, side, side)
    return laid.transpose(0, 3, 1, 4, 2).reshape(rows * side, cols * side, 3)


def data_url(picture: Image.Image) -> str:
    """A picture as a data URL."""
    shown = picture.copy()
    shown.thumbnail((LONGEST, LONGEST))
    kind = "png" if shown.width * shown.height <= SMALL else "jpeg"
    file = io.BytesIO()
    shown.save(file, kind.upper(), **({} if kind == "png" else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
