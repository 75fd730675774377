"""Tiles, squares and frames of LLaVA-NeXT and LLaVA-OneVision, bit for bit those of `transformers`' Pillow processors;
layouts against a literal computation, every step of which moves the logits."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_anyres import (
    BATCHES,
    LARGE,
    NEXT,
    NEXT_PROCESSOR,
    ONEVISION,
    ONEVISION_PROCESSOR,
    OV_PINPOINTS,
    PINPOINTS,
    SIDE,
    WIDE,
    n_tokens,
    next_batch,
    pairs,
    tiny_next,
    tiny_onevision,
)
from tiny_llava import picture
from torch.nn import functional as F
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from hooked_vlm.converters import KNOWN_MODELS
from hooked_vlm.errors import GeometryError
from hooked_vlm.inputs.anyres import AnyresProcessor, best_pinpoint
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.onevision import OneVisionProcessor
from hooked_vlm.inputs.stitched import bilinear, stitched_layout

SIZES = [
    (29, 30), (42, 21), (21, 42), (42, 42), (63, 21), (1, 1), (3, 2), (300, 8), (8, 300), (101, 60), (60, 101),
    (43, 41), (22, 64), (64, 22), (333, 211), (1, 90), (90, 1), (23, 23), (69, 69), (70, 62),
]  # fmt: skip
"""Tiny, very wide, very tall, the pinpoints themselves, margins of odd and even width."""


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs"), [(NEXT, NEXT_PROCESSOR), (ONEVISION, ONEVISION_PROCESSOR)], ids=["next", "ov"]
)
def test_pixels_equal_those_of_transformers(ours: AnyresProcessor, theirs: Any, size: tuple[int, int]) -> None:
    image = picture(*size)
    expected = theirs([image], return_tensors="pt")
    pixels, grids, (layout,) = ours([image])
    assert torch.equal(pixels, expected["pixel_values"][0]) and pixels.dtype == torch.float32
    assert expected["image_sizes"].tolist() == [[size[1], size[0]]]
    assert tuple(grids[0].tolist()) == layout.grid == (len(pixels), 3, 3) and layout.image_size == size


@pytest.mark.parametrize("size", [(1024, 768), (29, 30), (500, 1777)], ids=str)
def test_pixels_of_the_published_sizes_equal_those_of_transformers(size: tuple[int, int]) -> None:
    image = picture(*size)
    known = {name: KNOWN_MODELS[f"llava-hf/{name}"].config["image_grid_pinpoints"] for name in PUBLISHED}
    for name, theirs in PUBLISHED.items():
        kind = OneVisionProcessor if "onevision" in name else AnyresProcessor
        side = 384 if "onevision" in name else 336
        ours = kind(pairs(known[name]), side=side)
        assert torch.equal(ours([image])[0], theirs([image], return_tensors="pt")["pixel_values"][0])


PUBLISHED: dict[str, Any] = {
    "llava-v1.6-mistral-7b-hf": LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    ),
    "llava-onevision-qwen2-7b-ov-hf": LlavaOnevisionImageProcessorPil(),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_several_images_are_padded_to_squares_as_by_transformers(size: tuple[int, int]) -> None:
    images = [picture(*size), picture(31, 47)]
    both: Any = [images]
    theirs: Any = ONEVISION_PROCESSOR(both, return_tensors="pt")
    pixels, grids, layouts = ONEVISION.among(2)(images)
    assert torch.equal(pixels, theirs["pixel_values"].flatten(0, 1)) and theirs["batch_num_images"].tolist() == [2]
    assert grids.tolist() == [[1, 3, 3]] * 2 and [layout.n_tokens for layout in layouts] == [10, 10]
    assert ONEVISION.among(1) is ONEVISION and NEXT.among(2) is NEXT


@given(st.integers(1, 200), st.integers(1, 200))
def test_the_pinpoint_is_the_one_of_transformers(width: int, height: int) -> None:
    for pinpoints in (PINPOINTS, OV_PINPOINTS):
        assert best_pinpoint((width, height), pairs(pinpoints)) == select_best_resolution((height, width), pinpoints)


# ---------------------------------------------------------------- layouts


def literal(processor: AnyresProcessor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed as the reference packs: the first tile's outputs and a grid that is cut, resampled and given line breaks.

    Outputs are one-hot, a line break is nothing: row t holds how much of each output is in token t. And the boxes of
    the outputs, [output, (x0, y0, x1, y1)].
    """
    (width, height), side, n = size, processor.side, processor.side // processor.patch_size
    high, wide = select_best_resolution((height, width), [list(own) for own in processor.pinpoints])
    rows, cols = high // side, wide // side
    outputs = torch.eye((1 + rows * cols) * n * n, dtype=torch.float64)
    grid = outputs[n * n :].view(rows, cols, n, n, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    hf = tiny_next()
    unpad = type(hf.model).pack_image_features.__globals__["unpad_image"]
    grid = unpad(grid, (height, width))
    if processor.max_grid is not None:
        ratio = (grid.shape[1] * grid.shape[2] / (processor.max_grid * n * n)) ** 0.5
        if ratio > 1.1:
            new = [int(grid.shape[1] // ratio), int(grid.shape[2] // ratio)]
            grid = F.interpolate(grid[None], new, mode="bilinear")[0]
    grid = torch.cat((grid, torch.zeros(*grid.shape[:2], 1, dtype=torch.float64)), -1).flatten(1).T
    new_width, new_height = (
        (wide, min(math.ceil(height * (wide / width)), high)) if wide / width < high / height
        else (min(math.ceil(width * (high / height)), wide), high)
    )  # fmt: skip
    left, top = (wide - new_width) // 2, (high - new_height) // 2
    boxes = []
    for tile in range(1 + rows * cols):
        for row in range(n):
            for col in range(n):
                x, y, p = col * processor.patch_size, row * processor.patch_size, processor.patch_size
                if tile == 0:
                    boxes.append([x * width / side, y * height / side, (x + p) * width / side, (y + p) * height / side])
                    continue
                x += (tile - 1) % cols * side - left
                y += (tile - 1) // cols * side - top
                across, down = width / new_width, height / new_height
                boxes.append([x * across, y * down, (x + p) * across, (y + p) * down])
    return torch.cat((outputs[: n * n], grid)), torch.tensor(boxes, dtype=torch.float64)


def matrix(layout: ImageLayout) -> torch.Tensor:
    """How much of each output is in each token."""
    features = layout.features
    assert features is not None
    features = features.reshape(layout.n_tokens, -1)
    shares = np.ones(features.shape) if layout.shares is None else layout.shares
    found = torch.zeros(layout.n_tokens, layout.n_patches + 1, dtype=torch.float64)
    for at in range(features.shape[1]):
        found[torch.arange(layout.n_tokens), torch.from_numpy(features[:, at])] += torch.from_numpy(shares[:, at])
    return found[:, :-1]  # the last is the line break's, -1


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([NEXT, ONEVISION]))
def test_tokens_and_boxes_are_those_of_a_literal_computation(
    width: int, height: int, processor: AnyresProcessor
) -> None:
    layout = processor.layout((width, height))
    expected, boxes = literal(processor, (width, height))
    torch.testing.assert_close(matrix(layout), expected, atol=1e-9, rtol=0)
    for token, weights in enumerate(expected):
        own = boxes[weights > 1e-9]
        if not len(own):
            assert layout.box_of(token) is None and layout.tile_of(token) == -1
            continue
        union = [*own[:, :2].amin(0).tolist(), *own[:, 2:].amax(0).tolist()]
        assert layout.box_of(token) == pytest.approx(union, abs=1e-6)
        assert layout.tile_of(token) == int(weights.argmax()) // 9
        assert layout.part_of(token) == ("thumbnail" if token < 9 else "tiles")
    assert np.allclose(layout.patches.boxes, boxes.numpy())
    assert layout.n_tokens == n_tokens(tiny_next() if processor is NEXT else tiny_onevision(), (width, height))


def test_parts_of_one_place_are_both_found_and_pixels_of_no_patch_in_none() -> None:
    layout = NEXT.layout((42, 42))  # fills its pinpoint
    assert layout.tokens_in_box((0, 0, 7, 7)) == [0, 9]
    assert layout.tokens_in_box((0, 0, 7, 7), part="thumbnail") == [0]
    layout = ONEVISION.layout((46, 46))  # 2 x 2 tiles of 23 pixels, of which 21 are in patches
    with pytest.raises(GeometryError, match="does not see"):
        layout.tokens_in_box((45.5, 45.5, 46, 46))
    assert layout.tokens_in_box((21, 0, 23, 5), part="tiles") == []


def test_a_picture_too_narrow_for_a_row_is_in_the_first_tile_alone() -> None:
    layout = stitched_layout((1, 200), (84, 28), 28, 7)  # no column is left, but the line breaks of 12 rows
    assert layout.n_tokens == 16 + 12 and [part.name for part in layout.parts] == ["thumbnail"]
    assert layout.grid == (4, 4, 4) and layout.tokens_in_box((0, 0, 1, 10)) == [0, 1, 2, 3]
    assert stitched_layout((200, 1), (28, 84), 28, 7).n_tokens == 16


def test_bilinear_shares_are_those_of_interpolation() -> None:
    for n, n_out in ((27, 14), (162, 81), (100, 77), (5, 3), (3, 2), (4, 4)):
        cells = torch.randn(1, 1, n, dtype=torch.float64)
        sources, shares = bilinear(n, n_out)
        ours = (cells[0, 0].numpy()[sources] * shares).sum(1)
        theirs = F.interpolate(cells, size=n_out, mode="linear")[0, 0].numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_a_token_shows_the_pixels_of_its_box() -> None:
    """A picture of large coloured squares: wherever a token lies inside of one, its patch has that colour."""
    colours = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    image = Image.fromarray(colours.repeat(30, axis=0).repeat(30, axis=1))
    processor = AnyresProcessor(pairs(PINPOINTS), side=SIDE, patch_size=3)
    pixels, _, (layout,) = processor([image])
    seen = processor.patch_colours(pixels.numpy()).mean((2, 3)) * np.array(processor.image_std)
    seen = (seen + np.array(processor.image_mean)) * 255
    features, checked = layout.features, 0
    assert features is not None
    for token in np.flatnonzero(features >= 0).tolist():
        x0, y0, x1, y1 = layout.boxes[token].tolist()
        inside = x0 // 30 == (x1 - 1e-9) // 30 and y0 // 30 == (y1 - 1e-9) // 30
        margins = (x0 % 30, y0 % 30, 30 - (x1 - 1e-9) % 30, 30 - (y1 - 1e-9) % 30)
        if inside and min(x0, y0) >= 0 and min(margins) > 3:  # bicubic filters reach beyond an edge
            checked += 1
            assert np.abs(seen[features[token]] - colours[int(y0 // 30), int(x0 // 30)]).max() < 12
    assert checked > 10


def rearranged(layout: ImageLayout, step: str) -> ImageLayout:
    """The layout without one step of the arrangement, and as many tokens."""
    features, shares = layout.features, layout.shares
    assert features is not None
    if step == "resampling":
        assert shares is not None
        return replace(layout, features=features[:, 0], shares=None)
    if step == "stitching":  # the tiles' outputs as the tower makes them
        in_order = features.copy()
        in_order[features >= 0] = np.sort(features[features >= 0])
        return replace(layout, features=in_order)
    if step == "the first tile first":
        return replace(layout, features=np.roll(features, -9))
    margin = features.copy()  # "the middle": the outputs of another row
    rows = features[9:].reshape(len(layout.parts[0].rows), -1)
    margin[9:] = np.roll(rows, 1, axis=0).ravel()
    return replace(layout, features=margin)


@pytest.mark.parametrize(
    ("name", "size", "step"),
    [
        ("llava-next", WIDE, "stitching"),
        ("llava-next", WIDE, "the first tile first"),
        ("llava-next", WIDE, "the middle"),
        ("llava-onevision", LARGE, "resampling"),
    ],
)
@torch.no_grad()
def test_every_step_of_the_arrangement_moves_the_logits(name: str, size: tuple[int, int], step: str) -> None:
    model = tiny_model(name)
    inputs = model.inputs_from_hf(BATCHES[name]([[5, ("image", size), 6, 7]]))
    other = replace(inputs, image_layouts=(rearranged(inputs.image_grid(0), step),))
    assert (model(other) - model(inputs))[0, -1].abs().max() > 1e-3


@torch.no_grad()
def test_a_plain_gather_equals_the_mix_of_single_outputs() -> None:
    model = tiny_model("llava-next")
    inputs = model.inputs_from_hf(next_batch([[5, ("image", WIDE), 6, 7]]))
    layout = inputs.image_grid(0)
    features = np.stack((layout.features, layout.features), axis=1)
    shares = np.tile((0.25, 0.75), (layout.n_tokens, 1))
    mixed = replace(inputs, image_layouts=(replace(layout, features=features, shares=shares),))
    torch.testing.assert_close(model.encode_images(mixed), model.encode_images(inputs), atol=1e-6, rtol=0)


def test_shares_need_as_many_features() -> None:
    layout = NEXT.layout(WIDE)
    with pytest.raises(GeometryError, match="as many features"):
        replace(layout, shares=np.ones((layout.n_tokens, 2)))
