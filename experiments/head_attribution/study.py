"""Run the study end to end and write its report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hooked_vlm.experiments.common.command import command_line
from hooked_vlm.experiments.common.models import check_takes_images
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.common.workers import workers_of
from hooked_vlm.experiments.head_attribution.config import Command, HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.findings import Findings, as_table
from hooked_vlm.experiments.head_attribution.measurements import Measured, measure
from hooked_vlm.experiments.head_attribution.show_attribution import attribution, task
from hooked_vlm.experiments.head_attribution.show_curves import curves
from hooked_vlm.experiments.head_attribution.show_tokens import LOST, tokens
from hooked_vlm.experiments.head_attribution.show_where import where
from hooked_vlm.model.by_name import load
from hooked_vlm.model.fingerprints import provenance
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.files import writable_folder

PAPER = (
    "Jinyeong Kim, Seil Kang, Jiwoo Park, Junhyeok Kim and Seong Jae Hwang. Interpreting Attention Heads for "
    "Image-to-Text Information Flow in Large Vision-Language Models. 2025. arXiv:2509.17588"
)
SECTIONS: dict[str, Callable[[Report, Measured, HeadAttributionConfig], Findings]] = {
    "attribution": attribution,
    "curves": curves,
    "where": where,
    "tokens": tokens,
}


@dataclass(frozen=True, eq=False)
class HeadAttributionResult:
    """Measurements, findings and report of a run."""

    measured: Measured
    findings: Findings
    """Main numbers of the report, by name."""
    page: Path
    """report.html; figures/, tables/ and run.json lie beside it."""


def run(config: HeadAttributionConfig, model: HookedVLM | None = None) -> HeadAttributionResult:
    """Run the study, or resume an interrupted run, and write the report to `config.out`.

    Args:
        model: a loaded model to use instead of loading `config.model`.

    Raises:
        StudyError: a setting out of range, unusable data, or no picture answered correctly.
        OutputError: the output folder cannot be written.
        WorkerError: with --ray, no cluster, or workers that keep dying.
        CheckpointError, InputError, ImageError: see `HookedVLM.from_pretrained` and `to_inputs`.
    """
    config.check()
    writable_folder(config.out)
    model = model or load(config.model, config.device, config.dtype)
    check_takes_images(model, config.model)
    config.check_against(model)
    with workers_of(config, model, config.device) as workers:
        found = measure(model, config, workers)
        device = workers.device
    name = Path(config.model).name
    report = Report(
        f"Head attribution of {name}",
        f"Which attention heads carry information from the image to the text (after arXiv 2509.17588): "
        f"{len(found.probes)} pictures, {model.cfg.n_layers} layers of {model.cfg.n_heads} heads.",
        command_line("head-attribution", config, Command),
        PAPER,
    )
    findings = task(report, found, config)
    for section in config.sections:
        findings |= SECTIONS[section](report, found, config)
    report.answer = [answer(found, findings)]
    report.section("Summary", "The main numbers above, by which `compare` compares models.")
    report.table("summary", as_table(findings), "Findings, with 95% intervals")
    record: dict[str, Any] = {"config": _about(config), "images": found.images, **provenance(model), "device": device}
    return HeadAttributionResult(found, findings, report.write(config.out, record, config.zip))


def _about(config: HeadAttributionConfig) -> dict[str, Any]:
    """Settings that the results depend on."""
    return {name: value for name, value in config.as_dict().items() if name not in ("out", "quiet")}


def answer(found: Measured, findings: Findings) -> str:
    """One sentence: the heads with the largest mean coefficients or, without a regression, the text that matters."""
    if found.heads:
        means, heads = found.coefficients.mean(0), found.probes[0].heads
        top = [f"{heads[i][0]}.{heads[i][1]} ({means[i]:.2f})" for i in np.argsort(-means, kind="stable")[:5]]
        return f"Heads that add most to the answer when they see the image (mean coefficient): {', '.join(top)}."
    lost = {name.removeprefix(LOST): e for name, e in findings.items() if name.startswith(LOST)}
    if not lost:
        return "The image adds too little to the answer on every picture."
    most = max(lost, key=lambda name: lost[name].value)
    return f"Text that most needs to see the image: {most} (share of the image's effect lost otherwise: {lost[most]})."


def summary(result: HeadAttributionResult) -> str:
    """Text for the terminal: the answer, the findings, the report's path."""
    width = max(map(len, result.findings))
    lines = [f"  {name:{width}s}  {estimate}" for name, estimate in result.findings.items()]
    return "\n".join([answer(result.measured, result.findings), "", *lines, "", f"report: {result.page}"])
