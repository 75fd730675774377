"""`hooked-vlm sweep`: what each head does for the answers to a data set."""

from typing import Any

from hooked_vlm.experiments.common.frames import each_row
from hooked_vlm.experiments.head_sweep.config import HeadSweepConfig
from hooked_vlm.experiments.head_sweep.show import in_terminal
from hooked_vlm.experiments.head_sweep.study import HeadSweep, run


def answer(config: HeadSweepConfig) -> tuple[str, dict[str, Any]]:
    """Run the sweep; what to print, and the same as data."""
    return told(run(config))


def told(found: HeadSweep) -> tuple[str, dict[str, Any]]:
    """A finished sweep as text and as data: files, counts, and every head's mean effect by its name."""
    table = found.shown.table
    effects = {f"{row.layer}.{row.head}": float(row.effect) for row in each_row(table)}
    counts = {"samples": len(found.results.cases), "skipped": found.n_skipped}
    text = in_terminal(found.shown) + "".join(f"\n{name}: {path}" for name, path in found.files.items())
    return text, {**found.files, **counts, "answer": found.shown.answer, "effects": effects}
