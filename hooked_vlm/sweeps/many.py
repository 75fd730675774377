"""Sweeps over many images, stored as they are computed, on one machine or many.

cases = [SweepCase(page.id, inputs, interventions, log_prob(answer)) for ...]
table = sweep_many(model, cases, out / "parts")
table = sweep_many(model, cases, out / "parts", workers=OnRay(model, "auto"))  # the same table, on a cluster
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import ENCODER, Intervention
from hooked_vlm.metrics import Metric
from hooked_vlm.runtime.digests import digest
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import InProcess, SharedSetup, Task, Workers
from hooked_vlm.sweeps.run import sweep, with_features

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

RUNS_PER_BLOCK = 512
"""Default size of a block, which costs one plain run in addition."""


@dataclass(frozen=True, eq=False)
class SweepCase:
    """Arguments of one `sweep`, and a name for it."""

    name: str
    inputs: VLMInputs
    interventions: Sequence[Intervention]
    metric: Metric


def sweep_many(
    model: "HookedVLM",
    cases: Iterable[SweepCase],
    folder: Path,
    *,
    workers: Workers | None = None,
    logits_at: Literal["last", "all"] = "last",
    runs_per_block: int = RUNS_PER_BLOCK,
    max_runs: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Run many sweeps and concatenate their tables: `case`, and the columns of `SweepResult.to_dataframe`.

    The work is split by case and block of interventions; every block is stored in `folder` under a key of the weights,
    the inputs, the interventions and the metric. So an interrupted call resumes where it stopped, and blocks that two
    calls share are computed once. Blocks do not depend on the workers; a block rounds as a `sweep` of its own, which
    may differ in the last digits from a sweep over all blocks at once.

    Args:
        cases: read once, before the first of them runs.
        workers: executors of the blocks; this process by default.
        logits_at, max_runs: as in `sweep`.
        runs_per_block: largest number of interventions in a block.
        progress: show a progress bar.

    Raises:
        InputError: two cases of one name, an intervention or a metric that cannot be identified by its content
            (`CustomHooks`, a lambda), or what `sweep` raises.
        OutputError: the folder cannot be written.
        WorkerError: see `hooked_vlm.runtime.ray_workers`.
    """
    if runs_per_block < 1:
        raise InputError(f"runs_per_block must be at least 1, got {runs_per_block}")
    shared = {"model": model.identity(), "logits_at": logits_at}
    tasks: list[Task] = []
    origins: list[tuple[str, int]] = []
    names: set[str] = set()
    for case in cases:
        if case.name in names:
            raise InputError(
                f"there are several cases named {case.name!r}: their rows could not be distinguished in the table"
            )
        names.add(case.name)
        inputs = case.inputs.portable()
        key = {**shared, "inputs": digest(inputs), "metric": digest(case.metric)}
        setup = SharedSetup(prepared, (inputs, _encodes(model, case)))
        for first in range(0, len(case.interventions), runs_per_block):
            block = tuple(case.interventions[first : first + runs_per_block])
            arguments = (block, case.metric, logits_at, max_runs)
            block_key = {**key, "interventions": digest(block)}
            tasks.append(Task(ResultStore(folder), block_key, sweep_block, arguments, len(block), setup))
            origins.append((case.name, first))
    tables = (workers or InProcess(model)).tables(tasks, "sweep", each="block", counted="runs", quiet=not progress)
    placed = []
    for (name, first), table in zip(origins, tables, strict=True):
        table.insert(0, "case", name)
        placed.append(table.assign(run=table["run"] + first))
    columns = ["case", "run", "intervention", "row", "value", "baseline", "effect"]
    return pd.concat(placed, ignore_index=True) if placed else pd.DataFrame(columns=columns)


def _encodes(model: "HookedVLM", case: SweepCase) -> bool:
    """Whether the images can be encoded once for all blocks."""
    return all(iv.first_layer(model, case.inputs) != ENCODER for iv in case.interventions)


def prepared(model: "HookedVLM", inputs: VLMInputs, encode: bool) -> VLMInputs:
    """Move a case's inputs to the model's device, with their images encoded if `encode`."""
    inputs = model.as_inputs(inputs)
    return with_features(model, inputs) if encode else inputs


def sweep_block(
    model: "HookedVLM",
    inputs: VLMInputs,
    interventions: Sequence[Intervention],
    metric: Metric,
    logits_at: Literal["last", "all"],
    max_runs: int | None,
) -> pd.DataFrame:
    """Sweep over one block of a case's interventions: the work of one task."""
    return sweep(model, inputs, interventions, metric, logits_at=logits_at, max_runs=max_runs).to_dataframe()
