"""`VLMInputs`: tokens with the images and videos their placeholders stand for, as one immutable batch.

It behaves like its token tensor where tools look (`shape`, `ndim`, `device`, `len`, row indexing, ...),
so that everything that takes tokens takes a `VLMInputs`. Row indexing carries the row's images along.

Cached tensors are made outside of `torch.inference_mode`, so that inputs can also be trained on.
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.batching import checked_counts, join, rows_of
from hooked_vlm.inputs.boxes import Box, Part
from hooked_vlm.inputs.edits import Answer, append_answer, replace_image
from hooked_vlm.inputs.geometry import ImageLayout, features_of
from hooked_vlm.inputs.picture_settings import PictureSettings
from hooked_vlm.inputs.positions import TokenGroups, mrope_positions, opened_spans, prompt_groups
from hooked_vlm.inputs.token_layout import Grid, InputSpec, Kind, Visual, checked_grids, locate_visuals, real_span


@dataclass(frozen=True, eq=False)
class VLMInputs:
    """A batch of token sequences with their images and videos.

    Tensors have Hugging Face's layout: `tokens` and `attention_mask` [batch, pos], `pixel_values`
    [patch, channels * frames * patch height * patch width] of all images one after the other (of towers that see
    pictures of one size: [picture, channels, height, width]), `image_grid_thw` [image, 3], the same for videos. Padding
    must lie at the ends of a row.

    Raises:
        InputError: images and placeholders disagree, the mask has holes, or `n_generated` does not fit the rows.
    """

    tokens: Int[Tensor, "batch pos"]
    spec: InputSpec
    attention_mask: Int[Tensor, "batch pos"] = None  # type: ignore[assignment]
    """1 for real tokens, 0 for padding; all real if left out."""
    pixel_values: Float[Tensor, "patch ..."] | None = None
    image_grid_thw: Int[Tensor, "image 3"] | None = None
    """Patches of every image: (1, rows, columns), or (tiles, rows, columns) of a tile."""
    pixel_values_videos: Float[Tensor, "video_patch ..."] | None = None
    video_grid_thw: Int[Tensor, "video 3"] | None = None
    image_layouts: tuple[ImageLayout, ...] | None = None
    """Where the tokens of each image lie; of the grids alone if left out (then the original sizes are not known)."""
    video_layouts: tuple[ImageLayout, ...] | None = None
    image_settings: tuple[PictureSettings, ...] | None = None
    """Settings that messages gave the images; `with_image` keeps them."""
    image_features: Float[Tensor, "token *feature d_model"] | None = None
    """The projector's output, images first, then videos (with DeepStack several of each token); see
    `with_image_features`."""
    n_generated: tuple[int, ...] = ()
    """Number of tokens appended to the prompt at the end of each row."""

    visuals: tuple[Visual, ...] = field(init=False)
    first: tuple[int, ...] = field(init=False)
    """Position of the first real token of each row."""
    stop: tuple[int, ...] = field(init=False)
    """One past the position of the last real token of each row."""
    position_ids: Int[Tensor, "3 batch pos"] = field(init=False)
    """Temporal, height and width position of every token (M-RoPE); all equal where positions are plain."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the dataclass is frozen; these fields are derived from the others
        if self.attention_mask is None:
            set_(self, "attention_mask", torch.ones_like(self.tokens))
        if self.tokens.ndim != 2 or self.tokens.shape != self.attention_mask.shape:
            raise InputError(
                f"tokens and attention_mask must both be [batch, pos], got {tuple(self.tokens.shape)} "
                f"and {tuple(self.attention_mask.shape)}"
            )
        first, stop = real_span(self.attention_mask)
        set_(self, "first", first)
        set_(self, "stop", stop)
        set_(self, "n_generated", checked_counts(self.n_generated, first, stop))
        pictures: dict[Kind, Any] = {"image": self._placed("image"), "video": self._placed("video")}
        set_(self, "image_layouts", tuple(pictures["image"][1]) or None)
        set_(self, "video_layouts", tuple(pictures["video"][1]) or None)
        set_(self, "visuals", locate_visuals(self.tokens, self.spec, pictures, first, stop))
        self._check_pixels()
        per_second = None if self.spec.vision is None else self.spec.vision.positions_per_second
        spans = opened_spans(self.tokens, self.visuals, first, self.spec.vision_start_token_id, per_second)
        positions = mrope_positions(
            self.tokens.shape, first, stop, spans if self.spec.mrope else [], self.spec.token_size
        )
        set_(self, "position_ids", positions.to(self.tokens.device))

    def _placed(self, kind: Kind) -> tuple[list[Grid], list[ImageLayout]]:
        """Grids and layouts of the images, or of the videos."""
        grids = checked_grids(
            kind, self.image_grid_thw if kind == "image" else self.video_grid_thw, self.spec.token_size
        )
        layouts = self.image_layouts if kind == "image" else self.video_layouts
        most = 64 * self.spec.token_size**2 * max(64, self.tokens.numel())  # crops and padding may cost tokens
        if any(math.prod(grid) > most for grid in grids):
            raise InputError(
                f"{kind} grids {grids} describe far more patches than {self.tokens.numel()} tokens can hold"
            )
        if layouts is None:
            return grids, [self.spec.layout_of(grid, kind) for grid in grids]
        if [layout.grid for layout in layouts] != grids:
            raise InputError(
                f"the layouts of the {kind}s are for grids {[layout.grid for layout in layouts]}, but their grids are "
                f"{grids}: give {kind}_layouts=None to make them anew"
            )
        return grids, list(layouts)

    def _check_pixels(self) -> None:
        for kind, pixels, grid_thw in (
            ("image", self.pixel_values, self.image_grid_thw),
            ("video", self.pixel_values_videos, self.video_grid_thw),
        ):
            if pixels is None and grid_thw is not None and self.image_features is None:
                raise InputError(f"{kind} grids without pixels: pass the {kind}'s pixel values or its features")
            if pixels is None:
                continue
            n = sum(self.spec.n_pixel_rows(tuple(g)) for g in ([] if grid_thw is None else grid_thw.tolist()))
            n_pixels, unit = len(pixels) if pixels.ndim else 0, "patches" if self.spec.takes_patches else "tiles"
            if not pixels.ndim or n_pixels != n:
                raise InputError(f"got {n_pixels} {kind} {unit}, but the grids describe {n}")

    @cached_property
    @torch.inference_mode(False)
    def next_position(self) -> Int[Tensor, "batch"]:
        """The rotary position of the token that would follow each row."""
        return self.position_ids.amax(dim=(0, 2)) + 1

    # ---------------------------------------------------------------- like a token tensor

    @property
    def shape(self) -> torch.Size:
        return self.tokens.shape

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> torch.dtype:
        return self.tokens.dtype

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def size(self, dim: int | None = None) -> Any:
        return self.tokens.size() if dim is None else self.tokens.size(dim)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        n_videos = len(self.visuals) - self.n_images
        visuals = f"{self.n_images} images" + (f", {n_videos} videos" if n_videos else "")
        return f"VLMInputs({len(self)} x {self.shape[1]} tokens, {visuals}, {self.device})"

    def __getitem__(self, rows: int | np.integer | slice | Sequence[int] | Tensor | tuple[Any, ...]) -> "VLMInputs":
        """Some rows, each with its images; an int gives a batch of one."""
        if isinstance(rows, tuple):
            raise InputError(
                "VLMInputs are indexed by rows only, because positions belong to images. "
                "Use inputs.tokens[...] for token ids, inputs.append(...) to continue a prompt."
            )
        everything = range(len(self))
        if isinstance(rows, int | np.integer):
            chosen = [everything[int(rows)]]
        elif isinstance(rows, slice):
            chosen = list(everything[rows])
        else:
            index = rows.cpu() if isinstance(rows, Tensor) else list(rows)
            chosen = torch.arange(len(self))[index].reshape(-1).tolist()
        return self._take_rows(chosen)

    def to(self, target: torch.device | str | torch.dtype) -> "VLMInputs":
        """On another device, or with pixels (and image features) in another dtype."""
        changes: dict[str, Any] = {}
        for name in ("pixel_values", "pixel_values_videos", "image_features"):
            tensor = getattr(self, name)
            changes[name] = None if tensor is None else tensor.to(target)
        if not isinstance(target, torch.dtype):
            for name in ("tokens", "attention_mask", "image_grid_thw", "video_grid_thw"):
                tensor = getattr(self, name)
                changes[name] = None if tensor is None else tensor.to(target)
        return replace(self, **changes)

    def cpu(self) -> "VLMInputs":
        return self.to("cpu")

    def portable(self) -> "VLMInputs":
        """A copy to send or store: on the CPU, without the tokenizer, and without pixels if the images are encoded."""
        pixels = {} if self.image_features is None else {"pixel_values": None, "pixel_values_videos": None}
        return replace(self.cpu(), spec=replace(self.spec, tokenizer=None), **pixels)

    def repeat(self, *sizes: int) -> Int[Tensor, "..."]:
        """The token ids repeated, as a plain tensor (TransformerLens' head detector calls it)."""
        return self.tokens.repeat(*sizes)

    # ---------------------------------------------------------------- images and geometry

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...] | None:
        """(width, height) of the original images in pixels, after EXIF orientation; None if not known."""
        layouts = self.image_layouts
        if layouts is None or not all(layout.size_known for layout in layouts):
            return None
        return tuple(layout.image_size for layout in layouts)

    @property
    def n_images(self) -> int:
        return sum(v.kind == "image" for v in self.visuals)

    @property
    def has_visuals(self) -> bool:
        return bool(self.visuals)

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """Patches of all images, then of all videos: the order of pixels and of image features."""
        return tuple(v.grid for v in self.in_feature_order)

    @cached_property
    @torch.inference_mode(False)
    def feature_slots(self) -> Int[Tensor, "token"]:
        """Index into the flattened [batch * pos] tokens of every image feature, in feature order."""
        runs = [(v.row * self.shape[1], start, stop) for v in self.in_feature_order for start, stop in v.runs]
        spans = [row + torch.arange(start, stop) for row, start, stop in runs]
        return (torch.cat(spans) if spans else torch.zeros(0, dtype=torch.long)).to(self.device)

    @cached_property
    @torch.inference_mode(False)
    def feature_sources(self) -> tuple[Int[Tensor, "token source"], Float[Tensor, "token source"] | None] | None:
        """Which output of the projector each image token is, in feature order, -1 for line breaks; where tokens are
        mixes, which outputs and how much of each. None: all of them, in the order of the projector."""
        layouts = [v.layout for v in self.in_feature_order]
        if all(layout.features is None for layout in layouts):
            return None
        sources, shares = features_of(layouts, self.spec.token_size)
        on_device = None if shares is None else torch.from_numpy(shares).to(self.device)
        return torch.from_numpy(sources).to(self.device), on_device

    @property
    def in_feature_order(self) -> list[Visual]:
        """Images, then videos, by number."""
        return sorted(self.visuals, key=lambda v: (v.kind == "video", v.index))

    def visual(self, kind: Kind, i: int) -> Visual:
        """Image or video number `i` in the token stream.

        Raises:
            InputError: there is no such image or video.
        """
        same_kind = [v for v in self.visuals if v.kind == kind]
        for visual in same_kind:
            if visual.index == i:
                return visual
        raise InputError(f"there is no {kind} {i}: this batch has {len(same_kind)}, numbered from 0")

    def row_of_image(self, i: int) -> int:
        """The row of the batch that image `i` appears in."""
        return self.visual("image", i).row

    def image_tokens(self, i: int) -> Int[Tensor, "token"]:
        """Positions of image `i`'s tokens in its row, in the order of its layout."""
        return self.visual("image", i).positions

    def video_tokens(self, i: int) -> Int[Tensor, "token"]:
        """Positions of video `i`'s tokens in its row: frame by frame, each in raster order."""
        return self.visual("video", i).positions

    def image_grid(self, i: int) -> ImageLayout:
        """Where the tokens of image `i` lie: its parts, rows, columns and the boxes of tokens in original pixels.

        Inputs made from a Hugging Face batch do not have the original size: boxes are in pixels of the resized image,
        and where several tiles lie is not known.
        """
        return self.visual("image", i).layout

    def tokens_in_box(self, image: int, box: Box, min_overlap: float | int = 0.0, part: Part = "all") -> list[int]:
        """Positions of the tokens of `image` that overlap `box`, in the image's row.

        Args:
            box: half-open (x0, y0, x1, y1) in pixels of the original image.
            min_overlap: a token counts if more than this share of the box's area lies in it.
            part: of several, the tokens of one: those of its "tiles", of its "thumbnail", or "all".
        """
        visual = self.visual("image", image)
        return visual.positions[visual.layout.tokens_in_box(box, min_overlap, part=part)].tolist()

    def image_of_token(self, pos: int, row: int = 0) -> int:
        """The number of the image that the token at `pos` belongs to."""
        for visual in self.visuals:
            if visual.kind == "image" and visual.row == row and visual.holds(pos):
                return visual.index
        raise InputError(f"position {pos} of row {row} is not an image token")

    def box_of_token(self, pos: int, row: int = 0) -> tuple[float, float, float, float] | None:
        """The box (x0, y0, x1, y1), in pixels of the original image, that the image token at `pos` covers; None for one
        that stands for no place (a line break)."""
        visual = self.visual("image", self.image_of_token(pos, row))
        return visual.layout.box_of(int((visual.positions == pos).nonzero()))

    def on_image(
        self,
        image: int,
        values: Shaped[Tensor | np.ndarray, "*lead token"],
        part: Part = "tiles",
    ) -> Shaped[np.ndarray, "*lead row col"]:
        """Lay one value for each token of `image` out as the picture.

        Args:
            part: of several, the one to show: its tiles, put together, or its thumbnail.

        Raises:
            GeometryError: another number of values, or a thumbnail where there is none.
        """
        return self.image_grid(image).to_image(values, part)[..., 0, :, :]

    @cached_property
    @torch.inference_mode(False)
    def positions(self) -> TokenGroups:
        """Positions of the image, question, assistant header, final and generated tokens, row by row."""
        spec = self.spec
        rows = [
            prompt_groups(
                self.tokens[row].tolist(),
                self.first[row],
                self.stop[row],
                self.n_generated[row],
                [v for v in self.visuals if v.row == row],
                spec.turns,
                frozenset({spec.vision_end_token_id, *spec.placeholder_ids}),
                frozenset({spec.vision_start_token_id} - {None}),
                spec.encode,
            )
            for row in range(len(self))
        ]
        return TokenGroups(**{name: tuple(torch.tensor(r[name], dtype=torch.long) for r in rows) for name in rows[0]})

    # ---------------------------------------------------------------- new inputs from these

    def append(self, answer: Answer) -> "VLMInputs":
        """Continue the rows by `answer`: one text or list of token ids for all rows, or one per row.

        Existing positions stay where they are; shorter rows are padded at the end.

        Raises:
            InputError: an answer holds image placeholders, or there are neither one nor as many answers as rows.
        """
        return append_answer(self, answer)

    def with_image(self, i: int, image: Any) -> "VLMInputs":
        """The same prompt with another picture as image `i` (its number of tokens may change)."""
        return replace_image(self, i, image)

    def with_image_features(self, features: Float[Tensor, "token *feature d_model"] | None) -> "VLMInputs":
        """The same inputs with their images already encoded (`model.encode_images`), or None to encode again.

        Raises:
            InputError: not the features of these tokens: [token, d_model], with DeepStack [token, feature, d_model].
        """
        vision = self.spec.vision
        inner = () if vision is None or not vision.deepstack_layers else (1 + len(vision.deepstack_layers),)
        expected = (len(self.feature_slots), *inner, 0 if vision is None else vision.d_out)
        if features is not None and tuple(features.shape) != expected:
            places = f", at each of {inner[0]} places where they enter the stream" if inner else ""
            wanted = f"a vector of {expected[-1]} numbers for each of {expected[0]} image tokens{places}"
            raise InputError(f"image features are {expected}, {wanted}; got {tuple(features.shape)}")
        new = copy(self)  # skips the checks of __post_init__: no other field depends on the features
        object.__setattr__(new, "image_features", features)
        if features is None:
            new._check_pixels()
        return new

    @staticmethod
    def concat(batches: "Sequence[VLMInputs]") -> "VLMInputs":
        """Join several inputs into one batch, padded on the left to the longest row."""
        if not batches:
            raise InputError("nothing to concatenate")
        with_features = [b.image_features is not None for b in batches if b.visuals]
        if any(with_features) and not all(with_features):
            raise InputError("some of these inputs have encoded images and some have not: encode all or none")
        parts = [part for b in batches for part in rows_of(b)]
        return VLMInputs(**join(parts, batches[0].spec))

    def _take_rows(self, rows: list[int]) -> "VLMInputs":
        parts = rows_of(self)
        return VLMInputs(**join([parts[r] for r in rows], self.spec))
