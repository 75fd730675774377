"""The shipped toy checkpoints: ordinary folders of the published layouts, small, and able to read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from hooked_vlm import HookedVLM
from hooked_vlm.loading.folders import TOY_MODELS
from hooked_vlm.toys import pages as data
from hooked_vlm.toys.pages import Sample
from tools.toy_training.batches import collate, decoder_output
from tools.toy_training.evaluate import exact_match, held_out, report
from tools.toy_training.families import FAMILIES, family_in
from tools.toy_training.family import ToyFamily
from tools.toy_training.heads import ocr_scores


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> ToyFamily:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family: ToyFamily) -> Path:
    return TOY_MODELS / family.name


@pytest.fixture(scope="module")
def toy(family: ToyFamily, folder: Path) -> Iterator[Any]:
    yield family.load(folder).eval()


@pytest.fixture(scope="module")
def sets() -> dict[str, list[Sample]]:
    return held_out(seed=1, n=24)


@pytest.fixture(scope="module")
def right(toy: Any, sets: dict[str, list[Sample]]) -> dict[str, np.ndarray]:
    """Which samples of each task the intact model answers."""
    return {task: exact_match(toy, samples) for task, samples in sets.items()}


def prompt_of(family: ToyFamily, sample: Sample) -> dict[str, Any]:
    """What a user of transformers gives the model: the first question with its image, in the chat format."""
    batch = collate(family, [sample])
    end = int((batch.labels[0] != -100).nonzero()[0])
    given: dict[str, Any] = {"input_ids": batch.tokens[:, :end], "attention_mask": torch.ones(1, end).long()}
    if batch.pixel_values is not None:
        given["pixel_values"] = batch.pixel_values
    if family.name == "toy-qwen2-vl":
        image_token = family.tokenizer.token_to_id("<|image_pad|>")
        given["mm_token_type_ids"] = (given["input_ids"] == image_token).long()
        if batch.grid is not None:
            given["image_grid_thw"] = torch.tensor([[1, batch.grid.patches.rows, batch.grid.patches.cols]])  # pyright: ignore[reportAttributeAccessIssue]
    return given


def answer(toy: Any, family: ToyFamily, sample: Sample) -> str:
    given = prompt_of(family, sample)
    output = toy.generate(**given, max_new_tokens=12, do_sample=False)
    return family.tokenizer.decode(output[0, given["input_ids"].shape[1] :].tolist(), skip_special_tokens=True)


def test_the_folder_stays_below_eight_megabytes(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sum(files.values()) <= 8_000_000
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    expected |= {"preprocessor_config.json", "generation_config.json", "training_log.csv", "evaluation.json"}
    assert expected <= set(files)


def test_tensors_have_published_names_and_the_head_is_tied(family: ToyFamily, folder: Path) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert all(file.get_slice(name).get_dtype() == "F32" for name in names)
    config = json.loads((folder / "config.json").read_text())
    assert family_in(folder) is family and config["tie_word_embeddings"]
    assert not any("lm_head" in name for name in names)
    tops, some = {
        "toy-qwen2-vl": ({"model", "visual"}, {"model.embed_tokens.weight", "visual.patch_embed.proj.weight"}),
        "toy-internvl2": (
            {"language_model", "vision_model", "mlp1"},
            {"language_model.model.embed_tokens.weight", "vision_model.encoder.layers.0.attn.qkv.weight"},
        ),
    }[family.name]
    assert {name.split(".")[0] for name in names} == tops and some <= names


def test_the_tokenizer_is_the_one_in_the_code(family: ToyFamily, folder: Path) -> None:
    assert (folder / "tokenizer.json").read_text() == family.tokenizer.to_str(pretty=True)


def test_prompts_are_those_of_training(family: ToyFamily, folder: Path, sets: dict[str, list[Sample]]) -> None:
    """What `to_inputs` makes of a question and its image: the chat format, the tiles or patches, the positions."""
    model = HookedVLM.from_pretrained(folder)
    for sample in (sets["page3"][0], sets["text"][0], data.page_sample(np.random.default_rng(0), 3, (256, 112))):
        given = prompt_of(family, sample)
        inputs = model.to_inputs(sample.turns[0][0], images=sample.image)
        assert torch.equal(inputs.tokens, given["input_ids"])
        if sample.pixels is not None:
            assert inputs.pixel_values is not None and torch.equal(inputs.pixel_values, given["pixel_values"])


def test_the_chat_template_is_qwen2_vls_without_a_default_system_message() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOY_MODELS / "toy-qwen2-vl")
    content = [{"type": "image"}, {"type": "text", "text": "Read the text."}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": "ab12"}], tokenize=False
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (f"<|im_start|>user\n{image}Read the text.<|im_end|>\n<|im_start|>assistant\nab12<|im_end|>\n")


# Below what evaluation.json says by three standard deviations of a share of 24 samples, or so.
FLOORS = {
    "toy-qwen2-vl": {f"page{n}": 0.9 if n < 5 else 0.85 for n in range(1, 7)}
    | {"text": 0.95, "transcription": 0.87, "naming": 0.95},
    "toy-internvl2": {f"page{n}": 0.9 if n < 5 else 0.85 for n in range(1, 7)}
    | {"text": 0.95, "transcription": 0.87, "naming": 0.95},
}


@pytest.mark.parametrize("task", [*(f"page{n}" for n in range(1, 7)), "text", "transcription", "naming"])
def test_held_out_answers_are_right(right: dict[str, np.ndarray], family: ToyFamily, task: str) -> None:
    assert right[task].mean() >= FLOORS[family.name][task]


def test_greedy_generation_in_transformers_gives_the_answers_that_evaluation_counts(
    toy: Any, family: ToyFamily, sets: dict[str, list[Sample]]
) -> None:
    for task in ("page6", "text", "transcription", "naming"):
        counted = exact_match(toy, sets[task][:4])
        generated = [answer(toy, family, sample) == sample.turns[0][1] for sample in sets[task][:4]]
        np.testing.assert_array_equal(counted, generated)


def test_evaluation_restores_the_model(toy: Any) -> None:
    """Masked evaluation must leave neither a hook nor a changed weight behind."""
    sample = [data.page_sample(np.random.default_rng(0), 2)]
    before = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    assert exact_match(toy, sample, [(0, 0)]).shape == (1,)
    assert all(torch.equal(tensor, before[name]) for name, tensor in toy.state_dict().items())
    blocks: Any = toy.model.language_model.layers
    assert not any(block.self_attn.o_proj._forward_pre_hooks for block in blocks)


def test_the_heads_with_the_highest_scores_are_needed_for_pages_and_not_for_names(
    toy: Any, sets: dict[str, list[Sample]], right: dict[str, np.ndarray]
) -> None:
    n = 8  # of each kind of page
    pages = [sample for lines in range(1, 7) for sample in sets[f"page{lines}"][:n]]
    scores = ocr_scores(toy, pages)
    order = np.argsort(-scores, axis=None)
    top = [(int(i) // 4, int(i) % 4) for i in order[:2]]
    assert scores.flat[order[1]] > 0.5
    masked = exact_match(toy, pages, top).mean()
    intact = np.mean([right[f"page{lines}"][:n] for lines in range(1, 7)])
    assert exact_match(toy, sets["naming"], top).mean() > 0.9
    assert scores.flat[order[2]] < 0.15  # these two read, the others do not
    assert masked < 0.2 < 0.9 < intact


def test_the_page_about_the_toys_has_the_measured_figures(folder: Path) -> None:
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["samples"] >= 500
    docs = (Path(__file__).parents[2] / "docs" / "toy-models.md").read_text()
    assert report(result) in docs
    card = (folder / "README.md").read_text()
    assert all(f"{result['exact_match'][task]:.1%}" in card for task in ("page", "text", "transcription", "naming"))


@torch.no_grad()
def test_this_library_gives_the_logits_of_transformers(
    toy: Any, family: ToyFamily, folder: Path, sets: dict[str, list[Sample]]
) -> None:
    model = HookedVLM.from_pretrained(folder)
    samples = [sets["page6"][0], sets["naming"][0], data.page_sample(np.random.default_rng(1), 4, (256, 112))]
    for sample in samples:
        inputs = model.to_inputs(sample.turns[0][0], images=sample.image)
        expected = toy.lm_head(decoder_output(toy, collate(family, [sample])).last_hidden_state)
        torch.testing.assert_close(model(inputs), expected[:, : inputs.shape[1]], atol=1e-4, rtol=0)
