"""Cropped and padded squares against `transformers`' Pillow processor; what was cut off has no token."""

from typing import Any

import numpy as np
import pytest
import torch
from families import own_copy, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_llava import LLAVA_CASES, llava_batch, picture
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from hooked_vlm.errors import GeometryError, ImageError, InputError
from hooked_vlm.inputs.cropped import CropProcessor
from hooked_vlm.inputs.picture_processor import Bounds

SIZES = [(28, 28), (100, 60), (60, 100), (101, 60), (29, 30), (28, 500), (7, 5), (1, 1), (333, 211), (3, 2)]
TINY: dict[str, Any] = {"side": 28, "patch_size": 7}


@pytest.mark.parametrize("pad", [False, True], ids=["crop", "pad"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_equal_those_of_transformers(size: tuple[int, int], pad: bool) -> None:
    image = picture(*size)
    theirs: Any = LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_pad=pad)(
        [image], return_tensors="pt"
    )
    ours, grids, (layout,) = CropProcessor(**TINY, pad=pad)([image])
    assert torch.equal(ours, theirs["pixel_values"]) and ours.dtype == torch.float32
    assert grids.tolist() == [[1, 4, 4]] and layout.n_tokens == 16 and layout.image_size == size


@pytest.mark.parametrize("size", [(640, 480), (336, 336), (500, 777)])
def test_pixels_of_the_published_size_equal_those_of_transformers(size: tuple[int, int]) -> None:
    image = picture(*size)
    published: Any = LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    assert torch.equal(CropProcessor()([image])[0], published([image], return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("flag", ["class_token", "pre_norm"])
@torch.no_grad()
def test_every_part_of_the_tower_moves_the_numbers(flag: str) -> None:
    """What CLIP's tower has beside InternVL's and Qwen2-VL's, taken away."""
    model = own_copy(tiny_model("llava"))
    inputs = model.inputs_from_hf(llava_batch(LLAVA_CASES["one-image"]))
    before = model(inputs)
    if flag == "pre_norm":
        model.vision.ln_pre = None
    else:
        model.vision.tile_embed.class_token.zero_()
        model.vision.tile_embed.positions[:, 0].zero_()
    assert (model(inputs) - before).abs().max() > 1e-4


@torch.no_grad()
def test_blocks_and_the_norm_that_nothing_reads_move_no_number() -> None:
    model = own_copy(tiny_model("llava"))
    inputs = model.inputs_from_hf(llava_batch(LLAVA_CASES["one-image"]))
    before = model(inputs)
    assert model.cfg.vision.n_layers_run == 2 and model.cfg.vision.n_layers == 3
    for parameter in (*model.vision.unread_norm.parameters(), *model.vision.blocks[2].parameters()):
        parameter.mul_(7)
    assert torch.equal(model(inputs), before)
    model.vision.blocks[1].mlp.out_proj.weight.mul_(7)
    assert not torch.allclose(model(inputs), before)


@given(st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_tokens_cover_the_square_that_is_seen(width: int, height: int, pad: bool) -> None:
    layout = CropProcessor(**TINY, pad=pad).layout((width, height))
    x0, y0, x1, y1 = layout.parts[0].area
    assert (x0, y0) == (layout.boxes[0, 0], layout.boxes[0, 1])
    assert np.allclose(layout.boxes[-1, 2:], (x1, y1))
    if pad:  # the square holds the picture
        assert x0 <= 0 and y0 <= 0 and x1 >= width and y1 >= height and x1 - x0 == max(width, height)
    else:  # and the other way round; a pixel of the resized picture may be less than one of the original
        assert x0 >= 0 and y0 >= 0 and x1 <= width + 1e-9 and y1 <= height + 1e-9


def test_a_place_that_was_cut_off_has_no_token_and_says_so() -> None:
    layout = CropProcessor(**TINY).layout((84, 28))  # the middle third is seen
    assert layout.box_of(0) == (28, 0, 35, 7)
    assert layout.tokens_in_box((28, 0, 35, 7)) == [0]
    with pytest.raises(GeometryError, match="does not see"):
        layout.tokens_in_box((0, 0, 20, 28))
    padded = CropProcessor(**TINY, pad=True).layout((84, 28))
    assert padded.tokens_in_box((0, 0, 20, 28)) == [4, 8]


@pytest.mark.parametrize("pad", [False, True], ids=["crop", "pad"])
def test_a_token_shows_the_pixels_of_its_box(pad: bool) -> None:
    """A picture of coloured squares, each as large as a token in the original."""
    colours = np.random.default_rng(0).integers(0, 256, (2, 8, 3), dtype=np.uint8)
    image = Image.fromarray(colours.repeat(14, axis=0).repeat(14, axis=1))
    processor = CropProcessor(**TINY, pad=pad)
    pixels, _, (layout,) = processor([image])
    patches = processor.patch_colours(pixels.numpy())
    seen = (patches.mean((2, 3)) * np.array(processor.image_std) + np.array(processor.image_mean)) * 255
    for token, (x0, y0, x1, y1) in enumerate(np.round(layout.boxes).astype(int)):
        inside = np.asarray(image)[max(y0, 0) : max(y1, 0), x0:x1]
        if inside.shape[:2] == (y1 - y0, x1 - x0):
            assert np.abs(seen[token] - inside.mean((0, 1))).max() < 25  # bicubic filters reach beyond an edge


def test_settings_of_files() -> None:
    published = {
        "image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "do_convert_rgb": True, "resample": 3,
        "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28},
    }  # fmt: skip
    assert CropProcessor.from_dict(published, **TINY) == CropProcessor(**TINY)
    assert CropProcessor.from_dict({"do_pad": True}, **TINY) == CropProcessor(**TINY, pad=True)
    for pad in (False, True):
        processor = CropProcessor(**TINY, pad=pad)
        assert CropProcessor.from_dict(processor.to_files()["preprocessor_config.json"], **TINY) == processor
    for key in ("size", "crop_size"):
        with pytest.raises(ImageError, match=f"a {key} of 28 pixels"):
            CropProcessor.from_dict({key: {"shortest_edge": 32}}, **TINY)
    with pytest.raises(ImageError, match="do_center_crop"):
        CropProcessor.from_dict({"do_center_crop": False}, **TINY)


def test_a_picture_that_is_too_narrow_is_refused_by_its_number() -> None:
    narrow = Image.new("RGB", (1, 3000))
    with pytest.raises(ImageError, match=r"image 1: .*too narrow"):
        CropProcessor()([Image.new("RGB", (4, 4)), narrow])
    assert CropProcessor(pad=True)([narrow])[0].shape == (1, 3, 336, 336)


def test_inputs_of_unknown_image_size_have_geometry_of_the_square() -> None:
    inputs = tiny_model("llava").inputs_from_hf(llava_batch(LLAVA_CASES["one-image"]))
    assert inputs.image_sizes is None and inputs.image_grid(0).box_of(5) == (7, 7, 14, 14)
    batch = llava_batch(LLAVA_CASES["one-image"])
    with pytest.raises(InputError, match="28"):
        tiny_model("llava").inputs_from_hf({**batch, "pixel_values": batch["pixel_values"][..., :14, :14]})
    with pytest.raises(InputError, match="max_tiles"):
        CropProcessor().with_bounds(Bounds(max_tiles=2))
