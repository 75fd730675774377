"""`hooked-vlm atlas-compare`."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_atlas import made_up_atlas

from hooked_vlm import cli
from hooked_vlm.atlas.comparison import compare
from hooked_vlm.atlas.result import Atlas


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", "atlas-compare", *map(str, arguments)])
    cli.main()


def trained(name: str, values: np.ndarray) -> None:
    values += 0.005 * np.random.default_rng(2).standard_normal(values.shape)
    if name == "ocr":
        values[:, 2, 1] += 0.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    whole = tmp_path_factory.mktemp("atlases")
    made_up_atlas("before", (3, 4), (2, 3)).save(whole / "a")
    made_up_atlas("after", (3, 4), (2, 3), edit=trained).save(whole / "b")
    return whole / "a", whole / "b"


def test_it_answers_first_and_writes_table_and_page(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, *folders, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[:2] == ["a: before", "b: after"] and lines[3].startswith("1 of 12 heads of the language model changed")
    assert all(len(line) <= 80 or str(tmp_path) in line for line in lines)
    written = pd.read_csv(tmp_path / "out" / "compare.csv")
    expected = compare(*map(Atlas.load, folders)).table
    pd.testing.assert_frame_equal(written, expected, check_dtype=False)
    assert "Model B" in (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.csv", "compare.html"]


def test_without_a_folder_it_writes_nothing_and_json_says_the_same(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, *folders, "--json", "--quiet")
    told = json.loads(capsys.readouterr().out)
    assert told["towers"]["language"] == {"changed": ["2.1"], "heads": 12}
    assert told["scores"]["ocr"]["up"] == 1 and told["scores"]["ocr"]["head"] == "2.1"
    assert not list(tmp_path.iterdir())


def test_a_folder_without_an_atlas_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"no atlas in .*hooked-vlm atlas"):
        call(monkeypatch, folders[0], tmp_path)
