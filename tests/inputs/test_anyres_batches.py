"""Batches and settings of LLaVA-NeXT and LLaVA-OneVision: read as `transformers` makes them, refused where they do not
fit."""

from typing import Any

import pytest
import torch
from families import KINDS, own_copy, tiny_model
from tiny_anyres import (
    BATCHES,
    IMAGE,
    LARGE,
    NEXT,
    NEXT_PROCESSOR,
    ONEVISION,
    ONEVISION_PROCESSOR,
    PINPOINTS,
    SIDE,
    TALL,
    WIDE,
    n_tokens,
    next_batch,
    onevision_batch,
    pairs,
)
from tiny_llava import picture
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from hooked_vlm.errors import CheckpointError, GeometryError, ImageError, InputError
from hooked_vlm.inputs.anyres import AnyresProcessor
from hooked_vlm.inputs.image_settings import Settings
from hooked_vlm.inputs.onevision import OneVisionProcessor
from hooked_vlm.inputs.picture_processor import Bounds
from hooked_vlm.inputs.stitched import stitched_layout


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
