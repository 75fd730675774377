"""A clean and a corrupt input whose positions correspond."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.boxes import Box, LayoutPart, Part
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.token_layout import Visual
from hooked_vlm.inputs.vlm_inputs import VLMInputs

Direction = Literal["denoising", "noising"]
"""Denoising: the corrupt run gets clean activations. Noising: the clean run gets corrupt ones."""


@dataclass(frozen=True)
class Region:
    """The tokens or patches of an image under a box.

    Args:
        box: half-open (x0, y0, x1, y1) in pixels of the clean inputs' original image.
        image: its number in the batch.
        min_overlap: a token or patch counts if more than this share of the box's area lies in it.
        part: of a tiled image, tokens of its "tiles", of its "thumbnail", or "all".
    """

    box: Box
    image: int = 0
    min_overlap: float | int = 0.0
    part: Part = "all"


Place = Region | Sequence[Region] | Sequence[int]
"""A region, several (of the images of several rows, say), or positions of the clean inputs."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Clean and corrupt inputs; each row is an example.

    Args:
        places: regions and positions by names of your own, beside the groups every input has.
        by: how positions correspond. "columns": both inputs have the same columns, with images of the same sizes in
            the same places and as many tokens appended. "groups": stretches of text between images correspond where
            they are of one length, and so do `question`, `assistant_header`, `final` and `generated`; image tokens
            correspond to those at the same place of the picture, whatever the two grids. Positions without counterpart
            cannot be patched.

    Raises:
        InputError: the inputs cannot be aligned, or a place has the name of a group.
    """

    clean: VLMInputs
    corrupt: VLMInputs
    places: Mapping[str, Place] = field(default_factory=dict)
    by: Literal["columns", "groups"] = "columns"

    def __post_init__(self) -> None:
        if self.by not in ("columns", "groups"):
            raise InputError(f'positions are aligned by="columns" or by="groups", got {self.by!r}')
        reserved = {"each", "all", "text", *vars(self.clean.positions)} & set(self.places)
        if reserved:
            raise InputError(f"{sorted(reserved)[0]!r} names a group that every input has: call the place otherwise")
        if len(self.clean) != len(self.corrupt):
            raise InputError(
                f"clean has {len(self.clean)} rows and corrupt {len(self.corrupt)}: row by row they are examples"
            )
        for name, place in self.places.items():
            _check_place(name, place)
        for row in range(len(self.clean)):
            appended = [side.n_generated[row] for side in (self.clean, self.corrupt)]
            alike = appended[0] == appended[1] and same_columns(self.clean, row, self.corrupt, row)
            if self.by == "columns" and not alike:
                raise InputError(_misaligned(self.clean, self.corrupt, row))
            kinds = [[v.kind for v in _visuals(side, row)] for side in (self.clean, self.corrupt)]
            if kinds[0] != kinds[1]:
                raise InputError(
                    f"row {row} has {len(kinds[0])} images in clean and {len(kinds[1])} in corrupt, which cannot "
                    "correspond: give both the same number"
                )

    def __len__(self) -> int:
        return len(self.clean)

    def sides(self, direction: Direction) -> tuple[VLMInputs, VLMInputs]:
        """The inputs that are run with patches, and those the patches come from."""
        if direction not in ("denoising", "noising"):
            raise InputError(f'direction must be "denoising" or "noising", got {direction!r}')
        return (self.corrupt, self.clean) if direction == "denoising" else (self.clean, self.corrupt)

    def matches(self, direction: Direction) -> Int[Tensor, "batch pos"]:
        """For each position of the inputs that are run, the one of the other side; -1 where there is none."""
        base, source = self.sides(direction)
        return torch.stack([_match(base, source, row, self.by) for row in range(len(base))])


def aligned(x: Tensor, matches: Int[Tensor, "batch pos"]) -> Tensor:
    """An activation [batch, source position, ...] with the positions of the other side; zero where none matches."""
    index = matches.clamp(min=0).to(x.device)
    rows = torch.arange(len(x), device=x.device)[:, None]
    found = x[rows, index]
    there = (matches >= 0).to(x.device).view(*matches.shape, *[1] * (x.ndim - 2))
    return found * there


def same_columns(a: VLMInputs, row: int, b: VLMInputs, other: int) -> bool:
    """Whether every column is the same in both rows: text, or the same region of a picture."""
    if (a.shape[1], a.first[row], a.stop[row]) != (b.shape[1], b.first[other], b.stop[other]):
        return False
    own, its = _visuals(a, row), _visuals(b, other)
    return [(v.kind, v.start) for v in own] == [(v.kind, v.start) for v in its] and all(
        same_places(a, v, b, w) for v, w in zip(own, its, strict=True)
    )


def same_places(a: VLMInputs, visual: Visual, b: VLMInputs, other: Visual) -> bool:
    """Whether tokens and patches of two images have the same layout. Equal numbers of tiles may differ in it (4 x 1 or
    2 x 2), but count as the same where a size is not known (a Hugging Face batch)."""
    return visual.grid == other.grid and visual.layout.same_as(other.layout)


def _check_place(name: str, place: Place) -> None:
    """Refuse anything but positions or regions."""
    parts = [place] if isinstance(place, Region) else list(place) if isinstance(place, Sequence | Tensor) else []
    regions = [isinstance(part, Region) for part in parts]
    if not parts or isinstance(place, str) or any(regions) != all(regions):
        raise InputError(f"the place {name!r} must be a Region, several, or positions, got {place!r}")


def _visuals(inputs: VLMInputs, row: int) -> list[Visual]:
    return [v for v in inputs.visuals if v.row == row]


def _misaligned(clean: VLMInputs, corrupt: VLMInputs, row: int) -> str:
    return (
        f"clean and corrupt do not have the same columns in row {row}: clean is {_described(clean, row)}, corrupt is "
        f"{_described(corrupt, row)}. Give both prompts (and answers) the same number of tokens, images one size "
        '(corrupt = clean.with_image(0, picture)), or let them correspond by groups: Pair(..., by="groups")'
    )


def _described(inputs: VLMInputs, row: int) -> str:
    parts = [f"{v.kind} of {_shape(v)} tokens at {v.start}" for v in _visuals(inputs, row)]
    padded = inputs.shape[1] - (inputs.stop[row] - inputs.first[row])
    padding = f", {padded} of them padding" if padded else ""
    appended = f", {inputs.n_generated[row]} of them appended" if inputs.n_generated[row] else ""
    return f"{len(inputs)} x {inputs.shape[1]} tokens{padding}{appended} ({'; '.join(parts) or 'no image'})"


def _shape(visual: Visual) -> str:
    """The parts of a picture, as rows x columns of tokens."""
    layout = visual.layout
    if not layout.parts:
        return f"{layout.n_tiles} tiles and {layout.n_tokens}"
    frames = "" if layout.frames == 1 else f"{layout.frames} x "
    others = [f"{part.name} {part.cells.shape[1]} x {part.cells.shape[2]}" for part in layout.parts[1:]]
    tiles = "" if layout.layout == (1, 1) else f" in {layout.layout[0]} x {layout.layout[1]} tiles"
    return " and ".join([f"{frames}{layout.rows} x {layout.cols}{tiles}", *others])


def _match(base: VLMInputs, source: VLMInputs, row: int, by: str) -> Int[Tensor, "pos"]:
    found = torch.full((base.shape[1],), -1)
    if by == "columns":
        found[base.first[row] : base.stop[row]] = torch.arange(base.first[row], base.stop[row])
        return found
    for own, other in zip(_groups(base, row), _groups(source, row), strict=True):
        if len(own) == len(other):
            found[own] = other
    visuals = list(zip(_visuals(base, row), _visuals(source, row), strict=True))
    edges = [
        [inputs.first[row], *(p for v in own for run in v.runs for p in run), inputs.stop[row]]
        for inputs, own in ((base, [v for v, _ in visuals]), (source, [v for _, v in visuals]))
    ]
    for i in range(0, len(edges[0]), 2):  # stretches of text
        own, other = (torch.arange(side[i], side[i + 1]) for side in edges)
        if len(own) == len(other):
            found[own] = other
    for own, other in visuals:
        if same_places(base, own, source, other):
            found[own.positions] = other.positions
        elif own.kind == "image":
            places = torch.from_numpy(by_place(own.layout, other.layout))
            found[own.positions] = torch.where(places < 0, -1, other.positions[places])
    return found


def _groups(inputs: VLMInputs, row: int) -> list[Tensor]:
    groups = inputs.positions
    return [group[row] for group in (groups.question, groups.assistant_header, groups.final, groups.generated)]


def by_place(base: ImageLayout, source: ImageLayout) -> Int[np.ndarray, "token"]:
    """For each token of an image, the token of another that covers its centre when both pictures are scaled alike; -1
    for tokens that stand for no place, or for one that the other image's part of this name does not show."""
    found = np.full(base.n_tokens, -1)
    named = {part.name: part for part in source.parts}
    for part in base.parts:
        x0, y0, x1, y1 = np.divide(part.area, 2 * base.image_size)
        rows, cols = ((np.arange(n) + 0.5) / n for n in part.cells[0].shape)
        other = named.get(part.name, source.parts[0])
        found[part.cells[0]] = _covering(other, source, x0 + cols * (x1 - x0), y0 + rows * (y1 - y0))
    return found


def _covering(
    part: LayoutPart, layout: ImageLayout, xs: Float[np.ndarray, "col"], ys: Float[np.ndarray, "row"]
) -> Int[np.ndarray, "row col"]:
    """Tokens of a part at places given as shares of the picture; -1 where it shows nothing."""
    x0, y0, x1, y1 = np.divide(part.area, 2 * layout.image_size)
    cells = part.cells[0]
    n_rows, n_cols = cells.shape
    rows, cols = np.floor((ys - y0) / (y1 - y0) * n_rows), np.floor((xs - x0) / (x1 - x0) * n_cols)
    shown = np.outer((rows >= 0) & (rows < n_rows), (cols >= 0) & (cols < n_cols))
    at = np.ix_(np.clip(rows, 0, n_rows - 1).astype(int), np.clip(cols, 0, n_cols - 1).astype(int))
    return np.where(shown, cells[at], -1)
