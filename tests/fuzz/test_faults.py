"""Kills and full disks: what is there is whole, what went wrong is said in a sentence, and the next run goes on."""

import errno
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fuzz.records import data_set
from fuzz.seeds import checkpoints, models, picture
from fuzz.work import WORK, differences, done
from hooked_vlm import CheckpointError, viewer
from hooked_vlm.errors import OutputError
from hooked_vlm.experiments.common.figures import new_figure, save_figure
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.ocr_heads.data.store import load_or_build
from hooked_vlm.experiments.ocr_heads.examples import Example
from hooked_vlm.runtime.store import ResultStore
from tools.toy_training import train
from tools.toy_training.family import write_checkpoint

KILLS = Path(__file__).parent / "kills.py"
QUICK = ("data sets",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in WORK])
def test_a_disk_that_fills_at_any_file_stops_the_run_which_then_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the n-th file is put in place."""
    monkeypatch.chdir(tmp_path)
    replace, calls = os.replace, [0, 0]

    def full(source: Any, target: Any, **more: Any) -> None:
        calls[0] += 1
        if calls[0] == calls[1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target, **more)

    for function in ("replace", "rename"):
        monkeypatch.setattr(os, function, full)
    Path("whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    done(name, Path("out"))
    last = calls[0]
    for moment in sorted({2, random.Random(0).randint(2, last), last}):
        folder = tmp_path / f"full at {moment}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        calls[:] = 0, moment
        with pytest.raises(OutputError, match="No space left") as refused:
            done(name, Path("out"))
        assert "\n" not in str(refused.value)
        assert differences(tmp_path / "whole" / "out", folder / "out", complete=False) == []
        done(name, Path("out"))
        assert differences(tmp_path / "whole" / "out", folder / "out", complete=True) == []


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """The system refuses to let any file grow larger; C++'s and Rust's writers meet that, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FRAME = pd.DataFrame({"value": np.random.default_rng(0).random(5000)})


def _figure(folder: Path) -> None:
    figure = new_figure(4, 3)
    figure.subplots().plot([1, 2, 3])
    save_figure(figure, folder / "figure")


def _report(folder: Path) -> None:
    report = Report("x")
    report.section("x", "y" * 5000)
    report.write(folder, {})


def _table(folder: Path) -> None:
    report = Report("x")
    report.section("x")
    report.table("table", FRAME, "caption", shown=1)
    report.write(folder, {})


def _view(folder: Path) -> None:
    model = models()["toy-qwen2-vl"]
    image = picture()
    inputs = model.to_inputs("a", images=[image])
    viewer.attention(model, inputs, answer="7", images=[image]).save(folder / "page.html")


def _data_set(folder: Path) -> None:
    noise = [Example("q", ("a",), (picture(64, 64),))]
    load_or_build(folder, "set", {"seed": 0}, lambda: (noise, "made up"))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "part": lambda folder: ResultStore(folder).put({"image": 3}, FRAME),
    "figure": _figure,
    "report": _report,
    "table": _table,
    "view": _view,
    "data set": _data_set,
    "training state": lambda folder: train.save_state(folder / "state.pt", {"x": torch.zeros(5000)}),
    "training log": lambda folder: train.Log(folder / "log.csv", 0).write({"step": 1, "lr": 0.5}),
    "toy checkpoint": lambda folder: write_checkpoint(folder, {"x": torch.zeros(5000)}, {}, ("<a>",)),
    "checkpoint": lambda folder: models()["toy-qwen2-vl"].save_pretrained(folder / "saved"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_says_in_a_sentence_that_it_cannot_write_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    for once in (models, data_set, checkpoints):  # what is made once and kept in files is made before
        once()
    limit = 100 if name == "training log" else 2000
    with files_of_at_most(limit), pytest.raises((OutputError, CheckpointError), match="File too large") as refused:
        WRITERS[name](tmp_path)
    assert "\n" not in str(refused.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == limit]
    WRITERS[name](tmp_path)


@pytest.mark.slow
def test_a_small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, which fills while a study runs; with more room the study goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        monkeypatch.chdir(tmp_path)
        done("ocr-heads", Path("out"))
        monkeypatch.chdir(disk)
        with pytest.raises(OutputError, match="No space left"):
            done("ocr-heads", Path("out"))
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        assert differences(tmp_path / "out", disk / "out", complete=False) == []
        done("ocr-heads", Path("out"))
        assert differences(tmp_path / "out", disk / "out", complete=True) == []
    finally:
        monkeypatch.chdir(tmp_path)
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_kills_at_random_moments(name: str) -> None:
    said = subprocess.run([sys.executable, KILLS, "--kills", "5", name], check=True, capture_output=True, text=True)
    assert f"{name}: 5 kills" in said.stdout and ", 0 faults," in said.stdout, said.stdout
