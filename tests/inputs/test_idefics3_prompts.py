"""Prompts of Idefics3 and SmolVLM: the published template, token ids those of `transformers`' processor, the groups of
tokens in them.

The row and column of a tile are special tokens (SmolVLM-256M and 500M) or plain text (Idefics3-8B).
"""

from typing import Any

import pytest
from PIL import Image
from prompt_templates import SMOLVLM
from tiny_idefics3 import OF_TRANSFORMERS, OURS, SETTINGS, tiny_hf
from tiny_llava import picture
from transformers import Idefics3Processor
from whole_folders import TAGS, smol

from hooked_vlm import HookedVLM
from hooked_vlm.converters import idefics3
from hooked_vlm.loading.settings import model_config

WIDE, TALL, SQUARE, SMALL = picture(90, 50), picture(50, 90), picture(40, 40), picture(9, 5)
"""Of 3 x 2, 2 x 3, 3 x 3 and, enlarged, 3 x 2 tiles."""
Part = dict[str, Any]


def text(words: str) -> Part:
    return {"type": "text", "text": words}


def image(of: Image.Image) -> Part:
    return {"type": "image", "image": of}


def turn(role: str, *parts: Part) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def reading(tags: Any, n_ctx: int = 4096) -> Any:
    """The tiny model with such a tokenizer, whose vocabulary it has."""
    config = tiny_hf("idefics3").config.to_dict()
    tokenizer = smol(SMOLVLM, tags)
    config["image_token_id"] = tokenizer.convert_tokens_to_ids("<image>")
    config["text_config"] |= {"vocab_size": len(tokenizer), "max_position_embeddings": n_ctx}
    model: Any = HookedVLM(model_config(idefics3, config, {}))
    model.tokenizer, model.image_processor = tokenizer, OURS
    return model


@pytest.fixture(params=[TAGS, ()], ids=["special tags", "tags as text"])
def tags(request: pytest.FixtureRequest) -> Any:
    return request.param


PROMPTS: dict[str, list[dict[str, Any]]] = {
    "an image": [turn("user", image(WIDE), text("what is red?"))],
    "text first": [turn("user", text("what is red?"), image(SQUARE))],
    "smaller than a tile": [turn("user", image(SMALL), text("what is red?"))],
    "two images": [turn("user", image(WIDE), image(SMALL), text("which is red?"), image(SQUARE))],
    "a system turn": [turn("system", text("be short.")), turn("user", image(WIDE), text("what is red?"))],
    "several turns": [
        turn("user", image(WIDE), text("what is red?")),
        turn("assistant", text("the box.")),
        turn("user", text("and blue?")),
    ],
    "no image": [turn("user", text("what is red?"))],
}


@pytest.mark.parametrize("splits", [True, False], ids=["tiles", "one tile"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_token_ids_and_pixels_are_those_of_transformers(prompt: str, splits: bool, tags: Any) -> None:
    model, messages = reading(tags), PROMPTS[prompt]
    settings = {**SETTINGS, "size": {"longest_edge": 100 if splits else 34}}
    processor: Any = Idefics3Processor(
        OF_TRANSFORMERS["idefics3"](**settings), smol(SMOLVLM, tags), image_seq_len=4, chat_template=SMOLVLM
    )
    theirs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ours = model.to_inputs(messages, max_tiles=None if splits else 1)
    assert ours.tokens.tolist() == theirs["input_ids"].tolist()
    again = model.inputs_from_hf(theirs)
    assert [v.runs for v in again.visuals] == [v.runs for v in ours.visuals]
    if prompt != "no image":
        assert ours.pixel_values.equal(theirs["pixel_values"][0]) and again.pixel_values.equal(ours.pixel_values)
        n = len(ours.visuals)
        assert [again.image_grid(i).layout for i in range(n)] == [ours.image_grid(i).layout for i in range(n)]


def test_a_batch_with_different_numbers_of_tiles_is_that_of_transformers(tags: Any) -> None:
    model = reading(tags)
    asked = ["an image", "no image", "two images"]
    processor: Any = Idefics3Processor(
        OF_TRANSFORMERS["idefics3"](**SETTINGS), smol(SMOLVLM, tags), image_seq_len=4, chat_template=SMOLVLM
    )
    texts = [processor.apply_chat_template(PROMPTS[name], add_generation_prompt=True) for name in asked]
    pictures = [[WIDE], [], [WIDE, SMALL, SQUARE]]
    theirs = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
    ours, again = model.to_inputs([PROMPTS[name] for name in asked]), model.inputs_from_hf(theirs)
    assert theirs["pixel_values"].shape[:2] == (3, 7 + 7 + 10) and len(ours.pixel_values) == 7 + 24
    real = ours.attention_mask.bool()  # padding tokens are the configuration's here, the tokenizer's there
    assert ours.attention_mask.equal(again.attention_mask) and ours.tokens[real].equal(again.tokens[real])
    assert ours.pixel_values.equal(again.pixel_values)
    assert [v.runs for v in again.visuals] == [v.runs for v in ours.visuals]


def test_the_prompt_is_the_published_one() -> None:
    model = reading(TAGS)
    tiles = "".join(
        "".join(f"<fake_token_around_image><row_{row}_col_{col}>" + "<image>" * 4 for col in (1, 2, 3)) + "\n"
        for row in (1, 2)
    )
    whole = "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>"
    written = model.to_string(model.to_inputs("what is red?", images=WIDE))[0]
    assert written == f"<|im_start|>User:{tiles}\n{whole}what is red?<end_of_utterance>\nAssistant:"
    one = model.to_string(model.to_inputs("what is red?", images=WIDE, max_tiles=1))[0]
    assert one == f"<|im_start|>User:{whole}what is red?<end_of_utterance>\nAssistant:"
    assert model.to_string(model.to_inputs("<image>", images=SMALL, chat=False, max_tiles=1))[0] == whole


def said(model: Any, inputs: Any, group: str) -> str:
    return model.to_string(inputs.tokens[0, getattr(inputs.positions, group)[0]])


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("an image", "what is red?"),
        ("text first", " what is red?"),
        ("smaller than a tile", "what is red?"),
        ("a system turn", "what is red?"),
        ("several turns", " and blue?"),
        ("no image", " what is red?"),
    ],
)
def test_question_header_and_last_token_are_found(prompt: str, question: str, tags: Any) -> None:
    model = reading(tags)
    inputs = model.to_inputs(PROMPTS[prompt])
    assert said(model, inputs, "question") == question
    assert said(model, inputs, "assistant_header") == "<end_of_utterance>\nAssistant:"
    assert said(model, inputs, "final") == ":"
    assert said(model, inputs, "image") == "<image>" * len(inputs.positions.image[0])


def test_a_prompt_that_is_too_long_says_how_many_tiles_would_fit() -> None:
    model = reading(TAGS, n_ctx=90)
    with pytest.raises(ValueError, match=r"pass max_tiles=8 \(now 9\)"):
        model.to_inputs("what is red?", images=SQUARE)
    assert model.to_inputs("what is red?", images=SQUARE, max_tiles=8).shape[1] <= 90


def test_another_picture_of_the_same_tiles_takes_its_place_and_one_of_others_is_refused() -> None:
    model = reading(TAGS)
    inputs = model.to_inputs("what is red?", images=WIDE)
    other = inputs.with_image(0, picture(88, 52))
    assert other.tokens.equal(inputs.tokens) and other.image_sizes == ((88, 52),)
    assert not other.pixel_values.equal(inputs.pixel_values)
    assert inputs.with_image(0, SMALL).tokens.equal(inputs.tokens)
    for of_others in (TALL, SQUARE):  # as many tiles in other rows, more tiles
        with pytest.raises(ValueError, match="text between them"):
            inputs.with_image(0, of_others)
