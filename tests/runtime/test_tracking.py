"""Trackers hear of progress and results; a missing library is named."""

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hooked_vlm import cli
from hooked_vlm.errors import InputError
from hooked_vlm.runtime.progress import Progress
from hooked_vlm.runtime.tracking import tracked


class Recorder:
    """Stands for any of the three libraries."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.logged: list[tuple[dict[str, float], int | None]] = []
        self.ended = 0

    @contextmanager
    def run(self, **settings: Any) -> Any:
        self.begun.append(settings)
        yield self
        self.ended += 1

    def log(self, numbers: dict[str, float], step: int | None = None) -> None:
        self.logged.append((numbers, step))

    def add_text(self, name: str, text: str) -> None:
        self.begun.append(text)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.logged.append(({name: value}, step))


def as_library(library: str, heard: Recorder) -> dict[str, Any]:
    if library == "wandb":
        return {"wandb": SimpleNamespace(init=heard.run)}
    if library == "mlflow":
        own = SimpleNamespace(start_run=heard.run, log_params=heard.begun.append, log_metrics=heard.log)
        return {"mlflow": own}
    return {"torch.utils.tensorboard": SimpleNamespace(SummaryWriter=heard.run)}


@pytest.mark.parametrize("library", ["wandb", "mlflow", "tensorboard"])
def test_progress_and_results_are_logged(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Recorder()
    for name, module in as_library(library, heard).items():
        monkeypatch.setitem(sys.modules, name, module)
    with tracked(library, "sweep", {"limit": 3, "data": Path("pages")}) as log:
        with Progress("work", "thing", 2, quiet=True) as bar:
            bar.update()
            bar.update()
        log({"effects": {"3.1": -0.5}, "report": "x.html", "passed": True, "samples": 4})
    numbers: dict[str, float] = {}
    for own, _ in heard.logged:
        numbers |= own
    assert numbers["work/done"] == 2 and numbers["result/effects/3.1"] == -0.5 and numbers["result/samples"] == 4
    assert not any("report" in name or "passed" in name for name in numbers)
    assert heard.ended == 1 and "pages" in str(heard.begun)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match="pip install mlflow"), tracked("mlflow", "sweep", {}):
        pass
    data, out = ["--data", str(tmp_path), "--prompt", "?"], ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", "sweep", *data, *out, "--track", "mlflow"])
    with pytest.raises(SystemExit, match="pip install mlflow"):
        cli.main()


@pytest.mark.slow
def test_wandb_itself_takes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with tracked("wandb", "sweep", {"limit": 3}) as log, Progress("work", "thing", 1, quiet=True) as bar:
        bar.update()
        log({"samples": 1})
    assert list(tmp_path.rglob("*.wandb"))
