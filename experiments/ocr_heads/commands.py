"""The study's commands: `hooked-vlm ocr-heads score|select|mask|sink|thought|case|compare|all`."""

from typing import Any

from hooked_vlm.experiments.common.report import files_of
from hooked_vlm.experiments.ocr_heads.config import Command
from hooked_vlm.experiments.ocr_heads.pipeline import run
from hooked_vlm.experiments.ocr_heads.selection import ranked


def answer(command: Command) -> tuple[str, dict[str, Any]]:
    """Run a command; what to print, and the same as data: files, and every head's scores by its name."""
    result = run(command)
    scores = {
        kind: {f"{layer}.{head}": float(found.mean[layer, head]) for layer, head in ranked(found.mean)}
        for kind, found in result.scores.items()
    }
    return result.summary, {**files_of(result.report), "scores": scores}
