"""Run configured experiments and write the report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooked_vlm.experiments.common.command import command_line
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.common.steps import Step, untimed
from hooked_vlm.experiments.ocr_heads.chain_of_thought import thought
from hooked_vlm.experiments.ocr_heads.characters import case
from hooked_vlm.experiments.ocr_heads.config import (
    CaseConfig,
    Command,
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
from hooked_vlm.experiments.ocr_heads.selection import ranked, select
from hooked_vlm.experiments.ocr_heads.sink_redistribution import sink
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_names
from hooked_vlm.model.fingerprints import provenance
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.files import writable_folder
from hooked_vlm.runtime.progress import recorded

PAPER = (
    "Ingeol Baek, Hwan Chang, Sunghyun Ryu and Hwanhee Lee. How Do Large Vision-Language Models See Text in Image? "
    "Unveiling the Distinctive Role of OCR Heads. EMNLP 2025. arXiv:2505.15865"
)
EXPERIMENTS: tuple[tuple[str, type[ScoreConfig], Callable[[Study, Any], Finding]], ...] = (
    ("scores", ScoreConfig, lambda study, config: score(study)),
    ("selection", SelectConfig, profile),
    ("masking", MaskConfig, mask),
    ("sink redistribution", SinkConfig, sink),
    ("chain of thought", ThoughtConfig, thought),
    ("single characters", CaseConfig, case),
    ("published heads", CompareConfig, compare),
)
"""(name, configuration, experiment): a run includes every experiment whose configuration it inherits from."""

MOST_SENTENCES = 5
"""Of all findings together, shown first."""


@dataclass(frozen=True, eq=False)
class OcrHeadsResult:
    """Scores, findings and report of a run."""

    config: ScoreConfig
    scores: dict[str, Scores]
    """"ocr" and "retrieval"."""
    findings: Sequence[Finding]
    report: Path
    tokens_per_second: float | None
    """Tokens of prompts and answers, all workers together; None if every result was already stored."""

    @property
    def answer(self) -> list[str]:
        """Sentences to quote: the heads, then what every experiment found; its first alone where there are many."""
        own = [finding.answer for finding in self.findings]
        if sum(map(len, own)) > MOST_SENTENCES:
            own = [sentences[:1] for sentences in own]
        return [answer(self.config, self.scores["ocr"]) + ".", *(s for sentences in own for s in sentences)]

    def table(self, name: str) -> Any:
        """A table of the report, with all rows."""
        return next(f.tables[name][0] for f in self.findings if name in f.tables)

    @property
    def summary(self) -> str:
        """Text for the terminal: the answer, then every experiment's lines."""
        lines = list(self.answer)
        for finding in self.findings:
            lines += ["", finding.heading, *finding.lines]
        speed = "" if self.tokens_per_second is None else f" ({self.tokens_per_second:,.0f} tokens a second)"
        return "\n".join([*lines, "", f"report: {self.report}{speed}"])


def run(config: ScoreConfig, model: HookedVLM | None = None, step: Step = untimed) -> OcrHeadsResult:
    """Run the experiments of `config`, and write report.html, figures and tables to `config.out`.

    An interrupted run resumes where it stopped.

    Args:
        model: a loaded model to use instead of loading `config.model`.
        step: times the experiments.

    Raises:
        StudyError: a setting out of range, an unusable data set, or a model without vision tower or tokenizer.
        OutputError: the output folder cannot be written.
        WorkerError: with --ray, no cluster, or workers that keep dying.
        CheckpointError, InputError, ImageError: see `HookedVLM.from_pretrained` and `to_inputs`.
    """
    config.check()
    writable_folder(config.out)
    study = Study(config, model)
    config = study.config  # with "auto" resolved
    with recorded(config.out), study.workers as workers:
        findings = []
        for name, kind, experiment in EXPERIMENTS:
            if isinstance(config, kind):
                with step(name):
                    findings.append(experiment(study, config))
        scores = {"ocr": study.ocr, "retrieval": study.retrieval}
        device = workers.device
    speed = workers.size / workers.seconds if workers.seconds else None
    page = Report(
        f"OCR heads of {config.model}",
        "Which attention heads read text in images (arXiv 2505.15865)?",
        command_line("ocr-heads", config, Command),
        PAPER,
    )
    result = OcrHeadsResult(config, scores, findings, config.out / "report.html", speed)
    page.answer = result.answer
    for finding in findings:
        page.finding(finding)
    record = {"config": config.as_dict(), **provenance(study.model), "device": device, "data": _data_record(study)}
    page.write(config.out, record, config.zip)
    return result


def answer(config: ScoreConfig, ocr: Scores) -> str:
    """One sentence: the number of OCR heads and the names of the first ten, top head first."""
    chosen = select(ocr, config.threshold, config.min_frequency, config.protocol.frequency_rule)
    heads = [head for head in ranked(ocr.mean) if chosen[head]]
    names = head_names(heads[:10]) + (", ..." if len(heads) > 10 else "")
    found = f"{len(heads)} of {chosen.size} heads of {config.model} are OCR heads by {protocol_name(config.protocol)}"
    return f"{found}: {names}" if heads else found


def _data_record(study: Study) -> list[dict[str, Any]]:
    sets = [*study.scored(as_text=False), *study.scored(as_text=True)]
    return [{"name": s.name, "source": s.source, "n": len(s.examples), "content": s.digest} for s in sets]
