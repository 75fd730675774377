"""Stretched squares and crops of long pictures against `transformers`' Pillow processors; boxes stay in original
pixels."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_llava import picture
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hooked_vlm.errors import GeometryError, ImageError, InputError
from hooked_vlm.inputs.image_settings import IMAGES
from hooked_vlm.inputs.pan_and_scan import PanScanProcessor
from hooked_vlm.inputs.picture_processor import Bounds
from hooked_vlm.inputs.stretched import StretchProcessor

SIZES = [(32, 32), (100, 60), (60, 100), (101, 61), (29, 30), (32, 500), (7, 5), (1, 1), (333, 211), (3, 2), (1, 90)]
PALIGEMMA = StretchProcessor(side=32, patch_size=8)
GEMMA3 = PanScanProcessor(side=32, patch_size=4, token_size=2)
CROPPED = replace(GEMMA3, pan_and_scan=True, min_crop_size=20)
SQUARE = {"height": 32, "width": 32}
SIGLIP_PIL = SiglipImageProcessorPil(size=SQUARE)
GEMMA3_PIL = Gemma3ImageProcessorPil(size=SQUARE)
CROPPED_PIL = Gemma3ImageProcessorPil(
    size=SQUARE,
    do_pan_and_scan=True,
    pan_and_scan_min_crop_size=20,
    pan_and_scan_max_num_crops=4,
    pan_and_scan_min_ratio_to_activate=1.2,
)
PAIRS: dict[str, tuple[StretchProcessor, Any]] = {
    "paligemma": (PALIGEMMA, SIGLIP_PIL), "gemma3": (GEMMA3, GEMMA3_PIL), "pan and scan": (CROPPED, CROPPED_PIL),
}  # fmt: skip


def in_mode(mode: str) -> Image.Image:
    """Noise of another mode, some of it transparent."""
    noise = np.random.default_rng(1).integers(0, 256, (40, 70, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    return rgba.convert("RGB").convert("P") if mode == "P" else rgba.convert(mode)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_equal_those_of_transformers(size: tuple[int, int], name: str) -> None:
    ours, theirs = PAIRS[name]
    pixels, grids, (layout,) = ours([picture(*size)])
    assert torch.equal(pixels, theirs([picture(*size)], return_tensors="pt")["pixel_values"])
    assert pixels.dtype == torch.float32 and grids.tolist() == [list(layout.grid)] and layout.grid[0] == len(pixels)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1", "CMYK"])
def test_pixels_of_other_modes_equal_those_of_transformers(mode: str, name: str) -> None:
    ours, theirs = PAIRS[name]
    assert torch.equal(ours([in_mode(mode)])[0], theirs([in_mode(mode)], return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize(("width", "height"), [(640, 480), (896, 896), (1000, 3000), (2100, 600)])
def test_pixels_of_the_published_size_equal_those_of_transformers(width: int, height: int) -> None:
    theirs = Gemma3ImageProcessorPil(
        size={"height": 896, "width": 896},
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    ours = PanScanProcessor(pan_and_scan=True)
    assert torch.equal(
        ours([picture(width, height)])[0], theirs([picture(width, height)], return_tensors="pt")["pixel_values"]
    )


@pytest.mark.parametrize("resample", [filter.value for filter in Image.Resampling])
def test_every_filter_is_pillows(resample: int) -> None:
    ours, theirs = replace(PALIGEMMA, resample=resample), SiglipImageProcessorPil(size=SQUARE, resample=resample)
    assert torch.equal(ours([picture(70, 41)])[0], theirs([picture(70, 41)], return_tensors="pt")["pixel_values"])


def test_both_families_filters_and_crops_move_the_pixels() -> None:
    image = picture(90, 40)
    same = replace(GEMMA3, resample=3)([image])[0]
    assert torch.equal(same, PALIGEMMA([image])[0]) and not torch.equal(same, GEMMA3([image])[0])
    assert len(CROPPED([image])[0]) == 3 and len(GEMMA3([image])[0]) == 1


@given(
    st.integers(1, 400), st.integers(1, 400), st.integers(4, 90), st.integers(1, 4), st.floats(1, 3, allow_nan=False)
)
def test_crops_are_those_of_transformers(width: int, height: int, least: int, most: int, ratio: float) -> None:
    numbered = np.arange(width * height).reshape(1, height, width).repeat(3, axis=0)
    theirs = GEMMA3_PIL.pan_and_scan(numbered, least, most, ratio)
    ours = replace(GEMMA3, pan_and_scan=True, min_crop_size=least, max_crops=most, min_ratio=ratio)
    (x0, y0, x1, y1), *crops = ours.areas((width, height))
    assert (x0, y0, x1, y1) == (0, 0, width, height) and len(crops) == len(theirs)
    for (x0, y0, x1, y1), crop in zip(crops, theirs, strict=True):
        assert np.array_equal(numbered[:, int(y0) : int(y1), int(x0) : int(x1)], crop)


# ---------------------------------------------------------------- geometry


def test_boxes_are_in_original_pixels_although_the_picture_is_stretched() -> None:
    layout = PALIGEMMA.layout((160, 40))  # 4 x 4 tokens
    assert layout.box_of(0) == (0, 0, 40, 10) and layout.box_of(15) == (120, 30, 160, 40)
    assert layout.tokens_in_box((41, 1, 79, 9)) == [1] and layout.overlaps((20, 0, 60, 10))[:2].tolist() == [0.5, 0.5]
    pooled = GEMMA3.layout((160, 40))
    assert pooled.box_of(5) == (40, 10, 80, 20) and pooled.n_tokens == 16 and pooled.patches.n_tokens == 64
    assert pooled.patches.box_of(9) == (20, 5, 40, 10) and pooled.grid == (1, 8, 8)


def test_crops_are_parts_of_the_layout() -> None:
    layout = CROPPED.layout((101, 40))  # three crops, 34, 34 and 33 pixels wide
    assert [part.name for part in layout.parts] == ["tiles", "crop 0", "crop 1", "crop 2"]
    assert [part.area for part in layout.parts[1:]] == [(0, 0, 34, 40), (34, 0, 68, 40), (68, 0, 101, 40)]
    assert layout.runs == (16,) * 4 and layout.n_tiles == 4 and layout.part_of(40) == "crop 1"
    assert layout.tile_of(47) == 2 and layout.to_image(np.arange(64), part="crop 2")[0, 0, 0] == 48
    assert layout.tokens_in_box((70, 0, 71, 1), part="crop 2") == [48]
    assert layout.overlaps((70, 0, 71, 1))[[2, 48]].sum() > 1.9  # in the whole picture and in its crop
    assert layout.between == (
        "Here is the original image ", " and here are some crops to help you see better ", " ", " ", "",
    )  # fmt: skip
    tall = CROPPED.layout((40, 101))
    assert [part.area for part in tall.parts[1:]] == [(0, 0, 40, 34), (0, 34, 40, 68), (0, 68, 40, 101)]
    assert layout.patches.n_tokens == 256 and layout.patches.part_of(70) == "crop 0"
    with pytest.raises(GeometryError, match="crop 2"):
        layout.part("crop 3")


@pytest.mark.parametrize("size", [(112, 40), (40, 112), (64, 64)])
def test_a_token_shows_the_pixels_of_its_box(size: tuple[int, int]) -> None:
    """A picture of coloured squares."""
    colours = np.random.default_rng(0).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    smooth = Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)
    processor = replace(CROPPED, token_size=1, patch_size=8)
    pixels, _, (layout,) = processor([smooth])
    patches = processor.patch_colours(pixels.numpy())
    seen = (patches.mean((2, 3)) * 0.5 + 0.5) * 255
    for token, (x0, y0, x1, y1) in enumerate(np.round(layout.boxes).astype(int)):
        assert np.abs(seen[token] - np.asarray(smooth)[y0:y1, x0:x1].mean((0, 1))).max() < 30


# ---------------------------------------------------------------- settings


def test_settings_of_files() -> None:
    published = {
        "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_processor_type": "SiglipImageProcessor", "image_seq_length": 16,
        "image_std": [0.5, 0.5, 0.5], "processor_class": "PaliGemmaProcessor", "resample": 3,
        "rescale_factor": 0.00392156862745098, "size": SQUARE,
    }  # fmt: skip
    sizes: dict[str, Any] = {"side": 32, "patch_size": 8}
    assert StretchProcessor.from_dict(published, **sizes) == PALIGEMMA
    own = {"do_pan_and_scan": None, "pan_and_scan_max_num_crops": None, "resample": 2}
    sizes = {"side": 32, "patch_size": 4, "token_size": 2}
    assert PanScanProcessor.from_dict({**published, **own}, **sizes) == GEMMA3
    for processor in (GEMMA3, CROPPED, replace(GEMMA3, resample=0, image_mean=(0.1, 0.2, 0.3), min_ratio=2.0)):
        assert PanScanProcessor.from_dict(processor.to_files()[IMAGES], **sizes) == processor


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": {"height": 48, "width": 48}}, "a size of 32 x 32 pixels"),
        ({"size": {"shortest_edge": 48}}, "a size of 32 x 32 pixels"),
        ({"do_resize": False}, "do_resize"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"resample": 9}, "resample"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"do_pad": True}, "do_pad"),
        ({"image_seq_length": 256}, "image_seq_length must be the 16 tokens"),
        ({"image_std": [0, 1, 1]}, "image_std"),
        ({"do_pan_and_scan": "yes"}, "pan_and_scan"),
        ({"pan_and_scan_max_num_crops": 0}, "max_crops"),
        ({"pan_and_scan_min_crop_size": 2}, "as a crop has pixels"),
        ({"pan_and_scan_min_ratio_to_activate": 0.5}, "min_ratio"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ImageError, match=says):
        PanScanProcessor.from_dict(changes, side=32, patch_size=4, token_size=2)


def test_crops_of_a_hugging_face_batch_are_counted_or_pictures_by_themselves() -> None:
    made = CROPPED_PIL([picture(101, 40), picture(30, 30)], return_tensors="pt")
    read: Any = CROPPED.read_batch
    pixels, grids, sizes = read(torch.zeros(1, 1, dtype=torch.long), made, None)
    assert grids.tolist() == [[4, 8, 8], [1, 8, 8]] and sizes is None and len(pixels) == 5
    assert read(torch.zeros(1, 1, dtype=torch.long), {"pixel_values": pixels}, None)[1].tolist() == [[1, 8, 8]] * 5
    with pytest.raises(InputError, match="num_crops"):
        read(torch.zeros(1, 1, dtype=torch.long), {**made, "num_crops": torch.tensor([1, 1])}, None)
    with pytest.raises(InputError, match=r"\[square, 3, 32, 32\]"):
        read(torch.zeros(1, 1, dtype=torch.long), {"pixel_values": torch.zeros(1, 3, 28, 28)}, None)
    unplaced = CROPPED.layout_of((4, 8, 8))
    assert unplaced.runs == (16,) * 4 and not unplaced.parts
    assert CROPPED.layout_of((4, 8, 8), (101, 40)).same_as(CROPPED.layout((101, 40)))
    for grid, size in (((3, 8, 8), (101, 40)), ((1, 4, 4), None)):
        with pytest.raises(InputError, match="sees"):
            CROPPED.layout_of(grid, size)


def test_bounds_on_the_size_of_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="max_tiles"):
        PALIGEMMA.with_bounds(Bounds(max_tiles=2))
