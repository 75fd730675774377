"""`hooked-vlm head-attribution`: one command for each result, one for everything, one across models."""

from typing import Any

from hooked_vlm.analysis.statistics import Estimate
from hooked_vlm.experiments.common.claims import plain
from hooked_vlm.experiments.common.report import files_of
from hooked_vlm.experiments.head_attribution.comparison import compare
from hooked_vlm.experiments.head_attribution.config import Command, Compare
from hooked_vlm.experiments.head_attribution.study import run, summary


def answer(command: Command) -> tuple[str, dict[str, Any]]:
    """Run a command; what to print, and the same as data."""
    if isinstance(command, Compare):
        page = compare(command)
        return f"report: {page}", files_of(page)
    result = run(command)
    found = {name: numbers(estimate) for name, estimate in result.findings.items()}
    claims = [plain(claim, own) for claim, own in result.judged]
    return summary(result), {**files_of(result.page), "findings": found, "claims": claims}


def numbers(estimate: Estimate) -> dict[str, float | int | None]:
    """For JSON, which has no NaN."""
    return {name: None if value != value else value for name, value in vars(estimate).items()}
