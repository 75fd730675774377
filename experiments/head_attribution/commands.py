"""The command line of the study: one command for each result, one for everything, one across models."""

from typing import Annotated

import tyro

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


def answer(command: Command) -> str:
    """Run a command; what to print."""
    if isinstance(command, Compare):
        return f"report: {compare(command)}"
    return summary(run(command))
