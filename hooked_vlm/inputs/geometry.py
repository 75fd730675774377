"""Where image tokens lie: from pixels of the original image to tokens and patches, and back.

Coordinates are pixels of the displayed image (after EXIF orientation, before resizing), x to the right
and y down; boxes are half-open, `(x0, y0, x1, y1)` covers x0 <= x < x1 and y0 <= y < y1.

An image processor says by an `ImageLayout` how a picture became tokens; everything that asks where a token lies asks
the layout, never the family.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped

from hooked_vlm.errors import GeometryError, NotSeenError
from hooked_vlm.inputs.boxes import Box, ImageSize, LayoutPart, Part, shown, truncated


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """One image (or video) as tokens, numbered in the order of their placeholders.

    Every part is a grid of tokens over the picture or over a piece of it; several parts may show the same place. Tokens
    of no part stand for no place (line breaks, markers). A box covers all frames of a video.
    """

    image_size: ImageSize
    """Size of the original image in pixels; as the tower sees it where that is not known."""
    parts: tuple[LayoutPart, ...]
    """The main part first; none if it is not known where the tokens lie."""
    n_tokens: int
    grid: tuple[int, int, int]
    """What the tower sees: (tiles or frames, rows, columns) of patches."""
    tiles: Int[np.ndarray, "token"]
    """Number of the tile (or frame) of each token, as the tower counts them; -1 for tokens that stand for no place."""
    tower_order: Int[np.ndarray, "tile patch"]
    """Number in `patches` of each patch that the tower sees, in its order."""
    make_patches: Callable[[], "ImageLayout"] | None = field(default=None, compare=False)
    """Returns `patches`; None for a layout of patches."""
    runs: tuple[int, ...] = ()
    """Numbers of placeholders side by side; one run of all tokens by default."""
    between: tuple[str, ...] = ()
    """Texts before each run and behind the last, outside of the tokens that open and close a picture; none by
    default."""
    features: Int[np.ndarray, "token"] | Int[np.ndarray, "token source"] | None = None
    """Which output of the projector each token is, -1 for a learned line break; None: in the same order. With `shares`:
    of which outputs it is a mix."""
    shares: Float[np.ndarray, "token source"] | None = None
    """How much of each output is in a token (resampled grids); None: a token is one output."""
    size_known: bool = True
    seconds: float = 1.0
    """Of a video, the time from one frame to the next."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", self.runs or (self.n_tokens,))
        placed = np.concatenate([part.cells.ravel() for part in self.parts]) if self.parts else np.zeros(0, dtype=int)
        if sum(self.runs) != self.n_tokens or len(self.tiles) != self.n_tokens:
            raise GeometryError(f"runs {self.runs} and {len(self.tiles)} tiles do not count {self.n_tokens} tokens")
        inside = (placed >= 0) & (placed < self.n_tokens)
        if not inside.all() or len(np.unique(placed)) != len(placed):
            raise GeometryError(f"the cells of a layout's parts must be different numbers below {self.n_tokens}")
        if self.shares is not None and (self.features is None or self.features.shape != self.shares.shape):
            raise GeometryError(
                f"shares of {self.shares.shape} need as many features: which outputs a token is made of"
            )
        if self.between and len(self.between) != len(self.runs) + 1:
            n = len(self.runs)
            raise GeometryError(f"{n} runs need {n + 1} texts around them, got {self.between}")

    def __repr__(self) -> str:
        parts = ", ".join(f"{part.name} {part.cells.shape[1]} x {part.cells.shape[2]}" for part in self.parts)
        width, height = self.image_size
        return f"ImageLayout({width} x {height} pixels, {self.n_tokens} tokens: {parts or 'places not known'})"

    # ---------------------------------------------------------------- parts

    @property
    def frames(self) -> int:
        return self._main.cells.shape[0]

    @property
    def rows(self) -> int:
        """Rows of tokens in the main part."""
        return self._main.cells.shape[1]

    @property
    def cols(self) -> int:
        """Columns of tokens in the main part."""
        return self._main.cells.shape[2]

    @property
    def resized_size(self) -> ImageSize:
        """The main part as the vision tower sees it."""
        return self._main.seen

    @property
    def layout(self) -> tuple[int, int]:
        """(columns, rows) of tiles of the main part."""
        return self._main.tiles

    @property
    def n_tiles(self) -> int:
        """Number of pictures that the tower sees: tiles with the thumbnail, or frames."""
        return len(self.tower_order)

    @property
    def thumbnail(self) -> bool:
        """Whether a part is a small copy of the whole picture."""
        return "thumbnail" in (part.name for part in self.parts)

    @property
    def _main(self) -> LayoutPart:
        return self._known()[0]

    def part(self, name: Part) -> LayoutPart:
        """A part by its name.

        Raises:
            GeometryError: there is no such part; those there are are listed.
        """
        for part in self._known():
            if part.name == name:
                return part
        known = ", ".join(repr(part.name) for part in self.parts)
        seen = "this picture is seen whole" if len(self.parts) == 1 else "this picture has other parts"
        raise GeometryError(f'{seen}: there is no part {name!r}, choose "all" or one of {known}')

    def tokens_of(self, part: Part) -> Int[np.ndarray, "placed"]:
        """Numbers of the tokens of a part, or of all parts, in rising order."""
        parts = self._known() if part == "all" else (self.part(part),)
        return np.sort(np.concatenate([own.cells.ravel() for own in parts]))

    def part_of(self, index: int | np.integer) -> Part | None:
        """The part that a token belongs to; None if it stands for no place."""
        self._check(index)
        return next((part.name for part in self._known() if index in part.cells), None)

    def is_thumbnail(self, index: int | np.integer) -> bool:
        """Whether a token belongs to the thumbnail."""
        return self.part_of(index) == "thumbnail"

    def tile_of(self, index: int | np.integer) -> int:
        """Number of the tile (or frame) of a token, as the tower counts them; -1 if it stands for no place."""
        self._check(index)
        return int(self.tiles[index])

    def same_as(self, other: "ImageLayout") -> bool:
        """Whether tokens and patches with the same numbers lie at the same places of pictures scaled alike, as far as
        is known."""
        if not (self.parts and other.parts):
            return self.n_tokens == other.n_tokens and self.tower_order.shape == other.tower_order.shape
        return self.runs == other.runs and [(p.name, p.tiles, p.cells.tolist()) for p in self.parts] == [
            (p.name, p.tiles, p.cells.tolist()) for p in other.parts
        ]

    def scaled_to(self, size: tuple[int, int]) -> "ImageLayout":
        """The layout of the same picture in another size: boxes are in its pixels."""

        def scaled(part: LayoutPart) -> LayoutPart:
            x0, y0, x1, y1 = part.area
            (old_width, old_height), (width, height) = self.image_size, size
            area = (x0 * width / old_width, y0 * height / old_height, x1 * width / old_width, y1 * height / old_height)
            return replace(part, area=area)

        parts = tuple(map(scaled, self.parts))
        patches = None if self.make_patches is None else partial(_scaled_patches, self, size)
        return replace(self, image_size=ImageSize(*size), parts=parts, make_patches=patches)

    # ---------------------------------------------------------------- tokens

    def index(self, row: int, col: int, frame: int = 0) -> int:
        """Number of a token of the main part. Raises `GeometryError` if there is no such token."""
        if not (0 <= frame < self.frames and 0 <= row < self.rows and 0 <= col < self.cols):
            raise GeometryError(
                f"no token at row {row}, column {col}, frame {frame}: counted from 0, the image has "
                f"{self.rows} rows, {self.cols} columns and {self.frames} frame(s)"
            )
        return int(self._main.cells[frame, row, col])

    def row_col(self, index: int | np.integer) -> tuple[int, int]:
        """Row and column of a token within its part and frame.

        Raises:
            GeometryError: there is no such token, or it stands for no place.
        """
        self._check(index)
        for part in self._known():
            for _, row, col in np.argwhere(part.cells == index).tolist():
                return row, col
        raise GeometryError(f"token {index} stands for no place in the picture: it is a line break or a marker")

    def box_of(self, index: int | np.integer) -> tuple[float, float, float, float] | None:
        """The pixels a token covers; None if it stands for no place.

        Neighbours share their edge to the last bit where nothing lies between them.
        """
        self._check(index)
        x0, y0, x1, y1 = self.boxes[index].tolist()
        return None if math.isnan(x0) else (x0, y0, x1, y1)

    @cached_property
    def boxes(self) -> Float[np.ndarray, "token 4"]:
        """The box of every token; not a number where it stands for no place."""
        boxes = np.full((self.n_tokens, 4), np.nan)
        for part in self._known():
            x, y = part.edges()
            boxes[part.cells, 0::2] = x[None, None]
            boxes[part.cells, 1::2] = y[None, :, None]
        return boxes

    # ---------------------------------------------------------------- boxes

    def overlaps(
        self, box: Box, of: Literal["box", "token"] = "box", truncate: bool = False
    ) -> Float[np.ndarray, "token"]:
        """The share of the box that lies in each token: area of the intersection / area of the box.

        Args:
            box: half-open, in pixels of the original image. It is first clipped to the image, so the overlaps
                of a frame sum to 1 over a part that shows all of it.
            of: "token" divides by the token's area instead (the share of the token that lies in the box).
            truncate: exactly as the code published with the OCR-heads paper (arXiv 2505.15865;
                `return_weights` and `compute_tile_weights`): the box is scaled to the resized image and its
                corners truncated to whole pixels; it is not clipped to the image; a box left without area
                overlaps nothing. (That code then multiplies by 100.)

        Raises:
            GeometryError: the box is empty, reversed, not finite, or entirely outside the image.
            NotSeenError: it lies in a part of the image that the model does not see.
        """
        if of not in ("box", "token"):
            raise GeometryError(f'overlap is measured of="box" or of="token", got of={of!r}')
        corners = self._checked(box)
        shares = np.zeros(self.n_tokens)
        for part in self._known():
            placed = truncated(corners, part) if truncate else self._clipped(corners)
            if placed[0] != placed[2] and placed[1] != placed[3]:
                shares[part.cells] = part.shares(placed, of, "seen" if truncate else "image")
        if not truncate and not shares.any():
            raise NotSeenError(
                f"the box {shown(corners)} lies where the model does not see the picture: pixels that were cropped or "
                f"that no patch covers (it sees {'; '.join(shown(part.area) for part in self.parts)})"
            )
        return shares

    def tokens_in_box(
        self,
        box: Box,
        min_overlap: float | int = 0.0,
        of: Literal["box", "token"] = "box",
        truncate: bool = False,
        part: Part = "all",
    ) -> list[int]:
        """Tokens of a part whose `overlaps(box, of, truncate)` is greater than `min_overlap`, in rising order.

        With 0, every token that shares any area with the box. The OCR-heads paper uses 0.1; its code 0.001
        with `truncate=True`. A box that covers many tokens may leave none above a threshold `of="box"`.

        Raises:
            GeometryError: see `overlaps`; `min_overlap` is not in [0, 1); or there is no such part.
        """
        if not 0 <= min_overlap < 1:
            raise GeometryError(f"min_overlap is a share of the {of}'s area, 0 <= min_overlap < 1, got {min_overlap}")
        tokens = self.tokens_of(part)
        return tokens[self.overlaps(box, of, truncate)[tokens] > min_overlap].tolist()

    def _clipped(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        (x0, y0, x1, y1), (width, height) = box, self.image_size
        return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))

    def _checked(self, box: Box) -> tuple[float, float, float, float]:
        if len(box) != 4:
            raise GeometryError(f"a box is four numbers (x0, y0, x1, y1), got {len(box)}: {box}")
        x0, y0, x1, y1 = corners = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
        if not all(map(math.isfinite, corners)):
            raise GeometryError(f"the corners of a box must be finite numbers, got {shown(corners)}")
        if x0 >= x1 or y0 >= y1:
            raise GeometryError(
                f"the box {shown(corners)} has no area: expected (x0, y0, x1, y1) with x0 < x1 and y0 < y1, in pixels"
            )
        width, height = self.image_size
        if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
            raise GeometryError(
                f"the box {shown(corners)} lies outside the image, which is {width} x {height} pixels "
                "(width x height, original size after EXIF orientation)"
            )
        return corners

    # ---------------------------------------------------------------- pictures and patches

    def to_image(
        self, values: Shaped[np.ndarray | torch.Tensor, "*lead token"], part: Part = "tiles"
    ) -> Shaped[np.ndarray, "*lead frame row col"]:
        """Lay one value per token out as a part of the picture (a tensor is moved to the CPU, bfloat16 as float32)."""
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        if values.shape[-1:] != (self.n_tokens,):
            raise GeometryError(
                f"expected one value for each of the image's {self.n_tokens} tokens "
                f"({self.frames} frame(s) of {self.rows} x {self.cols}), got shape {tuple(values.shape)}"
            )
        return values[..., self.part(part).cells]

    @cached_property
    def patches(self) -> "ImageLayout":
        """The same picture with a token for each patch of the tower, class tokens left out."""
        return self if self.make_patches is None else self.make_patches()

    @property
    def n_patches(self) -> int:
        return self.tower_order.size

    def n_features(self, token_size: int) -> int:
        """Number of outputs of a projector whose tokens cover `token_size` x `token_size` patches."""
        return self.n_patches // token_size**2

    def patch_order(self) -> Int[np.ndarray, "patch 3"]:
        """(frame, row, column) in the main part of each patch in the order of the tower; -1 for those of other
        parts."""
        places = np.full((self.n_patches, 3), -1)
        cells = self.patches._main.cells
        places[cells.ravel()] = np.indices(cells.shape).reshape(3, -1).T
        return places[self.tower_order.ravel()]

    def _known(self) -> tuple[LayoutPart, ...]:
        if not self.parts:
            raise GeometryError(
                f"where the {self.n_tokens} tokens of this picture of {self.n_tiles} tiles lie follows from its size, "
                "which a Hugging Face batch does not carry: make the inputs with model.to_inputs(...)"
            )
        return self.parts

    def _check(self, index: int | np.integer) -> None:
        if not 0 <= index < self.n_tokens:
            raise GeometryError(f"no token {index}: the image has {self.n_tokens} tokens, counted from 0")


def _scaled_patches(layout: ImageLayout, size: tuple[int, int]) -> ImageLayout:
    return layout.patches.scaled_to(size)


def features_of(
    layouts: Sequence[ImageLayout], token_size: int
) -> tuple[Int[np.ndarray, "token source"], Float[np.ndarray, "token source"] | None]:
    """Which outputs of the projector the tokens of pictures in a row are, and how much of each where some are mixes."""
    widest = max(1 if layout.shares is None else layout.shares.shape[1] for layout in layouts)
    n_tokens = sum(layout.n_tokens for layout in layouts)
    sources, shares, first, done = np.full((n_tokens, widest), -1), np.zeros((n_tokens, widest)), 0, 0
    for layout in layouts:
        own = np.arange(layout.n_tokens) if layout.features is None else layout.features
        own = own.reshape(layout.n_tokens, -1)
        here = slice(done, done + layout.n_tokens), slice(own.shape[1])
        sources[here] = np.where(own < 0, -1, own + first)
        shares[here] = 1.0 if layout.shares is None else layout.shares
        first, done = first + layout.n_features(token_size), done + layout.n_tokens
    return sources, shares if widest > 1 else None
