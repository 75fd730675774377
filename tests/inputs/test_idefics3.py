"""Tiles of Idefics3 and SmolVLM, bit for bit those of `transformers`' two Pillow processors; layouts against a literal
computation and a coloured picture; batches of `transformers`."""

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
from tiny_idefics3 import IMAGE, LONGEST, MARK, OF_TRANSFORMERS, OURS, SETTINGS, SIDE, around_tiles, hf_batch
from tiny_llava import picture

from hooked_vlm.errors import GeometryError, ImageError, InputError
from hooked_vlm.inputs.idefics3 import Idefics3Processor, enlarged, whole_tiles
from hooked_vlm.inputs.image_settings import PROCESSOR
from hooked_vlm.inputs.picture_processor import Bounds

SIZES = [
    (1, 1), (2, 3), (34, 34), (34, 33), (68, 34), (34, 69), (100, 100), (100, 99), (101, 100), (300, 8), (8, 300),
    (1, 4000), (4000, 1), (63, 64), (333, 211), (97, 33), (33, 97), (67, 100), (35, 102),
]  # fmt: skip
"""Smaller than a tile, a tile, multiples of it, odd and even edges, very wide and very tall."""


def of_transformers(name: str, **settings: Any) -> Any:
    return OF_TRANSFORMERS[name](**{**SETTINGS, **settings})


@pytest.mark.parametrize("splits", [True, False], ids=["tiles", "one tile"])
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_equal_those_of_transformers(size: tuple[int, int], name: str, splits: bool) -> None:
    image = picture(*size)
    theirs = of_transformers(name, do_image_splitting=splits)
    expected = theirs([[image]], return_tensors="pt", return_row_col_info=True)
    pixels, grids, (layout,) = replace(OURS, splits=splits)([image])
    assert torch.equal(pixels, expected["pixel_values"][0]) and pixels.dtype == torch.float32
    assert tuple(grids[0].tolist()) == layout.grid == (len(pixels), 4, 4) and layout.image_size == size
    rows, cols = expected["rows"][0][0], expected["cols"][0][0]
    assert layout.layout == ((cols, rows) if rows else (1, 1)) and layout.thumbnail == (rows > 0)


@pytest.mark.parametrize("longest", [33, 34, 35, 68, 150])
def test_every_longest_edge_gives_the_tiles_of_transformers(longest: int) -> None:
    theirs: Any = of_transformers("idefics3", size={"longest_edge": longest})
    for size in SIZES:
        image = picture(*size)
        ours = replace(OURS, longest_edge=longest)([image])[0]
        assert torch.equal(ours, theirs([[image]], return_tensors="pt")["pixel_values"][0])


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 2000))
def test_rounding_of_sizes_is_that_of_transformers(width: int, height: int, longest: int, side: int) -> None:
    module = __import__(OF_TRANSFORMERS["idefics3"].__module__, fromlist=["get_resize_output_image_size"])
    shape = np.broadcast_to(np.uint8(0), (3, height, width))
    assert enlarged((width, height), longest) == module.get_resize_output_image_size(shape, longest)[::-1]
    asked: list[Any] = []
    theirs: Any = of_transformers("idefics3")
    theirs.resize = lambda image, size, resample: asked.append((size.width, size.height))
    theirs.resize_for_vision_encoder(shape, side)
    assert [whole_tiles((width, height), side)] == asked


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA"])
def test_pictures_of_every_mode_become_the_pixels_of_transformers(mode: str) -> None:
    image = picture(70, 50).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(np.arange(3500, dtype=np.uint32).reshape(50, 70).astype(np.uint8)))
    expected: Any = of_transformers("smolvlm")([[image]], return_tensors="pt")
    assert torch.equal(OURS([image])[0], expected["pixel_values"][0])


def test_floats_are_the_8_bit_levels_that_they_stand_for() -> None:
    levels = np.asarray(picture(70, 50))
    assert torch.equal(OURS([levels.astype(np.float32) / 255])[0], OURS([levels])[0])


@pytest.mark.parametrize(
    ("longest", "side", "patch", "merge", "n"),
    [(1456, 364, 14, 2, 169), (1536, 384, 14, 3, 81), (2048, 512, 16, 4, 64)],
)
def test_published_settings_give_the_tiles_and_tokens_of_transformers(
    longest: int, side: int, patch: int, merge: int, n: int
) -> None:
    ours = Idefics3Processor(side=side, patch_size=patch, merge_size=merge, longest_edge=longest)
    theirs: Any = of_transformers("idefics3", size={"longest_edge": longest}, max_image_size={"longest_edge": side})
    image = picture(300, 200)
    pixels, _, (layout,) = ours([image])
    assert torch.equal(pixels, theirs([[image]], return_tensors="pt")["pixel_values"][0])
    assert layout.runs == (n,) * 13 and layout.layout == (4, 3)


# ---------------------------------------------------------------- layouts


@given(st.integers(1, 300), st.integers(1, 300))
def test_boxes_are_those_of_a_literal_computation(width: int, height: int) -> None:
    layout = OURS.layout((width, height))
    cols, rows = layout.layout
    boxes, n = [], 2
    for tile in range(layout.n_tiles):
        whole = tile == cols * rows
        left, top = (0, 0) if whole else (tile % cols * SIDE, tile // cols * SIDE)
        across, down = (width / SIDE, height / SIDE) if whole else (width / (cols * SIDE), height / (rows * SIDE))
        for row in range(n):
            for col in range(n):
                x, y = left + 16 * col, top + 16 * row
                boxes.append([x * across, y * down, (x + 16) * across, (y + 16) * down])
    assert np.allclose(layout.boxes, boxes) and len(boxes) == layout.n_tokens
    assert [layout.tile_of(token) for token in range(layout.n_tokens)] == [t // 4 for t in range(layout.n_tokens)]
    assert layout.part_of(layout.n_tokens - 1) == ("thumbnail" if layout.n_tiles > 1 else "tiles")


def test_tiles_and_the_whole_picture_cover_the_same_place_and_a_rest_of_pixels_is_in_none() -> None:
    layout = OURS.layout((102, 68))  # 3 x 2 tiles
    assert layout.layout == (3, 2) and layout.runs == (4,) * 7
    tokens = layout.tokens_in_box((34, 34, 35, 35))
    assert [layout.part_of(token) for token in tokens] == ["tiles", "thumbnail"] and layout.tile_of(tokens[0]) == 4
    assert layout.tokens_in_box((32.5, 0, 33.5, 5), part="tiles") == []  # of 34 pixels of a tile 32 are in patches
    assert layout.tokens_in_box((32.5, 0, 33.5, 5)) == [24]
    with pytest.raises(GeometryError, match="does not see"):
        layout.tokens_in_box((101, 67, 102, 68))
    shown = layout.to_image(np.arange(28), "thumbnail")
    assert shown.tolist() == [[[24, 25], [26, 27]]] and layout.to_image(np.arange(28)).shape == (1, 4, 6)


def test_a_token_shows_the_pixels_of_its_box() -> None:
    """A picture of large coloured squares: wherever a token lies inside of one, its patches have that colour."""
    colours = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    image = Image.fromarray(colours.repeat(31, axis=0).repeat(29, axis=1))
    processor = replace(OURS, side=68, patch_size=4, longest_edge=3 * 68)
    pixels, _, (layout,) = processor([image])
    seen = (processor.patch_colours(pixels.numpy()).mean((2, 3)) * 0.5 + 0.5) * 255
    order, checked = layout.tower_order.ravel(), {"tiles": 0, "thumbnail": 0}
    for place, patch in enumerate(order.tolist()):
        x0, y0, x1, y1 = layout.patches.boxes[patch].tolist()
        inside = x0 // 29 == (x1 - 1e-9) // 29 and y0 // 31 == (y1 - 1e-9) // 31
        margins = (x0 % 29, y0 % 31, 29 - (x1 - 1e-9) % 29, 31 - (y1 - 1e-9) % 31)
        reach = 3 * max(x1 - x0, y1 - y0) / 4 + 1  # of Lanczos' filter, twice over
        if inside and min(margins) > reach:
            checked[str(layout.patches.part_of(patch))] += 1
            assert np.abs(seen[place] - colours[int(y0 // 31), int(x0 // 29)]).max() < 12
    assert checked["tiles"] > 100 and checked["thumbnail"] > 3


# ---------------------------------------------------------------- batches of transformers


def test_tiles_of_zeros_are_dropped_and_images_of_a_row_told_apart() -> None:
    model = tiny_model("idefics3")
    batch = hf_batch([[5, ("image", (2, 2)), ("image", (1, 1)), 7], [("image", (3, 1)), 8]])
    inputs = model.inputs_from_hf(batch)
    assert batch["pixel_values"].shape[:2] == (2, 6) and inputs.grids == ((5, 4, 4), (1, 4, 4), (4, 4, 4))
    assert torch.equal(inputs.pixel_values, torch.cat((batch["pixel_values"][0], batch["pixel_values"][1, :4])))
    assert [len(visual.runs) for visual in inputs.visuals] == [5, 1, 4]
    layouts = [inputs.image_grid(i) for i in range(3)]
    assert [layout.layout for layout in layouts] == [(2, 2), (1, 1), (3, 1)]
    assert layouts[0].box_of(6) == (34, 16, 50, 32) and inputs.image_sizes is None  # in the pixels of its tiles
    with_text = {**batch, "input_ids": torch.cat((batch["input_ids"], torch.full_like(batch["input_ids"][:1], 9)))}
    with_text["attention_mask"] = torch.cat((batch["attention_mask"], torch.ones_like(batch["attention_mask"][:1])))
    rows = torch.cat((batch["pixel_values"], torch.zeros_like(batch["pixel_values"][:1])))
    padded = model.inputs_from_hf({**with_text, "pixel_values": rows, "pixel_attention_mask": None})
    assert torch.equal(padded.pixel_values, inputs.pixel_values)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"pixel_values": torch.ones(1, 3, 3, SIDE, SIDE), "pixel_attention_mask": None},
            r"\[3\] tiles .* those of \[4\] tiles",
        ),
        ({"pixel_values": torch.ones(4, 3, SIDE, SIDE)}, r"must be \[row, tile, 3, 34, 34\]"),
        ({"pixel_attention_mask": torch.zeros(1, 4, SIDE, SIDE)}, "hides pixels"),
        ({"input_ids": torch.tensor([[MARK, 5, *[IMAGE] * 15, MARK]])}, "4 placeholders, but a run of them has 15"),
    ],
)
def test_batches_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    batch = {**hf_batch([[5, ("image", (3, 1))]]), **changes}
    if "input_ids" in changes:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(InputError, match=says):
        tiny_model("idefics3").inputs_from_hf(batch)


def test_a_size_that_gives_other_tiles_is_refused() -> None:
    assert OURS.layout_of((4, 4, 4), (90, 30)).layout == (3, 1)
    with pytest.raises(InputError, match="makes 4 of it"):
        OURS.layout_of((5, 4, 4), (90, 30))
    with pytest.raises(InputError, match="4 x 4 patches"):
        OURS.layout_of((1, 2, 2))
    assert OURS.layout_of((1, 4, 4)).box_of(3) == (16, 16, 32, 32)
    with pytest.raises(GeometryError, match="follows from its size"):
        _ = OURS.layout_of((5, 4, 4)).boxes


def test_tiles_that_are_in_no_grid_have_no_known_place() -> None:
    tile = [MARK, 180, *[IMAGE] * 4]
    tokens = torch.tensor([[5, *tile, *tile, 9, *tile, 9, *tile, MARK]])  # rows of two tiles, of one, and another
    inputs = tiny_model("idefics3").inputs_from_hf({"input_ids": tokens, "pixel_values": torch.ones(1, 4, 3, 34, 34)})
    assert not inputs.image_grid(0).parts and inputs.image_grid(0).runs == (4,) * 4


@torch.no_grad()
def test_the_order_of_tiles_moves_the_logits() -> None:
    model = tiny_model("idefics3")
    inputs = model.inputs_from_hf(hf_batch([[5, ("image", (2, 1)), 6, 7]]))
    other = replace(inputs, pixel_values=inputs.pixel_values.roll(1, 0))
    assert (model(other) - model(inputs))[0, -1].abs().max() > 1e-3
    assert around_tiles((2, 1)).count(IMAGE) == inputs.image_grid(0).n_tokens == 12


# ---------------------------------------------------------------- bounds and settings


@pytest.mark.parametrize("most", range(1, 17))
def test_a_bound_on_tiles_takes_the_longest_edge_that_keeps_it(most: int) -> None:
    free = replace(OURS, longest_edge=4 * SIDE)
    bounded: Any = free.with_bounds(Bounds(max_tiles=most))
    for size in SIZES:
        tiles = math.prod(bounded.tiling(size))
        fewer = [math.prod(replace(free, longest_edge=edge * SIDE).tiling(size)) for edge in range(1, 5)]
        assert tiles == max(n for n in fewer if n <= most)
        assert len(bounded([picture(*size)])[0]) == tiles + (tiles > 1)
    assert bounded.tile_counts[0] == max(n for n in (1, 4, 9, 16) if n <= most)


def test_settings_are_read_and_written() -> None:
    files = replace(OURS, splits=False, image_mean=(0.1, 0.2, 0.3)).to_files()
    read = Idefics3Processor.from_dict(files["preprocessor_config.json"], side=SIDE, patch_size=8, merge_size=2)
    assert read == replace(OURS, splits=False, image_mean=(0.1, 0.2, 0.3))
    assert files[PROCESSOR]["image_seq_len"] == 4
    silent = Idefics3Processor.from_dict({}, side=364, patch_size=14, merge_size=2)
    assert silent.longest_edge == 1456 and silent.splits and silent.image_std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_image_size": {"longest_edge": 35}}, "max_image_size must be the vision tower's image_size of 34"),
        ({"size": {"height": 68, "width": 68}}, "expected size as"),
        ({"size": 100}, "expected size as"),
        ({"size": {"longest_edge": "100"}}, "size.longest_edge must be a whole number"),
        ({"do_image_splitting": "yes"}, "do_image_splitting must be true or false"),
        ({"do_resize": False}, "do_resize"),
        ({"resample": 3}, "resample = 1"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"image_std": [0.5]}, "image_std"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(changes: dict[str, Any], says: str) -> None:
    config = {"size": {"longest_edge": LONGEST}, "max_image_size": {"longest_edge": SIDE}, **changes}
    with pytest.raises(ImageError, match=says):
        Idefics3Processor.from_dict(config, side=SIDE, patch_size=8, merge_size=2)
