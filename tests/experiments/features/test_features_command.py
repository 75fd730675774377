"""`hooked-vlm features` on a toy model: from nothing to a dictionary, tables and a page; refusals."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_vlm import HookedVLM, cli
from hooked_vlm.activations import Activations
from hooked_vlm.errors import HookedVLMError, StudyError
from hooked_vlm.experiments.features import FindConfig, PageConfig, TrainConfig, find, train
from hooked_vlm.experiments.features.effects import Ablation, answer_log_probs, direct_logits
from hooked_vlm.experiments.features.page import feature_page
from hooked_vlm.experiments.features.words import sentence
from hooked_vlm.features import load_dictionary, save_dictionary
from hooked_vlm.features.edits import EditFeatures
from hooked_vlm.features.labelled import TOY_LABELS, toy_pictures
from hooked_vlm.features.reading import read_tokens
from hooked_vlm.inputs.vlm_inputs import VLMInputs

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return TrainConfig(
        hook=HOOK, out=tmp_path_factory.mktemp("trained"), pictures=24, n_features=64, k=4, n_tokens=4096, batch=256,
        group="image", measure_every=8, quiet=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config: TrainConfig, model: HookedVLM) -> Any:
    return train(config, model)


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", "features", *words, "--json", "--quiet"])
    cli.main()
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def test_a_dictionary_is_trained_on_toy_pictures(config: TrainConfig, trained: Any, model: HookedVLM) -> None:
    saved = load_dictionary(config.out / "dictionary")
    saved.check_fits(model)
    for name, tensor in trained.dictionary.tensors.items():
        assert torch.equal(saved.tensors[name], tensor)
    curve = pd.read_csv(config.out / "training.csv")
    assert curve["step"].tolist() == [8, 16] and curve["mean squared error"].is_monotonic_decreasing
    acts = Activations(config.out / "activations")
    assert acts.n_samples == 24 and set(acts.index["group"]) == {"image"}


def test_stored_activations_give_the_same_dictionary(
    config: TrainConfig, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["train", str(config.out / "activations"), "--hook", HOOK, "--out", str(tmp_path / "out")]
    settings = {"n_features": 64, "k": 4, "n_tokens": 4096, "batch": 256, "group": "image", "measure_every": 8}
    for name, value in settings.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    told = call(monkeypatch, capsys, *words)
    assert told["explained variance"] == trained.measured["explained variance"].iloc[-1]
    assert torch.equal(load_dictionary(told["dictionary"]).W_enc, trained.dictionary.W_enc)


def test_tokens_are_read_with_what_they_show(model: HookedVLM) -> None:
    pictures = list(toy_pictures(4, 0, 2))
    read = read_tokens(model, HOOK, pictures, TOY_LABELS)
    for number, picture in enumerate(pictures):
        own = read.tokens.picture == number
        _, cache = model.run_with_cache(picture.sample.inputs(model), names_filter=HOOK)
        image = picture.sample.inputs(model).image_tokens(0)
        torch.testing.assert_close(read.values[own], cache[HOOK][0, image], rtol=1e-4, atol=1e-4)
        x0, y0, x1, y1 = read.boxes[own].T
        for name, (a, b, c, d), _ in picture.sample.boxes:
            inside = (np.minimum(x1, c) - np.maximum(x0, a)).clip(0) * (np.minimum(y1, d) - np.maximum(y0, b)).clip(0)
            shows = inside > 0.5 * (c - a) * (d - b)
            assert read.tokens.labels[own][shows, TOY_LABELS.index(name)].all()
    drawn = pictures[3]
    assert drawn.object_mask is not None and drawn.object_name is not None
    shown = read.tokens.labels[read.tokens.picture == 3]
    assert shown[:, TOY_LABELS.index(drawn.object_name)].sum() == shown.sum() > 0


def test_find_writes_what_it_says(
    config: TrainConfig, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    told = call(monkeypatch, capsys, "find", str(config.out), "--pictures", "12", "--out", str(tmp_path))
    table = pd.read_csv(tmp_path / "meanings.csv", dtype={"label": str})
    assert tuple(table["label"]) == TOY_LABELS and told["found"] == table["found"].tolist().count(True)
    assert [row["label"] for row in told["labels"]] == list(TOY_LABELS)
    features = pd.read_csv(tmp_path / "features.csv")
    assert len(features) == 64 and float(np.mean(features["active"].to_numpy())) * 64 == pytest.approx(4, abs=0.5)


def test_named_boxes_of_a_data_set_are_labels(
    config: TrainConfig, trained: Any, model: HookedVLM, tmp_path: Path
) -> None:
    lines = []
    for number, picture in enumerate(toy_pictures(6, 3)):
        file = tmp_path / f"{number}.png"
        picture.sample.images[0].save(file)
        boxes = [{"name": "corner", "box": [0, 0, 16, 16]}]
        lines.append(json.dumps({"id": f"s{number}", "prompt": "What?", "images": [file.name], "boxes": boxes}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    found = find(
        FindConfig(dictionary=config.out, data=tmp_path / "data.jsonl", out=tmp_path / "out", quiet=True), model
    )
    assert found.meanings["label"].tolist() == ["corner"] and found.read.tokens.labels.sum() == 6


def test_the_page_shows_what_was_found(config: TrainConfig, trained: Any, model: HookedVLM, tmp_path: Path) -> None:
    own = PageConfig(dictionary=config.out, pictures=12, shown=5, ablated=3, out=tmp_path, quiet=True)
    found = find(own, model)
    page = feature_page(own, found, model)
    assert len(page.entries) == 5 and len(page.html) < 2_000_000
    for entry in page.entries:
        values = found.features[:, entry.feature]
        assert entry.largest == pytest.approx(values.max()) and sum(entry.counts) == (values > 0).sum()
        assert entry.said in [sentence(row) for row in found.meanings.to_dict("records")] or not entry.label
        assert "3 pictures" in entry.effect or (values > 0).sum() < 3 or len(entry.marks) < 3


def test_direct_logits_are_the_norm_and_unembedding_of_the_direction(trained: Any, model: HookedVLM) -> None:
    ((raised, lowered),) = direct_logits(model, trained.dictionary, [5], n=3)
    direction = trained.dictionary.W_dec[5]
    normed = direction / (direction.square().mean() + model.cfg.eps).sqrt() * model.ln_final.w
    logits = normed @ model.W_U
    logits = logits - logits.mean()
    order = logits.argsort(descending=True)
    for found, tokens in ((raised, order[:3]), (lowered, order.flip(0)[:3])):
        assert [token for token, _ in found] == [model.to_string([int(t)]) for t in tokens]
        np.testing.assert_allclose([value for _, value in found], logits[tokens].detach(), rtol=1e-3, atol=1e-3)
    assert direct_logits(
        model, replace(trained.dictionary, hook_name="blocks.0.ln1.hook_normalized", out_hook_name=""), [5]
    ) == [((), ())]


@torch.no_grad()
def test_the_effect_of_an_ablation_is_that_of_single_runs(trained: Any, model: HookedVLM) -> None:
    samples = [picture.sample for picture in toy_pictures(6, 1, 2)]  # answers of several lengths: a padded batch
    edit = EditFeatures(trained.dictionary, (7,))
    together = answer_log_probs(model, VLMInputs.concat([own.inputs(model) for own in samples]), edit)
    changes = []
    for sample, ours in zip(samples, together, strict=True):
        inputs = sample.inputs(model)
        per_run = []
        for hooks in ([], edit.hooks(model, inputs)):
            logits = model.run_with_hooks(inputs, fwd_hooks=hooks)[0].log_softmax(-1)
            answer = inputs.positions.generated[0].tolist()
            per_run.append(sum(float(logits[pos - 1, inputs.tokens[0, pos]]) for pos in answer))
        assert ours == pytest.approx(per_run[1], abs=1e-3)
        changes.append(per_run[1] - per_run[0])
    ablation = Ablation(model, trained.dictionary, samples)
    said = re.search(r"by ([+-][\d.e+-]+) on average over the 6 pictures", ablation.effect(7, range(6)))
    assert said is not None and float(said[1]) == pytest.approx(np.mean(changes), rel=0.06, abs=5e-5)
    assert ablation.effect(7, [0, 1]) == ""


MISTAKES = {
    "no such folder": (["find", "nowhere"], "nowhere"),
    "no activations": (["train", "nowhere", "--hook", HOOK], "no activations"),
    "no such hook": (["train", "--hook", "blocks.9.hook_resid_post", "--pictures", "2"], "blocks.9"),
    "a setting out of range": (["train", "--hook", HOOK, "--n-features", "0"], "--n-features"),
    "processes that do not divide the batch": (["train", "--hook", HOOK, "--processes", "3"], "--processes"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, said = MISTAKES[case]
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", "features", *words, "--out", str(tmp_path / "out"), "--quiet"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert said in str(stopped.value) and "\n" not in str(stopped.value)


@pytest.mark.parametrize(("name", "value"), [("pictures", 3), ("permutations", 0), ("at_least", 1.0), ("shown", 0)])
def test_settings_out_of_range_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="--" + name.replace("_", "-")):
        replace(PageConfig(dictionary=tmp_path), **{name: value}).check()


def test_a_dictionary_of_another_model_is_refused(trained: Any, model: HookedVLM, tmp_path: Path) -> None:
    save_dictionary(
        replace(trained.dictionary, hook_name="vision.blocks.0.hook_resid_post", out_hook_name=""), tmp_path
    )
    with pytest.raises(HookedVLMError, match="192 numbers"):
        find(FindConfig(dictionary=tmp_path, out=tmp_path / "out", quiet=True), model)


def test_positions_of_an_answer_stand_for_what_follows(model: HookedVLM) -> None:
    pictures = list(toy_pictures(4, 0, 2))
    read = read_tokens(model, HOOK, pictures, TOY_LABELS, at="answer")
    for number, picture in enumerate(pictures):
        own = read.tokens.picture == number
        said = [TOY_LABELS[int(row.argmax())] for row in read.tokens.labels[own]]
        assert "".join(said) == picture.sample.answer and (read.tokens.labels[own].sum(1) == 1).all()
        inputs = picture.sample.inputs(model)
        _, cache = model.run_with_cache(inputs, names_filter=HOOK)
        first = int(inputs.positions.final[0])
        torch.testing.assert_close(read.values[own], cache[HOOK][0, first:-1], rtol=1e-4, atol=1e-4)
    with pytest.raises(HookedVLMError, match="no positions of the answer"):
        read_tokens(model, "hook_image_features", pictures, TOY_LABELS, at="answer")
