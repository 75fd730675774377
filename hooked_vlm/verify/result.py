"""What was compared, and whether it agrees."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hooked_vlm.analysis.text_tables import size, text_table


@dataclass(frozen=True)
class Row:
    """One comparison over all prompts; passes if `value` is at most `tolerance` (of tokens: if all are equal)."""

    quantity: str
    value: float | int
    """Largest absolute difference; or a ratio of errors; or a number of equal tokens."""
    tolerance: float | int | None
    """None: nothing is asked of the value."""
    unit: Literal["difference", "ratio", "tokens", "s", "bytes"] = "difference"
    layer: int | None = None
    largest: float | int | None = None
    """The largest absolute value of the reference's tensor, or how many there are to be equal."""
    reference: float | int | None = None
    """The same of the reference, where each has its own value."""

    @property
    def passed(self) -> bool:
        if self.tolerance is None:
            return True
        if self.unit == "tokens":
            return self.value >= self.tolerance
        return self.value <= self.tolerance  # also false where the value is no number


@dataclass(frozen=True)
class Verification:
    """All comparisons of one checkpoint."""

    model: str
    reference: str
    dtype: str
    rows: tuple[Row, ...]
    record: dict[str, Any]
    """Versions, weights, seed, device, kernel, prompts."""

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """For verify.json."""
        rows = [{**_without_infinities(asdict(row)), "passed": row.passed} for row in self.rows]
        about = {"model": self.model, "reference": self.reference, "passed": self.passed}
        return {**about, **self.record, "dtype": self.dtype, "rows": rows}

    def table(self, layers: bool = False) -> str:
        """One line for each comparison; of those made layer by layer the worst alone, unless `layers`."""
        shown = list(self.rows) if layers else _worst(self.rows)
        compared = "compared" if layers else "compared, worst layer"
        return text_table((compared, "ours and theirs", "tolerance", "largest", ""), [*map(_cells, shown)])


def _without_infinities(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity and no NaN: they become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _worst(rows: tuple[Row, ...]) -> list[Row]:
    """Row of one quantity that is nearest to its tolerance or furthest beyond it."""
    worst: dict[str, Row] = {}
    for row in rows:
        if row.quantity not in worst or _share(row) > _share(worst[row.quantity]):
            worst[row.quantity] = row
    return list(worst.values())


def _share(row: Row) -> float:
    share = row.value / row.tolerance if row.tolerance else 0.0
    return float("inf") if share != share else share


FREE = "none"
"""Tolerance of a row of which nothing is required."""


def _cells(row: Row) -> list[str]:
    verdict = "" if row.tolerance is None else "pass" if row.passed else "FAIL"
    name = row.quantity if row.layer is None else f"{row.quantity}, layer {row.layer}"
    if row.unit == "tokens":
        tolerance = FREE if row.tolerance is None else "all"
        return [name, f"{row.value} of {row.largest} equal", tolerance, "", verdict]
    if row.unit in ("s", "bytes"):
        show = _seconds if row.unit == "s" else size
        return [name, f"{show(row.value)} and {show(row.reference or 0)}", FREE, "", verdict]
    largest = "" if row.largest is None else f"{row.largest:.3g}"
    if row.unit == "ratio":
        value = f"{row.value:.3f} x its error"
        return [name, value, FREE if row.tolerance is None else f"{row.tolerance:g}", largest, verdict]
    tolerance = FREE if row.tolerance is None else f"{row.tolerance:.1e}"
    return [name, f"{row.value:.1e}", tolerance, largest, verdict]


def _seconds(value: float | int) -> str:
    return f"{value:.3g} s"
