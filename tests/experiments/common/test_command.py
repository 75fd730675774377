"""The command in a report repeats its run."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro

from hooked_vlm.experiments.common.command import command_line
from hooked_vlm.experiments.head_attribution import config as head_attribution
from hooked_vlm.experiments.ocr_heads import config as ocr_heads

RUNS = [
    ("ocr-heads", ocr_heads, ocr_heads.MaskConfig()),
    ("ocr-heads", ocr_heads, ocr_heads.ScoreConfig(model="a folder/model", compat=True, lengths=(64, 128))),
    ("ocr-heads", ocr_heads, ocr_heads.CaseConfig(protocol=ocr_heads.Protocol(0.25, weight_by_run="reply"))),
    ("ocr-heads", ocr_heads, ocr_heads.OcrHeadsConfig(random_from=("any", "live"), tasks=("page",), betas=(0.5,))),
    ("head-attribution", head_attribution, head_attribution.All(images=Path("my pictures"), question="What's it?")),
    ("head-attribution", head_attribution, head_attribution.Tokens(keep=0.25, masks=7, seed=3)),
]  # fmt: skip


@pytest.mark.parametrize(("study", "module", "config"), RUNS, ids=lambda value: type(value).__name__)
def test_the_command_line_parses_to_the_configuration(study: str, module: Any, config: Any) -> None:
    elsewhere = replace(config, out=Path("elsewhere"), zip=True)
    words = shlex.split(command_line(study, elsewhere, module.Command))
    assert words[:2] == ["hooked-vlm", study]
    settings = (tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagCreatePairsOff)
    read = tyro.cli(tyro.conf.OmitArgPrefixes[module.Command], args=words[2:], config=settings)
    assert read == replace(config, out=type(config)().out)


def test_a_configuration_without_a_command_has_none() -> None:
    assert command_line("ocr-heads", head_attribution.All(), ocr_heads.Command) == ""
