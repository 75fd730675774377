"""A sweep over heads from end to end: one intervention per head on every sample of a data set, tables and a report."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from hooked_vlm.data.skipped import SKIPPED_FILE, join_skipped
from hooked_vlm.errors import InputError
from hooked_vlm.experiments.common.workers import workers_of
from hooked_vlm.experiments.head_sweep.changes import interventions, means_over
from hooked_vlm.experiments.head_sweep.config import HeadSweepConfig
from hooked_vlm.experiments.head_sweep.results import (
    CSV,
    SAME,
    SAMPLES,
    TABLE,
    Results,
    picture_of,
    read_pictures,
    read_record,
    read_tables,
    write_record,
    write_results,
)
from hooked_vlm.experiments.head_sweep.show import Shown, write_report
from hooked_vlm.interventions.heads import tower_shape
from hooked_vlm.model.by_name import load
from hooked_vlm.model.fingerprints import provenance
from hooked_vlm.runtime.digests import digest
from hooked_vlm.runtime.files import writable_folder
from hooked_vlm.runtime.progress import recorded
from hooked_vlm.sweeps.answers import OfAnswer
from hooked_vlm.sweeps.many import RUNS_PER_BLOCK, SweepCase, sweep_each

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True, eq=False)
class HeadSweep:
    """A finished sweep."""

    out: Path
    results: Results
    shown: Shown
    n_skipped: int

    @property
    def files(self) -> dict[str, str]:
        """Paths of what was written."""
        return {"report": str(self.out / "report.html"), "csv": str(self.out / CSV), "table": str(self.out / TABLE)}


def run(config: HeadSweepConfig, model: "HookedVLM | None" = None) -> HeadSweep:
    """Run a sweep, or resume an interrupted one, and write its tables and its report to `config.out`.

    Args:
        model: a loaded model to use instead of loading `config.model`.

    Raises:
        InputError, StudyError: a setting out of range, a sample that cannot be used (--on-error stop), no sample.
        OutputError: the folder cannot be written.
        WorkerError: with --ray, no cluster, or workers that keep dying.
    """
    config.check()
    whole, samples = config.all_samples(), config.samples()
    if not len(samples):
        raise InputError(f"shard {config.shard} holds none of the {len(whole)} samples")
    out = writable_folder(config.out)
    model = model or load(config.model, config.device, config.dtype)
    heads = config.chosen(*tower_shape(model, config.tower)[:2])
    with recorded(out), workers_of(config, model, config.device) as workers:
        means = means_over(whole, config, model, workers) if config.intervention == "mean" else None
        runs = interventions(config, heads, means)
        metric = OfAnswer(config.metric, None, config.max_new_tokens)
        pictures: dict[str, str] = {}

        def cases() -> Iterator[SweepCase]:
            for sample in samples:
                pictures[sample.id] = picture_of(sample)
                yield SweepCase(sample.id, sample, runs, metric)

        tables = sweep_each(
            model,
            cases(),
            out / "parts",
            workers=workers,
            max_pixels=config.max_pixels,
            max_tiles=config.max_tiles,
            on_error=config.on_error,
            n_blocks=len(samples) * -(-len(runs) // RUNS_PER_BLOCK),
            progress=not config.quiet,
        )
        results = write_results(out, tables, heads, pictures)
    n_skipped = len(samples) - len(results.cases)
    join_skipped([out / "parts"], out)
    record = provenance(model) | {
        "settings": config.recorded(),
        "shard": list(config.part),
        "heads": [list(head) for head in heads],
        "of_samples": len(whole),
        "samples": len(results.cases),
        "skipped": n_skipped,
        "means": None if means is None else digest(means),
    }
    return finished(out, results, record)


def finished(out: Path, results: Results, record: Mapping[str, Any]) -> HeadSweep:
    """Write the report and the record of complete results.

    Raises:
        InputError: there are none. `merge` takes such a shard, too.
    """
    if not results.cases:
        if record["shard"] != [0, 1]:
            write_record(out, record)
        raise InputError(f"none of the samples can be used: {out / SKIPPED_FILE} says why")
    shown = write_report(out, results, record)
    write_record(out, record)
    return HeadSweep(out, results, shown, record["skipped"])


# ---------------------------------------------------------------- shards


def merge(folders: "list[Path]", out: Path) -> HeadSweep:
    """Join the shards of one sweep: the tables and the report of a run over all of them.

    Raises:
        InputError: folders of different sweeps, a shard that is missing or given twice, a sample that two of them
            have, a damaged file.
        OutputError: `out` cannot be written.
    """
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise InputError(f"{twice[0]} was given twice")
    records = {folder: read_record(folder) for folder in folders}
    first = next(iter(records.values()))
    for folder, record in records.items():
        for name in SAME:
            if record[name] != first[name]:
                what = _difference(name, record, first)
                raise InputError(f"{folder} and {folders[0]} are no shards of one sweep: they differ in {what}")
    ordered = in_order({folder: tuple(own["shard"]) for folder, own in records.items()}, first["of_samples"])
    heads = [(int(layer), int(head)) for layer, head in first["heads"]]
    out = writable_folder(out)
    pictures: dict[str, str] = {}
    for folder in ordered:
        own = read_pictures(folder)
        if twice := sorted(own.keys() & pictures.keys()):
            raise InputError(f"{folder} and a shard before it both have a sample named {twice[0]!r}")
        pictures |= own

    def tables() -> Iterator[pd.DataFrame]:
        for folder in ordered:
            cases: list[str] = []
            for table in read_tables(folder):
                cases.append(str(table["case"].iloc[0]))
                yield table
            if cases != list(read_pictures(folder)):
                raise InputError(
                    f"{folder / TABLE} and {folder / SAMPLES} hold different samples: run this sweep again"
                )

    results = write_results(out, tables(), heads, pictures)
    join_skipped(ordered, out)
    n_skipped = sum(record["skipped"] for record in records.values())
    return finished(out, results, first | {"shard": [0, 1], "samples": len(results.cases), "skipped": n_skipped})


def _difference(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    if name == "of_samples":
        return f"the number of samples of the data ({one[name]} and {other[name]})"
    if name != "settings":
        return name
    own, others = one[name], other[name]
    return ", ".join("--" + key.replace("_", "-") for key in own if own[key] != others.get(key))


def in_order(shards: Mapping[Path, tuple[int, ...]], n_samples: int) -> list[Path]:
    """Folders in the order of their shards; shards that hold none of the samples need not be there.

    Raises:
        InputError: shards of different divisions, a shard that is missing or given twice.
    """
    if len({n for _, n in shards.values()}) > 1:
        raise InputError(f"the folders are shards of different divisions: {', '.join(map(_named, shards.items()))}")
    n = next(iter(shards.values()))[1]
    found: dict[int, Path] = {}
    for folder, (i, _) in shards.items():
        if i in found:
            raise InputError(f"shard {i}/{n} was given twice: {found[i]} and {folder}")
        found[i] = folder
    if missing := [f"{i}/{n}" for i in range(n) if i not in found and n_samples * i // n < n_samples * (i + 1) // n]:
        raise InputError(f"shards are missing: {', '.join(missing)}")
    return [found[i] for i in sorted(found)]


def _named(shard: tuple[Path, tuple[int, ...]]) -> str:
    folder, (i, n) = shard
    return f"{folder} is {i}/{n}"
