"""The command line of the study: one command for each result, one for everything, one across models."""

from dataclasses import replace
from typing import Annotated, Any

import tyro

from hooked_vlm.analysis.statistics import Estimate
from hooked_vlm.experiments.common.report import files_of
from hooked_vlm.experiments.head_attribution.compare import compare
from hooked_vlm.experiments.head_attribution.config import All, Attribute, Compare, Curves, Tokens, Where
from hooked_vlm.experiments.head_attribution.study import run, summary

subcommand = tyro.conf.subcommand
Command = (
    Annotated[All, subcommand("all")]
    | Annotated[Attribute, subcommand("attribute")]
    | Annotated[Curves, subcommand("curves")]
    | Annotated[Where, subcommand("where")]
    | Annotated[Tokens, subcommand("tokens")]
    | Annotated[Compare, subcommand("compare")]
)


def answer(command: Command, quiet: bool) -> tuple[str, dict[str, Any]]:
    """Run a command; what to print, and the same as data."""
    if isinstance(command, Compare):
        page = compare(command)
        return f"report: {page}", files_of(page)
    result = run(replace(command, quiet=quiet))
    found = {name: plain(estimate) for name, estimate in result.findings.items()}
    return summary(result), {**files_of(result.page), "findings": found}


def plain(estimate: Estimate) -> dict[str, float | int | None]:
    """For JSON, which has no NaN."""
    return {name: None if value != value else value for name, value in vars(estimate).items()}
