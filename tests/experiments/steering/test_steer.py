"""`hooked-vlm steer` on the toy model: files, figures from the parts they claim, answers, refusals."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hooked_vlm import HookedVLM, InputError, cli
from hooked_vlm.data import read_samples
from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.steering import SteerConfig, Steered, run
from hooked_vlm.experiments.steering.answers import changes
from hooked_vlm.steering import SteeringVectors, steering_vectors
from hooked_vlm.toys import NAMING_PROMPT, naming_sample


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")


def drawing(rng: np.random.Generator, name: str) -> Image.Image:
    image = naming_sample(rng, name=name).image
    assert image is not None
    return image


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of drawn circles and squares, and the squares as JSON lines with answers."""
    folder = tmp_path_factory.mktemp("drawings")
    for seed, name in enumerate(("circle", "square")):
        rng = np.random.default_rng(seed)
        (folder / name).mkdir()
        for i in range(12):
            drawing(rng, name).save(folder / name / f"{i:02d}.png")
    lines = [
        json.dumps({"id": f"s{i}", "prompt": NAMING_PROMPT, "images": [f"square/{i // 2:02d}.png"], "answer": text})
        for i, text in enumerate(["square", "box"] * 10)
    ]
    (folder / "squares.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config(data: Path, out: Path, **settings: Any) -> SteerConfig:
    given = {"prompt": NAMING_PROMPT, "at": "final", "max_new_tokens": 4, "quiet": True, **settings}
    return SteerConfig(data / "circle", data / "square", out=out, **given)


@pytest.fixture(scope="module")
def result(model: HookedVLM, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Steered:
    return run(config(data, tmp_path_factory.mktemp("out")), model)


def test_vectors_are_those_of_the_library(result: Steered, model: HookedVLM, data: Path) -> None:
    sets = [list(read_samples(data / name, NAMING_PROMPT)) for name in ("circle", "square")]
    expected = steering_vectors(model, *sets)
    found = SteeringVectors.load(result.file, model)
    assert (found.vectors == expected.vectors).all() and found.held_out == expected.held_out
    table = pd.read_csv(result.config.out / "tables" / "separability.csv")
    np.testing.assert_allclose(table.to_numpy(float), expected.separability.to_numpy(float))


def test_answers_are_of_held_out_items_with_and_without_the_vector(
    result: Steered, model: HookedVLM, data: Path
) -> None:
    squares = list(read_samples(data / "square", NAMING_PROMPT))
    held_out = [squares[i] for i in result.vectors.held_out[1]]
    assert result.answers["id"].tolist() == [sample.id for sample in held_out] and len(held_out) == 3
    for row, sample in zip(result.answers.to_dict("records"), held_out, strict=True):
        inputs = sample.inputs(model)
        assert row["unsteered"] == model.generate(inputs, 4, return_type="str")
        hooks = result.vectors.at(result.vectors.best, 2.0, "final").hooks(model, inputs)
        assert row["× 2"] == model.generate(inputs, 4, fwd_hooks=hooks, return_type="str")
    assert "circle" in result.answers["× 2"].tolist()


def test_the_report_begins_with_the_answer(result: Steered) -> None:
    page = result.report.read_text("utf-8")
    best = result.best
    assert (
        result.answer[0] in page
        and f"AUC of {best['AUC']:.3f}" in result.answer[0]
        and "negative items" in result.answer[0]
    )
    assert page.index("held-out items have an AUC of") < page.index("Newcombe")
    assert result.summary.startswith(result.answer[0]) and str(result.file) in result.summary
    assert json.loads((result.config.out / "run.json").read_text())["data"]["positive"]["items"] == 12


def test_shares_of_changed_answers_by_hand() -> None:
    answers = pd.DataFrame({"unsteered": list("abcd"), "× 1": list("abxx"), "random × 1": list("abcx")})
    row: Any = changes(answers, [1.0]).iloc[0]
    assert (row["changed"], row["random vector"], row["difference"], row["n prompts"]) == (0.5, 0.25, 0.25, 4)
    assert row["changed, low"] < 0.5 < row["changed, high"] and row["difference, low"] < 0 < row["difference, high"]


def test_pictures_are_the_unit_where_asked(model: HookedVLM, data: Path, tmp_path: Path) -> None:
    asked = SteerConfig(
        data / "circle", data / "squares.jsonl", out=tmp_path, prompt=NAMING_PROMPT, unit="picture", max_new_tokens=2,
        quiet=True, samples=2, ask_prompt=NAMING_PROMPT, ask_image=(data / "circle" / "00.png",), layers=(1, 2),
    )  # fmt: skip
    found = run(asked, model)
    assert found.best["n negative"] == 3 and len(found.vectors.held_out[1]) == 6  # two items of every picture
    assert found.answers["id"].tolist() == ["prompt"] and found.vectors.layers == (1, 2)
    assert "negative pictures" in found.answer[0]


def test_the_command_prints_json(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--positive", str(data / "circle"), "--negative", str(data / "square"), "--prompt", NAMING_PROMPT]
    more = ["--out", str(tmp_path), "--scales", "2", "--max-new-tokens", "2", "--samples", "1", "--json", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", "steer", *words, *more])
    cli.main()
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err == "" and Path(found["vectors"]).is_file() and Path(found["report"]).is_file()
    assert found["best_layer"] in range(4) and 0 <= found["auc"]["low"] <= found["auc"]["AUC"] <= 1
    assert set(found["answers"][0]) == {"id", "prompt", "unsteered", "× 2", "random × 2"}
    assert found["held_out"] == [3, 3]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"scales": ()}, "--scales"),
        ({"scales": (1.0, 0.0)}, "--scales"),
        ({"scales": (1.0, 1.0)}, "twice"),
        ({"samples": 0}, "--samples"),
        ({"ask": Path("a"), "ask_prompt": "b"}, "--ask-prompt"),
        ({"ask_image": (Path("a"),)}, "--ask-image"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Any, word: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=word):
        run(config(data, tmp_path, **settings))


def test_pictures_cannot_be_the_unit_of_texts(model: HookedVLM, data: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"prompt": "ab"}\n' * 1)
    with pytest.raises(StudyError, match="--unit picture"):
        run(
            SteerConfig(data / "circle", tmp_path / "texts.jsonl", out=tmp_path / "out", prompt="a", unit="picture"),
            model,
        )
    with pytest.raises(InputError, match="at least 8"):
        run(SteerConfig(data / "circle", tmp_path / "texts.jsonl", out=tmp_path / "out", prompt="a", quiet=True), model)
