"""From a configuration to a report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.ocr_heads.chain_of_thought import thought
from hooked_vlm.experiments.ocr_heads.characters import case
from hooked_vlm.experiments.ocr_heads.config import (
    CaseConfig,
    CompareConfig,
    MaskConfig,
    ScoreConfig,
    SelectConfig,
    SinkConfig,
    ThoughtConfig,
)
from hooked_vlm.experiments.ocr_heads.head_profile import profile
from hooked_vlm.experiments.ocr_heads.head_scores import protocol_name, score
from hooked_vlm.experiments.ocr_heads.masking import mask
from hooked_vlm.experiments.ocr_heads.published import compare
from hooked_vlm.experiments.ocr_heads.scoring import Scores
from hooked_vlm.experiments.ocr_heads.sink_redistribution import sink
from hooked_vlm.experiments.ocr_heads.study import Finding, Study
from hooked_vlm.model.fingerprints import provenance
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.files import writable_folder

EXPERIMENTS: tuple[tuple[type[ScoreConfig], Callable[[Study, Any], Finding]], ...] = (
    (ScoreConfig, lambda study, config: score(study)),
    (SelectConfig, profile),
    (MaskConfig, mask),
    (SinkConfig, sink),
    (ThoughtConfig, thought),
    (CaseConfig, case),
    (CompareConfig, compare),
)
"""A configuration runs every experiment whose settings it has."""


@dataclass(frozen=True, eq=False)
class OcrHeadsResult:
    """What a run found, as in its report."""

    config: ScoreConfig
    scores: dict[str, Scores]
    """"ocr" and "retrieval"."""
    findings: Sequence[Finding]
    report: Path
    tokens_per_second: float | None
    """Of prompts and answers, by all workers; None if all parts were there already."""

    def table(self, name: str) -> Any:
        """One of the report's tables, whole."""
        return next(f.tables[name][0] for f in self.findings if name in f.tables)

    @property
    def summary(self) -> str:
        """What the terminal shows."""
        lines = [f"OCR heads of {self.config.model}, measured by {protocol_name(self.config.measured_by)}"]
        for finding in self.findings:
            lines += ["", finding.heading, *finding.lines]
        speed = "" if self.tokens_per_second is None else f" ({self.tokens_per_second:,.0f} tokens a second)"
        return "\n".join([*lines, "", f"report: {self.report}{speed}"])


def run(config: ScoreConfig, model: HookedVLM | None = None) -> OcrHeadsResult:
    """Run the experiments that `config` has settings for, and write report.html, figures and tables to `config.out`.

    A run that was interrupted goes on where it stopped.

    Args:
        model: a loaded model to use instead of loading `config.model`.

    Raises:
        StudyError: a setting out of range, a data set that is not what it should be, a model that cannot be asked.
        OutputError: the output folder cannot be written.
        WorkerError: with --ray, no cluster or workers that keep dying.
        CheckpointError, InputError, ImageError: see `HookedVLM.from_pretrained` and `to_inputs`.
    """
    config.check()
    writable_folder(config.out)
    study = Study(config, model)
    config = study.config  # with what "auto" stands for
    with study.workers as workers:
        findings = [experiment(study, config) for kind, experiment in EXPERIMENTS if isinstance(config, kind)]
        scores = {"ocr": study.ocr, "retrieval": study.retrieval}
        device = workers.device
    page = Report(
        f"OCR heads of {config.model}",
        "Which attention heads read text in images (arXiv 2505.15865); measured by "
        f"{protocol_name(config.measured_by)}.",
    )
    for finding in findings:
        page.section(finding.heading, *finding.paragraphs)
        page.lines(finding.lines)
        for name, (figure, caption) in finding.figures.items():
            page.figure(name, figure, caption)
        for name, (frame, caption, shown) in finding.tables.items():
            page.table(name, frame, caption, shown)
    record = {"config": config.as_dict(), **provenance(study.model), "device": device, "data": _data_record(study)}
    written = page.write(config.out, record)
    speed = workers.size / workers.seconds if workers.seconds else None
    return OcrHeadsResult(config, scores, findings, written, speed)


def _data_record(study: Study) -> list[dict[str, Any]]:
    sets = [*study.scored(as_text=False), *study.scored(as_text=True)]
    return [{"name": s.name, "source": s.source, "n": len(s.examples), "content": s.digest} for s in sets]
