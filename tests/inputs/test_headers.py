"""Turns that only headers in plain text mark: Vicuna's prompts, with a tokenizer that spells a header otherwise at the
beginning of a text than behind one."""

from dataclasses import replace
from typing import Any

import pytest
from families import own_copy, tiny_model
from PIL import Image
from prompt_templates import VICUNA
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

LETTERS = "▁USERAITN:whatisred?\nk."


def tokenizer(prepend: bool) -> Any:
    """Letter by letter but for some words, spaces as ▁; `prepend`: one at the beginning of a text, as sentencepiece."""
    words = ["▁is", "▁red", "US", "ER", "SS", "▁A", "▁U"]
    vocab = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(LETTERS), *words])}
    merges = [("▁", "A"), ("▁", "U"), ("U", "S"), ("E", "R"), ("S", "S")]
    merges += [("▁", "i"), ("▁i", "s"), ("▁", "r"), ("▁r", "e"), ("▁re", "d")]
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    steps: list[Any] = [normalizers.Prepend("▁")] if prepend else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Replace("▁", " ")
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.add_special_tokens({"additional_special_tokens": ["<image>"]})
    wrapped.chat_template = VICUNA
    return wrapped


def reading(prepend: bool) -> Any:
    """The tiny model with a tokenizer."""
    model = own_copy(tiny_model("llava"))
    model.tokenizer = tokenizer(prepend)
    model.cfg = model.cfg.with_(image_token_id=model.tokenizer.convert_tokens_to_ids("<image>"))
    return model


@pytest.fixture(params=[True, False], ids=["prepends a space", "as it stands"])
def model(request: pytest.FixtureRequest) -> Any:
    return reading(request.param)


def said(model: Any, inputs: Any, group: str) -> str:
    """The text of a group of tokens."""
    positions = getattr(inputs.positions, group)[0]
    return model.to_string(inputs.tokens[0, positions])


PICTURE = Image.new("RGB", (30, 40))


def test_a_picture_in_front_of_a_text_as_it_stands_brings_no_other_tokens(model: Any) -> None:
    bare = model.to_inputs("what", images=PICTURE, chat=False)
    written = model.to_inputs("<image>what", images=PICTURE, chat=False)
    assert bare.tokens.tolist() == written.tokens.tolist()


def test_the_prompt_is_the_published_one(model: Any) -> None:
    inputs = model.to_inputs("what is red?", images=PICTURE)
    text = model.to_string(inputs)[0].replace("<image>" * 16, "<image>")
    assert text.replace("<image> ", "<image>").strip() == "USER: <image>\nwhat is red? ASSISTANT:"


def test_question_header_and_last_token_are_found_by_headers(model: Any) -> None:
    inputs = model.to_inputs("what is red?", images=PICTURE)
    assert said(model, inputs, "question").strip() == "what is red?"
    assert said(model, inputs, "assistant_header").strip() == "ASSISTANT:"
    assert said(model, inputs, "final") == ":"
    assert len(inputs.positions.image[0]) == 16
    assert said(model, inputs.append(" red"), "assistant_header").strip() == "ASSISTANT:"


def test_the_last_of_several_turns_counts(model: Any) -> None:
    def text(role: str, words: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": words}]}

    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    chat = [first, text("assistant", "red."), text("user", "is red red?")]
    inputs = model.to_inputs(chat, images=PICTURE)
    assert said(model, inputs, "question").strip() == "is red red?"


def test_a_picture_that_ends_the_turn_has_its_question_before_it() -> None:
    model = reading(prepend=False)
    inputs = model.to_inputs("USER: what is red? <image> ASSISTANT:", images=PICTURE, chat=False)
    assert said(model, inputs, "question") == " what is red? "


def test_a_spelling_less_loses_the_header() -> None:
    """Behind text the tokens of a header are others where the tokenizer prepends nothing."""
    model = reading(prepend=False)
    inputs = model.to_inputs("what is red?", images=PICTURE)
    turns = inputs.spec.turns
    assert turns is not None
    alone = replace(inputs.spec, turns=replace(turns, assistant_behind=()))
    assert turns.assistant != turns.assistant_behind
    assert said(model, replace(inputs, spec=alone), "assistant_header") == ""
    assert said(model, inputs, "assistant_header") == " ASSISTANT:"
