"""The study's commands: `hooked-vlm ocr-heads score|select|mask|sink|thought|case|compare|all`."""

from typing import Annotated, Any

import tyro

from hooked_vlm.experiments.common.report import files_of
from hooked_vlm.experiments.ocr_heads.config import (
    CaseConfig,
    CompareConfig,
    MaskConfig,
    OcrHeadsConfig,
    ScoreConfig,
    SelectConfig,
    SinkConfig,
    ThoughtConfig,
)
from hooked_vlm.experiments.ocr_heads.run import run
from hooked_vlm.experiments.ocr_heads.selection import ranked

Command = (
    Annotated[OcrHeadsConfig, tyro.conf.subcommand("all")]
    | Annotated[ScoreConfig, tyro.conf.subcommand("score")]
    | Annotated[SelectConfig, tyro.conf.subcommand("select")]
    | Annotated[MaskConfig, tyro.conf.subcommand("mask")]
    | Annotated[SinkConfig, tyro.conf.subcommand("sink")]
    | Annotated[ThoughtConfig, tyro.conf.subcommand("thought")]
    | Annotated[CaseConfig, tyro.conf.subcommand("case")]
    | Annotated[CompareConfig, tyro.conf.subcommand("compare")]
)


def answer(command: Command) -> tuple[str, dict[str, Any]]:
    """Run a command; what to print, and the same as data: files, and every head's scores by its name."""
    result = run(command)
    scores = {
        kind: {f"{layer}.{head}": float(found.mean[layer, head]) for layer, head in ranked(found.mean)}
        for kind, found in result.scores.items()
    }
    return result.summary, {**files_of(result.report), "scores": scores}
