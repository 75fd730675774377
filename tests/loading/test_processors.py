"""Settings of images and videos, wherever a folder has them, against `transformers`' own reading of the same folder."""

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_internvl
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_processing_utils import BaseVideoProcessor

from hooked_vlm import CheckpointError, HookedVLM
from hooked_vlm.converters import converter_for, read_config
from hooked_vlm.converters.internvl import HF
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.processors import processor_of
from hooked_vlm.loading.folders import TOY_MODELS
from hooked_vlm.loading.pictures import picture_settings
from hooked_vlm.loading.settings import model_config

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 470, 3), dtype=np.uint8))
NESTED, IMAGES, VIDEOS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"


def settings(number: int) -> dict[str, Any]:
    """Settings that tell where they were read."""
    return {
        "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [number / 10] * 3,
        "size": {"shortest_edge": 1024 * number, "longest_edge": 16384 * number},
    }  # fmt: skip


PLACES = ("nested images", "nested videos", "images", "videos")


def written(folder: Path, places: tuple[str, ...]) -> Path:
    """A folder with settings in some of the places, different in each."""
    stated = {place: settings(PLACES.index(place) + 1) for place in places}
    nested = {
        f"{kind}_processor": stated[f"nested {kind}s"] for kind in ("image", "video") if f"nested {kind}s" in stated
    }
    for file, content in ((NESTED, nested), (IMAGES, stated.get("images")), (VIDEOS, stated.get("videos"))):
        if content is not None:
            (folder / file).write_text(json.dumps(content))
    return folder


def write(folder: Path, content: dict[str, Any], nested: bool, kind: str = "image") -> None:
    """Settings in a section of processor_config.json, or in a file of their own."""
    if not nested:
        (folder / (IMAGES if kind == "image" else VIDEOS)).write_text(json.dumps(content))
        return
    path = folder / NESTED
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, f"{kind}_processor": content}))


def toy_cfg() -> Any:
    config = read_config(TOY_MODELS / "toy-qwen2-vl")
    return model_config(converter_for(config), config, {})


@pytest.mark.parametrize(
    "places", [c for n in range(len(PLACES) + 1) for c in itertools.combinations(PLACES, n)], ids=" + ".join
)
def test_settings_are_read_where_transformers_reads_them(places: tuple[str, ...], tmp_path: Path) -> None:
    folder = written(tmp_path, places)
    images, videos = picture_settings(folder)
    for ours, read in (
        (images, Qwen2VLImageProcessorPil.get_image_processor_dict),
        (videos, BaseVideoProcessor.get_video_processor_dict),
    ):
        if ours.file is None:
            with pytest.raises(OSError, match="Can't load"):
                read(folder)
        else:
            assert ours.values == read(folder)[0]
    processor: Any = processor_of(toy_cfg(), images, videos)
    if images.file is None:
        assert processor.max_pixels == ImageProcessor().max_pixels
    else:
        theirs = Qwen2VLImageProcessorPil.from_pretrained(folder)([PICTURE], return_tensors="pt")
        pixels, grid, _ = processor([PICTURE])
        assert torch.equal(pixels, theirs["pixel_values"]) and torch.equal(grid, theirs["image_grid_thw"])
    if videos.file is not None:  # a still video is prepared as a picture is, under the videos' settings
        (tmp_path / "videos").mkdir()
        (tmp_path / "videos" / IMAGES).write_text(json.dumps(videos.values))
        theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "videos")([PICTURE], return_tensors="pt")
        pixels, grid, _ = processor.video([PICTURE, PICTURE])
        assert torch.equal(pixels, theirs["pixel_values"]) and torch.equal(grid, theirs["image_grid_thw"])


BOUNDS = [
    {"min_pixels": 3136, "max_pixels": 12544, "size": {"min_pixels": 3136, "max_pixels": 12845056}},
    {"min_pixels": 3136, "max_pixels": 12544, "size": {"shortest_edge": 3136, "longest_edge": 12845056}},
    {"max_pixels": 12544, "size": {"shortest_edge": 3136, "longest_edge": 12845056}},
    {"min_pixels": 200704, "size": {"shortest_edge": 3136, "longest_edge": 12845056}},
    {"size": {"shortest_edge": 200704, "longest_edge": 401408}},
    {"max_pixels": 12544},
    {"min_pixels": 802816},
    {},
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_bounds_are_those_of_transformers(bounds: dict[str, Any], nested: bool, tmp_path: Path) -> None:
    content = {"patch_size": 8, **bounds}
    (tmp_path / (NESTED if nested else IMAGES)).write_text(
        json.dumps({"image_processor": content} if nested else content)
    )
    ours: Any = processor_of(toy_cfg(), *picture_settings(tmp_path))
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size
    assert (ours.min_pixels, ours.max_pixels) == (theirs["shortest_edge"], theirs["longest_edge"])
    assert ours.for_videos is None
    write(tmp_path, {"patch_size": 8}, nested, kind="video")  # silent: the class of videos decides
    silent: Any = processor_of(toy_cfg(), *picture_settings(tmp_path))
    assert silent.for_videos == ImageProcessor(8, min_pixels=128 * 28 * 28, max_pixels=28 * 28 * 768)


def test_the_budget_of_a_video_is_shared_by_its_frames() -> None:
    """By hand: int(2048 * 16^2 * 0.9) * 2 // 36 = 26214 pixels a frame, to which 470 x 300 shrinks as 192 x 128."""
    stated = {"patch_size": 8, "min_pixels": 256, "max_pixels": 10**6, "max_video_tokens": 2048}
    capped, free = (ImageProcessor.from_dict({**stated, "cap_pixels_per_frame": cap}) for cap in (True, None))
    assert capped.video([PICTURE] * 36)[1].tolist() == [[18, 16, 24]]
    assert free.video([PICTURE] * 36)[1].tolist() == [[18, 38, 58]]
    assert capped([PICTURE])[1].tolist() == [[1, 38, 58]]  # pictures do not share


def test_settings_of_videos_are_saved_and_bounded(tmp_path: Path) -> None:
    model: Any = HookedVLM.from_pretrained("toy-qwen2-vl")
    videos = ImageProcessor(8, min_pixels=1024, max_pixels=8192, video_tokens=99)
    model.image_processor = ImageProcessor(8, min_pixels=1024, max_pixels=65536, for_videos=videos)
    model.save_pretrained(tmp_path / "saved")
    again: Any = HookedVLM.from_pretrained(tmp_path / "saved").image_processor
    assert again == model.image_processor
    assert again.bounded(None, 4096).for_videos.max_pixels == 4096 == again.bounded(None, 4096).max_pixels


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (NESTED, {"image_processor": 3}, "processor_config.*image_processor"),
        (NESTED, {"video_processor": []}, "processor_config.*video_processor"),
        (NESTED, {"image_processor": {"patch_size": 9}}, "processor_config.*patch_size"),
        (VIDEOS, {"patch_size": 9}, "video_preprocessor_config.*patch_size"),
        (VIDEOS, {"do_resize": False}, "video_preprocessor_config.*do_resize"),
        (IMAGES, {"max_pixels": "many"}, "preprocessor_config.*max_pixels"),
    ],
)
def test_settings_that_cannot_be_met_name_their_file(file: str, content: Any, says: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=says):
        processor_of(toy_cfg(), *picture_settings(tmp_path))


@pytest.mark.parametrize("nested", [False, True])
def test_tiles_in_the_layout_of_transformers(nested: bool, tmp_path: Path) -> None:
    cfg = tiny_internvl.tiny_model("qwen2").cfg.with_(original_architecture=HF)
    side = cfg.vision.tile_size
    stated = {"size": {"height": side, "width": side}, "min_patches": 2, "max_patches": 5, "image_mean": [0.25] * 3}
    (tmp_path / (NESTED if nested else IMAGES)).write_text(
        json.dumps({"image_processor": stated} if nested else stated)
    )
    ours: Any = processor_of(cfg, *picture_settings(tmp_path))
    theirs: Any = GotOcr2ImageProcessorPil.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs([PICTURE], crop_to_patches=True, return_tensors="pt")["pixel_values"]
    assert torch.equal(ours([PICTURE])[0], expected)
