"""Prompts of LLaVA-NeXT's and LLaVA-OneVision's language models, string for string what their published templates give,
and the groups of tokens in them.

Expected strings are those of public copies: transformers' documentation and tests, the published conversion scripts.
(Yi's: the prompt in the documentation; its template is from memory.)
"""

from typing import Any

import pytest
from families import own_copy, tiny_model
from PIL import Image
from prompt_templates import TEMPLATES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MARKS = ["<image>", "<video>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
EXPECTED = {
    "mistral": "[INST] <image>\nwhat is red? [/INST]",
    "chatml": "<|im_start|>user\n<image>\nwhat is red?<|im_end|><|im_start|>assistant\n",
    "onevision": "<|im_start|>user <image>\nwhat is red?<|im_end|><|im_start|>assistant\n",
    "onevision, converted": "<|im_start|>user\n<image>\nwhat is red?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n<image>\nwhat is red?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
HEADERS = {
    "mistral": "[/INST]",
    "chatml": "<|im_end|><|im_start|>assistant\n",
    "onevision": "<|im_end|><|im_start|>assistant\n",
    "onevision, converted": "<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}
PICTURE = Image.new("RGB", (50, 40))


def tokenizer(style: str) -> Any:
    """Letter by letter; Mistral's with spaces as ▁ and one in front of a text, as sentencepiece has it."""
    letters = dict.fromkeys("▁[]/INSTabcdefghijklmnopqrstuvwxyz?.\n ")
    vocab = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    if style == "mistral":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Replace("▁", " ")
    else:
        made.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
        made.decoder = decoders.Fuse()
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.add_special_tokens({"additional_special_tokens": MARKS})
    wrapped.chat_template = TEMPLATES[style]
    return wrapped


@pytest.fixture(params=TEMPLATES)
def style(request: pytest.FixtureRequest) -> str:
    return request.param


def reading(style: str) -> Any:
    """The tiny model of the family with such a tokenizer."""
    is_onevision = "onevision" in style
    model = own_copy(tiny_model("llava-onevision" if is_onevision else "llava-next"))
    model.tokenizer = tokenizer(style)
    ids = model.tokenizer.convert_tokens_to_ids(MARKS[:2])
    ids = {"image_token_id": ids[0], "video_token_id": ids[1] if is_onevision else None}
    model.cfg = model.cfg.with_(**ids, prompt_style="chatml" if is_onevision else style)
    return model


def said(model: Any, inputs: Any, group: str, row: int = 0) -> str:
    return model.to_string(inputs.tokens[row, getattr(inputs.positions, group)[row]])


def test_the_prompt_is_the_published_one(style: str) -> None:
    model = reading(style)
    inputs = model.to_inputs("what is red?", images=PICTURE)
    n = len(inputs.positions.image[0])
    text = model.to_string(inputs)[0].replace("<image>" * n, "<image>").strip(" ")
    if style == "mistral":  # its tokenizer puts a space behind a special token
        text = text.replace("<image> ", "<image>")
    assert n > 9 and text == EXPECTED[style]


def test_question_header_and_last_token_are_found(style: str) -> None:
    model = reading(style)
    inputs = model.to_inputs("what is red?", images=PICTURE)
    assert said(model, inputs, "question").strip() == "what is red?"
    assert said(model, inputs, "assistant_header").lstrip(" ") == HEADERS[style]
    assert said(model, inputs, "final") == HEADERS[style][-1]


def test_the_last_of_several_turns_counts(style: str) -> None:
    def text(role: str, words: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": words}]}

    model = reading(style)
    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    inputs = model.to_inputs([first, text("assistant", "red."), text("user", "is red red?")], images=PICTURE)
    assert said(model, inputs, "question").strip() == "is red red?"
    assert said(model, inputs, "assistant_header").lstrip(" ") == HEADERS[style]


def test_several_images_and_a_video_in_a_prompt() -> None:
    model = reading("onevision")
    inputs = model.to_inputs("what is red?", images=[PICTURE, PICTURE], videos=[[PICTURE] * 3])
    assert [visual.n_tokens for visual in inputs.visuals] == [10, 10, 3 * 4 + 1]
    assert [visual.kind for visual in inputs.visuals] == ["image", "image", "video"]
    assert said(model, inputs, "question").strip() == "what is red?" and len(inputs.positions.video[0]) == 13
    assert inputs.visual("video", 0).layout.box_of(12) is None and inputs.visual("video", 0).layout.frames == 3
    alone = model.to_inputs("what is red?", images=PICTURE)
    assert alone.n_images == 1 and alone.image_grid(0).n_tiles > 1
    both = model.to_inputs(["what?", "is red?"], images=[PICTURE, [PICTURE, PICTURE]])
    assert [both.image_grid(i).n_tiles for i in range(3)] == [alone.image_grid(0).n_tiles, 1, 1]
    again = both.with_image(2, Image.new("RGB", (20, 90)))
    assert again.image_grid(2).n_tiles == 1 and again.image_sizes == ((50, 40), (50, 40), (20, 90))


def test_videos_of_a_family_without_and_settings_of_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="no videos"):
        reading("mistral").to_inputs("what?", videos=[[PICTURE] * 2])
    messages = [{"role": "user", "content": [{"type": "video", "video": [PICTURE] * 2, "max_pixels": 900}]}]
    with pytest.raises(ValueError, match="frames have one size"):
        reading("onevision").to_inputs(messages)


def test_a_prompt_that_is_too_long_says_how_many_tiles_would_fit() -> None:
    model = reading("chatml")
    model.cfg = model.cfg.with_(n_ctx=75)
    large = Image.new("RGB", (90, 90))
    with pytest.raises(ValueError, match=r"pass max_tiles=3 \(now 4\)"):
        model.to_inputs("what is red?", images=large)
    assert model.to_inputs("what is red?", images=large, max_tiles=3).shape[1] <= 75
