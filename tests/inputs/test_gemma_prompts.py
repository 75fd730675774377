"""Prompts of Gemma 3 and PaliGemma, string for string and id for id what `transformers`' processors make of them."""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from families import own_copy
from prompt_templates import GEMMA3
from reading_gemma import reading
from tiny_gemma3 import N_TOKENS
from tiny_llava import picture
from transformers import Gemma3Processor, PaliGemmaProcessor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hooked_vlm.errors import InputError

WIDE, SMALL = picture(120, 40), picture(30, 28)
CROPS = {
    "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}  # fmt: skip


def gemma3(crops: bool = False) -> tuple[Any, Any]:
    """The model and transformers' processor, which takes the settings of crops with the pictures."""
    model, options = reading("gemma3"), {"return_tensors": "pt", "add_special_tokens": False}
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    theirs = Gemma3Processor(images, deepcopy(model.tokenizer), chat_template=GEMMA3, image_seq_length=N_TOKENS)
    if crops:
        model = own_copy(model)
        model.image_processor = replace(model.image_processor, pan_and_scan=True, min_crop_size=20)
        options["images_kwargs"] = CROPS
    return model, partial(theirs, **options)


def equal(inputs: Any, batch: Any) -> bool:
    assert inputs.tokens.tolist() == batch["input_ids"].tolist()
    assert inputs.attention_mask.tolist() == batch["attention_mask"].tolist()
    assert torch.equal(inputs.pixel_values, batch["pixel_values"])
    return True


def said(model: Any, inputs: Any, group: str, row: int = 0) -> str:
    return model.to_string(inputs.tokens[row, getattr(inputs.positions, group)[row]])


# ---------------------------------------------------------------- Gemma 3

TEXT = {"type": "text", "text": " what is red?"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "picture first": [{"role": "user", "content": [{"type": "image"}, TEXT]}],
    "picture last": [{"role": "user", "content": [TEXT, {"type": "image"}]}],
    "two pictures": [{"role": "user", "content": [{"type": "image"}, TEXT, {"type": "image"}, TEXT]}],
    "side by side": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
    "turns": [
        {"role": "system", "content": [{"type": "text", "text": "be good"}]},
        {"role": "user", "content": [{"type": "image"}, TEXT]},
        {"role": "assistant", "content": [{"type": "text", "text": "red."}]},
        {"role": "user", "content": [{"type": "text", "text": "\n\nis red red?"}]},
    ],
}


def pictures_of(chat: list[dict[str, Any]]) -> list[Any]:
    n = sum(part["type"] == "image" for message in chat for part in message["content"])
    return [WIDE, SMALL][:n]


@pytest.mark.parametrize("crops", [False, True], ids=["whole", "pan and scan"])
@pytest.mark.parametrize("name", CHATS)
def test_a_chat_of_gemma3_is_what_transformers_makes_of_it(name: str, crops: bool) -> None:
    model, theirs = gemma3(crops)
    chat, pictures = CHATS[name], pictures_of(CHATS[name])
    text = theirs.func.apply_chat_template(chat, add_generation_prompt=True)
    batch = theirs(text=[text], images=[pictures])
    inputs = model.to_inputs(chat, images=pictures)
    assert equal(inputs, batch)
    assert len(inputs.visuals[0].runs) == (4 if crops else 1) and inputs.n_images == len(pictures)


def test_text_of_a_chat_of_gemma3() -> None:
    model, _ = gemma3()
    text = model.to_string(model.to_inputs("what is red?", images=SMALL))[0]
    assert text.replace("<image_soft_token>" * N_TOKENS, "[16]") == (
        "<bos><start_of_turn>user\n\n\n<start_of_image>[16]<end_of_image>\n\nwhat is red?<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


def test_raw_text_names_pictures_by_the_token_that_opens_them_or_gets_them_in_front() -> None:
    model, theirs = gemma3(crops=True)
    raw = "<bos>a <start_of_image> red <start_of_image>"
    batch = theirs(text=[raw], images=[[WIDE, SMALL]])
    assert equal(model.to_inputs(raw, images=[WIDE, SMALL], chat=False), batch)
    written = "<bos>a \n\n<start_of_image><image_soft_token><end_of_image>\n\n red"
    short = model.to_inputs("<bos>a <start_of_image> red", images=SMALL, chat=False)
    assert torch.equal(model.to_inputs(written, images=SMALL, chat=False).tokens, short.tokens)
    front = model.to_string(model.to_inputs("is red", images=SMALL, chat=False))[0]
    assert front.startswith("\n\n<start_of_image><image_soft") and front.endswith("<end_of_image>\n\nis red")
    with pytest.raises(InputError, match="2 image placeholders but got 1"):
        model.to_inputs(raw, images=SMALL, chat=False)


def test_question_header_and_last_token_of_gemma3_are_found() -> None:
    model, _ = gemma3(crops=True)
    inputs = model.to_inputs(CHATS["turns"], images=WIDE)
    assert said(model, inputs, "question").strip() == "is red red?"
    assert said(model, inputs, "assistant_header") == "<end_of_turn>\n<start_of_turn>model\n"
    assert said(model, inputs, "final") == "\n" and len(inputs.positions.image[0]) == 4 * N_TOKENS
    alone = model.to_inputs("what is red?", images=WIDE)
    assert said(model, alone, "question").strip() == "what is red?"


def test_crops_that_transformers_read_are_read_with_their_number_or_as_pictures() -> None:
    model, theirs = gemma3(crops=True)
    text = "<bos><start_of_image> red <start_of_image>"
    batch = theirs(text=[text], images=[[WIDE, SMALL]])
    inputs = model.inputs_from_hf(batch)
    assert inputs.n_images == 5 and {visual.runs[0][1] - visual.runs[0][0] for visual in inputs.visuals} == {N_TOKENS}
    counted = model.inputs_from_hf({**batch, "num_crops": torch.tensor([3, 0])})
    assert [len(visual.runs) for visual in counted.visuals] == [4, 1]
    assert torch.equal(model(counted), model(inputs))
    again = counted.with_image(1, picture(28, 30))
    assert again.n_images == 2
    with pytest.raises(InputError, match="other"):
        model.to_inputs(text, images=[WIDE, SMALL], chat=False).with_image(0, SMALL)


def test_a_batch_of_gemma3_is_padded_as_by_transformers() -> None:
    model, theirs = gemma3()
    chats = [CHATS["two pictures"], CHATS["picture last"]]
    texts = [theirs.func.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    batch = theirs(text=texts, images=[[WIDE, SMALL], [SMALL]], padding=True)
    assert equal(model.to_inputs(chats, images=[[WIDE, SMALL], [SMALL]]), batch)


# ---------------------------------------------------------------- PaliGemma


def paligemma(family: str = "paligemma") -> tuple[Any, Any]:
    model, images = reading(family), SiglipImageProcessorPil(size={"height": 32, "width": 32})
    known = deepcopy(model.tokenizer)
    images.image_seq_length = N_TOKENS  # pyright: ignore[reportAttributeAccessIssue]
    return model, PaliGemmaProcessor(images, known)


@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
@pytest.mark.parametrize(
    ("prompt", "n"),
    [
        ("detect a cat", 1),
        ("<image>detect a cat", 1),
        ("<image><image>which ?", 2),
        ("", 1),
        ("is <loc0012><seg003>?", 1),
    ],
)
def test_a_prompt_of_paligemma_is_what_transformers_makes_of_it(family: str, prompt: str, n: int) -> None:
    model, theirs = paligemma(family)
    pictures = [WIDE, SMALL][:n]
    batch = theirs(text=[prompt], images=[pictures], return_tensors="pt")
    inputs = model.to_inputs(prompt, images=pictures)
    assert equal(inputs, batch)
    content = [{"type": "text", "text": prompt.replace("<image>", "")}, *({"type": "image"} for _ in pictures)]
    for given in (content, content[::-1]):
        assert equal(model.to_inputs([{"role": "user", "content": given}], images=pictures), batch)
    same = model.inputs_from_hf(batch)
    assert same.n_generated == (0,) and torch.equal(model(same), model(inputs))


@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
@torch.no_grad()
def test_a_suffix_of_paligemma_counts_as_generated(family: str) -> None:
    model, theirs = paligemma(family)
    batch = theirs(
        text=["is red?", "a"], images=[[WIDE], [SMALL]], suffix=["no", "yes"], return_tensors="pt", padding=True
    )
    inputs = model.inputs_from_hf(batch)
    assert inputs.n_generated == (3, 4)  # with <eos>
    ours = model.to_inputs(["is red?", "a"], images=[WIDE, SMALL]).append(["no<eos>", "yes<eos>"])
    assert ours.n_generated == (3, 4) and said(model, inputs, "generated") == "no<eos>"
    for row in range(2):
        read, made = (model(one[row])[0][one[row].attention_mask[0].bool()] for one in (inputs, ours))
        torch.testing.assert_close(read, made, atol=1e-5, rtol=0)
    causal = model.inputs_from_hf({**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])})
    assert (model(causal) - model(inputs)).abs().max() > 1e-3


def test_token_types_that_are_no_suffix_are_refused() -> None:
    model, theirs = paligemma()
    batch = theirs(text=["is red?"], images=[[WIDE]], return_tensors="pt")
    types = torch.zeros_like(batch["input_ids"])
    types[0, 18] = 1
    with pytest.raises(InputError, match="token_type_ids"):
        model.inputs_from_hf({**batch, "token_type_ids": types})


def test_an_answer_whose_beginning_nobody_says_is_refused() -> None:
    """It would be seen as a part of the prompt, without a word."""
    model, theirs = paligemma()
    batch = theirs(text=["is red?"], images=[[WIDE]], suffix=["no"], return_tensors="pt")
    without = {name: x for name, x in batch.items() if name != "token_type_ids"}
    with pytest.raises(InputError, match=r"labels.*return_token_type_ids=True"):
        model.inputs_from_hf(without)


def test_question_and_header_of_paligemma_are_found() -> None:
    model, _ = paligemma()
    inputs = model.to_inputs(["detect a <loc0012> cat", "a"], images=[WIDE, SMALL])
    assert [said(model, inputs, "question", row) for row in (0, 1)] == ["detect a <loc0012> cat", "a"]
    assert said(model, inputs, "assistant_header") == "\n" == said(model, inputs, "final")
    assert said(model, inputs.append("no"), "generated") == "no"


def test_paligemma_has_no_chats_and_raw_text_stands_as_it_is() -> None:
    model, _ = paligemma()
    raw = model.to_inputs("<image><bos>a\n", images=SMALL, chat=False)
    assert torch.equal(raw.tokens, model.to_inputs("a", images=SMALL).tokens)
    assert model.to_string(model.to_inputs("a"))[0] == "<bos>a\n"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for chat in (turns, [{"role": "system", "content": "a"}], [turns[1]]):
        with pytest.raises(InputError, match="has no chats"):
            model.to_inputs(chat)
    with pytest.raises(InputError, match="this model has none"):
        model.to_inputs("a", template={"tools": []})
    with pytest.raises(InputError, match="2 image placeholders but got 1"):
        model.to_inputs("<image><image>a", images=SMALL)


def test_positions_of_a_row_count_from_0_where_transformers_counts_paligemmas_from_1() -> None:
    """Rotary positions are relative: adding one to all of them changes no score (tests/model/test_parity.py)."""
    model, _ = paligemma()
    inputs = model.to_inputs("a", images=SMALL)
    assert inputs.position_ids[0, 0].tolist() == list(range(inputs.shape[1]))
