"""Compare finished runs of several models, from their tables."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hooked_vlm.analysis.statistics import Estimate
from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.head_attribution import plots
from hooked_vlm.experiments.head_attribution.config import Compare
from hooked_vlm.experiments.head_attribution.findings import BY_NAME, BY_PICTURE, from_table_row
from hooked_vlm.experiments.head_attribution.rankings import RANKINGS
from hooked_vlm.runtime.files import writable_folder


def compare(config: Compare) -> Path:
    """Write a report with the findings of finished runs, one column per model.

    Returns:
        Path of report.html.

    Raises:
        StudyError: no folders given, or one without a finished run.
        OutputError: the output folder cannot be written.
    """
    if not config.runs:
        raise StudyError("--runs needs the folders of finished runs of head-attribution")
    writable_folder(config.out)
    finished = [_finished(folder) for folder in config.runs]
    labels = _labels([run.name for run in finished])
    tables = [run.summary for run in finished]
    report = Report("Head attribution across models", f"{len(labels)} runs: {', '.join(labels)}.")
    report.section("Findings", "Each with its 95% intervals, which resample pictures, or names of objects.")
    measures = list(dict.fromkeys(name for table in tables for name in table["measure"]))
    columns = {label: _by_name(table) for label, table in zip(labels, tables, strict=True)}
    rows = [
        {"measure": m} | {label: str(own[m]) if m in own and own[m].n else "–" for label, own in columns.items()}
        for m in measures
    ]
    report.table("findings", pd.DataFrame(rows), "Findings of every run")
    long = [table.assign(model=label) for label, table in zip(labels, tables, strict=True)]
    report.table("findings_long", pd.concat(long, ignore_index=True), "The same, one number per row", shown=1)
    wanted = {name: f"heads needed for 0.8 of both, {name}" for name in RANKINGS.values()}
    if all(measure in own for own in columns.values() for measure in wanted.values()):
        bars = {name: {label: own[measure] for label, own in columns.items()} for name, measure in wanted.items()}
        report.section("Heads needed")
        figure = plots.bars(bars, "heads needed for 0.8 of both")
        caption = (
            "Heads needed for 0.8 of both faithfulness and completeness; means over pictures, 95% intervals by picture"
        )
        report.figure("heads_needed", figure, caption)
    _layers(report, finished, labels)
    return report.write(config.out, {"runs": [run.record for run in finished]}, config.zip)


@dataclass(frozen=True, eq=False)
class _Finished:
    """Name, record and tables of a finished run."""

    name: str
    record: dict[str, Any]
    summary: pd.DataFrame
    layers: pd.DataFrame | None


def _finished(folder: Path) -> _Finished:
    def table(name: str, **types: type) -> pd.DataFrame:
        frame = pd.read_parquet(folder / "tables" / f"{name}.parquet", page_checksum_verification=True)
        return pd.DataFrame(frame[list(types)]).astype(types)

    by_picture, by_name = (dict.fromkeys(columns, float) for columns in (BY_PICTURE, BY_NAME))
    counts = {"pictures": int, "names": int}
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        record = {"model": str(run["model"]), "weights": str(run["weights"]), "images": len(run["images"])}
        has_layers = (folder / "tables" / "layers.parquet").exists()
        return _Finished(
            Path(run["config"]["model"]).name + (", vision tower" if run["config"].get("tower") == "vision" else ""),
            record,
            table("summary", measure=str, value=float, **by_picture, **by_name, **counts),
            table("layers", layer=int, share=float, **by_picture) if has_layers else None,
        )
    except Exception as error:  # readers of damaged files raise whatever they meet
        raise StudyError(f"{folder} has no finished run of head-attribution: give folders that it wrote") from error


def _labels(names: list[str]) -> list[str]:
    """Label runs by model name, numbered where a model occurs twice."""
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _by_name(table: pd.DataFrame) -> dict[str, Estimate]:
    return {str(own["measure"]): from_table_row(own) for own in table.to_dict("records")}


def _layers(report: Report, finished: list[_Finished], labels: list[str]) -> None:
    """Add importance over relative depth, if all runs have it."""
    tables = [run.layers for run in finished if run.layers is not None]
    if len(tables) < len(finished):
        return
    report.section(
        "Importance by depth", "Each layer's share of all positive coefficients, by relative depth (0 first, 1 last)."
    )
    lines = {}
    for label, table in zip(labels, tables, strict=True):
        n = len(table)
        shares = [n * table[name].to_numpy() for name in ("share", *BY_PICTURE)]
        lines[f"{label}, {n} layers"] = (table["layer"].to_numpy() / max(1, n - 1), *shares)
    figure = plots.over_depth(lines, "share times number of layers")
    report.figure("depth", figure, "1 is a layer's even share; 95% intervals over pictures")
