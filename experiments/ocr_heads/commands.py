"""The study's commands: `hooked-vlm ocr-heads score|select|mask|sink|thought|case|compare|all`."""

from typing import Annotated

import tyro

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
