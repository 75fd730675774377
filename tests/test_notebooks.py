"""The notebooks run as they stand, pictures included; the one for a published checkpoint is Python at least."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
PICTURES = {
    "1_cache_and_look": {"attention", "mass", "writes"},
    "2_patch_an_image_region": {"places", "tokens", "heads"},
    "3_ablate_and_steer": {"zeroed"},
}
SAYS = {
    "1_cache_and_look": "heads that look at the value most: ['2.0', '2.1']",
    "2_patch_an_image_region": "the page says 7h2k, the model now says nwil",
    "3_ablate_and_steer": "a drawn square, steered: circle",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / f"{name}.py"))
    assert {path.stem for path in (tmp_path / "out" / "notebooks").iterdir()} == PICTURES[name]
    assert SAYS[name] in capsys.readouterr().out


def test_every_notebook_is_python() -> None:
    names = sorted(FOLDER.glob("*.py"))
    assert {path.stem for path in names} == {*PICTURES, "4_qwen2_vl_2b"}
    for path in names:
        compile(path.read_text(encoding="utf-8"), path.name, "exec")
