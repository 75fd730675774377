"""Run the study end to end and write its report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hooked_vlm.experiments.common.claims import Evidence, Judged, claims_table, terminal_lines, told
from hooked_vlm.experiments.common.command import command_line
from hooked_vlm.experiments.common.models import check_takes_images
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.common.steps import Step, untimed
from hooked_vlm.experiments.common.workers import workers_of
from hooked_vlm.experiments.head_attribution.claims import CLAIMS
from hooked_vlm.experiments.head_attribution.config import Command, HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.findings import Findings, Section, as_table
from hooked_vlm.experiments.head_attribution.measurements import Measured, measure
from hooked_vlm.experiments.head_attribution.show_attribution import attribution, task
from hooked_vlm.experiments.head_attribution.show_curves import curves
from hooked_vlm.experiments.head_attribution.show_tokens import tokens
from hooked_vlm.experiments.head_attribution.show_where import where
from hooked_vlm.model.by_name import load
from hooked_vlm.model.fingerprints import provenance
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.files import writable_folder
from hooked_vlm.runtime.progress import recorded

PAPER = (
    "Jinyeong Kim, Seil Kang, Jiwoo Park, Junhyeok Kim and Seong Jae Hwang. Interpreting Attention Heads for "
    "Image-to-Text Information Flow in Large Vision-Language Models. 2025. arXiv:2509.17588"
)
SECTIONS: dict[str, Callable[[Report, Measured, HeadAttributionConfig], Section]] = {
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
    answer: list[str]
    """Sentences that answer the study's question, which the report and the terminal begin with."""
    tables: Mapping[str, pd.DataFrame]
    """Tables of the report, with all rows."""
    judged: Judged = ()
    """What the paper claims, each with what was found; of `All` only."""


def run(config: HeadAttributionConfig, model: HookedVLM | None = None, step: Step = untimed) -> HeadAttributionResult:
    """Run the study, or resume an interrupted run, and write the report to `config.out`.

    Args:
        model: a loaded model to use instead of loading `config.model`.
        step: times the measurements.

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
    with recorded(config.out), workers_of(config, model, config.device) as workers:
        found = measure(model, config, workers, step)
        device = workers.device
    name = Path(config.model).name
    n_layers, n_heads = found.probes[0].shape
    about = "Which attention heads carry information from the image to the text (after arXiv 2509.17588)"
    if config.tower == "vision":
        about = (
            "Which attention heads of the vision tower an answer about the picture needs (by the measures that arXiv "
            "2509.17588 has for the language model's heads; token flow is about these and left out)"
        )
    report = Report(
        f"Head attribution of {name}{', vision tower' if config.tower == 'vision' else ''}",
        f"{about}: {len(found.probes)} pictures, {n_layers} layers of {n_heads} heads.",
        command_line("head-attribution", config, Command),
        PAPER,
    )
    sections = config.shown_sections
    parts = [task(report, found, config), *(SECTIONS[section](report, found, config) for section in sections)]
    findings = {name: estimate for part in parts for name, estimate in part.findings.items()}
    answer = [sentence for part in (*parts[1:], parts[0]) for sentence in part.answer]
    report.answer = answer
    judged = _judge(report, findings, model, config) if set(SECTIONS) <= set(sections) else ()
    report.section("Summary", "The main numbers above, by which `compare` compares models.")
    report.table("summary", as_table(findings), "Findings, with 95% intervals")
    record: dict[str, Any] = {"config": _about(config), "images": found.images, **provenance(model), "device": device}
    page = report.write(config.out, record, config.zip)
    return HeadAttributionResult(found, findings, page, answer, report.frames, judged)


def _judge(report: Report, findings: Findings, model: HookedVLM, config: HeadAttributionConfig) -> Judged:
    """List what the paper claims beside what was found."""
    evidence = Evidence(config.model, model.cfg.n_layers, report.frames, findings)
    judged = [(claim, claim.judge(evidence)) for claim in CLAIMS]
    report.section(
        "What the paper claims",
        "A claim passes if the 95% interval of the number that decides it lies where the claim says, and differs if "
        "the interval excludes that. The paper's own numbers are not known to us, so none is compared.",
        *(told(claim, own) for claim, own in judged),
    )
    rules = {"the paper says": [claim.says for claim in CLAIMS], "passes if": [claim.rule for claim in CLAIMS]}
    report.table("claims", claims_table(judged).assign(**rules), "Claims of the paper, and what was found")
    return judged


def _about(config: HeadAttributionConfig) -> dict[str, Any]:
    """Settings that the results depend on."""
    return {name: value for name, value in config.as_dict().items() if name not in ("out", "quiet")}


def summary(result: HeadAttributionResult) -> str:
    """Text for the terminal: the answer, the paper's claims, the findings, the report's path."""
    known = {name: estimate for name, estimate in result.findings.items() if estimate.n}
    width = max(map(len, known))
    lines = [f"  {name:{width}s}  {estimate}" for name, estimate in known.items()]
    claims = ["", "What the paper claims:", *terminal_lines(result.judged)] if result.judged else []
    return "\n".join([*result.answer, *claims, "", *lines, "", f"report: {result.page}"])
