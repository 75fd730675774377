"""Sweeps over many images, kept as they are made, on one machine or many.

cases = [SweepCase(page.id, inputs, interventions, log_prob(answer)) for ...]
table = sweep_many(model, cases, out / "parts")
table = sweep_many(model, cases, out / "parts", workers=OnRay(model, "auto"))  # the same table, on a cluster
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import ENCODER, Intervention
from hooked_vlm.metrics import Metric
from hooked_vlm.model.fingerprints import weights_hash
from hooked_vlm.runtime.digests import digest
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import InProcess, SharedSetup, Task, Workers
from hooked_vlm.sweeps.single import sweep

RUNS_PER_BLOCK = 512
"""By default; a block's own cost is one plain run."""


@dataclass(frozen=True, eq=False)
class SweepCase:
    """One sweep: what `sweep` is given, and a name for it."""

    name: str
    inputs: VLMInputs
    interventions: Sequence[Intervention]
    metric: Metric


def sweep_many(
    model: Any,
    cases: Sequence[SweepCase],
    folder: Path,
    *,
    workers: Workers | None = None,
    logits_at: Literal["last", "all"] = "last",
    runs_per_block: int = RUNS_PER_BLOCK,
    max_runs: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """The tables of many sweeps, one after the other: `case`, and the columns of `SweepResult.to_dataframe`.

    The work is split by case and block of interventions; every block is a part in `folder`, under a key made from the
    weights, the inputs, the interventions and the metric. So an interrupted call goes on where it stopped, and blocks
    that two calls share are done once. Blocks are cut the same way whoever does them; a block rounds as its own `sweep`
    does, which may differ in the last digits from a sweep over all blocks at once.

    Args:
        workers: who does it; this process by default.
        logits_at, max_runs: as in `sweep`.
        runs_per_block: how many interventions a block has at most.
        progress: show a bar.

    Raises:
        InputError: two cases of one name, an intervention or a metric that cannot be told from others by its content
            (`CustomHooks`, a lambda), or what `sweep` raises.
        OutputError: the folder cannot be written.
        WorkerError: see `hooked_vlm.runtime.ray_workers`.
    """
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"there are several cases named {twice!r}: a table of both could not tell them apart")
    if runs_per_block < 1:
        raise InputError(f"runs_per_block must be at least 1, got {runs_per_block}")
    shared = {"weights": weights_hash(model), "version": version("hooked-vlm"), "logits_at": logits_at}
    units: list[Task] = []
    places: list[tuple[str, int]] = []
    for case in cases:
        inputs = case.inputs.portable()
        key = {**shared, "inputs": digest(inputs), "metric": digest(case.metric)}
        common = SharedSetup(prepared, (inputs, _encodes(model, case)))
        for first in range(0, len(case.interventions), runs_per_block):
            block = tuple(case.interventions[first : first + runs_per_block])
            arguments = (block, case.metric, logits_at, max_runs)
            own = {**key, "interventions": digest(block)}
            units.append(Task(ResultStore(folder), own, sweep_block, arguments, len(block), common))
            places.append((case.name, first))
    tables = (workers or InProcess(model)).tables(units, "sweep", each="block", counted="runs", quiet=not progress)
    placed = []
    for (name, first), table in zip(places, tables, strict=True):
        table.insert(0, "case", name)
        placed.append(table.assign(run=table["run"] + first))
    columns = ["case", "run", "intervention", "row", "value", "baseline", "effect"]
    return pd.concat(placed, ignore_index=True) if placed else pd.DataFrame(columns=columns)


def _encodes(model: Any, case: SweepCase) -> bool:
    """Whether the images can be encoded once for all blocks."""
    if not case.inputs.has_visuals or case.inputs.image_features is not None:
        return False
    return all(iv.first_layer(model, case.inputs) != ENCODER for iv in case.interventions)


def prepared(model: Any, inputs: VLMInputs, encode: bool) -> VLMInputs:
    """A case's inputs where the model is, with their images encoded."""
    inputs = model.as_inputs(inputs)
    return inputs.with_image_features(model.encode_images(inputs)) if encode else inputs


def sweep_block(
    model: Any,
    inputs: VLMInputs,
    interventions: Sequence[Intervention],
    metric: Metric,
    logits_at: Literal["last", "all"],
    max_runs: int | None,
) -> pd.DataFrame:
    """The unit of work: some of a case's runs."""
    return sweep(model, inputs, interventions, metric, logits_at=logits_at, max_runs=max_runs).to_dataframe()
