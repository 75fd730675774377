"""Positions of images and videos in the token stream, and the model's placeholders."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.tiles import TileProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Grid = tuple[int, int, int]
"""Numbers of patches: (temporal patches, rows, columns), or for a tiled image (tiles, rows, columns)."""
Kind = Literal["image", "video"]


@dataclass(frozen=True, eq=False)
class InputSpec:
    """The properties of a model that its inputs depend on."""

    image_token_id: int | None
    video_token_id: int | None
    vision_end_token_id: int | None
    patch_size: int
    merge_size: int
    pad_token_id: int
    vision_start_token_id: int | None = None
    """The token that opens an image or video."""
    turn_start_ids: tuple[int, ...] = ()
    """The tokens that open a chat turn (`<|im_start|>`, or one for each role)."""
    turn_end_id: int | None = None
    """The token that closes a chat turn (`<|im_end|>`)."""
    user_header: int = 3
    """Number of tokens that open a user's turn: `<|im_start|> user \\n`."""
    tokenizer: "PreTrainedTokenizerBase | None" = None
    image_processor: ImageProcessor | TileProcessor | None = None
    mrope: bool = True
    """Whether positions have three axes (M-RoPE); otherwise every token counts one position."""
    tile_size: int | None = None
    """Side in pixels of the tiles that images are cut into; None: each image is seen whole."""

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return tuple(i for i in (self.image_token_id, self.video_token_id) if i is not None)

    def n_tokens(self, grid: Grid) -> int:
        """Number of placeholders of an image or video of `grid` patches."""
        t, h, w = grid
        return t * h * w // self.merge_size**2

    def n_pixel_rows(self, grid: Grid) -> int:
        """Number of rows of the pixel tensor for an image or video of `grid`: patches, or whole tiles."""
        t, h, w = grid
        return t * h * w if self.tile_size is None else t


@dataclass(frozen=True)
class Visual:
    """One image or video in the token stream."""

    kind: Kind
    index: int
    """Its number among the images (or among the videos) of the batch, in order of appearance."""
    row: int
    start: int
    """Position of its first placeholder."""
    n_tokens: int
    grid: Grid
    """Patches: (temporal patches or tiles, rows, columns)."""

    @property
    def stop(self) -> int:
        return self.start + self.n_tokens


def real_span(mask: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First real position of each row and one past the last.

    Raises:
        InputError: a row without real tokens, or with padding between them.
    """
    host = mask.to(torch.bool).cpu()
    counts = host.sum(1)
    first = host.int().argmax(1)
    stop = host.shape[1] - host.flip(1).int().argmax(1)
    if (counts == 0).any():
        raise InputError(f"row {int((counts == 0).nonzero()[0])} has no real token: its attention_mask is all 0")
    if (stop - first != counts).any():
        row = int((stop - first != counts).nonzero()[0])
        raise InputError(f"row {row} has padding between real tokens: padding must lie at the ends of a row")
    return tuple(first.tolist()), tuple(stop.tolist())


def tile_grids(
    tokens: Int[Tensor, "batch pos"],
    pixels: Float[Tensor, "tile ..."],
    num_tiles: Int[Tensor, "image"] | None,
    spec: InputSpec,
) -> Int[Tensor, "image 3"]:
    """Grids of the images of a model that tiles them: (tiles, rows, columns) of patches.

    Without `num_tiles`, every run of placeholders is one image.

    Raises:
        InputError: tiles that are not square, or do not fit the placeholders.
    """
    if pixels.ndim != 4 or pixels.shape[2] != pixels.shape[3] or pixels.shape[2] % (spec.patch_size * spec.merge_size):
        side = spec.patch_size * spec.merge_size
        raise InputError(
            f"pixel_values must be [tile, channels, side, side] with a side that is a multiple of {side}, got "
            f"{tuple(pixels.shape)}"
        )
    side = pixels.shape[2] // spec.patch_size
    per_tile = spec.n_tokens((1, side, side))
    if num_tiles is None:
        runs = _runs(tokens == spec.image_token_id)
        if any(n % per_tile for n in runs):
            raise InputError(
                f"a tile has {per_tile} placeholders, but their runs are {runs} long: pass num_tiles, the number of "
                "tiles of each image"
            )
        counts = [n // per_tile for n in runs]
    else:
        if num_tiles.dtype.is_floating_point:
            raise InputError(f"num_tiles must be whole numbers, got {num_tiles.dtype}")
        counts = [int(n) for n in num_tiles.reshape(-1).tolist()]
    if sum(counts) != len(pixels) or min(counts, default=1) < 1:
        source = "num_tiles" if num_tiles is not None else "the runs of placeholders"
        raise InputError(f"got {len(pixels)} tiles, but {source} count {counts} for the images")
    return torch.tensor([[n, side, side] for n in counts], device=tokens.device).reshape(-1, 3)


def _runs(marked: Tensor) -> list[int]:
    """Lengths of the runs of true values in the rows of a [batch, pos] tensor, in order."""
    lengths: list[int] = []
    for row in marked.tolist():
        for is_one, run in groupby(row):
            if is_one:
                lengths.append(len(list(run)))
    return lengths


def locate_visuals(
    tokens: Int[Tensor, "batch pos"],
    spec: InputSpec,
    image_grid_thw: Int[Tensor, "image 3"] | None,
    video_grid_thw: Int[Tensor, "video 3"] | None,
    first: Sequence[int],
    stop: Sequence[int],
) -> tuple[Visual, ...]:
    """Find the run of placeholders of every image and video, in order of appearance.

    Raises:
        InputError: placeholders that do not match the grids.
    """
    tokens = tokens.cpu()
    visuals: list[Visual] = []
    kinds: tuple[tuple[Kind, int | None, Tensor | None], ...] = (
        ("image", spec.image_token_id, image_grid_thw),
        ("video", spec.video_token_id, video_grid_thw),
    )
    for kind, token_id, grid_thw in kinds:
        grids = [] if grid_thw is None else _checked_grids(kind, grid_thw, spec.merge_size)
        at = (tokens == token_id).nonzero().tolist() if token_id is not None else []
        expected = sum(spec.n_tokens(g) for g in grids)
        if len(at) != expected:
            raise InputError(_mismatch(kind, len(at), expected, len(grids)))
        done = 0
        for index, grid in enumerate(grids):
            n = spec.n_tokens(grid)
            (row, start), (last_row, last) = at[done], at[done + n - 1]
            if last_row != row or last != start + n - 1:
                raise InputError(
                    f"the {n} placeholders of {kind} {index} are not one run of tokens in one row "
                    f"(they start at row {row}, position {start})"
                )
            if not first[row] <= start < stop[row]:
                raise InputError(f"the placeholders of {kind} {index} lie under the padding of row {row}")
            visuals.append(Visual(kind, index, row, start, n, grid))
            done += n
    return tuple(sorted(visuals, key=lambda v: (v.row, v.start)))


def _checked_grids(kind: str, grid_thw: Tensor, merge: int) -> list[Grid]:
    whole = not grid_thw.dtype.is_floating_point and grid_thw.dtype != torch.bool
    grids = grid_thw.tolist() if whole and grid_thw.ndim == 2 and grid_thw.shape[1] == 3 else [(0, 0, 0)]
    if any(min(t, h, w) < 1 or h % merge or w % merge for t, h, w in grids):
        raise InputError(
            f"{kind}_grid_thw must be whole numbers [{kind}, (frames or tiles, rows, columns)], rows and columns "
            f"multiples of {merge}, got {tuple(grid_thw.shape)} of {grid_thw.dtype}: {str(grid_thw.tolist())[:80]}"
        )
    return [(t, h, w) for t, h, w in grids]


def _mismatch(kind: str, n_placeholders: int, n_expected: int, n_visuals: int) -> str:
    if n_visuals == 0:
        return (
            f"{n_placeholders} {kind} placeholders but no {kind}: pass the VLMInputs that "
            f"model.to_inputs(prompt, {kind}s=...) makes, not bare tokens"
        )
    return (
        f"{n_visuals} {kind}{'s' if n_visuals > 1 else ''} need {n_expected} placeholders, but the tokens have "
        f"{n_placeholders}"
    )
