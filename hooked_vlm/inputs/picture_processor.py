"""What every image processor can do: pixels and layouts of pictures, and bounds on their size."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.boxes import ImageSize
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.image_settings import Settings
from hooked_vlm.inputs.images import checked_images, load_named

if TYPE_CHECKING:
    from hooked_vlm.inputs.token_layout import Grid, InputSpec

Prepared = tuple[Float[Tensor, "..."], Int[Tensor, "image 3"], list[ImageLayout]]
"""Pixels of all pictures one after the other, the (pictures, rows, columns) of patches that the tower sees of each, and
where its tokens lie."""


@dataclass(frozen=True)
class Bounds:
    """Bounds on the size of images that hold for a whole call; None: the checkpoint's."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tiles: int | None = None

    @property
    def given(self) -> list[str]:
        """Names of the bounds that are set."""
        return [own.name for own in fields(self) if getattr(self, own.name) is not None]


class PictureProcessor(ABC):
    """An image processor: a value that says how pictures become pixels and tokens.

    A family with another way of seeing pictures adds a class and its name to `processors.PROCESSORS`.
    """

    bounds: ClassVar[tuple[str, ...]] = ()
    """The arguments of `to_inputs` that bound the size of pictures."""
    resizes_single: ClassVar[bool] = False
    """Whether single images and frames may have sizes of their own."""
    takes_videos: ClassVar[bool] = False
    patch_size: int
    temporal_patch_size: int = 1
    """Frames of a video that are seen as one picture."""
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @abstractmethod
    def __call__(self, images: Sequence[Any], *, resized: Sequence[tuple[int, int] | None] | None = None) -> Prepared:
        """Prepare images (anything `load_image` takes).

        Args:
            resized: the (height, width) of each resized image, or None where the processor decides; only of
                processors that resize single images.

        Raises:
            ImageError: see `load_image`; the message starts with the number of the image.
        """

    @abstractmethod
    def layout(self, size: tuple[int, int]) -> ImageLayout:
        """The layout of an image of (width, height) pixels."""

    @abstractmethod
    def layout_of(self, grid: "Grid", size: tuple[int, int] | None = None, kind: str = "image") -> ImageLayout:
        """The layout of a picture that the tower sees as `grid`, (pictures, rows, columns) of patches.

        Raises:
            InputError: this processor makes no such grid of a picture of this size.
        """

    def n_tokens(self, size: tuple[int, int]) -> int:
        """Image tokens of an image of (width, height) pixels."""
        return self.layout(size).n_tokens

    def read_batch(
        self, tokens: Int[Tensor, "batch pos"], batch: Mapping[str, Tensor | None], spec: "InputSpec"
    ) -> tuple[Tensor | None, Tensor | None, list[ImageLayout] | None]:
        """Pixels, grids and layouts of the images of a Hugging Face batch; layouts are None where grids say all that is
        known."""
        return batch["pixel_values"], batch["image_grid_thw"], None

    def read_videos(self, pixels: Tensor | None, grids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Pixels and grids of the videos of a Hugging Face batch."""
        return pixels, grids

    def among(self, n_images: int) -> "PictureProcessor":
        """The processor of each of so many images in one prompt: most see it as if it were alone."""
        return self

    def video(
        self, frames: Iterable[Any], *, resized: tuple[int, int] | None = None
    ) -> tuple[Float[Tensor, "..."], Int[Tensor, "1 3"], list[ImageSize]]:
        """Prepare one video, of processors that take videos.

        Args:
            frames: images of one size, in order.
            resized: the (height, width) of each resized frame; only of processors that resize single frames.

        Returns:
            Pixels, the one grid, and the original size of the frames.
        """
        raise InputError("this model takes no videos: give their frames as images")

    def with_bounds(self, bounds: Bounds) -> "PictureProcessor":
        """The processor with other bounds on the size of images.

        Raises:
            InputError: a bound that this kind of processor does not have.
            ImageError: bounds that contradict each other.
        """
        if foreign := [name for name in bounds.given if name not in self.bounds]:
            instead = f"bound them by {' and '.join(self.bounds)}" if self.bounds else "they have one size"
            raise InputError(f"{self.sees}: {instead}, not by {' or '.join(foreign)}")
        return self._bounded(bounds)

    sees: ClassVar[str] = "this model sees pictures of one size"

    def _bounded(self, bounds: Bounds) -> "PictureProcessor":
        return self

    def bounds_for(self, pixels: int | None) -> dict[str, int | None]:
        """Arguments of `to_inputs` with which every picture has about this area, as far as the model allows."""
        return {}

    def bounds_below(self, n_tokens: int, n_tiles: int) -> dict[str, int]:
        """Arguments of `to_inputs` with which a picture has at most so many tokens, or tiles of fixed size."""
        return {}

    def tighter(
        self, n_text: list[int], pictures: Sequence[Sequence[Any]], n_ctx: int, given: Bounds
    ) -> Iterator[tuple[str, "PictureProcessor"]]:
        """Smaller and smaller bounds on the pictures of a batch, with the arguments that set them.

        Args:
            n_text: tokens of each row that are no pictures.
            pictures: (size, number of temporal patches) of the pictures of each row.
        """
        yield from ()

    def patch_colours(self, pixels: Float[np.ndarray, "..."]) -> Float[np.ndarray, "patch 3 side side"]:
        """Normalised colours of the patches of one picture, in the order of the tower; `pixels` are the squares that it
        sees, unless a processor makes others."""
        return cut_pictures(pixels, self.patch_size)

    @classmethod
    @abstractmethod
    def from_checkpoint(cls, cfg: VLMConfig, images: Settings, videos: Settings) -> "PictureProcessor":
        """The processor of a checkpoint, with the vision tower's sizes where the settings are silent.

        Raises:
            CheckpointError: settings that are not supported, or that contradict config.json.
        """

    @abstractmethod
    def to_files(self) -> dict[str, dict[str, Any]]:
        """Settings by the file that holds them, as `transformers` spells them."""


def each_image(images: Sequence[Any]) -> Iterator[tuple[str, Image.Image]]:
    """Every image with its name, read.

    Raises:
        ImageError: see `load_image`; the message starts with the number of the image.
    """
    for i, image in enumerate(checked_images(images, "images")):
        yield f"image {i}", load_named(image, f"image {i}")


def cut_pictures(
    pictures: Float[np.ndarray, "picture 3 high wide"], patch_size: int
) -> Float[np.ndarray, "patch 3 side side"]:
    """The patches of pictures, row by row; a rest of pixels at the right and at the bottom is in none."""
    n, _, high, wide = pictures.shape
    rows, cols = high // patch_size, wide // patch_size
    whole = pictures[:, :, : rows * patch_size, : cols * patch_size]
    cut = whole.reshape(n, 3, rows, patch_size, cols, patch_size)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3, patch_size, patch_size)


def as_tensor(batch: Mapping[str, Any], name: str, device: torch.device) -> Tensor | None:
    """An entry of a Hugging Face batch on a device.

    Raises:
        InputError: it is no tensor, nor anything like one.
    """
    value = batch.get(name)
    try:
        return None if value is None else torch.as_tensor(value).to(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} must be a tensor ({error}): call the processor with return_tensors='pt', padding=True"
        ) from error
