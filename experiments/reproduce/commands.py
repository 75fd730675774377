"""`hooked-vlm reproduce MODEL --paper ...`."""

from typing import Any

from hooked_vlm.experiments.common.claims import VERDICTS, plain, terminal_lines
from hooked_vlm.experiments.common.report import files_of
from hooked_vlm.experiments.reproduce.config import ReproduceConfig
from hooked_vlm.experiments.reproduce.pipeline import run


def answer(config: ReproduceConfig) -> tuple[str, dict[str, Any]]:
    """Run a reproduction; what to print, and the same as data: files, claims, number of each verdict, seconds."""
    result = run(config)
    lines = [*result.answer, "", *terminal_lines(result.judged), "", f"report: {result.page}"]
    counts = {verdict: sum(own.verdict == verdict for _, own in result.judged) for verdict in VERDICTS}
    data = {
        **files_of(result.page),
        "study": str(result.page.parent / config.paper / "report.html"),
        "claims": [plain(claim, own) for claim, own in result.judged],
        "verdicts": counts,
        "passed": result.passed,
        "seconds": dict(result.seconds),
    }
    return "\n".join(lines), data
