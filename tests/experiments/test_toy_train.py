"""Training is a function of its configuration: interrupted and resumed, it ends in the same state."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hooked_vlm.experiments.toy import batches, data, heads, model, train


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = train.Stage(
        0, continuations=1, texts=1, text_lines=(0.5, 0.5), echo=0.5, pages=2, full_pages=1, strips=2, drawings=2,
        lines=(0.5, 0.5), page_sizes=((112, 48),), strip_sizes=((32, 32),), drawing_sizes=((48, 48),),
    )  # fmt: skip
    monkeypatch.setattr(train, "CURRICULUM", (stage,))
    monkeypatch.setattr(train, "held_out", lambda seed, n: {})
    monkeypatch.setattr(train, "choose_reading_heads", lambda model, config: [(3, 0), (1, 1)])


def configuration(out: Path, resume: bool = False) -> train.TrainConfig:
    schedule = ((0, 0.5), (2, 1.0), (6, 0.0))
    return train.TrainConfig(
        out=out, resume=resume, threads=1, steps=6, schedule=schedule, specialise_from=3, log_every=1, save_every=2
    )


@pytest.mark.usefixtures("small_steps")
def test_an_interrupted_run_resumes_to_the_uninterrupted_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train.train(configuration(tmp_path / "whole"))

    real = train.step_samples

    def interrupted(config: train.TrainConfig, step: int) -> list[list[data.Sample]]:
        if step == 5:
            raise KeyboardInterrupt
        return real(config, step)

    with monkeypatch.context() as patched:
        patched.setattr(train, "step_samples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(configuration(tmp_path / "parts"))
    resumed = train.train(configuration(tmp_path / "parts", resume=True))

    for (name, expected), actual in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, actual), name
    logs = []
    for run in ("whole", "parts"):
        with (tmp_path / run / "training_log.csv").open(newline="") as file:
            logs.append([{**row, "seconds": ""} for row in csv.DictReader(file)])
    assert logs[0] == logs[1] and [row["step"] for row in logs[0]] == [str(n) for n in range(1, 7)]


def test_training_pixels_are_what_the_image_processor_makes(tmp_path: Path) -> None:
    from transformers import Qwen2VLImageProcessorPil

    model.save_checkpoint_folder(model.build_model(num_hidden_layers=1), tmp_path, num_hidden_layers=1)
    processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    for size in (data.PAGE_SIZE, *data.OTHER_PAGE_SIZES, (32, 32)):
        pages = [data.make_page(np.random.default_rng(seed), 1 + seed % 2, size) for seed in range(2)]
        expected = processor([Image.fromarray(page.pixels) for page in pages], return_tensors="pt")
        images = torch.from_numpy(np.stack([page.pixels for page in pages]))
        assert torch.equal(model.patches_of(images), expected["pixel_values"])


def test_the_training_forward_is_the_reference_forward() -> None:
    torch.manual_seed(0)
    reference = model.build_model(num_hidden_layers=2).eval()
    samples = [data.page_sample(np.random.default_rng(seed), 3, turns=2) for seed in range(3)]
    batch = batches.collate(samples)
    assert batch.images is not None
    height, width = batch.images.shape[1:3]
    side = model.PATCH_SIZE
    with torch.no_grad():
        expected = reference(
            input_ids=batch.tokens,
            pixel_values=model.patches_of(batch.images),
            image_grid_thw=torch.tensor([[1, height // side, width // side]] * 3),
            mm_token_type_ids=(batch.tokens == reference.config.image_token_id).long(),
        ).logits
        model.batch_vision_attention(reference)
        actual = reference.lm_head(batches.decoder_output(reference, batch).last_hidden_state)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_gate_of_zero_removes_exactly_one_head() -> None:
    torch.manual_seed(0)
    toy = model.build_model(num_hidden_layers=1).eval()
    batch = batches.collate([data.text_sample(np.random.default_rng(0), 2)])
    with torch.no_grad():
        with heads.kept_heads(toy, heads.head_mask((1, 4), [(0, 2)], 1)):
            gated = batches.decoder_output(toy, batch).last_hidden_state
        block: Any = toy.model.language_model.layers[0]
        block.self_attn.o_proj.weight[:, 2 * 48 : 3 * 48] = 0
        removed = batches.decoder_output(toy, batch).last_hidden_state
    torch.testing.assert_close(gated, removed, atol=1e-6, rtol=0)


def test_evidence_is_the_share_of_the_characters_box() -> None:
    # A box of 10 x 10 over the corner of four tokens: 9 %, 21 %, 21 % and 49 % of its area.
    mask = heads.evidence_tokens((13, 13, 23, 23), (2, 2), min_overlap=0.1)
    assert mask.tolist() == [False, True, True, True]
    assert heads.evidence_tokens((13, 13, 23, 23), (2, 2), min_overlap=0.08).all()
