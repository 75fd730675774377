"""Progress of long work: a bar in the terminal, lines in progress.jsonl, and whoever else listens.

with listening(lambda step: run.log(step.as_dict())):  # run = wandb.init(project="heads"), for example
    sweep_many(model, cases, "parts")
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from hooked_vlm.errors import OutputError
from hooked_vlm.runtime.files import why

FILE = "progress.jsonl"
SECONDS_BETWEEN = 1.0
"""Listeners hear of a step once in this time at most, and of the last one always."""


@dataclass(frozen=True)
class Step:
    """How far work is."""

    what: str
    step: int
    """Number of things done, those found done included."""
    total: int | None
    """Number of all, if it is known."""
    unit: str
    """What is counted."""
    per_second: float
    """Rate of what was done since the work began or was resumed."""
    seconds: float
    """Time since then."""
    seconds_left: float | None
    """At this rate, if the total is known and something was done."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Listener = Callable[[Step], Any]
_LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener` with every step of the work inside."""
    token = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Append the steps of the work inside to `progress.jsonl` of a folder, one JSON object a line.

    Work that is inside of recorded work already is recorded there and nowhere else.

    Raises:
        OutputError: it cannot be written.
    """
    if any(isinstance(listener, _File) for listener in _LISTENERS.get()):
        yield
        return
    with listening(_File(folder / FILE)):
        yield


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, step: Step) -> None:
        at = {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(at | step.as_dict()) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {why(error)}") from error


class Progress:
    """A bar with total, rate and time left, whose steps listeners hear of."""

    def __init__(self, what: str, unit: str, total: int | None, *, quiet: bool = False) -> None:
        self._listeners = _LISTENERS.get()
        self.what, self.unit, self.total = what, unit, total
        self._bar = tqdm(total=total, desc=what, unit=unit, disable=quiet)
        self._begun, self._told = time.perf_counter(), -SECONDS_BETWEEN
        self._found = self._done = 0
        self._told_of: int | None = None

    def found(self, n: int = 1) -> None:
        """Count things that were done before; the rate leaves them out."""
        self._found += n
        if not self._bar.disable:
            self._bar.initial += n
        self._bar.update(n)

    def update(self, n: int = 1, note: str = "") -> None:
        """Count things that are done now. `note` is shown behind the bar."""
        self._done += n
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(n)
        if self._seconds() - self._told >= SECONDS_BETWEEN:
            self._tell()

    def _seconds(self) -> float:
        return time.perf_counter() - self._begun

    def _tell(self) -> None:
        seconds = self._told = self._seconds()
        rate = self._done / seconds if seconds else 0.0
        step, left = self._found + self._done, None
        self._told_of = step
        if self.total is not None and rate:
            left = round(max(0, self.total - step) / rate, 3)
        told = Step(self.what, step, self.total, self.unit, round(rate, 6), round(seconds, 3), left)
        for listener in self._listeners:
            listener(told)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._told_of != self._found + self._done and (self._done or (self._found and kind is None)):
            self._tell()
