"""Prompts of InternVL's sizes, string for string, and what becomes of them: placeholders, turns, stop tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_internvl import by_hand, original_config, train_tokenizer

from hooked_vlm import CheckpointError, HookedVLM, InputError
from hooked_vlm.inputs.templates import TEMPLATES

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
CHATML = f"<|im_start|>system\n{SYSTEM}<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|><|im_start|>assistant\n"
EXPECTED = {  # template: the prompt of "What?" with an image
    "Hermes-2": CHATML,  # 1B, 40B
    "internlm2-chat": CHATML,  # 2B, 8B, 26B, 76B
    "phi3-chat": f"<|system|>\n{SYSTEM}<|end|><|user|>\n<image>\nWhat?<|end|><|assistant|>\n",  # 4B
    "internvl2_5": (
        f"<|im_start|>system\n{SYSTEM_2_5}<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_every_template(name: str) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert TEMPLATES[name].render([{"role": "user", "content": content}]) == EXPECTED[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_several_turns_and_another_system_message(name: str) -> None:
    template = TEMPLATES[name]
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "?"},
    ]
    own = template.render([{"role": "system", "content": "Be brief."}, *chat])
    assert own == template.render(chat, system_message="Be brief.")
    assert own.startswith(f"{template.system_header}Be brief.{template.separator}{template.user_header}Hi")
    assert own.endswith(f"{template.assistant_header}Yes{template.separator}{template.user_header}?"
                        f"{template.separator}{template.assistant_header}")  # fmt: skip


def test_roles_and_parts_that_no_template_knows() -> None:
    with pytest.raises(InputError, match="'tool'"):
        TEMPLATES["Hermes-2"].render([{"role": "tool", "content": "?"}])
    with pytest.raises(InputError, match="'video'"):
        TEMPLATES["Hermes-2"].render([{"role": "user", "content": [{"type": "video"}]}])


# ---------------------------------------------------------------- a checkpoint with its tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return HookedVLM.from_pretrained(checkpoint(tmp_path_factory.mktemp("internvl")))


def checkpoint(folder: Path) -> Path:
    """A tiny InternVL2 as published: InternLM2 with its tokenizer, and a template by name."""
    n_pieces = len(train_tokenizer(folder, add_dummy_prefix=False, remove_extra_whitespaces=False))
    config = original_config("llama-dynamic")
    config["llm_config"] |= {"vocab_size": n_pieces + 9, "max_position_embeddings": 400}
    weights = {name: tensor.contiguous() for name, tensor in by_hand("llama-dynamic").items()}
    for name in ("language_model.model.tok_embeddings.weight", "language_model.output.weight"):
        weights[name] = torch.randn(n_pieces + 9, 64, generator=torch.Generator().manual_seed(0)) / 8
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


IMAGE = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)


def test_ids_and_stops_come_from_the_tokenizer_and_the_template(model: Any) -> None:
    ids = model.tokenizer.convert_tokens_to_ids(["<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>"])
    cfg = model.cfg
    assert [cfg.vision_start_token_id, cfg.vision_end_token_id, cfg.image_token_id, *cfg.eos_token_ids] == ids


def test_a_prompt_with_an_image(model: Any) -> None:
    inputs = model.to_inputs("What?", IMAGE)
    text = model.to_string(inputs.tokens[0])
    n = inputs.visuals[0].n_tokens
    assert model.image_processor.tiling(90, 40) == (2, 1) and n == 3 * 16
    slot = "<img>" + "<IMG_CONTEXT>" * n + "</img>"
    assert text == "<s>" + CHATML.replace("<image>", slot)
    groups = inputs.positions
    assert model.to_string(inputs.tokens[0][groups.question[0]]).strip() == "What?"
    assert model.to_string(inputs.tokens[0][groups.assistant_header[0]]) == "<|im_end|><|im_start|>assistant\n"
    assert inputs.image_grid(0).image_size == (90, 40)
    model.generate(inputs, max_new_tokens=2)


def test_where_images_stand(model: Any) -> None:
    written = model.to_inputs("First <image> then <image> what?", [IMAGE, IMAGE])
    assert len(written.visuals) == 2 and "then <img>" in model.to_string(written.tokens[0])
    in_front = model.to_inputs("What?", [IMAGE, IMAGE])
    assert model.to_string(in_front.tokens[0]).count("</img>\n<img>") == 1
    chat = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}]}]
    assert torch.equal(model.to_inputs(chat).tokens, model.to_inputs("What?", IMAGE).tokens)
    raw = model.to_inputs("What?", IMAGE, chat=False)
    assert model.to_string(raw.tokens[0]).startswith("<img><IMG_CONTEXT>")


def test_fewer_tiles(model: Any) -> None:
    inputs = model.to_inputs("What?", IMAGE, max_tiles=1)
    assert inputs.visuals[0].n_tokens == 16 and inputs.image_grid(0).n_tiles == 1
    other = inputs.with_image(0, np.zeros((90, 30, 3), np.uint8))
    assert other.visuals[0].n_tokens == 16


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"prompt": "<image> and <image>", "images": IMAGE}, "2 <image>.*1"),
        ({"prompt": "<image>"}, "1 <image>.*0"),
        ({"prompt": "What?", "images": IMAGE, "max_pixels": 1000}, "max_tiles"),
        ({"prompt": "What?", "videos": [[IMAGE]]}, "video"),
    ],
)
def test_prompts_that_do_not_fit(model: Any, kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        model.to_inputs(**kwargs)


def test_too_many_tiles_for_the_context(model: Any) -> None:
    n_text = model.to_inputs("What?").shape[1]
    cfg = model.cfg.with_(n_ctx=n_text + 4 + 4 * 16, rope_scaling=None)  # room for four tiles and their marks
    short = HookedVLM(cfg, model.tokenizer, model.image_processor)
    wide = np.zeros((30, 180, 3), np.uint8)
    with pytest.raises(InputError, match=r"max_tiles=3.*6"):
        short.to_inputs("What?", wide)
    assert short.to_inputs("What?", wide, max_tiles=3).visuals[0].n_tokens == 4 * 16
    with pytest.raises(InputError, match=rf"context.*\b{cfg.n_ctx}\D*$"):
        short.to_inputs("What? " * 99, wide)


@pytest.mark.parametrize("name", ["vicuna", ""])
def test_a_template_that_is_not_known(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "template": name}))
    with pytest.raises(CheckpointError, match=rf"'{name}'.*Hermes-2"):
        HookedVLM.from_pretrained(folder)


def test_saved_for_transformers_the_template_goes_along(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "hf", layout="hf")
    again: Any = HookedVLM.from_pretrained(tmp_path / "hf")
    assert again.cfg.chat_template is None
    here, there = (m.to_inputs("What?", IMAGE) for m in (model, again))
    assert torch.equal(there.tokens, here.tokens)  # <s> in front, as transformers' processor puts it there, too
    assert here.pixel_values is not None and torch.equal(here.pixel_values, there.pixel_values)
