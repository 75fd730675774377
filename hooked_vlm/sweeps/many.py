"""Sweeps over many images, stored as they are computed, on one machine or many.

cases = (SweepCase(sample.id, sample, interventions, OfAnswer()) for sample in read_samples("pages.jsonl"))
table = sweep_many(model, cases, out / "parts")
table = sweep_many(model, cases, out / "parts", workers=OnRay(model, "auto"))  # the same table, on a cluster
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from hooked_vlm.data.samples import Sample
from hooked_vlm.data.skipped import report_skipped
from hooked_vlm.errors import HookedVLMError, InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import ENCODER, Intervention
from hooked_vlm.metrics import Metric
from hooked_vlm.runtime.digests import digest
from hooked_vlm.runtime.progress import recorded
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import InProcess, SharedSetup, Stored, Task, Workers
from hooked_vlm.sweeps.answers import LogitsAt, OfAnswer, Subject, subject
from hooked_vlm.sweeps.run import sweep

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

RUNS_PER_BLOCK = 512
"""Default size of a block, which costs one plain run in addition."""
COLUMNS = ("case", "run", "intervention", "row", "value", "baseline", "effect")
_TWICE = "there are several cases named {!r}: their rows could not be distinguished in the table"


@dataclass(frozen=True, eq=False)
class SweepCase:
    """Arguments of one `sweep`, and a name for it.

    The inputs of a `Sample` are made where the case runs: its pictures are opened, resized and dropped there.
    """

    name: str
    inputs: VLMInputs | Sample
    interventions: Sequence[Intervention]
    metric: Metric | OfAnswer


def sweep_many(
    model: "HookedVLM",
    cases: Iterable[SweepCase],
    folder: str | Path,
    *,
    workers: Workers | None = None,
    logits_at: LogitsAt = "last",
    runs_per_block: int = RUNS_PER_BLOCK,
    max_runs: int | None = None,
    max_pixels: int | None = None,
    max_tiles: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    n_blocks: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Run many sweeps and concatenate their tables: `case`, and the columns of `SweepResult.to_dataframe`.

    The work is split by case and block of interventions; every block is stored in `folder` under a key of the weights,
    the inputs, the interventions and the metric. So an interrupted call resumes where it stopped, and blocks that two
    calls share are computed once. Blocks do not depend on the workers; a block rounds as a `sweep` of its own, which
    may differ in the last digits from a sweep over all blocks at once. `folder` also gets `progress.jsonl`, and
    `skipped.csv` if cases were skipped.

    Args:
        cases: any iterable, read once and one by one as workers become free; a case is dropped when it is done.
        workers: executors of the blocks; this process by default.
        logits_at, max_runs: as in `sweep`; a metric `OfAnswer` knows which logits it reads.
        runs_per_block: largest number of interventions in a block.
        max_pixels, max_tiles: bounds on the pictures of samples, as in `model.to_inputs`.
        on_error: "skip" leaves out cases that cannot be used (a broken picture, a prompt that does not fit), with a
            warning.
        n_blocks: number of blocks, for the progress bar, where the cases do not tell.
        progress: show a progress bar.

    Raises:
        InputError: two cases of one name, an intervention or a metric that cannot be identified by its content (a
            lambda; `CustomHooks` without a version), or what `sweep` raises.
        OutputError: the folder cannot be written.
        WorkerError: see `hooked_vlm.runtime.ray_workers`.
    """
    given = {name: value for name, value in locals().items() if name not in ("model", "cases", "folder")}
    tables = list(sweep_each(model, cases, folder, **given))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(COLUMNS))


def sweep_each(
    model: "HookedVLM",
    cases: Iterable[SweepCase],
    folder: str | Path,
    *,
    workers: Workers | None = None,
    logits_at: LogitsAt = "last",
    runs_per_block: int = RUNS_PER_BLOCK,
    max_runs: int | None = None,
    max_pixels: int | None = None,
    max_tiles: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    n_blocks: int | None = None,
    progress: bool = False,
) -> Iterator[pd.DataFrame]:
    """Yield the tables of `sweep_many` case by case, in their order, once all are stored."""
    if runs_per_block < 1:
        raise InputError(f"runs_per_block must be at least 1, got {runs_per_block}")
    if on_error not in ("stop", "skip"):
        raise InputError(f'on_error must be "stop" or "skip", got {on_error!r}')
    if isinstance(cases, Sequence) and (twice := [n for n, k in Counter(c.name for c in cases).items() if k > 1]):
        raise InputError(_TWICE.format(twice[0]))
    if n_blocks is None and isinstance(cases, Sequence):
        n_blocks = sum(len(range(0, len(case.interventions), runs_per_block)) for case in cases)
    folder, skipped = Path(folder), dict[str, str]()
    bounds = {"max_pixels": max_pixels, "max_tiles": max_tiles}
    shared = {"model": model.identity(), "logits_at": logits_at}
    shared |= {name: bound for name, bound in bounds.items() if bound is not None}
    origins: list[tuple[str, int]] = []

    def tasks() -> Iterator[Task]:
        names: set[str] = set()
        for case in cases:
            if case.name in names:
                raise InputError(_TWICE.format(case.name))
            names.add(case.name)
            inputs = case.inputs if isinstance(case.inputs, Sample) else case.inputs.portable()
            try:
                given = inputs.digest() if isinstance(inputs, Sample) else digest(inputs)
            except InputError as error:  # a picture that cannot be read
                if on_error == "stop":
                    raise
                skipped[case.name] = str(error)
                continue
            key = {**shared, "inputs": given, "metric": digest(case.metric)}
            setup = SharedSetup(subject, (inputs, case.metric, logits_at, bounds))
            for first in range(0, len(case.interventions), runs_per_block):
                block = tuple(case.interventions[first : first + runs_per_block])
                block_key = {**key, "interventions": digest(block)}
                origins.append((case.name, first))
                work = (ResultStore(folder), block_key, sweep_block, (block, max_runs), len(block), setup, case.name)
                yield Task(*work)

    def skip(task: Task, error: HookedVLMError) -> None:
        skipped.setdefault(task.label, str(error))

    with recorded(folder):
        stored = (workers or InProcess(model)).stored(
            tasks(),
            "sweep",
            each="block",
            counted="runs",
            total=n_blocks,
            quiet=not progress,
            skip=skip if on_error == "skip" else None,
        )
    for (name, _), place in zip(origins, stored, strict=True):
        if place is None:
            skipped.setdefault(name, "it has the inputs of another case that cannot be used")
    report_skipped(folder, skipped, stacklevel=3)
    for name, blocks in groupby(zip(origins, stored, strict=True), key=lambda block: block[0][0]):
        if name not in skipped:
            yield _joined(name, [(first, place) for (_, first), place in blocks if place is not None])


def _joined(name: str, blocks: list[tuple[int, Stored]]) -> pd.DataFrame:
    """The table of a case; `blocks` are the number of the first run of each, and where it is stored."""
    table = pd.concat([place.read().assign(run=lambda own, first=first: own["run"] + first) for first, place in blocks])
    table.insert(0, "case", name)
    return table.reset_index(drop=True)


def sweep_block(
    model: "HookedVLM", case: Subject, interventions: Sequence[Intervention], max_runs: int | None
) -> pd.DataFrame:
    """Sweep over one block of a case's interventions: the work of one task."""
    changes_images = any(iv.first_layer(model, case.inputs) == ENCODER for iv in interventions)
    inputs: Any = case.inputs if changes_images else case.encoded
    result = sweep(model, inputs, interventions, case.metric, logits_at=case.logits_at, max_runs=max_runs)
    table = result.to_dataframe()
    return table if case.answer is None else table.assign(answer=case.answer)
