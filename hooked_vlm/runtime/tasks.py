"""Work in units: each makes one table, kept as a part under the key of what decides it.

    with InProcess(model) as workers:
        units = [Task(parts, {**settings, "image": image.id}, score, (image, settings)) for image in images]
        tables = workers.tables(units, "scores")

What is there already is not done again, so interrupted work goes on where it stopped. Who does the rest is left open:
this process (`InProcess`), or the machines of a Ray cluster (`hooked_vlm.runtime.ray_workers.OnRay`). Either way this
process writes the parts, and the tables are the same.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pandas as pd
import torch
from tqdm.auto import tqdm

from hooked_vlm.runtime.store import ResultStore

Some = TypeVar("Some", bound="Workers")
"""The class entered (`typing.Self`, which beartype does not know in methods)."""


@dataclass(frozen=True, eq=False)
class SharedSetup:
    """What several units begin with, such as an encoded picture.

    A worker makes it for the first of them and keeps it until a unit comes with another one.
    """

    make: Callable[..., Any]
    """A function on the top level of a module, called as make(model, *arguments)."""
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Task:
    """One table to be made, and where it is kept."""

    parts: ResultStore
    key: Mapping[str, Any]
    """All that decides the table's content, the model's weights included."""
    work: Callable[..., pd.DataFrame]
    """A function on the top level of a module, called as work(model, *arguments), or with what `common` made in front
    of the arguments. Gradients are off."""
    arguments: tuple[Any, ...] = ()
    """They are pickled if the work is done elsewhere."""
    size: int = 1
    """How much it counts in the throughput: its tokens, its runs."""
    common: SharedSetup | None = None

    @property
    def path(self) -> Path:
        return self.parts.path(self.key)

    @property
    def name(self) -> str:
        """For messages."""
        key = json.dumps(self.key)
        return f"{self.work.__name__} of {key if len(key) <= 200 else key[:200] + '...'}"


class Workers(ABC):
    """Whoever does units of work."""

    def __init__(self) -> None:
        self.size, self.seconds = 0, 0.0
        """How much was done (`Task.size`), and how long that took."""

    def tables(
        self, units: Sequence[Task], what: str, *, each: str = "unit", counted: str | None = None, quiet: bool = False
    ) -> list[pd.DataFrame]:
        """The tables of all units, in their order, as they are read from their parts.

        Those that are not there are made; units with the same key are one.

        Args:
            what: what the progress bar is called.
            each: what a unit is.
            counted: what `Task.size` counts, if the bar is to show how many of them are done in a second.
            quiet: no bar.

        Raises:
            OutputError: a part cannot be written.
            WorkerError: see the class.
        """
        found = [unit.parts.get(unit.key) for unit in units]
        missing = {unit.path: unit for unit, table in zip(units, found, strict=True) if table is None}
        n_found = sum(table is not None for table in found)
        bar = tqdm(total=n_found + len(missing), initial=n_found, desc=what, unit=each, disable=quiet)
        with bar, closing(self.made(list(missing.values()))) as units_made:
            begun, done = time.perf_counter(), 0
            try:
                for unit, table in units_made:
                    unit.parts.put(unit.key, table)
                    done += unit.size
                    if counted is not None:
                        rate = done / (time.perf_counter() - begun)
                        bar.set_postfix_str(f"{rate:,.0f} {counted}/s", refresh=False)
                    bar.update()
            finally:
                if done:
                    self.count(done, time.perf_counter() - begun)
        return [_read(unit) if table is None else table for unit, table in zip(units, found, strict=True)]

    @abstractmethod
    def made(self, units: Sequence[Task]) -> Generator[tuple[Task, pd.DataFrame], None, None]:
        """Every unit with its table, in the order in which they are finished. Closed early, the rest is left."""

    @property
    @abstractmethod
    def device(self) -> str:
        """What the work is done on."""

    def count(self, size: int, seconds: int | float) -> None:
        """Add to what was done."""
        self.size, self.seconds = self.size + size, self.seconds + seconds

    def rest(self) -> None:  # noqa: B027 (not all hold something)
        """Let go of replicas until there is more to do."""

    def close(self) -> None:  # noqa: B027 (not all hold something)
        """Let go of what they hold."""

    def __enter__(self: Some) -> Some:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class InProcess(Workers):
    """One unit after the other, here."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def device(self) -> str:
        return str(self.model.cfg.device)

    def made(self, units: Sequence[Task]) -> Generator[tuple[Task, pd.DataFrame], None, None]:
        bench = WorkerState(self.model)
        for unit in units:
            common = unit.common
            given = () if common is None else bench.common(id(common), lambda common=common: common)
            yield unit, bench.table(unit.work, (*given, *unit.arguments))


class WorkerState:
    """A model, and what was made of it for the unit before."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._key: Any = None
        self._value: Any = None

    @torch.no_grad()
    def common(self, key: Any, get: Callable[[], SharedSetup]) -> tuple[Any]:
        """What units of this key begin with."""
        if key != self._key:
            self._key = self._value = None  # before there are two
            common = get()
            self._key, self._value = key, common.make(self.model, *common.arguments)
        return (self._value,)

    @torch.no_grad()
    def table(self, work: Callable[..., pd.DataFrame], arguments: tuple[Any, ...]) -> pd.DataFrame:
        """A unit's table."""
        return work(self.model, *arguments)


def _read(unit: Task) -> pd.DataFrame:
    table = unit.parts.get(unit.key)
    assert table is not None
    return table
