"""Tasks on a Ray cluster: each actor holds a replica of the model and executes one task at a time.

    with OnRay(model, "auto") as workers:  # "local" starts a cluster of this machine's own
        table = sweep_many(model, cases, out / "parts", workers=workers)

A worker loads the model by its name, and is refused if its replica differs from the model here. This process assigns
tasks and writes the store, so the machines share no files. A worker that dies is replaced and its task repeated.

Ray's own restarts (`max_restarts`, `max_task_retries`) are not used: a restarted actor would load its model without a
check of its identity, one that dies while loading would restart without end, and the driver is not told of a loss.
"""

import pickle
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import redirect_stdout
from functools import cached_property, partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from hooked_vlm.errors import WorkerError
from hooked_vlm.runtime.ray_cluster import Share, connect, n_gpus_of, share_of
from hooked_vlm.runtime.tasks import SKIPPED, Result, SharedSetup, Stored, Task, Workers, WorkerState

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

ATTEMPTS = 3
"""Times that a task is begun if its workers die, and number of workers in a row that may die while they start."""
CPU_WORKERS = 2
"""Default number of workers without GPUs."""
PATIENCE = 20.0
"""Seconds without an answer from any worker, after which the cluster is checked for room for one."""


class OnRay(Workers):
    """Workers on a Ray cluster. They start with the first task, and stay until `close`.

    Args:
        model: workers hold replicas of it, loaded by `model.cfg.model_name` (a bundled toy model, a folder that
            every machine sees under this path, or a hub name) in its dtype.
        address: "local" for a cluster of this machine's own, which ends with the work; "auto" for the one that runs
            here; or "host:port". An open connection (`ray.init`) is used as it is.
        n: number of workers; by default one for each GPU of the cluster, or two where there are none.
        device: of the replicas: "cpu" leaves GPUs alone; by default CUDA if the cluster has GPUs.
        attempts: times that a task is begun if its workers die.

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
        self._n_requested, self._device_requested = n, device
        self.n_lost = 0
        """Workers that died at work so far."""
        self._loading: dict[Any, Any] = {}
        """Starting actors, by the answer they give when ready."""
        self._idle: list[Any] = []
        self._n_failed = 0
        """Actors in a row that died while starting."""

    def stored(self, *args: Any, **settings: Any) -> list[Stored | None]:
        with redirect_stdout(sys.stderr):  # Ray prints messages about lost workers
            return super().stored(*args, **settings)

    def results(self, tasks: Iterator[Task]) -> Generator[Result, None, None]:
        waiting, begun, working = deque(islice(tasks, 1)), Counter[Path](), dict[Any, tuple[Any, Task]]()
        if not waiting:
            return  # do not connect without tasks
        self._start(self.n - len(self._idle) - len(self._loading))
        setups = _SharedSetups(self._ray)

        def assign() -> None:
            while self._idle and waiting:
                actor, task = self._idle.pop(), waiting.popleft()
                begun[task.path] += 1
                working[actor.do.remote(task.work, task.arguments, setups.reference(task))] = (actor, task)
                waiting.extend(islice(tasks, 1 - len(waiting)))

        try:
            while waiting or working:
                assign()
                answer = self._next_answer([*working, *self._loading])
                if answer in self._loading:
                    self._admit(answer)
                    continue
                actor, task = working.pop(answer)
                table = self._get(answer)
                if table is None:
                    self._replace(task, begun[task.path])
                    waiting.appendleft(task)
                    continue
                self._idle.append(actor)
                if isinstance(table, BaseException) and not isinstance(table, SKIPPED):
                    raise table
                setups.release(task)
                del begun[task.path]
                assign()  # before this process stores the table
                yield task, table
        finally:
            for actor, _ in working.values():  # their results are not needed any more
                self._ray.kill(actor)

    @property
    def device(self) -> str:
        connected = "_connection" in vars(self)
        return self._device if connected else str(self.model.cfg.device)  # do not connect to find out

    def rest(self) -> None:
        """Stop the workers; others start with the next task."""
        for actor in [*self._idle, *self._loading.values()]:
            self._ray.kill(actor)
        self._idle, self._loading = [], {}

    def close(self) -> None:
        """Stop the workers, and the cluster if it was started for them."""
        self.rest()
        if "_connection" in vars(self) and self._connection[1]:
            self._ray.shutdown()
        for name in ("_connection", "n", "share", "_actor"):
            vars(self).pop(name, None)

    # ---------------------------------------------------------------- properties

    @cached_property
    def _connection(self) -> tuple[Any, bool]:
        return connect(self.address)

    @property
    def _ray(self) -> Any:
        return self._connection[0]

    @property
    def _device(self) -> str:
        return self._device_requested or ("cuda" if n_gpus_of(self._ray) else "cpu")

    @property
    def _on_gpus(self) -> bool:
        return self._device.startswith("cuda")

    @cached_property
    def n(self) -> int:
        """Number of workers."""
        return self._n_requested or (max(1, n_gpus_of(self._ray)) if self._on_gpus else CPU_WORKERS)

    @cached_property
    def share(self) -> Share:
        """CPUs and GPUs that each worker reserves."""
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

    # ---------------------------------------------------------------- starting and losing actors

    def _start(self, n: int) -> None:
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
            if len(awaited) == len(self._loading):  # all are starting: is there still a machine for one?
                share_of(self._ray, 1, self.share.n_gpus > 0)

    def _get(self, answer: Any) -> Any:
        """The answer of an actor, or None if it died."""
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:  # errors of the work itself come as answers
            raise WorkerError(f"a worker cannot do its work ({_last_line(error)})") from error
        except self._ray.exceptions.RayError:
            return None

    def _admit(self, ready: Any) -> None:
        """Add an actor that has loaded its model to the idle ones, if it is the same model."""
        actor, identity = self._loading.pop(ready), self._get(ready)
        if isinstance(identity, BaseException):
            raise identity
        if identity is None:
            self._n_failed += 1
            if self._n_failed >= self.attempts:
                raise WorkerError(
                    f"{self._n_failed} workers in a row died while they loaded {self._source}: has every machine the "
                    "memory for it, and hooked-vlm installed?"
                )
            self._start(1)
            return
        for name, expected in self._identity.items():
            if identity[name] != expected:
                raise WorkerError(
                    f"a worker's {name}: {identity[name]}, here: {expected}. Each worker loads {self._source}: "
                    "the checkpoint and the software must be the same everywhere, and a model changed since it was "
                    "loaded must be saved (save_pretrained) and loaded from there"
                )
        self._n_failed = 0
        self._idle.append(actor)

    def _replace(self, task: Task, n_begun: int) -> None:
        """Start another actor for one that died."""
        self.n_lost += 1
        if n_begun >= self.attempts:
            raise WorkerError(
                f"{n_begun} workers in a row died on one task: does it need more memory than a worker has? "
                f"({task.name})"
            )
        tqdm.write(f"a worker was lost; another starts and repeats its task ({task.name})", sys.stderr)
        self._start(1)


class _SharedSetups:
    """Shared setups in Ray's object store, each put there once; tasks of one setup follow each other."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._n_working: Counter[SharedSetup] = Counter()
        self._references: dict[SharedSetup, tuple[int, Any]] = {}

    def reference(self, task: Task) -> tuple[int, Any] | None:
        """A unique number and an object reference."""
        setup = task.setup
        if setup is None:
            return None
        if setup not in self._references:
            self._references = {own: held for own, held in self._references.items() if self._n_working[own]}
            self._references[setup] = (next(_NUMBERS), self._ray.put(setup))
        self._n_working[setup] += 1
        return self._references[setup]

    def release(self, task: Task) -> None:
        """One of a setup's tasks is done. The last setup is kept, since more of its tasks may come."""
        if task.setup is None:
            return
        self._n_working[task.setup] -= 1
        if not self._n_working[task.setup]:
            del self._n_working[task.setup]


_NUMBERS = count()


def _fetched(reference: Any) -> SharedSetup:
    """A shared setup from Ray's object store."""
    import ray

    return ray.get(reference)


class Replica:
    """An actor: a replica of the model that executes tasks. Exceptions are returned, and raised by the driver."""

    state: WorkerState

    def load(
        self, kind: "type[HookedVLM]", name: str, device: str, dtype: torch.dtype, n_threads: int
    ) -> dict[str, str] | Exception:
        """Load the model and return its identity (`HookedVLM.identity`)."""
        torch.set_num_threads(n_threads)
        try:
            model = kind.from_pretrained(name, device=device, dtype=dtype)
            self.state = WorkerState(model)
            return model.identity()
        except Exception as error:
            return _sendable(error)

    def do(
        self, work: Callable[..., pd.DataFrame], arguments: tuple[Any, ...], setup: tuple[int, Any] | None
    ) -> pd.DataFrame | Exception:
        """Compute the table of a task; `setup` is the number and reference of its shared setup."""
        try:
            prepared = () if setup is None else self.state.prepared(setup[0], partial(_fetched, setup[1]))
            return self.state.table(work, (*prepared, *arguments))
        except Exception as error:
            return _sendable(error)


def _sendable(error: Exception) -> Exception:
    """The error with its traceback as a note; as a RuntimeError with that text if it cannot be pickled."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"in a worker:\n{text}")
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
