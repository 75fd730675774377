"""The page of a reproduction: the answer, every claim with the number that decides it, the rules, the time."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hooked_vlm.experiments.common.claims import VERDICTS, WORDS, Judged, claims_table, told
from hooked_vlm.experiments.common.command import changed_settings
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.head_attribution.study import PAPER as HEAD_ATTRIBUTION
from hooked_vlm.experiments.ocr_heads.pipeline import PAPER as OCR_HEADS
from hooked_vlm.experiments.reproduce.config import ReproduceConfig
from hooked_vlm.model.fingerprints import provenance
from hooked_vlm.model.vlm import HookedVLM

PAPERS = {"ocr-heads": OCR_HEADS, "head-attribution": HEAD_ATTRIBUTION}


def write_page(
    config: ReproduceConfig, judged: Judged, seconds: Mapping[str, float], model: HookedVLM, about: Mapping[str, Any]
) -> tuple[Path, list[str]]:
    """Write the page to `config.out`; its path, and its answer."""
    name = Path(config.model).name
    report = Report(
        f"{config.paper} reproduced on {name}",
        f"Which claims of the paper hold on this model ({config.size} size)?",
        command_of(config),
        PAPERS[config.paper],
    )
    report.answer = answer_of(judged, seconds["total"], name)
    report.section(
        "Claims",
        "A claim passes if the interval of the number that decides it lies where the claim says, and differs if the "
        "interval excludes that; the rules are in the table of rules. Intervals are 95%.",
        f"The study's own report, with all of its figures and tables: `{config.paper}/report.html` beside this page.",
    )
    for claim, own in judged:
        report.text(told(claim, own))
    report.table("claims", claims_table(judged), f"Claims of the paper on {name}")
    report.section("Rules", "What counts as pass was fixed before the run.")
    rules = [{"claim": claim.name, "the paper says": claim.says, "passes if": claim.rule} for claim, _ in judged]
    report.table("rules", pd.DataFrame(rules), "Rule of every claim")
    report.section(
        "Time",
        "Seconds of every step. A step that was interrupted counts with all of its runs; parts of the study begin with "
        "its name and are in its time.",
    )
    steps = pd.DataFrame({"step": list(seconds), "seconds": [round(own, 1) for own in seconds.values()]})
    report.table("seconds", steps, "Time of every step")
    record = {"config": dict(about), **provenance(model)}
    return report.write(config.out, record, config.zip), report.answer


def answer_of(judged: Judged, total: float, name: str) -> list[str]:
    """Sentences that answer which claims hold."""
    check, claims = judged[0][1], judged[1:]
    names = {verdict: [claim.name for claim, own in claims if own.verdict == verdict] for verdict in VERDICTS}
    counts = (
        f"Of {len(claims)} claims of the paper {len(names['pass'])} pass on {name}, {len(names['differs'])} differ "
        f"and {len(names['cannot say'])} cannot be judged."
    )
    parts = [f"{WORDS[verdict]}: {'; '.join(own)}." for verdict in VERDICTS if (own := names[verdict])]
    checked = f"Check against transformers: {check.verdict} ({check.reason})."
    return [counts, *parts, f"{checked} All of it took {_duration(total)}."]


def command_of(config: ReproduceConfig) -> str:
    """The command that repeats the run: the model, the paper, and every setting that is not the default."""
    default = ReproduceConfig(config.model, config.paper)
    words = ["hooked-vlm", "reproduce", config.model, "--paper", config.paper]
    return shlex.join([*words, *changed_settings(config, default)])


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
