"""Training is a function of its configuration: interrupted and resumed, it ends in the same state."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import ONE_TOY
from PIL import Image

from hooked_vlm import HookedVLM
from hooked_vlm.toys import pages as data
from tools.toy_training import batches, guidance, heads, imitate, qwen2_vl, train
from tools.toy_training.families import FAMILIES, INTERNVL2, QWEN2_VL
from tools.toy_training.family import ToyFamily
from tools.toy_training.internvl2 import start_from_qwen2_vl
from tools.toy_training.recipes import RECIPES, Recipe, Stage

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "held_out", lambda seed, n: {})
    monkeypatch.setattr(train, "choose_reading_heads", lambda model, recipe, seed: [(3, 0), (1, 1)])
    monkeypatch.setattr(imitate, "IMAGES", 4)


def small_recipe(family: ToyFamily) -> Recipe:
    stage = Stage(
        0, continuations=1, texts=1, text_lines=(0.5, 0.5), echo=0.5, pages=2, full_pages=1, strips=2, drawings=2,
        lines=(0.5, 0.5), page_sizes=((112, 48),), strip_sizes=((32, 32),), drawing_sizes=((48, 48),), decoys=0.5,
    )  # fmt: skip
    recipe = replace(RECIPES[family.name], curriculum=(stage,), steps=6, specialise_from=3)
    return replace(recipe, schedule=((0, 0.5), (2, 1.0), (6, 0.0)), imitation=min(recipe.imitation, 2))


def configuration(family: ToyFamily, out: Path, resume: bool = False) -> train.TrainConfig:
    return train.TrainConfig(
        out=out,
        model=family.name,  # pyright: ignore[reportArgumentType]
        resume=resume,
        threads=1,
        log_every=1,
        save_every=2,
    )


@pytest.mark.parametrize("name", ONE_TOY)
@pytest.mark.usefixtures("small_steps")
def test_an_interrupted_run_resumes_to_the_uninterrupted_state(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    recipe = small_recipe(family)
    whole = train.train(configuration(family, tmp_path / "whole"), recipe)

    real = train.step_samples

    def interrupted(recipe: Recipe, seed: int, step: int) -> list[list[data.Sample]]:
        if step == 5:
            raise KeyboardInterrupt
        return real(recipe, seed, step)

    with monkeypatch.context() as patched:
        patched.setattr(train, "step_samples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(configuration(family, tmp_path / "parts"), recipe)
    resumed = train.train(configuration(family, tmp_path / "parts", resume=True), recipe)

    for (parameter, expected), actual in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, actual), parameter
    logs = []
    for run in ("whole", "parts"):
        with (tmp_path / run / "training_log.csv").open(newline="") as file:
            logs.append([{**row, "seconds": ""} for row in csv.DictReader(file)])
    assert logs[0] == logs[1] and [row["step"] for row in logs[0]] == [str(n) for n in range(1, 7)]


def test_training_pixels_are_what_the_image_processor_makes(tmp_path: Path) -> None:
    from transformers import Qwen2VLImageProcessorPil

    QWEN2_VL.save(QWEN2_VL.build(num_hidden_layers=1), tmp_path, num_hidden_layers=1)
    processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    for size in (data.PAGE_SIZE, *data.OTHER_PAGE_SIZES, (32, 32)):
        pages = [data.make_page(np.random.default_rng(seed), 1 + seed % 2, size) for seed in range(2)]
        expected = processor([Image.fromarray(page.pixels) for page in pages], return_tensors="pt")
        images = torch.from_numpy(np.stack([page.pixels for page in pages]))
        assert torch.equal(qwen2_vl.patches_of(images), expected["pixel_values"])


def reference_logits(model: Any, batch: batches.Batch) -> torch.Tensor:
    """The same by the reference's own entrance, images and all."""
    placeholder = batch.tokens == model.config.image_token_id
    images: dict[str, torch.Tensor] = {"pixel_values": batch.pixel_values}  # pyright: ignore[reportAssignmentType]
    if model.config.model_type == "qwen2_vl":
        grids = torch.tensor([[1, batch.grid.patches.rows, batch.grid.patches.cols]] * len(batch.tokens))  # pyright: ignore
        images |= {"image_grid_thw": grids, "mm_token_type_ids": placeholder.long()}
    return model(input_ids=batch.tokens, **images).logits


@every_family
@pytest.mark.parametrize("size", [data.PAGE_SIZE, (256, 112)], ids=["page", "wide"])
def test_the_training_forward_is_the_reference_forward(family: ToyFamily, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    reference = family.build(num_hidden_layers=2).eval()
    samples = [data.page_sample(np.random.default_rng(seed), 3, size, turns=2) for seed in range(3)]
    batch = batches.collate(family, samples)
    assert batch.grid is not None
    assert (batch.tokens == reference.config.image_token_id).sum(1).tolist() == [batch.grid.n_tokens] * 3
    with torch.no_grad():
        expected = reference_logits(reference, batch)
        family.prepare_training(reference)
        actual = reference.lm_head(batches.decoder_output(reference, batch).last_hidden_state)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@every_family
def test_a_saved_checkpoint_is_the_trained_model(family: ToyFamily, tmp_path: Path) -> None:
    """In `transformers` and in this library, from the published layout."""
    torch.manual_seed(0)
    trained = family.build().eval()
    family.save(trained, tmp_path)
    samples = [data.page_sample(np.random.default_rng(seed), 3, turns=2) for seed in range(2)]
    batch = batches.collate(family, samples)
    ours = HookedVLM.from_pretrained(tmp_path)
    inputs = ours.to_inputs([sample.turns[0][0] for sample in samples], images=[sample.image for sample in samples])
    with torch.no_grad():
        expected = batches.decoder_output(trained, batch).last_hidden_state
        assert torch.equal(batches.decoder_output(family.load(tmp_path), batch).last_hidden_state, expected)
        logits = trained.lm_head(expected)[0, : inputs.shape[1]]
        torch.testing.assert_close(ours(inputs)[0], logits, atol=1e-4, rtol=0)


def test_the_decoder_starts_as_toy_qwen2_vls() -> None:
    torch.manual_seed(0)
    model, other = INTERNVL2.build(), QWEN2_VL.build()
    start_from_qwen2_vl(model, other)
    sample = data.text_sample(np.random.default_rng(0), 2)
    batch = batches.collate(QWEN2_VL, [sample])  # the same text: the families' prompts differ
    with torch.no_grad():
        expected = batches.decoder_output(other, batch).last_hidden_state
        positions = INTERNVL2.positions(batch.tokens.shape[1], None)
        actual = batches.decoder_output(model, replace(batch, position_ids=positions)).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_imitation_is_zero_for_the_teacher_itself_and_moves_the_vision_side_only() -> None:
    torch.manual_seed(0)
    teacher, model = QWEN2_VL.build().eval(), INTERNVL2.build()
    images = imitate.step_images(np.random.default_rng(0), (128, 128))[:2]
    assert imitate.imitation_loss(model, model, images).item() == 0
    imitate.imitation_loss(model, teacher, images).backward()
    moved = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"vision_tower", "multi_modal_projector"}
    assert all(p.grad is None for p in teacher.parameters())


def test_a_gate_of_zero_removes_exactly_one_head() -> None:
    torch.manual_seed(0)
    toy = QWEN2_VL.build(num_hidden_layers=1).eval()
    batch = batches.collate(QWEN2_VL, [data.text_sample(np.random.default_rng(0), 2)])
    with torch.no_grad():
        with heads.kept_heads(toy, heads.head_mask((1, 4), [(0, 2)], 1)):
            gated = batches.decoder_output(toy, batch).last_hidden_state
        block: Any = toy.model.language_model.layers[0]
        block.self_attn.o_proj.weight[:, 2 * 48 : 3 * 48] = 0
        removed = batches.decoder_output(toy, batch).last_hidden_state
    torch.testing.assert_close(gated, removed, atol=1e-6, rtol=0)


@every_family
def test_evidence_is_where_the_answers_characters_are_drawn(family: ToyFamily) -> None:
    """Blanking a character's box changes the pixels of its evidence tokens, and they hold most of its ink."""
    sample = data.page_sample(np.random.default_rng(2), 3, (256, 112))
    batch = batches.collate(family, [sample])
    mask = heads.evidence_mask([sample], batch)[0]
    producing = np.flatnonzero(mask.any(1))
    boxes = sample.page.lines[sample.target_lines[0]].value_boxes  # pyright: ignore[reportOptionalMemberAccess]
    labels = batch.labels[0, producing + 1].tolist()
    assert family.tokenizer.decode(labels) == sample.turns[0][1] and len(boxes) == len(producing)
    for position, box in zip(producing, boxes, strict=True):
        shares = batch.grid.overlaps(box)  # pyright: ignore[reportOptionalMemberAccess]
        assert (mask[position] == (shares > heads.EVIDENCE_SHARE)).all() and shares[mask[position]].sum() > 0.8


@every_family
def test_guidance_asks_where_the_keys_are_and_where_they_are_needed(family: ToyFamily) -> None:
    text = data.text_sample(np.random.default_rng(0), 3, turns=2)
    batch = batches.collate(family, [text])
    decode = family.tokenizer.decode
    lines = dict(line.split(data.SEPARATOR) for line in text.turns[0][0].split("\n")[:-1])
    told: dict[str, str] = {}
    for _, position, key in guidance._in_text(family, [text]):
        told[key] = told.get(key, "") + decode([int(batch.tokens[0, position])])
    assert told == lines
    page = data.page_sample(np.random.default_rng(0), 3, (256, 112), turns=2)
    for sample in (text, page):
        batch = batches.collate(family, [sample])
        produced: dict[str, list[int]] = {}
        for _, position, key in guidance._asked([sample], batch):
            produced.setdefault(key, []).append(int(batch.tokens[0, position + 1]))
        answers = {question.removesuffix("?").split()[-1]: answer for question, answer in sample.turns}
        assert {key: decode(tokens) for key, tokens in produced.items()} == answers
    keys = {line.key: line for line in page.page.lines}  # pyright: ignore[reportOptionalMemberAccess]
    seen = set()
    for _, position, key in guidance._in_image(family, [page], batch):
        x0, y0, x1, y1 = batch.grid.boxes[position - family.image_start]  # pyright: ignore[reportOptionalMemberAccess]
        a0, b0, a1, b1 = keys[key].value_box
        assert x0 < a1 and a0 < x1 and y0 < b1 and b0 < y1
        seen.add(key)
    assert seen == set(keys)
