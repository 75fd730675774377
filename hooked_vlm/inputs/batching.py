"""Splitting a batch of inputs into rows, each with its images, and joining rows into a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.picture_settings import PictureSettings
from hooked_vlm.inputs.token_layout import InputSpec, Kind

if TYPE_CHECKING:
    from hooked_vlm.inputs.vlm_inputs import VLMInputs


@dataclass(frozen=True, eq=False)
class ImageSlice:
    """One image or video cut out of a batch."""

    kind: Kind
    grid_thw: Tensor
    pixels: Tensor | None
    layout: ImageLayout
    settings: PictureSettings | None
    features: Tensor | None


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt with its images and videos."""

    tokens: Tensor
    mask: Tensor
    n_generated: int
    slices: list[ImageSlice]


def checked_counts(n_generated: Sequence[int], first: Sequence[int], stop: Sequence[int]) -> tuple[int, ...]:
    """The number of tokens appended to each row, whose tokens lie at first <= pos < stop; by default none.

    Raises:
        InputError: not one number for each row, or more than a row has tokens.
    """
    lengths = [end - begin for begin, end in zip(first, stop, strict=True)]
    counts = tuple(n_generated) or (0,) * len(lengths)
    if len(counts) != len(lengths) or any(not 0 <= n <= most for n, most in zip(counts, lengths, strict=True)):
        raise InputError(
            f"n_generated counts the tokens appended to each of {len(lengths)} rows, which have "
            f"{', '.join(map(str, lengths))} tokens; got {counts}"
        )
    return counts


def rows_of(inputs: "VLMInputs") -> list[Row]:
    """The rows of `VLMInputs`."""
    slices = _image_slices(inputs)
    return [
        Row(
            inputs.tokens[r],
            inputs.attention_mask[r],
            inputs.n_generated[r],
            [slices[v.kind, v.index] for v in inputs.visuals if v.row == r],
        )
        for r in range(len(inputs))
    ]


def _image_slices(inputs: "VLMInputs") -> dict[tuple[str, int], ImageSlice]:
    """Every image and video by its kind and number."""
    slices = {}
    feature_start = 0
    patch_start = {"image": 0, "video": 0}
    pixels = {"image": inputs.pixel_values, "video": inputs.pixel_values_videos}
    grids = {"image": inputs.image_grid_thw, "video": inputs.video_grid_thw}
    for v in inputs.in_feature_order:
        a, b = patch_start[v.kind], patch_start[v.kind] + inputs.spec.n_pixel_rows(v.grid)
        all_pixels, all_grids, features = pixels[v.kind], grids[v.kind], inputs.image_features
        assert all_grids is not None
        slices[v.kind, v.index] = ImageSlice(
            v.kind,
            all_grids[v.index],
            None if all_pixels is None else all_pixels[a:b],
            v.layout,
            inputs.image_settings[v.index] if v.kind == "image" and inputs.image_settings is not None else None,
            None if features is None else features[feature_start : feature_start + v.n_tokens],
        )
        patch_start[v.kind] = b
        feature_start += v.n_tokens
    return slices


def join(rows: list[Row], spec: InputSpec) -> dict[str, Any]:
    """Join rows, padded on the left to the longest; returns the arguments of `VLMInputs`.

    Raises:
        InputError: no rows, or images whose pixels cannot share a tensor.
    """
    if not rows:
        raise InputError("no rows are left: a batch needs at least one")
    tokens, mask = left_pad([r.tokens for r in rows], [r.mask for r in rows], spec.pad_token_id)
    images = [s for r in rows for s in r.slices if s.kind == "image"]
    videos = [s for r in rows for s in r.slices if s.kind == "video"]
    settings = tuple(s.settings or PictureSettings() for s in images)
    features = [s.features for s in (*images, *videos) if s.features is not None]
    return {
        "tokens": tokens,
        "spec": spec,
        "attention_mask": mask,
        "pixel_values": _cat([s.pixels for s in images]),
        "image_grid_thw": torch.stack([s.grid_thw for s in images]) if images else None,
        "pixel_values_videos": _cat([s.pixels for s in videos]),
        "video_grid_thw": torch.stack([s.grid_thw for s in videos]) if videos else None,
        "image_layouts": tuple(s.layout for s in images) or None,
        "video_layouts": tuple(s.layout for s in videos) or None,
        "image_settings": settings if any(s.resizes for s in settings) else None,
        "image_features": torch.cat(features) if features else None,
        "n_generated": tuple(r.n_generated for r in rows),
    }


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    if len(shapes := {tuple(t.shape[1:]) for t in present}) > 1:
        raise InputError(f"images whose pixels have different sizes {sorted(shapes)} cannot share a batch")
    return torch.cat(present) if present else None


def left_pad(rows: list[Tensor], masks: list[Tensor], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pad token ids [pos] and their masks on the left, to [batch, pos] of the longest."""
    width = max(len(row) for row in rows)
    tokens = rows[0].new_full((len(rows), width), pad_token_id)
    mask = masks[0].new_zeros(len(rows), width)
    for r, (row, row_mask) in enumerate(zip(rows, masks, strict=True)):
        tokens[r, width - len(row) :] = row
        mask[r, width - len(row) :] = row_mask
    return tokens, mask


def left_padding_mask(tokens: Int[Tensor, "batch pos"], pad_ids: list[int]) -> Int[Tensor, "batch pos"]:
    """The attention mask of rows padded on the left.

    All ones if no row, or every row, begins with padding: then the padding token is text.
    """
    padding = torch.isin(tokens, torch.tensor(pad_ids, device=tokens.device)).long().cumprod(dim=1)
    if padding[:, 0].all():
        return torch.ones_like(tokens)
    return 1 - padding * (1 - padding.amin(dim=1, keepdim=True))
