"""Time of the steps of a run."""

import time
from pathlib import Path

import pytest

from hooked_vlm.experiments.common.steps import Clock


def test_a_finished_step_is_timed_once_and_an_interrupted_one_adds_up(tmp_path: Path) -> None:
    path, run = tmp_path / "seconds.json", {"model": "a", "lengths": (1, 2)}
    clock = Clock(path, run)
    with clock("first"):
        time.sleep(0.02)
    with pytest.raises(KeyboardInterrupt), clock("second"):
        time.sleep(0.02)
        raise KeyboardInterrupt
    before = dict(clock.seconds)
    assert list(before) == ["first", "second"] and min(before.values()) >= 0.02
    resumed = Clock(path, run)
    assert resumed.seconds == before
    with resumed("first"), resumed("second"):
        time.sleep(0.02)
    assert resumed.seconds["first"] == before["first"]
    assert resumed.seconds["second"] >= before["second"] + 0.02
    finished = dict(resumed.seconds)
    with resumed("second"):
        pass
    assert resumed.seconds == finished == Clock(path, run).seconds


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": {"model": "b"}, "steps": {"first": [1.0, true]}}'])
def test_times_of_another_run_or_a_broken_file_are_dropped(content: str, tmp_path: Path) -> None:
    path = tmp_path / "seconds.json"
    path.write_text(content)
    assert Clock(path, {"model": "a"}).seconds == {}
