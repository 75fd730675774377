"""Tasks and their workers: a task computes one table, stored under a key of everything that decides its content.

    with InProcess(model) as workers:
        tasks = [Task(store, {**settings, "image": image.id}, score, (image, settings)) for image in images]
        tables = workers.tables(tasks, "scores")

Stored tables are not computed again, so interrupted work resumes where it stopped. Workers are this process
(`InProcess`) or the machines of a Ray cluster (`hooked_vlm.runtime.ray_workers.OnRay`). Either way this process writes
the store, and the tables are the same.
"""

import json
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
import torch

from hooked_vlm.errors import GeometryError, HookedVLMError, ImageError, InputError, NotFiniteError, OutputError
from hooked_vlm.runtime.progress import Progress
from hooked_vlm.runtime.store import ResultStore

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

SKIPPED = (InputError, ImageError, GeometryError, NotFiniteError)
"""Errors of what a task was given, which say nothing about other tasks."""
Some = TypeVar("Some", bound="Workers")
"""The class entered (`typing.Self`, which beartype does not know in methods)."""


@dataclass(frozen=True, eq=False)
class SharedSetup:
    """Preparation that several tasks share, such as an encoded picture.

    A worker runs it for the first of them and keeps the result until a task comes with another setup.
    """

    make: Callable[..., Any]
    """A function on the top level of a module, called as make(model, *arguments)."""
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Task:
    """A table to compute, and its place in a store."""

    parts: ResultStore
    key: Mapping[str, Any]
    """Everything that decides the table's content, the model's weights included."""
    work: Callable[..., pd.DataFrame]
    """A function on the top level of a module, called as work(model, *arguments), or work(model, result of `setup`,
    *arguments). Gradients are off."""
    arguments: tuple[Any, ...] = ()
    """Pickled if the work is done in another process."""
    size: int = 1
    """Its weight in the throughput: a number of tokens or runs."""
    setup: SharedSetup | None = None
    label: str = ""
    """What it is about, for whoever made it."""

    @property
    def path(self) -> Path:
        return self.parts.path(self.key)

    @property
    def name(self) -> str:
        """The function and the key, for messages."""
        key = json.dumps(self.key)
        return f"{self.work.__name__} of {key if len(key) <= 200 else key[:200] + '...'}"


@dataclass(frozen=True, eq=False)
class Stored:
    """The place of a table that is stored."""

    parts: ResultStore
    key: Mapping[str, Any]

    def read(self) -> pd.DataFrame:
        """The table.

        Raises:
            OutputError: it was removed or damaged since it was stored.
        """
        table = self.parts.get(self.key)
        if table is None:
            raise OutputError(f"{self.parts.path(self.key)} was removed or damaged by another program: run this again")
        return table


Result = tuple[Task, "pd.DataFrame | HookedVLMError"]
"""A task with its table, or with the reason why it has none."""


class Workers(ABC):
    """Executes tasks."""

    def __init__(self) -> None:
        self.size, self.seconds = 0, 0.0
        """Sum of `Task.size` of the executed tasks, and the seconds they took."""

    def tables(self, tasks: Iterable[Task], what: str, **settings: Any) -> list[pd.DataFrame]:
        """Return the tables of all tasks, in their order, as read from the store; `settings` as of `stored`."""
        return [stored.read() for stored in self.stored(tasks, what, **settings) if stored is not None]

    def stored(
        self,
        tasks: Iterable[Task],
        what: str,
        *,
        each: str = "task",
        counted: str | None = None,
        total: int | None = None,
        quiet: bool = False,
        skip: Callable[[Task, HookedVLMError], None] | None = None,
    ) -> "list[Stored | None]":
        """Have the tables of all tasks in their stores, and return where they are, in the order of the tasks.

        Tasks are taken one by one, as workers become free, and dropped when they are done. Tables that are missing
        are computed and stored; tasks with the same key are one.

        Args:
            what: label of the progress bar.
            each: name of a task in the bar.
            counted: name of the quantity in `Task.size`; the bar then shows its rate per second.
            total: number of tasks; by default their length, if they have one.
            quiet: show no bar.
            skip: called with a task that cannot be done because of what it was given (`SKIPPED`), and the reason; its
                place in the list is None. By default such an error ends the work.

        Raises:
            OutputError: a table cannot be written.
            WorkerError: see the class.
        """
        if total is None and isinstance(tasks, Sized):
            total = len(tasks)
        places: list[Stored | None] = []
        numbers: dict[Path, list[int]] = {}
        failed: set[Path] = set()
        with Progress(what, each, total, quiet=quiet) as progress:
            missing = self._missing(tasks, places, numbers, progress)
            with closing(self.results(missing)) as results:
                begun, done = time.perf_counter(), 0
                try:
                    for task, table in results:
                        if isinstance(table, HookedVLMError):
                            if skip is None:
                                raise _with_label(table, task.label)
                            skip(task, table)
                            failed.add(task.path)
                        else:
                            task.parts.put(task.key, table)
                            done += task.size
                        rate = done / (time.perf_counter() - begun)
                        progress.update(note="" if counted is None else f"{rate:,.0f} {counted}/s")
                finally:
                    if done:
                        self.count(done, time.perf_counter() - begun)
        for number in (number for path in failed for number in numbers[path]):
            places[number] = None
        return places

    def _missing(
        self,
        tasks: Iterable[Task],
        places: "list[Stored | None]",
        numbers: dict[Path, list[int]],
        progress: Progress,
    ) -> Iterator[Task]:
        """The tasks whose tables are not stored, each once; the place of every task is noted on the way."""
        for task in tasks:
            path = task.path
            numbers.setdefault(path, []).append(len(places))
            places.append(Stored(task.parts, task.key))
            if len(numbers[path]) > 1 or task.parts.get(task.key) is not None:
                progress.found()
            else:
                if len(numbers) == 1:
                    _say_what_changed(task)
                yield task

    @abstractmethod
    def results(self, tasks: Iterator[Task]) -> Generator[Result, None, None]:
        """Execute tasks, taken as workers become free; yield each with its table, or with an error of `SKIPPED`, in the
        order they finish. Closing the generator stops the rest."""

    @property
    @abstractmethod
    def device(self) -> str:
        """The device of the workers."""

    def count(self, size: int, seconds: int | float) -> None:
        """Add to `size` and `seconds`."""
        self.size, self.seconds = self.size + size, self.seconds + seconds

    def rest(self) -> None:  # noqa: B027 (not all hold something)
        """Release replicas until there are more tasks."""

    def close(self) -> None:  # noqa: B027 (not all hold something)
        """Release all resources."""

    def __enter__(self: Some) -> Some:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class InProcess(Workers):
    """Executes one task after the other in this process."""

    def __init__(self, model: "HookedVLM") -> None:
        super().__init__()
        self.model = model

    @property
    def device(self) -> str:
        return str(self.model.cfg.device)

    def results(self, tasks: Iterator[Task]) -> Generator[Result, None, None]:
        state = WorkerState(self.model)
        for task in tasks:
            setup = task.setup
            try:
                prepared = () if setup is None else state.prepared(setup, lambda setup=setup: setup)
                found: pd.DataFrame | HookedVLMError = state.table(task.work, (*prepared, *task.arguments))
            except SKIPPED as error:
                found = error
            yield task, found


class WorkerState:
    """A model and the result of the last shared setup."""

    def __init__(self, model: "HookedVLM") -> None:
        self.model = model
        self._key: Any = None
        self._value: Any = None

    @torch.no_grad()
    def prepared(self, key: Any, get: Callable[[], SharedSetup]) -> tuple[Any]:
        """The result of a shared setup, run if its key differs from the last one."""
        if self._key is None or key != self._key:
            self._key = self._value = None  # before there are two
            setup = get()
            self._key, self._value = key, setup.make(self.model, *setup.arguments)
        return (self._value,)

    @torch.no_grad()
    def table(self, work: Callable[..., pd.DataFrame], arguments: tuple[Any, ...]) -> pd.DataFrame:
        """The table of a task."""
        return work(self.model, *arguments)


def _with_label(error: HookedVLMError, label: str) -> HookedVLMError:
    """The error, saying which task it is of."""
    if not label or repr(label) in str(error):
        return error
    labelled = type(error)(f"{label!r}: {error}")
    labelled.__cause__ = error
    return labelled


def _say_what_changed(task: Task) -> None:
    """Say why results that are there are not used."""
    if changed := task.parts.changed(task.key):
        warnings.warn(
            f"results in {task.parts.folder} are made anew: since they were stored, the model's "
            f"{', '.join(changed)} changed",
            stacklevel=3,
        )
