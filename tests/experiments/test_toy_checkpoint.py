"""The shipped toy checkpoint: an ordinary folder that transformers loads, small, and able to read."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from hooked_vlm.experiments.toy import data
from hooked_vlm.experiments.toy.data import Sample
from hooked_vlm.experiments.toy.evaluate import exact_match, held_out
from hooked_vlm.experiments.toy.heads import ocr_scores
from hooked_vlm.experiments.toy.tokenizer import build_tokenizer
from hooked_vlm.loading import TOY_MODELS

FOLDER = TOY_MODELS / "toy-qwen2-vl"


@pytest.fixture(scope="module")
def toy() -> Any:
    return Qwen2VLForConditionalGeneration.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def sets() -> dict[str, list[Sample]]:
    return held_out(seed=1, n=24)


def answer(toy: Any, sample: Sample) -> str:
    """What a user of transformers gets: chat template, image processor, greedy generation."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    processor = Qwen2VLImageProcessorPil.from_pretrained(FOLDER)
    question = {"type": "text", "text": sample.turns[0][0]}
    content = [question] if sample.image is None else [{"type": "image"}, question]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    images = {}
    if sample.image is not None:
        images = dict(processor(sample.image, return_tensors="pt"))
        n_tokens = int(images["image_grid_thw"].prod()) // processor.merge_size**2
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * n_tokens)
    encoded = tokenizer(prompt, return_tensors="pt")
    image_token = toy.config.image_token_id
    output = toy.generate(
        **encoded, **images, mm_token_type_ids=(encoded["input_ids"] == image_token).long(), max_new_tokens=12
    )
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_folder_stays_below_eight_megabytes() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert sum(files.values()) <= 8_000_000
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    expected |= {"preprocessor_config.json", "generation_config.json", "training_log.csv", "evaluation.json"}
    assert expected <= set(files)


def test_tensors_have_published_names_and_the_head_is_tied() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert all(file.get_slice(name).get_dtype() == "F32" for name in names)
    assert "lm_head.weight" not in names and json.loads((FOLDER / "config.json").read_text())["tie_word_embeddings"]
    assert {name.split(".")[0] for name in names} == {"model", "visual"}
    assert {"model.embed_tokens.weight", "visual.patch_embed.proj.weight"} <= names


def test_the_tokenizer_is_the_one_in_the_code() -> None:
    assert (FOLDER / "tokenizer.json").read_text() == build_tokenizer().to_str(pretty=True)


def test_the_chat_template_is_qwen2_vls_without_a_default_system_message() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    content = [{"type": "image"}, {"type": "text", "text": "Read the text."}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": "ab12"}], tokenize=False
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (f"<|im_start|>user\n{image}Read the text.<|im_end|>\n<|im_start|>assistant\nab12<|im_end|>\n")


@pytest.mark.parametrize(
    ("task", "floor"),
    [
        *((f"page{n}", 0.9) for n in range(1, 4)),
        *((f"page{n}", 0.8) for n in range(4, 7)),
        *((task, 0.9) for task in ("text", "transcription", "naming")),
    ],
)
def test_held_out_answers_are_right(toy: Any, sets: dict[str, list[Sample]], task: str, floor: float) -> None:
    assert exact_match(toy, sets[task]).mean() >= floor


def test_greedy_generation_in_transformers_gives_the_answers_that_evaluation_counts(
    toy: Any, sets: dict[str, list[Sample]]
) -> None:
    for task in ("page6", "text", "transcription", "naming"):
        counted = exact_match(toy, sets[task][:4])
        generated = [answer(toy, sample) == sample.turns[0][1] for sample in sets[task][:4]]
        np.testing.assert_array_equal(counted, generated)


def test_evaluation_restores_the_model(toy: Any) -> None:
    """Masked evaluation must leave neither a hook nor a changed weight behind."""
    sample = [data.page_sample(np.random.default_rng(0), 2)]
    before = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    assert exact_match(toy, sample, [(0, 0)]).shape == (1,)
    assert all(torch.equal(tensor, before[name]) for name, tensor in toy.state_dict().items())
    blocks: Any = toy.model.language_model.layers
    assert not any(block.self_attn.o_proj._forward_pre_hooks for block in blocks)


def test_two_heads_read_and_the_others_do_not(toy: Any, sets: dict[str, list[Sample]]) -> None:
    pages = [sample for n in range(1, 7) for sample in sets[f"page{n}"]]
    scores = ocr_scores(toy, pages)
    order = np.argsort(-scores, axis=None)
    top = [(int(i) // 4, int(i) % 4) for i in order[:2]]
    assert scores.flat[order[1]] > 0.5 and scores.flat[order[2]] < 0.15
    assert exact_match(toy, pages, top).mean() < 0.35 < 0.85 < exact_match(toy, pages).mean()
    assert exact_match(toy, sets["naming"], top).mean() > 0.9
