"""Pictures inside messages: every key is honoured as Qwen's own reader of messages does, or refused."""

import base64
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from families import bundled
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_qwen2_vl import reading_model
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hooked_vlm import HookedVLM, ImageError, InputError, VLMInputs
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.picture_settings import PictureSettings, process_images

TOKEN = 28
TEXT = {"type": "text", "text": "Read the text"}


def picture(width: int = 300, height: int = 470, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, TEXT]}]


@pytest.fixture
def model() -> Any:
    return reading_model()


# ---------------------------------------------------------------- what qwen-vl-utils makes of the settings


def nearest(height: int, width: int, least: float, most: float) -> tuple[int, int]:
    """`smart_resize` of qwen-vl-utils by its description: whole tokens, at least one, an area within bounds."""
    rows, cols = (max(1, round(side / TOKEN)) for side in (height, width))
    if rows * cols * TOKEN**2 > most:
        scale = math.sqrt(height * width / most)
        rows, cols = (max(1, math.floor(side / scale / TOKEN)) for side in (height, width))  # theirs may be 0
    elif rows * cols * TOKEN**2 < least:
        scale = math.sqrt(least / (height * width))
        rows, cols = (math.ceil(side * scale / TOKEN) for side in (height, width))
    return rows * TOKEN, cols * TOKEN


def as_published(image: Image.Image, part: dict[str, int]) -> Any:
    """qwen-vl-utils resizes by the message's settings, then the processor of the checkpoint takes the result."""
    if "resized_height" in part:
        height, width = nearest(part["resized_height"], part["resized_width"], 4 * TOKEN**2, 16384 * TOKEN**2)
    else:
        bounds = part.get("min_pixels", 4 * TOKEN**2), part.get("max_pixels", 16384 * TOKEN**2)
        height, width = nearest(image.height, image.width, *bounds)
    assume(3136 <= height * width <= 12845056)  # the processor would resize again, up to its own bounds
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056})
    return processor([image.resize((width, height))], return_tensors="pt")


sides = st.integers(TOKEN, 400)
areas = st.integers(3136, 200 * TOKEN**2)
settings_of_images = st.one_of(
    st.fixed_dictionaries({"max_pixels": areas}),
    st.fixed_dictionaries({"min_pixels": areas}),
    st.tuples(areas, areas).map(lambda two: {"min_pixels": min(two), "max_pixels": max(two)}),
    st.fixed_dictionaries({"resized_height": st.integers(1, 500), "resized_width": st.integers(100, 500)}),
)


@settings(max_examples=60, deadline=None)
@given(sides, sides, settings_of_images)
def test_pixels_by_settings_of_an_image_are_those_of_qwens_reader_and_the_pillow_processor(
    width: int, height: int, part: dict[str, int]
) -> None:
    image = picture(width, height)
    pixels, grid, (layout,) = process_images([image], [PictureSettings(**part)], ImageProcessor())
    expected = as_published(image, part)
    torch.testing.assert_close(pixels, expected["pixel_values"], rtol=0, atol=0)
    assert grid.tolist() == expected["image_grid_thw"].tolist() and layout.image_size == (width, height)


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        ({"max_pixels": 4096}, {"max_pixels": 4096}),
        ({"min_pixels": 4096}, {"min_pixels": 4096}),
        ({"min_pixels": 1024, "max_pixels": 2048}, {"min_pixels": 1024, "max_pixels": 2048}),
    ],
)
def test_bounds_in_a_message_are_those_of_the_call_for_its_picture_alone(
    model: Any, part: dict[str, int], arguments: dict[str, int]
) -> None:
    first, second = picture(40, 60), picture(100, 30, seed=1)
    inputs = model.to_inputs(user({"type": "image", "image": first, **part}, {"type": "image", "image": second}))
    alone = [model.to_inputs("", images=first, **arguments), model.to_inputs("", images=second)]
    assert torch.equal(inputs.pixel_values, torch.cat([one.pixel_values for one in alone]))
    assert torch.equal(inputs.image_grid_thw, torch.cat([one.image_grid_thw for one in alone]))
    assert inputs.image_sizes == (first.size, second.size)


def test_resized_sides_are_rounded_to_tokens_and_need_no_aspect_ratio(model: Any) -> None:
    inputs = model.to_inputs(user({"type": "image", "image": picture(), "resized_height": 29, "resized_width": 76}))
    assert inputs.image_grid_thw.tolist() == [[1, 8, 20]]  # 32 x 80 pixels: 4 x 10 tokens of 8 x 8


def test_a_message_bounds_its_picture_more_closely_than_the_call_does(model: Any) -> None:
    part = {"type": "image", "image": picture(), "max_pixels": 4096}
    assert torch.equal(
        model.to_inputs(user(part), max_pixels=8192).pixel_values, model.to_inputs(user(part)).pixel_values
    )
    other = model.to_inputs(user({"type": "image", "image": picture()}), max_pixels=8192)
    assert other.n_images == 1 and other.image_grid_thw.prod() * 16 <= 8192


def test_settings_follow_their_picture_through_rows_batches_and_replacements(model: Any) -> None:
    part = {"type": "image", "image": picture(), "max_pixels": 2048}
    inputs = model.to_inputs([user({"type": "image", "image": picture(40, 60)}), user(part)])
    joined: Any = VLMInputs.concat([inputs[1], inputs[0]])
    for batch, i in ((inputs, 1), (inputs[1], 0), (joined, 0)):
        changed = batch.with_image(i, picture(470, 300))
        expected = model.to_inputs(user({**part, "image": picture(470, 300)}))
        assert changed.image_grid_thw[i].tolist() == expected.image_grid_thw[0].tolist()
    assert model.to_inputs("", images=picture(40, 60)).image_settings is None


# ---------------------------------------------------------------- where a part carries its picture

FORMS = {
    "image": lambda path, data: {"type": "image", "image": path},
    "image of a PIL image": lambda path, data: {"type": "image", "image": Image.open(io.BytesIO(data))},
    "image of bytes": lambda path, data: {"type": "image", "image": data},
    "image of a file object": lambda path, data: {"type": "image", "image": io.BytesIO(data)},
    "image of datasets": lambda path, data: {"type": "image", "image": {"bytes": data, "path": None}},
    "url": lambda path, data: {"type": "image", "url": path},
    "path": lambda path, data: {"type": "image", "path": path},
    "base64": lambda path, data: {"type": "image", "base64": base64.b64encode(data).decode()},
    "base64 with line breaks": lambda path, data: {"type": "image", "base64": base64.encodebytes(data).decode()},
    "image_url": lambda path, data: {"type": "image_url", "image_url": path},
    "image_url of OpenAI": lambda path, data: {"type": "image_url", "image_url": {"url": path, "detail": "auto"}},
    "image with image_url": lambda path, data: {"type": "image", "image_url": path},
    "file://": lambda path, data: {"type": "image", "image": f"file://{path}"},
    "a data URI": lambda path, data: {"type": "image", "image": data_uri(data)},
    "a data URI as OpenAI has it": lambda path, data: {"type": "image_url", "image_url": {"url": data_uri(data)}},
    "no type": lambda path, data: {"image": path},
    "columns of datasets": lambda path, data: {
        "type": "image", "image": path, "text": None, "max_pixels": None, "video": None, "fps": None
    },
}  # fmt: skip


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize("toy", ["toy-qwen2-vl", pytest.param("toy-internvl2", marks=pytest.mark.full)])
@pytest.mark.parametrize("form", FORMS)
def test_a_picture_is_the_same_in_every_form_of_a_part(tmp_path: Any, toy: str, form: str) -> None:
    model: Any = bundled(toy)
    path = tmp_path / "a picture.png"
    picture(40, 60).save(path)
    inputs = model.to_inputs(user(FORMS[form](str(path), path.read_bytes())))
    expected = model.to_inputs("Read the text", images=picture(40, 60))
    assert torch.equal(inputs.tokens, expected.tokens)
    assert torch.equal(inputs.pixel_values, expected.pixel_values)


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_in_a_message_and_another_as_argument_are_refused(tmp_path: Any, model: Any, form: str) -> None:
    path = tmp_path / "picture.png"
    picture(40, 60).save(path)
    with pytest.raises(InputError, match="both"):
        model.to_inputs(user(FORMS[form](str(path), path.read_bytes())), images=picture(8, 8))


@pytest.mark.parametrize("kind", ["video", "video_url"])
def test_a_video_in_a_message_and_another_as_argument_are_refused(model: Any, kind: str) -> None:
    with pytest.raises(InputError, match="both"):
        model.to_inputs(user({"type": kind, kind: [picture(8, 8)]}), videos=[picture(8, 8)])


A = picture(40, 60)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image", "image": A, "max_pixel": 4096}, "max_pixel"),
        ({"type": "image", "image": A, "fps": 1.0}, "fps"),
        ({"type": "image", "image": A, "nframes": 4}, "nframes"),
        ({"type": "image", "image": A, "total_pixels": 4096}, "total_pixels"),
        ({"type": "image", "image": A, "text": "a caption"}, "text"),
        ({"type": "image", "image": A, "video": [A]}, "video"),
        ({"type": "image", "image": A, "url": "b.png"}, "url"),
        ({"type": "image", "path": "a.png", "base64": "AAAA"}, "base64"),
        ({"type": "image", "max_pixels": 4096}, "beside"),
        ({"type": "image", "image": A, "resized_height": 32}, "resized_width"),
        ({"type": "image", "image": A, "resized_width": 32}, "resized_height"),
        ({"type": "image", "image": A, "resized_height": 32, "resized_width": 32, "max_pixels": 4096}, "max_pixels"),
        ({"type": "image", "image": A, "min_pixels": 4096, "max_pixels": 2048}, "min_pixels"),
        ({"type": "image", "image": A, "max_pixels": 0}, "max_pixels"),
        ({"type": "image", "image": A, "max_pixels": "4096"}, "max_pixels"),
        ({"type": "image", "image": A, "max_pixels": True}, "max_pixels"),
        ({"type": "image", "image": A, "resized_height": 10**6, "resized_width": 10**6}, "enlarge"),
        ({"type": "image", "base64": "not base64!"}, "base64"),
        ({"type": "image", "image": "data:image/png;base64,%%%"}, "base64"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "detail"),
        ({"type": "video", "video": [A], "nframes": 2}, "nframes"),
        ({"type": "video", "video": [A], "max_frames": 2}, "max_frames"),
        ({"type": "video", "video": [A], "fps": 0}, "fps"),
        ({"type": "video", "video": [A], "fps": math.nan}, "fps"),
        ({"type": "video", "video": "a.mp4", "fps": 1.0, "nframes": 4}, "nframes"),
        ({"type": "video", "video": [A], "frames_per_second": 1.0}, "frames_per_second"),
        ({"type": "video", "video": [A], "image": A}, "image"),
        ({"type": "text", "text": "a", "cache_control": {}}, "cache_control"),
        ({"type": "text", "text": 3}, "text"),
        ({"type": "text"}, "text"),
        ({"type": "audio", "audio": "a.wav"}, "audio"),
        ({"type": ["image"]}, "image"),
        ({}, "part"),
        ("a text among the parts", "content"),
    ],
)
def test_what_has_no_effect_or_two_is_refused(model: Any, part: Any, says: str) -> None:
    with pytest.raises((InputError, ImageError), match=says):
        model.to_inputs(user(part))


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels", "resized"])
def test_settings_of_one_picture_are_refused_where_images_are_cut_into_tiles(name: str) -> None:
    part = {"resized_height": 64, "resized_width": 64} if name == "resized" else {name: 4096}
    with pytest.raises(ImageError, match="max_tiles"):
        bundled("toy-internvl2").to_inputs(user({"type": "image", "image": A, **part}))


def test_bounds_that_a_picture_has_of_its_own_are_not_advised_to_be_lowered_by_the_call(model: Any) -> None:
    short = HookedVLM(model.cfg.with_(n_ctx=100), model.tokenizer, model.image_processor)
    own = {"type": "image", "image": picture(), "max_pixels": 64 * 200}
    with pytest.raises(InputError, match=r"context(?!.*max_pixels)"):
        short.to_inputs(user(own))
    with pytest.raises(InputError, match=r"context.*max_pixels=(\d+)"):
        short.to_inputs(user({"type": "image", "image": picture()}, {**own, "max_pixels": 64 * 20}))


def test_the_advised_bound_makes_room_beside_pictures_with_bounds_of_their_own(model: Any) -> None:
    short = HookedVLM(model.cfg.with_(n_ctx=100), model.tokenizer, model.image_processor)
    prompt = user({"type": "image", "image": picture()}, {"type": "image", "image": picture(), "max_pixels": 64 * 20})
    with pytest.raises(InputError) as caught:
        short.to_inputs(prompt)
    advice = str(caught.value).rpartition("max_pixels=")[2].partition(" ")[0]
    assert short.to_inputs(prompt, max_pixels=int(advice)).shape[1] <= 100
