"""The prepared run on a GPU: every section runs, on a tiny model here; time and memory that do not suffice are said."""

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; its neighbours are gone again afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield import_module("device")
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.repeats_shapes
def test_every_section_runs_on_a_tiny_model(device: Any, tmp_path: Path) -> None:
    path = device.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    found = json.loads(path.read_text())
    sections = import_module("device_sections").SECTIONS
    assert set(found["tables"]) == {f"tiny: {title}" for title in sections}
    assert set(found["skipped"]) == {"tests marked gpu", "tiny: transformers, flash_attention_2"}
    for own in found["tables"].values():
        assert all(timing["seconds"] > 0 for timing in own["methods"].values()) and own["rounds"] >= 3
    numbers = {name: value for own in found["tables"].values() for name, value in own["numbers"].items()}
    assert numbers["largest difference of logits, share of the largest"] < 1e-4
    assert numbers["largest difference of the metric from the loop's"] < 1e-4
    assert 0 < numbers["host's share, hooked_vlm"] <= 1
    page = path.with_suffix(".md").read_text()
    assert page.startswith("Measured on a CPU") and "no figures of a GPU" in page and "no GPU" in page


def test_nothing_begins_without_time(device: Any, tmp_path: Path) -> None:
    path = device.main(["--tiny", "--device", "cpu", "--minutes", "0", "--out", str(tmp_path)])
    found = json.loads(path.read_text())
    assert not found["tables"] and found["skipped"]["tiny"] == "0 s are left"


def test_without_a_gpu_the_large_models_are_refused(device: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        device.main(["--device", "cpu", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 9), (20.0, None), (8.0, 5), (1000.0, None)])
def test_rounds_follow_from_the_time_left(seconds: float, rounds: int | None, device: Any) -> None:
    run = device.Run("cpu", torch.float32, time.monotonic() + 200)
    run.section("work", seconds, lambda n: {"rounds": n})
    assert run.tables.get("work", {}).get("rounds") == rounds
    assert ("work" in run.skipped) == (rounds is None)


def test_a_section_that_runs_out_of_memory_is_skipped_by_name(device: Any) -> None:
    run = device.Run("cpu", torch.float32, time.monotonic() + 100)
    with run.attempt("2B: memory"):
        raise torch.cuda.OutOfMemoryError
    assert run.skipped == {"2B: memory": "out of memory"}
    with pytest.raises(ZeroDivisionError), run.attempt("other"):
        raise ZeroDivisionError
