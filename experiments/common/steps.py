"""Time that the steps of a run take, also of a run that is resumed."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from hooked_vlm.runtime.files import atomic_write

Step = Callable[[str], AbstractContextManager[Any]]
"""Called with a step's name; the step is done inside of the context."""


def untimed(name: str) -> AbstractContextManager[Any]:
    """A step whose time nobody asks for."""
    return nullcontext()


class Clock:
    """Seconds of every step, kept in a file: an interrupted step adds its time, a finished one is not timed again.

    clock = Clock(out / "seconds.json", {"model": "toy-qwen2-vl"})
    with clock("verify"):
        ...
    clock.seconds  # {"verify": 10.2}
    """

    def __init__(self, path: Path, run: Any) -> None:
        """`run` is what the times belong to: times of another run in the file are dropped."""
        self._path, self._run = path, json.loads(json.dumps(run))
        self._steps: dict[str, list[Any]] = {}
        """Name -> [seconds, whether it is finished]."""
        found = _read(path)
        if isinstance(found, dict) and found.get("run") == self._run and isinstance(found.get("steps"), dict):
            self._steps = found["steps"]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a step.

        Raises:
            OutputError: the file cannot be written.
        """
        before, finished = self._steps.get(name, [0.0, False])
        start, done = time.perf_counter(), False
        try:
            yield
            done = True
        finally:
            if not finished:
                self._steps[name] = [before + time.perf_counter() - start, done]
                self._write()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every step, in the order they were begun."""
        return {name: float(seconds) for name, (seconds, _) in self._steps.items()}

    def _write(self) -> None:
        text = json.dumps({"run": self._run, "steps": self._steps}, indent=2) + "\n"
        atomic_write(self._path, lambda aside: aside.write_text(text, encoding="utf-8"))


def _read(path: Path) -> Any:
    """Content of a JSON file; None if there is none or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
