"""`hooked-vlm steer --positive DATA --negative DATA`."""

from typing import Any

from hooked_vlm.experiments.common.report import files_of
from hooked_vlm.experiments.steering.config import SteerConfig
from hooked_vlm.experiments.steering.pipeline import run


def answer(config: SteerConfig) -> tuple[str, dict[str, Any]]:
    """Run the command; what to print, and the same as data: files, best layer, its AUC, answers."""
    result = run(config)
    best = result.best
    data = {
        **files_of(result.report),
        "vectors": str(result.file),
        "best_layer": result.vectors.best,
        "auc": {name: float(best[name]) for name in ("AUC", "low", "high", "p")},
        "held_out": [int(best["n positive"]), int(best["n negative"])],
        "answers": [dict(zip(result.answers.columns, row, strict=True)) for row in result.answers.to_numpy().tolist()],
    }
    return result.summary, data
