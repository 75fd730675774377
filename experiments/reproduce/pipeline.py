"""A reproduction from end to end: check the model, run the study, judge the claims, write the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hooked_vlm.experiments import head_attribution, ocr_heads
from hooked_vlm.experiments.common.claims import Claim, Evidence, Judgement
from hooked_vlm.experiments.common.command import LEFT_OUT
from hooked_vlm.experiments.common.steps import Clock, Step
from hooked_vlm.experiments.head_attribution import claims as claims_attribution
from hooked_vlm.experiments.head_attribution.config import All
from hooked_vlm.experiments.ocr_heads.config import OcrHeadsConfig
from hooked_vlm.experiments.ocr_heads.published import published_for
from hooked_vlm.experiments.reproduce import claims_ocr
from hooked_vlm.experiments.reproduce.config import ReproduceConfig
from hooked_vlm.experiments.reproduce.page import write_page
from hooked_vlm.experiments.reproduce.sizes import study_config
from hooked_vlm.experiments.reproduce.verification import check_against_transformers, is_of, judged, stored_check
from hooked_vlm.model.by_name import load
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.files import writable_folder

VERIFY, LOAD, STUDY = "verify", "load the model", "study"
STEPS_OF_ALL = (VERIFY, LOAD, STUDY)
"""Steps that together are the run; others are parts of the study."""


@dataclass(frozen=True, eq=False)
class Reproduction:
    """Judged claims and page of a run."""

    config: ReproduceConfig
    judged: Sequence[tuple[Claim, Judgement]]
    """The check of the model first, then the paper's claims."""
    seconds: Mapping[str, float]
    """Of every step, all runs together; `study` contains the steps that begin with "study: "."""
    page: Path
    """report.html; the study's own lies in a folder beside it."""
    answer: Sequence[str]

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return all(own.verdict != "differs" for _, own in self.judged)


def run(config: ReproduceConfig, model: HookedVLM | None = None) -> Reproduction:
    """Reproduce a paper on a model, or resume an interrupted run, and write the page to `config.out`.

    Args:
        model: a loaded model to use for the study instead of loading `config.model`.

    Raises:
        StudyError: a setting of the other paper, or what the study refuses.
        OutputError: the output folder cannot be written.
        WorkerError: with --ray, no cluster, or workers that keep dying.
        CheckpointError, InputError, ImageError: see `HookedVLM.from_pretrained` and `to_inputs`.
    """
    config.check()
    own = study_config(config)
    own.check()
    writable_folder(config.out)
    clock = Clock(config.out / "seconds.json", recorded(config))
    check = config.out / "verify.json"
    with clock(VERIFY):  # before the study's model is loaded: it needs two of its own
        record = stored_check(check) or check_against_transformers(config, check)
    with clock(LOAD):
        model = model or load(config.model, config.device, config.dtype)
        if "error" not in record and not is_of(record, model):
            record = check_against_transformers(config, check)
    with clock(STUDY):
        evidence = study(own, model, lambda name: clock(f"{STUDY}: {name}"), config.model)
    claims = (judged(record), *(claims_ocr if config.paper == "ocr-heads" else claims_attribution).CLAIMS)
    found = [(claim, claim.judge(evidence)) for claim in claims]
    total = {"total": sum(clock.seconds[name] for name in STEPS_OF_ALL)}
    page, answer = write_page(config, found, clock.seconds | total, model, recorded(config))
    return Reproduction(config, found, clock.seconds | total, page, answer)


def study(config: OcrHeadsConfig | All, model: HookedVLM, step: Step, name: str) -> Evidence:
    """Run the study; what the rules read of it."""
    n_layers = model.cfg.n_layers
    if isinstance(config, All):
        result = head_attribution.run(config, model, step)
        return Evidence(name, n_layers, result.tables, result.findings)
    found = ocr_heads.run(config, model, step)
    tables = {name: frame for finding in found.findings for name, (frame, *_) in finding.tables.items()}
    record = published_for(name)
    shape = (n_layers, model.cfg.n_heads)
    if record is not None and (record["n_layers"], record["n_heads"]) != shape:
        record = None
    return Evidence(name, n_layers, tables, {}, record, config.compat)


def recorded(config: ReproduceConfig) -> dict[str, Any]:
    """Settings that results depend on."""
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in LEFT_OUT}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
