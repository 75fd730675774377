"""From prompts and pictures to tokens, and from tokens to text, with the toy models' tokenizer."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_qwen2_vl import reading_model
from torch import Tensor

from hooked_vlm import HookedVLM, InputError

HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
QUESTION = "Read the text"


@pytest.fixture
def model() -> Any:
    return reading_model()


@pytest.fixture
def short() -> Any:
    """With a context of 100 tokens."""
    long = reading_model()
    return HookedVLM(long.cfg.with_(n_ctx=100), long.tokenizer, long.image_processor)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pads(n: int, kind: str = "image") -> str:
    return f"<|vision_start|>{f'<|{kind}_pad|>' * n}<|vision_end|>"


def texts(model: Any, inputs: Any) -> list[str]:
    """Every row without its padding."""
    return [
        str(model.to_string(row[first:stop]))
        for row, first, stop in zip(inputs.tokens, inputs.first, inputs.stop, strict=True)
    ]


def real_logits(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(inputs)[inputs.attention_mask.bool()]


# ---------------------------------------------------------------- prompts


def test_a_prompt_becomes_the_users_turn_with_its_pictures_before_it(model: Any) -> None:
    inputs = model.to_inputs(QUESTION, images=[picture(48, 32), picture(16, 24)])
    assert texts(model, inputs) == [HEAD + pads(24) + pads(6) + QUESTION + TAIL]
    pixels, grids, _ = model.image_processor([picture(48, 32), picture(16, 24)])
    assert torch.equal(inputs.pixel_values, pixels) and torch.equal(inputs.image_grid_thw, grids)
    assert inputs.image_sizes == ((48, 32), (16, 24))
    groups = inputs.positions
    assert model.to_string(inputs.tokens[0, groups.question[0]]) == QUESTION
    assert model.to_string(inputs.tokens[0, groups.assistant_header[0]]) == TAIL


def test_a_batch_of_prompts_with_no_one_and_two_images_runs_as_each_alone(model: Any) -> None:
    prompts = [QUESTION, "What is the value of a", "What"]
    images = [None, picture(40, 40), [picture(16, 48, 1), picture(32, 32, 2)]]
    batch = model.to_inputs(prompts, images)
    alone = [model.to_inputs(prompt, one) for prompt, one in zip(prompts, images, strict=True)]
    assert texts(model, batch) == [texts(model, one)[0] for one in alone]
    assert min(batch.stop) == batch.shape[1]
    ours, each = real_logits(model, batch), torch.cat([real_logits(model, one) for one in alone])
    torch.testing.assert_close(ours, each, atol=1e-5, rtol=0)
    assert [batch.row_of_image(i) for i in range(3)] == [1, 2, 2]


def test_pictures_may_come_inside_the_messages(model: Any) -> None:
    a, b, clip = picture(32, 16), picture(16, 32, 1), [picture(16, 16, i) for i in range(3)]
    content: list[Any] = [
        {"type": "text", "text": "Read"},
        {"type": "image", "image": a},
        {"type": "video", "video": clip},
        {"type": "image", "image": b},
    ]
    inside = model.to_inputs([{"role": "user", "content": content}])
    assert texts(model, inside) == [HEAD + "Read" + pads(8) + pads(8, "video") + pads(8) + TAIL]
    bare = [{"type": part["type"], **({"text": "Read"} if part["type"] == "text" else {})} for part in content]
    beside = model.to_inputs([{"role": "user", "content": bare}], images=[a, b], videos=[clip])
    for name in ("tokens", "pixel_values", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(getattr(inside, name), getattr(beside, name))
    with pytest.raises(InputError, match="messages"):
        model.to_inputs([{"role": "user", "content": content}], images=[a, b])


def test_a_list_of_conversations_is_a_batch(model: Any) -> None:
    chats = [[{"role": "user", "content": [{"type": "image"}]}], [{"role": "user", "content": "What"}]]
    batch = model.to_inputs(chats, [picture(16, 16), None])
    assert texts(model, batch) == [HEAD + pads(4) + TAIL, HEAD + "What" + TAIL]


def test_a_conversation_keeps_its_turns(model: Any) -> None:
    turns = [("user", "What"), ("assistant", "abc"), ("user", QUESTION)]
    inputs = model.to_inputs([{"role": role, "content": text} for role, text in turns])
    assert texts(model, inputs) == [
        "".join(f"<|im_start|>{r}\n{t}<|im_end|>\n" for r, t in turns) + "<|im_start|>assistant\n"
    ]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("abc", pads(4) + "abc"),
        ("abc<|image_pad|>d", "abc" + "<|image_pad|>" * 4 + "d"),
    ],
    ids=["without", "with"],
)
def test_raw_text_is_taken_as_it_stands_and_pictures_without_placeholder_go_in_front(
    model: HookedVLM, prompt: str, text: str
) -> None:
    assert texts(model, model.to_inputs(prompt, picture(16, 16), chat=False)) == [text]


def test_an_odd_clip_repeats_its_last_frame_and_a_flat_list_is_one_video(model: Any) -> None:
    clip = [picture(16, 16, i) for i in range(5)]
    inputs = model.to_inputs(QUESTION, videos=clip)
    assert inputs.video_grid_thw.tolist() == [[3, 4, 4]]
    assert torch.equal(
        inputs.pixel_values_videos, model.to_inputs(QUESTION, videos=[[*clip, clip[-1]]]).pixel_values_videos
    )


@pytest.mark.parametrize(
    ("prompt", "kwargs", "says"),
    [
        ("<|image_pad|>", {"chat": False}, "prompt 0.*1 image placeholder.*0"),
        ("<|image_pad|>" * 2, {"chat": False, "images": ["one"]}, "prompt 0.*2 image placeholders.*1"),
        (["a", "b"], {"images": "one"}, "2 prompts.*images"),
        (["a", "b"], {"images": [None, None, None]}, "2 prompts.*images"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "1 image placeholder.*0"),
        ([{"content": "a"}], {}, "'role'"),
        ([], {}, "empty"),
        ("", {"chat": False}, "empty"),
        ("a", {"images": 5}, "images.*5"),
        ("a", {"videos": 5}, "videos.*5"),
        ([{"role": "user", "content": None}], {}, '"type": "text"'),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, '"type": "text"'),
        ([{"role": "user", "content": ["a"]}], {}, '"type": "text"'),
    ],
    ids=str,
)
def test_prompts_and_pictures_that_disagree_are_refused(model: Any, prompt: Any, kwargs: Any, says: str) -> None:
    if kwargs.get("images") in ("one", ["one"]):
        kwargs = {**kwargs, "images": picture(16, 16) if kwargs["images"] == "one" else [picture(16, 16)]}
    with pytest.raises(InputError, match=says):
        model.to_inputs(prompt, **kwargs)


TOO_LONG: dict[str, dict[str, Any]] = {
    "one image": {"prompt": QUESTION, "images": [(160, 160)]},
    "two images": {"prompt": QUESTION, "images": [(160, 160), (24, 24)]},
    "another row binds": {"prompt": ["a", "b"], "images": [[(160, 160)], [(64, 80)] * 3]},
    "a long text beside it": {"prompt": ["a", "abcdefgh " * 9], "images": [[(160, 160)], [(48, 48)]]},
    "a video": {"prompt": QUESTION, "videos": [[(64, 64)] * 8]},
    "image and video": {"prompt": QUESTION, "images": [(80, 80)], "videos": [[(40, 40)] * 5]},
    "a narrow image": {"prompt": QUESTION, "images": [(16, 1600), (1600, 16)]},
    "less than min_pixels": {"prompt": QUESTION, "images": [(16, 16)] * 22},
    "min_pixels given": {"prompt": QUESTION, "images": [(16, 16)] * 2, "min_pixels": 64 * 100},
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_the_error_for_a_prompt_that_is_too_long_names_bounds_that_fit(short: Any, case: str) -> None:
    def drawn(sizes: Any) -> Any:
        return picture(*sizes) if isinstance(sizes, tuple) else [drawn(size) for size in sizes]

    given = {name: drawn(value) if name in ("images", "videos") else value for name, value in TOO_LONG[case].items()}
    with pytest.raises(InputError, match=r"context.*100.*_pixels=\d") as error:
        short.to_inputs(**given)
    bounds = {name: int(value) for name, value in re.findall(r"(\w+_pixels)=(\d+)", str(error.value))}
    assert short.to_inputs(**{**given, **bounds}).shape[1] <= 100


@pytest.mark.parametrize("images", [None, [(16, 16)]], ids=["text", "with-image"])
def test_text_that_is_too_long_by_itself_is_to_be_shortened(short: Any, images: Any) -> None:
    with pytest.raises(InputError, match=r"context.*100\D*$"):
        short.to_inputs("abc " * 40, images=images and [picture(*size) for size in images])


def test_another_picture_is_resized_within_the_bounds_of_the_first(model: Any) -> None:
    inputs = model.to_inputs(QUESTION, picture(160, 160), max_pixels=64 * 9)
    assert inputs.with_image(0, picture(160, 160, 1)).shape == inputs.shape


# ---------------------------------------------------------------- geometry


def test_a_box_of_the_original_picture_leads_to_the_tokens_that_see_it(model: Any) -> None:
    """Two pictures in two rows, black but for one token's area: the brightest features' pixels are there."""
    boxes, sizes = [(20, 30, 30, 40), (80, 0, 90, 10)], [(60, 50), (100, 40)]
    pictures = []
    for (width, height), (x0, y0, x1, y1) in zip(sizes, boxes, strict=True):
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[y0:y1, x0:x1] = 255
        pictures.append(Image.fromarray(pixels))
    inputs = model.to_inputs(["What is the main object in the image", "What"], pictures)
    patches = inputs.pixel_values.split(inputs.image_grid_thw.prod(1).tolist())
    for image, box in enumerate(boxes):
        brightness = patches[image].unflatten(0, (-1, 4)).mean((1, 2))
        brightest = int(inputs.image_tokens(image)[brightness.argmax()])
        assert brightest in inputs.tokens_in_box(image, box)
        row = inputs.row_of_image(image)
        for position in inputs.image_tokens(image).tolist():
            assert inputs.tokens_in_box(image, inputs.box_of_token(position, row), 0.01) == [position]
        assert inputs.tokens_in_box(image, (0, 0, *sizes[image])) == inputs.image_tokens(image).tolist()


# ---------------------------------------------------------------- tokens and text


@settings(max_examples=30)
@given(st.text(min_size=1, max_size=30))
def test_tokens_of_a_text_spell_the_text(text: str) -> None:
    model = reading_model()
    assert model.to_string(model.to_tokens(text)) == [text]
    assert len(model.to_str_tokens(text)) == model.to_tokens(text).shape[1]


def test_a_text_of_one_token_has_an_id_and_others_say_what_they_are(model: Any) -> None:
    assert model.to_string([model.to_single_token(" value")]) == " value"
    with pytest.raises(InputError, match=r"'ab'.*2.*\['a', 'b'\]"):
        model.to_single_token("ab")
    with pytest.raises(InputError, match="0 tokens"):
        model.to_single_token("")


def test_texts_of_different_lengths_run_alike_as_texts_and_as_tokens(model: Any) -> None:
    both = ["Read", "What is the value"]
    tokens = model.to_tokens(both)
    as_tokens, as_texts = model.as_inputs(tokens), model.as_inputs(both)
    assert torch.equal(as_tokens.attention_mask, as_texts.attention_mask)
    alone = torch.cat([real_logits(model, model.as_inputs(text)) for text in both])
    for inputs in (as_tokens, as_texts):
        torch.testing.assert_close(real_logits(model, inputs), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad_token_id", [None, 7])
def test_rows_that_the_tokenizer_padded_run_as_each_alone(model: Any, pad_token_id: int | None) -> None:
    """Whatever token the configuration pads with."""
    both = ["Read", "What is the value"]
    padded = model.tokenizer(both, padding=True, padding_side="left", return_tensors="pt")
    other = copy.copy(model)
    other.cfg = model.cfg.with_(pad_token_id=pad_token_id)
    assert torch.equal(other.as_inputs(padded["input_ids"]).attention_mask, padded["attention_mask"])
    tokens = other.to_tokens(both)
    assert torch.equal(other.as_inputs(tokens).attention_mask, padded["attention_mask"])


def test_a_tokenizer_of_another_checkpoint_is_noticed(model: Any) -> None:
    other = copy.copy(model)
    other.cfg = model.cfg.with_(d_vocab=100)
    with pytest.raises(InputError, match=r"vocabulary.*100"):
        other.to_inputs("Read the text.")


@pytest.mark.parametrize("tokens", [[[0, 5, 6]], [[0, 5, 6], [0, 7, 8]], [[0, 0], [5, 6]]], ids=str)
def test_padding_tokens_that_do_not_pad_are_text(model: Any, tokens: list[list[int]]) -> None:
    pad = model.input_spec().pad_token_id
    ids = torch.tensor(tokens)
    assert model.as_inputs(torch.where(ids == 0, pad, ids)).attention_mask.all()


def test_a_first_token_goes_before_the_text_not_before_its_padding(model: Any) -> None:
    try:
        model.tokenizer.bos_token = "<|im_start|>"
        tokens = model.to_tokens(["Read", "What is"], prepend_bos=True)
    finally:
        model.tokenizer.bos_token = None
    assert model.to_string(tokens) == ["<|endoftext|><|im_start|>Read", "<|im_start|>What is"]


def test_a_first_token_that_the_tokenizer_lacks_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="beginning-of-text"):
        model.to_tokens("Read", prepend_bos=True)


def test_generated_text_is_the_new_tokens_up_to_the_stop(model: Any) -> None:
    inputs = model.to_inputs([QUESTION, "What"], [picture(16, 16), None])
    tokens = model.generate(inputs, 6, stop_at_eos=False)[:, inputs.shape[1] :]
    assert model.generate(inputs, 6, stop_at_eos=False, return_type="str") == model.to_string(tokens)
    cfg = model.cfg
    try:
        model.cfg = cfg.with_(eos_token_ids=(int(tokens[0, 3]),))
        until = tokens[0].tolist().index(int(tokens[0, 3]))
        assert model.generate(inputs[0], 6, return_type="str") == model.to_string(tokens[0, :until])
    finally:
        model.cfg = cfg
