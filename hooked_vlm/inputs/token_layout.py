"""Positions of images and videos in the token stream, and the model's placeholders."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.layouts import by_frames
from hooked_vlm.inputs.picture_processor import PictureProcessor
from hooked_vlm.inputs.prompt_styles import CHATML, PromptStyle
from hooked_vlm.vision_config import VisionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Grid = tuple[int, int, int]
"""What the vision tower sees of an image or video: (pictures, rows, columns) of patches; a picture is the image, one of
its tiles, or a temporal patch of a video."""
Kind = Literal["image", "video"]


@dataclass(frozen=True)
class Turns:
    """Token ids of the turns of a chat."""

    starts: tuple[int, ...]
    """Tokens that open a turn (`<|im_start|>`, or one for each role); none in a style without such tokens."""
    end: int | None
    """The token that closes a turn (`<|im_end|>`)."""
    user: tuple[int, ...]
    """What opens a user's turn: `<|im_start|> user \\n`."""
    assistant: tuple[int, ...]
    """What opens an answer."""
    user_behind: tuple[int, ...] = ()
    """The same header behind text, where the tokenizer spells it otherwise there; the same by default."""
    assistant_behind: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class InputSpec:
    """The properties of a model that its inputs depend on."""

    image_token_id: int | None
    video_token_id: int | None
    vision_end_token_id: int | None
    pad_token_id: int
    vision: VisionConfig | None = None
    vision_start_token_id: int | None = None
    """The token that opens an image or video."""
    style: PromptStyle = CHATML
    turns: "Turns | None" = None
    """The tokens of the style's turns; None for a vocabulary without them."""
    tokenizer: "PreTrainedTokenizerBase | None" = None
    image_processor: PictureProcessor | None = None
    layouts: PictureProcessor | None = field(default=None, repr=False)
    """The processor that says where tokens lie, also of models that have none to prepare pictures."""
    mrope: bool = True
    """Whether positions have three axes (M-RoPE); otherwise every token counts one position."""
    class_tokens: int = field(init=False, repr=False)
    """Number of class tokens before the patches of a picture in the tower."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_tokens", int(self.vision is not None and self.vision.class_token))

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return tuple(i for i in (self.image_token_id, self.video_token_id) if i is not None)

    @property
    def patch_size(self) -> int:
        return self.vision.patch_size if self.vision else 1

    @property
    def token_size(self) -> int:
        """Side in patches of the square that an image token covers."""
        return self.vision.token_size if self.vision else 1

    @property
    def takes_patches(self) -> bool:
        """Whether a row of the pixel tensor is a patch; otherwise it is a picture that the tower sees."""
        return self.vision is None or self.vision.patch_order == "blocks"

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands; none without a tokenizer."""
        return [] if self.tokenizer is None else self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included; their numbers without a tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def layout_of(self, grid: Grid, kind: Kind, size: tuple[int, int] | None = None) -> ImageLayout:
        """The layout of an image or video that the tower sees as `grid`."""
        if self.layouts is None:
            raise InputError("these inputs have pictures, and their model has no vision tower")
        layout = self.layouts.layout_of(grid, size, kind)
        by_itself = kind == "video" and self.vision is not None and self.vision.video_times
        return by_frames(layout) if by_itself else layout

    def n_pixel_rows(self, grid: Grid) -> int:
        """Number of rows of the pixel tensor for an image or video of `grid`: patches, or whole pictures."""
        t, h, w = grid
        return t * h * w if self.takes_patches else t


@dataclass(frozen=True)
class Visual:
    """One image or video in the token stream."""

    kind: Kind
    index: int
    """Its number among the images (or among the videos) of the batch, in order of appearance."""
    row: int
    runs: tuple[tuple[int, int], ...]
    """First position of each run of its placeholders, and one past its last."""
    grid: Grid
    """Patches that the tower sees: (pictures, rows, columns)."""
    layout: ImageLayout = field(compare=False, repr=False)

    @property
    def start(self) -> int:
        """Position of its first placeholder."""
        return self.runs[0][0]

    @property
    def stop(self) -> int:
        """One past the position of its last placeholder."""
        return self.runs[-1][1]

    @property
    def n_tokens(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    @cached_property
    def positions(self) -> Int[Tensor, "token"]:
        """Positions of its placeholders in its row."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.runs])

    @property
    def span(self) -> "slice | Int[Tensor, 'token']":
        """Index of its positions: a slice where they are one run."""
        return slice(*self.runs[0]) if len(self.runs) == 1 else self.positions

    def holds(self, pos: int) -> bool:
        """Whether a position is one of its placeholders."""
        return any(start <= pos < stop for start, stop in self.runs)


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


def locate_visuals(
    tokens: Int[Tensor, "batch pos"],
    spec: InputSpec,
    pictures: dict[Kind, tuple[list[Grid], list[ImageLayout]]],
    first: Sequence[int],
    stop: Sequence[int],
) -> tuple[Visual, ...]:
    """Find the runs of placeholders of every image and video, in order of appearance.

    Args:
        pictures: grids and layouts of the images and of the videos.

    Raises:
        InputError: placeholders that do not match the grids.
    """
    tokens = tokens.cpu()
    visuals: list[Visual] = []
    for kind, (grids, layouts) in pictures.items():
        token_id = spec.image_token_id if kind == "image" else spec.video_token_id
        at = (tokens == token_id).nonzero().tolist() if token_id is not None else []
        expected = sum(layout.n_tokens for layout in layouts)
        if len(at) != expected:
            raise InputError(_mismatch(kind, len(at), expected, len(grids)))
        done = 0
        for index, (grid, layout) in enumerate(zip(grids, layouts, strict=True)):
            row = at[done][0]
            runs = _runs_of(at[done : done + layout.n_tokens], layout, f"{kind} {index}")
            if not first[row] <= runs[0][0] < stop[row]:
                raise InputError(f"the placeholders of {kind} {index} lie under the padding of row {row}")
            visuals.append(Visual(kind, index, row, runs, grid, layout))
            done += layout.n_tokens
    return tuple(sorted(visuals, key=lambda v: (v.row, v.start)))


def _runs_of(at: list[list[int]], layout: ImageLayout, name: str) -> tuple[tuple[int, int], ...]:
    """The runs of one picture's placeholders, given the (row, position) of each."""
    runs, done = [], 0
    for n in layout.runs:
        (row, start), (last_row, last) = at[done], at[done + n - 1]
        if last_row != at[0][0] or row != last_row or last != start + n - 1:
            lengths = "one run" if len(layout.runs) == 1 else f"runs of {', '.join(map(str, layout.runs))}"
            raise InputError(
                f"the {layout.n_tokens} placeholders of {name} are not {lengths} of tokens in one row "
                f"(they start at row {row}, position {start})"
            )
        runs.append((start, start + n))
        done += n
    return tuple(runs)


def checked_grids(kind: str, grid_thw: Tensor | None, merge: int) -> list[Grid]:
    """Grids of images or videos, if they are whole merge blocks.

    Raises:
        InputError: they are no whole numbers [picture, 3], or no multiples of `merge`.
    """
    if grid_thw is None:
        return []
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
