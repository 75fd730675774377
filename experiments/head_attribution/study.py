"""The study from end to end: ask, ablate, regress, compare, write."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooked_vlm.experiments.common.models import check_asks_about_images
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.common.workers import workers_of
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.findings import Findings, as_table
from hooked_vlm.experiments.head_attribution.measurements import Measured, measure
from hooked_vlm.experiments.head_attribution.show_attribution import attribution, task
from hooked_vlm.experiments.head_attribution.show_curves import curves
from hooked_vlm.experiments.head_attribution.show_tokens import tokens
from hooked_vlm.experiments.head_attribution.show_where import where
from hooked_vlm.model.by_name import load
from hooked_vlm.model.fingerprints import provenance
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.files import writable_folder

SECTIONS: dict[str, Callable[[Report, Measured, HeadAttributionConfig], Findings]] = {
    "attribution": attribution,
    "curves": curves,
    "where": where,
    "tokens": tokens,
}


@dataclass(frozen=True, eq=False)
class HeadAttributionResult:
    """What a run found."""

    measured: Measured
    findings: Findings
    """The numbers the report's sections end with."""
    page: Path
    """report.html; figures/, tables/ and run.json lie beside it."""


def run(config: HeadAttributionConfig, model: HookedVLM | None = None) -> HeadAttributionResult:
    """Run the study, or go on with an interrupted run, and write the report to `config.out`.

    Args:
        model: a loaded model to use instead of loading `config.model`.

    Raises:
        StudyError: a setting out of range, data that cannot be used, or no picture answered rightly.
        OutputError: the output folder cannot be written.
        WorkerError: with --ray, no cluster or workers that keep dying.
        CheckpointError, InputError, ImageError: see `HookedVLM.from_pretrained` and `to_inputs`.
    """
    config.check()
    writable_folder(config.out)
    model = model or load(config.model, config.device, config.dtype)
    check_asks_about_images(model, config.model)
    config.check_against(model)
    with workers_of(config, model, config.device) as workers:
        found = measure(model, config, workers)
        device = workers.device
    name = Path(config.model).name
    report = Report(
        f"Head attribution of {name}",
        f"Which attention heads carry information from image to text (after arXiv 2509.17588): {len(found.probes)} "
        f"pictures, {model.cfg.n_layers} layers of {model.cfg.n_heads} heads.",
    )
    findings = task(report, found, config)
    for section in config.sections:
        findings |= SECTIONS[section](report, found, config)
    report.section("Summary", "The numbers above that other models are compared by.")
    report.table("summary", as_table(findings), "Findings, with 95% intervals")
    record: dict[str, Any] = {"config": _about(config), "images": found.images, **provenance(model), "device": device}
    return HeadAttributionResult(found, findings, report.write(config.out, record))


def _about(config: HeadAttributionConfig) -> dict[str, Any]:
    """What decides the results; not where they are written."""
    return {name: value for name, value in config.as_dict().items() if name not in ("out", "quiet")}


def summary(result: HeadAttributionResult) -> str:
    """The terminal's table."""
    width = max(map(len, result.findings))
    lines = [f"  {name:{width}s}  {estimate}" for name, estimate in result.findings.items()]
    return "\n".join([*lines, "", f"report: {result.page}"])
