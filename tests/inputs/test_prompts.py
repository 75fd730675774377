"""What reaches a chat template: texts as strings where there is no vision tower, and the arguments that it reads."""

import re
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import bundled
from PIL import Image
from tiny import randomise
from tiny_qwen2_vl import reading_model

from hooked_vlm import HookedVLM, InputError

QUESTION = "What is 2+2?"


def turn(content: str) -> str:
    """A turn as a template writes it, with an expression for the content."""
    return "{{ '<|im_start|>' + message['role'] + '\n' + " + content + " + '<|im_end|>\n' }}"


def chat(content: str) -> str:
    """A chat template of such turns."""
    header = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    return "{% for message in messages %}" + turn(content) + "{% endfor %}" + header


TEMPLATES = {  # how published templates of language models take the content
    "added (Qwen2, InternLM2, Phi-3)": chat("message['content']"),
    "trimmed (Llama-3)": chat("message['content'] | trim"),
    "trimmed as an attribute": chat("message.content | trim"),
    "stripped (Mistral)": chat("message['content'].strip()"),
    "split (DeepSeek-R1)": chat("message['content'].split('</think>')[-1]"),
    "printed": "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}",
    "checked (Qwen3)": "{% for message in messages %}{% if message.content is string %}"
    + turn("message.content")
    + "{% else %}{{ raise_exception('not a text') }}{% endif %}{% endfor %}",
    "as JSON": chat("message['content'] | tojson"),
}


def language_model(template: str) -> Any:
    """A language model alone, with the toy models' tokenizer and a chat template."""
    tokenizer = deepcopy(reading_model().tokenizer)
    tokenizer.chat_template = template
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    hf = transformers.Qwen2ForCausalLM(config).eval()
    randomise(hf)
    return HookedVLM.from_hf(hf, tokenizer)


def with_template(template: str) -> Any:
    """The tiny model that sees, with another chat template."""
    model = reading_model()
    tokenizer = deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    return HookedVLM(model.cfg, tokenizer, model.image_processor)


def rendered(model: Any, messages: list[Any], **arguments: Any) -> str:
    return model.tokenizer.apply_chat_template(messages, tokenize=False, **{"add_generation_prompt": True, **arguments})


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_text_reaches_the_template_of_a_language_model_as_a_string(name: str) -> None:
    model = language_model(TEMPLATES[name])
    expected = rendered(model, [{"role": "user", "content": QUESTION}])
    as_parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    for prompt in (QUESTION, [{"role": "user", "content": QUESTION}], as_parts):
        assert model.chat_text(prompt) == expected
        assert model.to_string(model.to_inputs(prompt).tokens[0]) == expected
    batch = model.to_inputs([QUESTION, as_parts])
    assert torch.equal(batch.tokens[0], batch.tokens[1])


def test_a_conversation_of_texts_and_parts_is_a_conversation_of_texts() -> None:
    model = language_model(TEMPLATES["trimmed (Llama-3)"])
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", QUESTION)]
    parts = [
        {"role": role, "content": [{"type": "text", "text": text}] if i % 2 else text}
        for i, (role, text) in enumerate(said)
    ]
    assert model.chat_text(parts) == rendered(model, [{"role": role, "content": text} for role, text in said])


def test_several_parts_are_refused_where_the_template_takes_one_text() -> None:
    model = language_model(TEMPLATES["trimmed (Llama-3)"])
    with pytest.raises(InputError, match="join"):
        model.to_inputs([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])


def test_a_picture_for_a_language_model_is_refused() -> None:
    model = language_model(TEMPLATES["printed"])
    picture = Image.new("RGB", (8, 8))
    for prompt, images in (
        ("a", picture),
        ([{"role": "user", "content": [{"type": "image", "image": picture}]}], None),
    ):
        with pytest.raises(InputError, match="vision tower"):
            model.to_inputs(prompt, images=images)


@pytest.mark.parametrize("name", ["trimmed (Llama-3)", "printed", "stripped (Mistral)", "checked (Qwen3)"])
def test_a_template_that_takes_no_parts_is_refused_in_a_model_that_sees(name: str) -> None:
    model = with_template(TEMPLATES[name])
    with pytest.raises(InputError, match="template"):
        model.to_inputs(QUESTION)
    messages = [{"role": "user", "content": QUESTION}]  # the way out
    assert model.chat_text(messages) == rendered(model, messages)


# ---------------------------------------------------------------- arguments of the template

READING = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% set count = namespace(images=0) %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% elif message['content'] %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{% set count.images = count.images + 1 %}"
    "{% if add_vision_id %}{{ 'Picture ' ~ count.images ~ ': ' }}{% endif %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]
ARGUMENTS = {
    "tools": {"tools": TOOLS},
    "add_vision_id": {"add_vision_id": True},
    "enable_thinking": {"enable_thinking": False},
    "continue_final_message": {"continue_final_message": True, "add_generation_prompt": False},
    "add_generation_prompt": {"add_generation_prompt": False},
    "chat_template": {"chat_template": chat("'always this'")},
    "several": {"tools": TOOLS, "enable_thinking": False, "add_vision_id": True},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_reach_the_template_as_transformers_passes_them(name: str) -> None:
    model = with_template(READING)
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare"}]}
    ]
    if name == "continue_final_message":
        messages.append({"role": "assistant", "content": "They are"})
    expected = rendered(model, messages, **ARGUMENTS[name])
    assert name == "add_generation_prompt" or expected != rendered(model, messages)
    given = {
        k: v for k, v in ARGUMENTS[name].items() if name == "add_generation_prompt" or k != "add_generation_prompt"
    }
    pictures = None if name == "chat_template" else [Image.new("RGB", (8, 8))] * 2
    inputs = model.to_inputs(messages, images=pictures, template=given)
    assert re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", str(model.to_string(inputs.tokens[0]))) == expected


def test_a_message_of_tool_calls_needs_no_content() -> None:
    model = with_template(READING)
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    messages = [{"role": "user", "content": "Add"}, call, {**call, "content": None}, {"role": "tool", "content": "4"}]
    assert model.chat_text(messages) == rendered(model, messages)


@pytest.mark.parametrize(
    "arguments",
    [{"enable_thinkin": False}, {"tokenize": True}, {"return_tensors": "pt"}, {"padding": True}, {"messages_": []}],
)
def test_an_argument_that_the_template_does_not_read_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"does not read '{next(iter(arguments))}'"):
        with_template(READING).to_inputs("a", template=arguments)


@pytest.mark.parametrize("name", ["tools", "add_vision_id", "enable_thinking"])
def test_arguments_are_refused_by_a_template_that_has_no_use_for_them(name: str) -> None:
    with pytest.raises(InputError, match=f"does not read '{name}'"):
        reading_model().to_inputs("a", template=ARGUMENTS[name])


def test_arguments_without_such_a_template_are_refused() -> None:
    with pytest.raises(InputError, match="chat=False"):
        reading_model().to_inputs("a", template={"tools": TOOLS}, chat=False)
    with pytest.raises(InputError, match="no chat template"):
        reading_model().to_inputs("a", template={"chat_template": 5})
    with pytest.raises(InputError, match="takes none"):
        bundled("toy-internvl2").to_inputs("a", template={"enable_thinking": False})


def test_contradicting_arguments_are_refused_as_transformers_refuses_them() -> None:
    with pytest.raises(InputError, match="continue_final_message"):
        with_template(READING).to_inputs(
            [{"role": "assistant", "content": "a"}],
            template={"continue_final_message": True, "add_generation_prompt": True},
        )


@pytest.mark.parametrize("key", ["name", "tool_calls", "reasoning_content"])
@pytest.mark.parametrize("toy", ["toy-qwen2-vl", "toy-internvl2"])
def test_what_the_template_does_not_read_of_a_message_is_refused(toy: str, key: str) -> None:
    model = bundled(toy)
    with pytest.raises(InputError, match=key):
        model.to_inputs([{"role": "user", "content": "a", key: [{"a": 1}]}])
    plain = model.to_inputs([{"role": "user", "content": "a"}])
    assert torch.equal(model.to_inputs([{"role": "user", "content": "a", key: None}]).tokens, plain.tokens)


def test_pictures_in_messages_of_a_batch_keep_their_rows() -> None:
    model = reading_model()
    pictures = [Image.fromarray(np.full((8, 16, 3), level, np.uint8)) for level in (10, 200)]
    prompts = [[{"role": "user", "content": [{"type": "image", "image": p}, {"text": "a"}]}] for p in pictures]
    inputs = model.to_inputs(prompts)
    for row, picture in enumerate(pictures):
        assert torch.equal(inputs[row].pixel_values, model.to_inputs("a", images=picture).pixel_values)
