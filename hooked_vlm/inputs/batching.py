"""Taking a batch of inputs apart into rows, each with its images, and joining rows to a batch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.token_layout import InputSpec, Kind


@dataclass(frozen=True, eq=False)
class ImageSlice:
    """One image or video cut out of a batch."""

    kind: Kind
    grid_thw: Tensor
    pixels: Tensor | None
    size: tuple[int, int] | None
    features: Tensor | None


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt with its images and videos."""

    tokens: Tensor
    mask: Tensor
    n_generated: int
    pieces: list[ImageSlice]


def rows_of(inputs: Any) -> list[Row]:
    """The rows of `VLMInputs`."""
    pieces = _pieces(inputs)
    return [
        Row(
            inputs.tokens[r],
            inputs.attention_mask[r],
            inputs.n_generated[r],
            [pieces[v.kind, v.index] for v in inputs.visuals if v.row == r],
        )
        for r in range(len(inputs))
    ]


def _pieces(inputs: Any) -> dict[tuple[str, int], ImageSlice]:
    pieces = {}
    feature_start = 0
    patch_start = {"image": 0, "video": 0}
    pixels = {"image": inputs.pixel_values, "video": inputs.pixel_values_videos}
    grids = {"image": inputs.image_grid_thw, "video": inputs.video_grid_thw}
    for v in inputs.in_feature_order:
        a, b = patch_start[v.kind], patch_start[v.kind] + inputs.spec.n_pixel_rows(v.grid)
        own, all_grids, features = pixels[v.kind], grids[v.kind], inputs.image_features
        assert all_grids is not None
        pieces[v.kind, v.index] = ImageSlice(
            v.kind,
            all_grids[v.index],
            None if own is None else own[a:b],
            inputs.image_sizes[v.index] if v.kind == "image" and inputs.image_sizes is not None else None,
            None if features is None else features[feature_start : feature_start + v.n_tokens],
        )
        patch_start[v.kind] = b
        feature_start += v.n_tokens
    return pieces


def join(rows: list[Row], spec: InputSpec) -> dict[str, Any]:
    """What rows make together, padded on the left to the longest: the arguments of `VLMInputs`.

    Raises:
        InputError: no rows, or images whose pixels cannot share a tensor.
    """
    if not rows:
        raise InputError("no rows are left: a batch needs at least one")
    tokens, mask = left_pad([r.tokens for r in rows], [r.mask for r in rows], spec.pad_token_id)
    pieces = [p for r in rows for p in r.pieces]
    images = [p for p in pieces if p.kind == "image"]
    videos = [p for p in pieces if p.kind == "video"]
    sizes = tuple(p.size for p in images if p.size is not None)
    features = [p.features for p in (*images, *videos) if p.features is not None]
    return {
        "tokens": tokens,
        "spec": spec,
        "attention_mask": mask,
        "pixel_values": _cat([p.pixels for p in images]),
        "image_grid_thw": torch.stack([p.grid_thw for p in images]) if images else None,
        "pixel_values_videos": _cat([p.pixels for p in videos]),
        "video_grid_thw": torch.stack([p.grid_thw for p in videos]) if videos else None,
        "image_sizes": sizes if images and len(sizes) == len(images) else None,
        "image_features": torch.cat(features) if features else None,
        "n_generated": tuple(r.n_generated for r in rows),
    }


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    if len(shapes := {tuple(t.shape[1:]) for t in present}) > 1:
        raise InputError(f"images whose pixels have different sizes {sorted(shapes)} cannot share a batch")
    return torch.cat(present) if present else None


def left_pad(rows: list[Tensor], masks: list[Tensor], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids [pos] and their masks as [batch, pos] of the longest."""
    width = max(len(row) for row in rows)
    tokens = rows[0].new_full((len(rows), width), pad_token_id)
    mask = masks[0].new_zeros(len(rows), width)
    for r, (row, row_mask) in enumerate(zip(rows, masks, strict=True)):
        tokens[r, width - len(row) :] = row
        mask[r, width - len(row) :] = row_mask
    return tokens, mask
