"""`hooked-vlm atlas`: files, page, answer; data of one's own; the same again without work."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hooked_vlm import cli
from hooked_vlm.atlas import Atlas
from hooked_vlm.toys import make_page

SMALL = ("atlas", "toy-qwen2-vl", "--n", "2", "--groups", "0", "--pictures", "2")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", *arguments])
    cli.main()


@pytest.mark.repeats_shapes
def test_page_tables_and_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call(monkeypatch, *SMALL, "--out", str(out), "--json")
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    found = Atlas.load(out)
    assert data["model"] == found.model == "toy-qwen2-vl"
    assert data["scores"]["ocr"]["heads"]["2.1"] == pytest.approx(found.values("ocr")[2, 1], abs=1e-6)
    assert data["scores"]["entropy"]["above_null"] is None
    page = (out / "atlas.html").read_text(encoding="utf-8")
    links = set(re.findall(r"pictures/[\w-]+\.html", page))
    assert links == {f"pictures/{number}{end}.html" for number in (0, 1) for end in ("", "-vision")}
    assert all((out / link).is_file() for link in links)
    parts = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("*.parquet")}
    call(monkeypatch, *SMALL, "--out", str(out), "--quiet")
    text = capsys.readouterr().out
    assert text.startswith("toy-qwen2-vl: ") and all(len(line) <= 80 for line in text.splitlines() if "/" not in line)
    assert parts == {path: path.stat().st_mtime_ns for path in (out / "parts").glob("*.parquet")}  # nothing was redone


@pytest.mark.repeats_shapes
def test_samples_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = make_page(np.random.default_rng(3), n_lines=2)
    page.image.save(tmp_path / "page.png")
    line = page.lines[0]
    boxes = [[char, *box] for char, box in zip(line.value, line.value_boxes, strict=True)]
    row = {"id": "mine", "prompt": page.question(0), "images": ["page.png"], "answer": line.value}
    row["boxes"] = [{"name": box[0], "box": box[1:]} for box in boxes]
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    data = str(tmp_path / "own.jsonl")
    call(monkeypatch, *SMALL, "--data", data, "--out", str(tmp_path / "out"), "--quiet")
    found = Atlas.load(tmp_path / "out")
    assert found.observed["ocr"].stimuli == ("mine",) and "text_retrieval" not in found.observed
    assert np.isfinite(found.values("localisation")).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--groups", "5"), "5 random groups are too few"),
        (("--n", "0"), "at least one stimulus"),
        (("--pictures", "-1"), "must be 0 to 254"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_done_is_refused(
    arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "atlas", "toy-qwen2-vl", "--out", "out", *arguments)
    assert says in str(ended.value)
