"""Made-up results of both studies, which rules judge."""

from typing import Any

import pandas as pd

from hooked_vlm.analysis.statistics import Estimate
from hooked_vlm.experiments.common.claims import Evidence
from hooked_vlm.experiments.head_attribution.findings import OverPictures


def evidence(tables: dict[str, pd.DataFrame] | None = None, **more: Any) -> Evidence:
    return Evidence(**{"model": "made-up", "n_layers": 28, "tables": tables or {}, **more})


def scores(*groups: tuple[int, float, float, float], n: int = 200) -> pd.DataFrame:
    """Table of heads, (number, score, low, high) of each group, top heads first; frequencies equal scores."""
    rows = [row for count, *row in groups for _ in range(count)]
    table = pd.DataFrame(rows, columns=["score", "low", "high"])
    return table.assign(layer=range(len(rows)), head=0, frequency=table["score"], n=n)


def by_name(value: float, low: float, high: float, names: int = 10) -> Estimate:
    """An estimate whose interval by picture would decide otherwise."""
    return OverPictures(float(value), low - 10.0, high + 10.0, 3 * names, float(low), float(high), names)


def verdict(claims: Any, name: str, own: Evidence) -> tuple[str, str]:
    """Verdict and reason of a claim by its name."""
    judged = next(claim for claim in claims if claim.name == name).judge(own)
    return judged.verdict, judged.reason
