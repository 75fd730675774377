"""Tiles, squares and frames of LLaVA-NeXT and LLaVA-OneVision, bit for bit those of `transformers`' Pillow processors;
layouts against a literal computation; batches and settings that do not fit."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from families import KINDS, own_copy, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_anyres import (
    IMAGE,
    LARGE,
    MOST,
    NEXT_PROCESSOR,
    ONEVISION_PROCESSOR,
    OV_PINPOINTS,
    OV_SIDE,
    PINPOINTS,
    SIDE,
    TALL,
    WIDE,
    n_tokens,
    next_batch,
    onevision_batch,
    tiny_next,
    tiny_onevision,
)
from tiny_llava import picture
from torch.nn import functional as F
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from hooked_vlm.converters import KNOWN_MODELS
from hooked_vlm.errors import CheckpointError, GeometryError, ImageError, InputError
from hooked_vlm.inputs.anyres import AnyresProcessor, best_pinpoint
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.image_settings import Settings
from hooked_vlm.inputs.onevision import OneVisionProcessor
from hooked_vlm.inputs.picture_processor import Bounds
from hooked_vlm.inputs.stitched import bilinear, stitched_layout


def pairs(pinpoints: list[list[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((high, wide) for high, wide in pinpoints)


NEXT = AnyresProcessor(pairs(PINPOINTS), side=SIDE, patch_size=7)
ONEVISION = OneVisionProcessor(
    pairs(OV_PINPOINTS),
    side=OV_SIDE,
    patch_size=7,
    max_grid=MOST,
    image_mean=(0.5, 0.4, 0.3),
    image_std=(0.5, 0.6, 0.7),
)
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
    theirs: Any = ONEVISION_PROCESSOR([images], return_tensors="pt")
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


# ---------------------------------------------------------------- Hugging Face batches

BATCHES = {"llava-next": next_batch, "llava-onevision": onevision_batch}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_of_the_processor_is_read_as_pictures_are_prepared(name: str) -> None:
    """Sizes are (height, width) there; tiles that pad a batch are left out."""
    processor, theirs = (NEXT, NEXT_PROCESSOR) if name == "llava-next" else (ONEVISION, ONEVISION_PROCESSOR)
    images = [picture(*WIDE), picture(*TALL)]
    prepared: Any = theirs(images, return_tensors="pt")
    hf = KINDS[name].hf()
    ids = [[5, *[IMAGE] * n_tokens(hf, image.size), 7] for image in images]
    width = max(map(len, ids))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    model = tiny_model(name)
    inputs = model.inputs_from_hf({**prepared, "input_ids": tokens, "attention_mask": (tokens > 0).long()})
    pixels, grids, layouts = processor(images)
    assert torch.equal(inputs.pixel_values, pixels) and torch.equal(inputs.image_grid_thw, grids)
    assert inputs.image_sizes == (WIDE, TALL)
    assert [layout.same_as(own) for layout, own in zip(inputs.image_layouts, layouts, strict=True)] == [True, True]


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_do_not_fit_say_what_was_expected(name: str) -> None:
    model, batch = tiny_model(name), BATCHES[name]([[5, ("image", LARGE), 6]])
    for changes, says in (
        ({"image_sizes": None}, "image_sizes must be whole numbers"),
        ({"image_sizes": torch.tensor([[0, 5]])}, "image_sizes must be whole numbers"),
        ({"image_sizes": torch.tensor([[5.0, 5.0]])}, "image_sizes must be whole numbers"),
        ({"image_sizes": torch.tensor([[30, 300]])}, r"\(height, width\) \[\(30, 300\)\] have \[4\] tiles"),
        ({"image_sizes": batch["image_sizes"].repeat(2, 1)}, "both must be those|batch_num_images must be"),
        ({"pixel_values": batch["pixel_values"][:, :2]}, "pixel_values are"),
        ({"pixel_values": batch["pixel_values"][..., :5]}, r"must be \[image, tile, 3"),
        ({"input_ids": batch["input_ids"][:, 4:], "attention_mask": None}, "placeholders, the tokens have"),
    ):
        with pytest.raises(InputError, match=says):
            model.inputs_from_hf({**batch, **changes})
    flat = model.inputs_from_hf({**batch, "pixel_values": batch["pixel_values"].flatten(0, 1)})
    assert torch.equal(flat.pixel_values, model.inputs_from_hf(batch).pixel_values)


def test_a_batch_made_with_other_pinpoints_is_refused_by_their_name() -> None:
    other = own_copy(tiny_model("llava-next"))
    other.image_processor = AnyresProcessor(pairs(PINPOINTS[:1]), side=SIDE, patch_size=7)
    with pytest.raises(InputError, match=r"image_grid_pinpoints \[\[21, 42\]\]"):
        other.inputs_from_hf(next_batch([[5, ("image", TALL), 6]]))


def test_wrong_numbers_of_images_and_frames_are_refused() -> None:
    model = tiny_model("llava-onevision")
    batch = onevision_batch([[5, ("image", WIDE), 6, ("image", TALL), 7]])
    with pytest.raises(InputError, match="batch_num_images"):
        model.inputs_from_hf({**batch, "batch_num_images": torch.tensor([1])})
    video = onevision_batch([[5, ("video", 2), 6]])
    with pytest.raises(InputError, match="pixel_values_videos must be"):
        model.inputs_from_hf({**video, "pixel_values_videos": video["pixel_values_videos"][0]})
    with pytest.raises(InputError, match="image_sizes"):
        model.input_spec().layout_of((4, 3, 3), "image")
    with pytest.raises(InputError, match="is seen as"):
        NEXT.layout_of((2, 3, 3), WIDE)
    with pytest.raises(InputError, match="3 x 3 patches"):
        ONEVISION.layout_of((2, 4, 4), WIDE)


# ---------------------------------------------------------------- settings and bounds


def test_bounds_leave_the_pinpoints_of_fewer_tiles() -> None:
    assert NEXT.with_bounds(Bounds(max_tiles=3)).layout((42, 42)).n_tiles == 3
    assert ONEVISION.with_bounds(Bounds(max_tiles=1)).layout((90, 90)).n_tiles == 2
    with pytest.raises(ImageError, match="at least 2"):
        NEXT.with_bounds(Bounds(max_tiles=1))
    with pytest.raises(InputError, match="max_pixels"):
        NEXT.with_bounds(Bounds(max_pixels=900))
    assert NEXT.bounds_for(100) == {"max_tiles": 2} and NEXT.bounds_below(1000, 3) == {"max_tiles": 3}
    assert [own.layout((42, 42)).n_tiles for _, own in NEXT.tighter([1], [[]], 10, Bounds())] == [3, 3]


def test_settings_of_files() -> None:
    for processor, theirs in ((NEXT, LlavaNextImageProcessorPil), (ONEVISION, LlavaOnevisionImageProcessorPil)):
        files = processor.to_files()["preprocessor_config.json"]
        defaults = {"pinpoints": processor.pinpoints, "side": processor.side, "patch_size": 7}
        again = type(processor).from_dict(files, **defaults, max_grid=processor.max_grid)
        assert again == processor
        read: Any = theirs(**files)
        image = picture(50, 33)
        assert torch.equal(read([image], return_tensors="pt")["pixel_values"][0], processor([image])[0])
        for key, value in (("size", {"height": 20, "width": 20}), ("crop_size", 5)):
            with pytest.raises(ImageError, match=f"a {key} of"):
                type(processor).from_dict({**files, key: value}, **defaults)
        with pytest.raises(ImageError, match=r"must be those of config\.json"):
            type(processor).from_dict({**files, "image_grid_pinpoints": [[21, 21]]}, **defaults)
    with pytest.raises(ImageError, match="multiples of the 21 pixels"):
        AnyresProcessor(((20, 42),), side=SIDE)
    with pytest.raises(ImageError, match="got none"):
        AnyresProcessor((), side=SIDE)
    with pytest.raises(GeometryError, match="not made of tiles"):
        stitched_layout((5, 5), (20, 42), 21, 7)


def test_videos_may_have_settings_of_their_own() -> None:
    cfg = tiny_model("llava-onevision").cfg
    images = Settings({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, "preprocessor_config.json")
    other = Settings({"image_mean": [0.1] * 3, "image_std": [0.5] * 3}, "video_preprocessor_config.json")
    same, apart = (OneVisionProcessor.from_checkpoint(cfg, images, videos) for videos in (images, other))
    assert same.for_videos is None and apart.for_videos is not None
    frames = [picture(30, 20), picture(30, 20)]
    assert not torch.equal(same.video(frames)[0], apart.video(frames)[0])
    assert torch.equal(same.video(frames)[0][:1], same([frames[0]])[0][:1])  # as the first tile of an image
    files = apart.to_files()
    assert files["video_preprocessor_config.json"]["image_mean"] == [0.1] * 3
    with pytest.raises(ImageError, match="one size"):
        same.video([picture(30, 20), picture(20, 30)])
    with pytest.raises(ImageError, match="at least one frame"):
        same.video([])
    with pytest.raises(CheckpointError, match="resample"):
        OneVisionProcessor.from_checkpoint(cfg, Settings({"resample": 0}, "preprocessor_config.json"), images)
