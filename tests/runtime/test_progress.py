"""Progress: what listeners and progress.jsonl hear of."""

import json
from pathlib import Path

import pytest

from hooked_vlm.errors import OutputError
from hooked_vlm.runtime import progress as module
from hooked_vlm.runtime.progress import Progress, Step, listening, recorded


def steps_of(n: int, total: int | None, found: int = 0) -> None:
    with Progress("work", "thing", total, quiet=True) as bar:
        if found:
            bar.found(found)
        for _ in range(n):
            bar.update()


def test_listeners_hear_of_the_first_step_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *(10 + 0.3 * i for i in range(100))])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    heard: list[Step] = []
    with listening(heard.append):
        steps_of(8, 20, found=2)
    assert heard[-1].step == 10 and heard[-1].total == 20 and heard[-1].what == "work"
    assert 3 <= len(heard) < 8, "about one a second"
    last = heard[-1]
    assert last.per_second == pytest.approx(8 / last.seconds), "the rate leaves out what was found"
    assert last.seconds_left == pytest.approx(10 / last.per_second, abs=1e-2)
    with listening(heard.append):
        steps_of(1, None)
    assert heard[-1].total is None and heard[-1].seconds_left is None
    n = len(heard)
    steps_of(1, 1)
    assert len(heard) == n, "nobody listens any more"


def test_steps_are_lines_of_a_file(tmp_path: Path) -> None:
    with recorded(tmp_path / "run"):
        steps_of(3, 3)
        with recorded(tmp_path / "inner"):
            steps_of(1, 1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "progress.jsonl").read_text().splitlines()]
    assert [(line["step"], line["total"]) for line in lines if line["total"] == 3][-1] == (3, 3)
    assert lines[-1]["total"] == 1 and not (tmp_path / "inner").exists()
    assert {"at", "what", "unit", "per_second", "seconds", "seconds_left"} < set(lines[0])
    with recorded(tmp_path):
        steps_of(0, 0)
        steps_of(0, 2, found=2)
    (line,) = (tmp_path / "progress.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"), recorded(tmp_path / "file"):
        steps_of(1, 1)
