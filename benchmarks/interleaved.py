"""Time and memory of several methods for the same work, interleaved in one process; ratios are medians over rounds."""

import argparse
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark."""

    device: str
    dtype: str
    model: str
    rounds: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def read_settings(description: str | None, rounds: int = 7) -> Settings:
    parser = argparse.ArgumentParser(description=str(description).splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--model", default="middle", choices=("middle", "2b"))
    parser.add_argument("--rounds", type=int, default=rounds)
    return Settings(**vars(parser.parse_args()))


@dataclass(frozen=True)
class Timing:
    """Medians of one method over the rounds."""

    seconds: float
    extra_bytes: int
    """Peak memory beyond that in use before."""
    ratio: float = 1.0
    """Ratio to the first method's time in the same round."""
    quartiles: tuple[float, float] = (1.0, 1.0)
    """Of that ratio over the rounds."""


def measure(
    ways: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", warmup: int = 1, memory: bool = True
) -> dict[str, Timing]:
    """They take turns, so that a change in the machine's load meets all of them.

    `memory`: watch it, which costs short passes time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[int]] = {name: [] for name in ways}
    for round_ in range(warmup + rounds):
        for name, work in ways.items():
            with PeakMemory(device) if memory else nullcontext() as peak:
                _synchronise(device)
                start = time.perf_counter()
                work()
                _synchronise(device)
                took = time.perf_counter() - start
            if round_ >= warmup:
                seconds[name].append(took)
                peaks[name].append(0 if peak is None else peak.extra_bytes)
    first = next(iter(seconds.values()))
    timings: dict[str, Timing] = {}
    for name, own in seconds.items():
        relative = [a / b for a, b in zip(own, first, strict=True)]
        low, _, high = statistics.quantiles(relative, n=4) if len(relative) > 1 else relative * 3
        peak = int(statistics.median(peaks[name]))
        timings[name] = Timing(statistics.median(own), peak, statistics.median(relative), (low, high))
    return timings


class PeakMemory:
    """Peak memory within a `with` block, beyond that before it."""

    def __init__(self, device: str) -> None:
        self.device, self.extra_bytes = device, 0

    def __enter__(self) -> "PeakMemory":
        _synchronise(self.device)
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.most = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.most = max(self.most, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self.device.startswith("cuda"):
            self.extra_bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self.most = max(self.most, self.process.memory_info().rss)
        self.done.set()
        self.thread.join()
        self.extra_bytes = self.most - self.before


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ratios(measured: Mapping[str, Timing]) -> dict[str, Any]:
    """What is written of a table: seconds, the ratio to the first way and its quartiles, extra memory."""
    return {
        name: {
            "seconds": timing.seconds,
            "ratio": timing.ratio,
            "quartiles": timing.quartiles,
            "extra_bytes": timing.extra_bytes,
        }
        for name, timing in measured.items()
    }


def show(title: str, measured: Mapping[str, Timing]) -> None:
    """A table; ratios are to the first way, with their quartiles."""
    print(title)
    for name, timing in measured.items():
        extra = timing.extra_bytes / 2**20
        print(
            f"  {name:52s} {timing.seconds * 1000:10.1f} ms {timing.ratio:7.2f}x "
            f"({timing.quartiles[0]:.2f} to {timing.quartiles[1]:.2f}) {extra:9.0f} MiB extra",
            flush=True,
        )


def save(settings: Settings, name: str, tables: Mapping[str, Any]) -> None:
    """Written as JSON beside what it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    on = {
        "device": torch.cuda.get_device_name() if settings.device.startswith("cuda") else platform.processor(),
        "cores": len(psutil.Process().cpu_affinity() or []),
        "torch": torch.__version__,
        "dtype": settings.dtype,
        "model": settings.model,
        "rounds": settings.rounds,
    }
    kind = f"{settings.device.partition(':')[0]}-{settings.dtype}-{settings.model}"
    path = RESULTS / f"{name}-{kind}.json"
    path.write_text(json.dumps({"measured_on": on, "tables": tables}, indent=1) + "\n")
    print(f"written to {path}")
