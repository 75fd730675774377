"""Experiment trackers that hear of a run's progress and its numbers: wandb, MLflow and TensorBoard, where installed."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from numbers import Real
from typing import Any, Literal

from hooked_vlm.errors import InputError
from hooked_vlm.runtime.progress import Step, listening

Library = Literal["wandb", "mlflow", "tensorboard"]
PROJECT = "hooked_vlm"
MLFLOW_PARAMETER = 6000
"""Longest value of a parameter that MLflow takes."""


@contextmanager
def tracked(library: Library, name: str, settings: Mapping[str, Any]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Open a run of a tracker and log the progress of the work inside; yield a function that logs its result.

    Where runs are kept is the library's own affair: WANDB_PROJECT, WANDB_MODE=offline, MLFLOW_TRACKING_URI; TensorBoard
    writes to ./runs.

    Args:
        name: of the run.
        settings: of the run; what is no number is logged as text.

    Raises:
        InputError: the library is not installed.
    """
    try:
        module: Any = import_module("torch.utils.tensorboard" if library == "tensorboard" else library)
    except ImportError as error:
        raise InputError(f"--track {library} needs the package {library}: pip install {library}") from error
    told = {key: value if isinstance(value, Real) else str(value) for key, value in settings.items()}
    opened = {"wandb": _wandb, "mlflow": _mlflow, "tensorboard": _tensorboard}[library](module, name, told)
    with opened as log, listening(lambda step: log(_of_step(step), step.step)):
        yield lambda result: log(dict(_numbers(result)), 0)


def _of_step(step: Step) -> dict[str, float]:
    own = {"done": step.step, "per second": step.per_second, "seconds left": step.seconds_left}
    return {f"{step.what}/{name}": float(value) for name, value in own.items() if value is not None}


def _numbers(result: Mapping[str, Any], prefix: str = "result") -> Iterator[tuple[str, float]]:
    """All numbers of nested data, by their path."""
    for name, value in result.items():
        path = f"{prefix}/{name}"
        if isinstance(value, Mapping):
            yield from _numbers(value, path)
        elif isinstance(value, Real) and not isinstance(value, bool):
            yield path, float(value)


# ---------------------------------------------------------------- the libraries

Log = Callable[[Mapping[str, float], int], None]


@contextmanager
def _wandb(wandb: Any, name: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    with wandb.init(project=project, name=name, config=dict(settings)) as run:
        yield lambda numbers, step: run.log(dict(numbers))


@contextmanager
def _mlflow(mlflow: Any, name: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    with mlflow.start_run(run_name=name):
        mlflow.log_params({key: str(value)[:MLFLOW_PARAMETER] for key, value in settings.items()})
        yield lambda numbers, step: mlflow.log_metrics(dict(numbers), step=step)


@contextmanager
def _tensorboard(tensorboard: Any, name: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    with tensorboard.SummaryWriter(comment=f"-{name}") as writer:
        writer.add_text("settings", "\n\n".join(f"{key}: {value}" for key, value in settings.items()))

        def log(numbers: Mapping[str, float], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        yield log
