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
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
import torch
from tqdm.auto import tqdm

from hooked_vlm.runtime.store import ResultStore

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

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

    @property
    def path(self) -> Path:
        return self.parts.path(self.key)

    @property
    def name(self) -> str:
        """The function and the key, for messages."""
        key = json.dumps(self.key)
        return f"{self.work.__name__} of {key if len(key) <= 200 else key[:200] + '...'}"


class Workers(ABC):
    """Executes tasks."""

    def __init__(self) -> None:
        self.size, self.seconds = 0, 0.0
        """Sum of `Task.size` of the executed tasks, and the seconds they took."""

    def tables(
        self, tasks: Sequence[Task], what: str, *, each: str = "task", counted: str | None = None, quiet: bool = False
    ) -> list[pd.DataFrame]:
        """Return the tables of all tasks, in their order, as read from the store.

        Missing ones are computed and stored first; tasks with the same key are one.

        Args:
            what: label of the progress bar.
            each: name of a task in the bar.
            counted: name of the quantity in `Task.size`; the bar then shows its rate per second.
            quiet: show no bar.

        Raises:
            OutputError: a table cannot be written.
            WorkerError: see the class.
        """
        stored = [task.parts.get(task.key) for task in tasks]
        missing = {task.path: task for task, table in zip(tasks, stored, strict=True) if table is None}
        n_found = sum(table is not None for table in stored)
        if missing and not n_found:
            _say_what_changed(next(iter(missing.values())))
        bar = tqdm(total=n_found + len(missing), initial=n_found, desc=what, unit=each, disable=quiet)
        with bar, closing(self.results(list(missing.values()))) as results:
            begun, done = time.perf_counter(), 0
            try:
                for task, table in results:
                    task.parts.put(task.key, table)
                    done += task.size
                    if counted is not None:
                        rate = done / (time.perf_counter() - begun)
                        bar.set_postfix_str(f"{rate:,.0f} {counted}/s", refresh=False)
                    bar.update()
            finally:
                if done:
                    self.count(done, time.perf_counter() - begun)
        return [_read(task) if table is None else table for task, table in zip(tasks, stored, strict=True)]

    @abstractmethod
    def results(self, tasks: Sequence[Task]) -> Generator[tuple[Task, pd.DataFrame], None, None]:
        """Execute tasks; yield each with its table, in the order they finish. Closing the generator stops the rest."""

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

    def results(self, tasks: Sequence[Task]) -> Generator[tuple[Task, pd.DataFrame], None, None]:
        state = WorkerState(self.model)
        for task in tasks:
            setup = task.setup
            prepared = () if setup is None else state.prepared(id(setup), lambda setup=setup: setup)
            yield task, state.table(task.work, (*prepared, *task.arguments))


class WorkerState:
    """A model and the result of the last shared setup."""

    def __init__(self, model: "HookedVLM") -> None:
        self.model = model
        self._key: Any = None
        self._value: Any = None

    @torch.no_grad()
    def prepared(self, key: Any, get: Callable[[], SharedSetup]) -> tuple[Any]:
        """The result of a shared setup, run if its key differs from the last one."""
        if key != self._key:
            self._key = self._value = None  # before there are two
            setup = get()
            self._key, self._value = key, setup.make(self.model, *setup.arguments)
        return (self._value,)

    @torch.no_grad()
    def table(self, work: Callable[..., pd.DataFrame], arguments: tuple[Any, ...]) -> pd.DataFrame:
        """The table of a task."""
        return work(self.model, *arguments)


def _say_what_changed(task: Task) -> None:
    """Say why results that are there are not used."""
    if changed := task.parts.changed(task.key):
        warnings.warn(
            f"results in {task.parts.folder} are made anew: since they were stored, the model's "
            f"{', '.join(changed)} changed",
            stacklevel=3,
        )


def _read(task: Task) -> pd.DataFrame:
    table = task.parts.get(task.key)
    assert table is not None
    return table
