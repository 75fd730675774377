"""The README's code runs as it stands, block after block."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_every_python_block_of_the_readme_runs(capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    answer, line = capsys.readouterr().out.strip().split(" is written in ")
    assert line.endswith(f"= {answer}")
    assert names["mass"].shape == (names["model"].cfg.n_heads,)
    assert set(names["table"]["intervention"][:2]) == {"ReplaceImageKV 2.1", "ReplaceImageKV 2.0"}


def test_every_python_block_of_the_page_about_sweeps_runs(capsys) -> None:
    page = (Path(__file__).parents[1] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "sweeps.md", "exec"), names)
    assert "vision tower: 1 pass instead of 16" in capsys.readouterr().out
    assert names["result"].values.shape == (16, 1)


def test_every_python_block_of_the_page_about_patching_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "patching.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "patching.md", "exec"), names)
    assert names["result"].estimate(layer=2, place="value").value > 0.9
    assert names["result"].estimate(layer=3, place="value").value < 0.1
    assert names["folded"].cfg.processed == ("fold_ln", "center_unembed", "fold_value_biases")


def test_every_python_block_of_the_page_about_head_attribution_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "head-attribution.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "head-attribution.md", "exec"), names)
    assert "held-out correlation: 0.9" in capsys.readouterr().out
    assert names["result"].measured.coefficients.shape == (3, 16)
    assert (tmp_path / "out" / "head-attribution" / "report.html").exists()


def test_every_python_block_of_the_page_about_the_viewer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "viewer.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "viewer.md", "exec"), names)
    written = {"attention.html", "lens.html", "patches.html", "values.html", "heads.html", "tokens.html"}
    assert {path.name for path in tmp_path.glob("*.html")} == written
    assert "".join(chip.text for chip in names["view"].chips if chip.row is not None) == "4s4g"


def test_every_python_block_of_the_page_about_activations_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "activations.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "activations.md", "exec"), names)
    assert names["x"].shape == (len(names["evidence"]), names["model"].cfg.d_model) and len(names["x"])
    assert len(names["image_rows"]) == len(names["acts"]["hook_image_features"])


def test_the_files_it_points_to_exist() -> None:
    root = Path(__file__).parents[1]
    for name in ("README.md", "docs/patching.md", "docs/viewer.md", "docs/notebooks/README.md"):
        page = root / name
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), target
