"""The code of the README, and of pages whose results are looked at, runs as it stands (the others: test_docs.py)."""

from pathlib import Path

import pytest
from pages import run_page


def test_every_python_block_of_the_readme_runs(capsys) -> None:
    names = run_page("README.md")
    answer, line = capsys.readouterr().out.strip().split(" is written in ")
    assert line.endswith(f"= {answer}")
    assert names["mass"].shape == (names["model"].cfg.n_heads,)
    assert set(names["table"]["intervention"][:2]) == {"ReplaceImageKV 2.1", "ReplaceImageKV 2.0"}


def test_every_python_block_of_the_page_about_sweeps_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/sweeps.md")
    assert "vision tower: 1 pass instead of 16" in capsys.readouterr().out
    assert names["result"].values.shape == (16, 1)
    assert len(names["table"]) == 16 and set(names["table"]["answer"]) == {names["page"].lines[2].value}


@pytest.mark.repeats_shapes
def test_every_python_block_of_the_page_about_patching_runs() -> None:
    names = run_page("docs/patching.md")
    assert names["result"].estimate(layer=2, place="value").value > 0.9
    assert names["result"].estimate(layer=3, place="value").value < 0.1
    assert names["folded"].cfg.processed == ("fold_ln", "center_unembed", "fold_value_biases")


@pytest.mark.repeats_shapes
@pytest.mark.usefixtures("sketches")
def test_every_python_block_of_the_page_about_head_attribution_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/head-attribution.md")
    assert "held-out correlation: 0.9" in capsys.readouterr().out
    assert names["result"].measured.coefficients.shape == (3, 16)
    assert (tmp_path / "out" / "head-attribution" / "report.html").exists()


@pytest.mark.repeats_shapes
@pytest.mark.usefixtures("sketches")
def test_every_python_block_of_the_page_about_the_viewer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/viewer.md")
    written = {"attention.html", "lens.html", "patches.html", "values.html", "heads.html", "tokens.html"}
    assert {path.name for path in tmp_path.glob("*.html")} == written
    assert "".join(chip.text for chip in names["view"].chips if chip.kind == "answer") == "4s4g"


def test_every_python_block_of_the_page_about_activations_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/activations.md")
    assert names["x"].shape == (len(names["evidence"]), names["model"].cfg.d_model) and len(names["x"])
    assert len(names["image_rows"]) == len(names["acts"]["hook_image_features"])
