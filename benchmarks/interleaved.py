"""Times several ways of doing the same work in one process, taking turns, and prints ratios of medians."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def ratios(
    ways: Mapping[str, Callable[[], object]], rounds: int = 9, warmup: int = 2
) -> dict[str, tuple[float, float]]:
    """(median seconds, ratio to the first way) of every way. They take turns, so that a change in the
    machine's load meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(warmup + rounds):
        for name, work in ways.items():
            _synchronise()
            start = time.perf_counter()
            work()
            _synchronise()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    first = next(iter(medians.values()))
    return {name: (median, median / first) for name, median in medians.items()}


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def show(title: str, measured: Mapping[str, tuple[float, float]]) -> None:
    print(title)
    for name, (median, ratio) in measured.items():
        print(f"  {name:48s} {median * 1000:9.1f} ms   {ratio:5.2f}x")
