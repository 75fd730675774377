"""Units of work on a Ray cluster: actors that hold a replica of the model each, one unit at a time.

    with OnRay(model, "auto") as workers:  # "local" starts a cluster of this machine's own
        table = sweep_many(model, cases, out / "parts", workers=workers)

A worker loads the model itself, by its name, and is refused if it comes to another one. This process hands out the
units and writes the parts, so the machines share no files. A worker that dies is replaced and its unit done again.
"""

import pickle
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import redirect_stdout
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from hooked_vlm.errors import WorkerError
from hooked_vlm.runtime.ray_cluster import Share, connect, n_gpus_of, share_of
from hooked_vlm.runtime.tasks import SharedSetup, Task, Workers, WorkerState

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

ATTEMPTS = 3
"""A unit whose worker dies is begun so many times; so many workers in a row may die before one is ready."""
CPU_WORKERS = 2
"""By default, where there are no GPUs."""
PATIENCE = 20.0
"""Seconds without a word from any worker, after which it is looked up whether there is still a place for one."""


class OnRay(Workers):
    """Workers on a Ray cluster. They are hired when there is something to do, and stay until `close`.

    Args:
        model: whose replicas do the work. They are loaded by `model.cfg.model_name` (a bundled toy model, a folder that
            every machine sees under this path, or a hub name) in its dtype.
        address: "local" for a cluster of this machine's own, which ends with the work; "auto" for the one that runs
            here; or "host:port". An open connection (`ray.init`) is used as it is.
        n: how many workers; by default one for each GPU of the cluster, or two where there are none.
        device: of the replicas: "cpu" leaves GPUs alone; by default CUDA if the cluster has GPUs.
        attempts: how often a unit is begun whose worker dies.

    Raises:
        WorkerError: fewer than one worker, or a model that is spread or quantised; and from `tables`: Ray is not
            installed, the cluster is not there or too small, replicas are not the same model, workers keep dying.
            Errors of the work itself arrive as they are.
    """

    def __init__(
        self,
        model: "HookedVLM",
        address: str = "local",
        n: int | None = None,
        *,
        device: str | None = None,
        attempts: int = ATTEMPTS,
    ) -> None:
        super().__init__()
        if n is not None and n < 1:
            raise WorkerError(f"the number of workers must be at least 1, got {n}")
        if getattr(model, "device_map", None) or model.cfg.quantize is not None:
            what = "quantised" if model.cfg.quantize is not None else "spread over devices (--device auto)"
            raise WorkerError(f"workers hold whole replicas in the model's own dtype, and this model is {what}")
        self.model, self.address, self.attempts = model, address, attempts
        self._asked, self._asked_device = n, device
        self.n_lost = 0
        """Workers that died at their work so far."""
        self._loading: dict[Any, Any] = {}
        """Actors by the answer they will give when they are ready."""
        self._idle: list[Any] = []
        self._n_failed = 0
        """Actors that died before they were ready, one after the other."""

    def tables(self, *args: Any, **kwargs: Any) -> list[pd.DataFrame]:
        with redirect_stdout(sys.stderr):  # where Ray's own words about lost workers belong
            return super().tables(*args, **kwargs)

    def made(self, units: Sequence[Task]) -> Generator[tuple[Task, pd.DataFrame], None, None]:
        if not units:
            return  # a cluster is not asked for nothing
        self._hire(self.n - len(self._idle) - len(self._loading))
        waiting, begun, working = deque(units), Counter[Path](), dict[Any, tuple[Any, Task]]()
        shelf = _Shelf(self._ray, units)

        def hand_out() -> None:
            while waiting and self._idle:
                actor, unit = self._idle.pop(), waiting.popleft()
                begun[unit.path] += 1
                working[actor.do.remote(unit.work, unit.arguments, shelf.place(unit))] = (actor, unit)

        try:
            while waiting or working:
                hand_out()
                answer = self._next_answer([*working, *self._loading])
                if answer in self._loading:
                    self._welcome(answer)
                    continue
                actor, unit = working.pop(answer)
                table = self._got(answer)
                if table is None:
                    self._replace(unit, begun[unit.path])
                    waiting.appendleft(unit)
                    continue
                self._idle.append(actor)
                if isinstance(table, BaseException):
                    raise table
                shelf.done(unit)
                hand_out()  # before this process turns to the table
                yield unit, table
        finally:
            for actor, _ in working.values():  # what they do is not wanted any more
                self._ray.kill(actor)

    @property
    def device(self) -> str:
        connected = "_connection" in vars(self)
        return self._device if connected else str(self.model.cfg.device)  # nobody was asked

    def rest(self) -> None:
        """Dismiss the workers; others are hired when there is more to do."""
        for actor in [*self._idle, *self._loading.values()]:
            self._ray.kill(actor)
        self._idle, self._loading = [], {}

    def close(self) -> None:
        """Dismiss the workers; a cluster that was started for them ends."""
        self.rest()
        if "_connection" in vars(self) and self._connection[1]:
            self._ray.shutdown()
        for name in ("_connection", "n", "share", "_actor"):
            vars(self).pop(name, None)

    # ---------------------------------------------------------------- what they are

    @cached_property
    def _connection(self) -> tuple[Any, bool]:
        return connect(self.address)

    @property
    def _ray(self) -> Any:
        return self._connection[0]

    @property
    def _device(self) -> str:
        return self._asked_device or ("cuda" if n_gpus_of(self._ray) else "cpu")

    @property
    def _on_gpus(self) -> bool:
        return self._device.startswith("cuda")

    @cached_property
    def n(self) -> int:
        """How many there are."""
        return self._asked or (max(1, n_gpus_of(self._ray)) if self._on_gpus else CPU_WORKERS)

    @cached_property
    def share(self) -> Share:
        """What each reserves."""
        return share_of(self._ray, self.n, self._on_gpus)

    @cached_property
    def _actor(self) -> Any:
        kind = self._ray.remote(Replica)
        return kind.options(num_cpus=self.share.n_cpus, num_gpus=self.share.n_gpus, max_restarts=0)

    @cached_property
    def _identity(self) -> dict[str, str]:
        return self.model.identity()

    @cached_property
    def _source(self) -> str:
        name = str(self.model.cfg.model_name)
        return str(Path(name).resolve()) if Path(name).exists() else name  # workers run in folders of their own

    # ---------------------------------------------------------------- how they come and go

    def _hire(self, n: int) -> None:
        for _ in range(n):
            actor = self._actor.remote()
            ready = actor.load.remote(
                type(self.model), self._source, self._device, self.model.cfg.dtype, self.share.n_threads
            )
            self._loading[ready] = actor

    def _next_answer(self, awaited: list[Any]) -> Any:
        while True:
            answers, _ = self._ray.wait(awaited, num_returns=1, timeout=PATIENCE)
            if answers:
                return answers[0]
            if len(awaited) == len(self._loading):  # nobody works: have machines left?
                share_of(self._ray, 1, self.share.n_gpus > 0)

    def _got(self, answer: Any) -> Any:
        """What an actor says, or None if it died."""
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:  # errors of the work are answers, so this is none
            raise WorkerError(f"a worker cannot do its work ({_last_line(error)})") from error
        except self._ray.exceptions.RayError:
            return None

    def _welcome(self, ready: Any) -> None:
        """Let an actor that has loaded its model join, if it is the same model."""
        actor, found = self._loading.pop(ready), self._got(ready)
        if isinstance(found, BaseException):
            raise found
        if found is None:
            self._n_failed += 1
            if self._n_failed >= self.attempts:
                raise WorkerError(
                    f"{self._n_failed} workers in a row died while they loaded {self._source}: has every machine the "
                    "memory for it, and hooked-vlm installed?"
                )
            self._hire(1)
            return
        for name, own in self._identity.items():
            if found[name] != own:
                raise WorkerError(
                    f"a worker's {name}: {found[name]}, this process's: {own}. Workers load {self._source} themselves: "
                    "the checkpoint and the software must be the same everywhere, and a model changed since it was "
                    "loaded must be saved (save_pretrained) and loaded from there"
                )
        self._n_failed = 0
        self._idle.append(actor)

    def _replace(self, unit: Task, n_begun: int) -> None:
        """Hire another actor for one that died."""
        self.n_lost += 1
        if n_begun >= self.attempts:
            raise WorkerError(
                f"{n_begun} workers in a row died while they did one unit: does it need more memory than a worker has? "
                f"({unit.name})"
            )
        tqdm.write(f"a worker was lost; another takes its place and does its unit again ({unit.name})", sys.stderr)
        self._hire(1)


class _Shelf:
    """What several units begin with, put into Ray's store once, as long as one of them is to be done."""

    def __init__(self, ray: Any, units: Sequence[Task]) -> None:
        self._ray = ray
        self._n_left = Counter(id(unit.common) for unit in units)
        self._places: dict[int, tuple[int, Any]] = {}

    def place(self, unit: Task) -> tuple[int, Any] | None:
        """A number of its own, and a reference."""
        if unit.common is None:
            return None
        if id(unit.common) not in self._places:
            self._places[id(unit.common)] = (next(_NUMBERS), self._ray.put(unit.common))
        return self._places[id(unit.common)]

    def done(self, unit: Task) -> None:
        self._n_left[id(unit.common)] -= 1
        if not self._n_left[id(unit.common)]:
            self._places.pop(id(unit.common), None)


_NUMBERS = count()


def _fetched(reference: Any) -> SharedSetup:
    """What lies on the driver's shelf."""
    import ray

    return ray.get(reference)


class Replica:
    """What an actor is: a model, and units done on it. Exceptions are answers, and are raised where they arrive."""

    bench: WorkerState

    def load(
        self, kind: "type[HookedVLM]", name: str, device: str, dtype: torch.dtype, n_threads: int
    ) -> dict[str, str] | Exception:
        """Load the model; what it is (`HookedVLM.identity`)."""
        torch.set_num_threads(n_threads)
        try:
            model = kind.from_pretrained(name, device=device, dtype=dtype)
            self.bench = WorkerState(model)
            return model.identity()
        except Exception as error:
            return _sendable(error)

    def do(
        self, work: Callable[..., pd.DataFrame], arguments: tuple[Any, ...], place: tuple[int, Any] | None
    ) -> pd.DataFrame | Exception:
        """A unit's table; `place` is where what it begins with lies on the driver's shelf."""
        try:
            given = () if place is None else self.bench.common(place[0], partial(_fetched, place[1]))
            return self.bench.table(work, (*given, *arguments))
        except Exception as error:
            return _sendable(error)


def _sendable(error: Exception) -> Exception:
    """With its traceback as a note; told in words if it cannot be pickled."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"in a worker:\n{text}")
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
