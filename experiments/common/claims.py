"""Claims of a paper, the rules that judge them, and what rules share.

A rule reads tables of a study and answers "pass", "differs" or "cannot say". It decides by an interval or a test, never
by a value alone: a claim passes if the interval lies where the claim says, differs if the interval excludes that, and
otherwise nothing can be said.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from hooked_vlm.analysis.statistics import Estimate

Verdict = Literal["pass", "differs", "cannot say"]
VERDICTS: tuple[Verdict, ...] = ("pass", "differs", "cannot say")
ALPHA = 0.05
"""p at which a test decides."""
FEWEST = 5
"""Observations (samples, pictures) below which nothing is said."""
FEWEST_HEADS = 100
"""Heads below which nothing is said about shares of heads: one of 16 heads is 6% of them, more than shares differ."""
FEWEST_LAYERS = 6
"""Layers below which nothing is said about early and late ones."""


@dataclass(frozen=True)
class Number:
    """The number that decides a claim, with its 95% interval and, of a test, its p."""

    name: str
    value: float
    low: float
    high: float
    n: int
    """Observations it is of."""
    p: float = np.nan
    unit: Literal["", "%", "points"] = ""
    """Shares are shown in percent, their differences in points."""

    @property
    def interval(self) -> str:
        if not self.known:
            return "none"
        return f"{self.show(self.low).removesuffix(' points')} to {self.show(self.high).removesuffix(' points')}"

    @property
    def known(self) -> bool:
        """Whether it has an interval."""
        return bool(np.isfinite([self.value, self.low, self.high]).all())

    def show(self, value: float) -> str:
        """A value in the number's unit."""
        if not self.unit:
            return f"{value:.3g}"
        return f"{100 * value:.1f}%" if self.unit == "%" else f"{100 * value:+.1f} points"

    def __str__(self) -> str:
        tested = "" if np.isnan(self.p) else f", p = {self.p:.2g}"
        return f"{self.name}: {self.show(self.value)} ({self.interval}{tested}; n = {self.n})"


@dataclass(frozen=True)
class Judgement:
    """What became of a claim."""

    verdict: Verdict
    reason: str
    """What decided, or why nothing can be said."""
    number: Number | None = None
    published: str = "no number found"
    """The paper's number."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Results of a study that rules read."""

    model: str
    n_layers: int
    tables: Mapping[str, pd.DataFrame]
    """Tables of the study's report."""
    findings: Mapping[str, Estimate] = field(default_factory=dict)
    """Findings of head attribution."""
    published: Mapping[str, Any] | None = None
    """Published record of the model."""
    compat: bool = False
    """Whether it was measured as the official code does."""

    def table(self, name: str) -> pd.DataFrame:
        """A table; an empty one if the study made none of that name."""
        return self.tables.get(name, pd.DataFrame())


@dataclass(frozen=True, eq=False)
class Claim:
    """A claim of a paper and the rule that judges it."""

    name: str
    says: str
    """The paper's claim."""
    rule: str
    """What counts as pass, in one sentence."""
    judge: Callable[[Evidence], Judgement]


def cannot_say(why: str, number: Number | None = None, published: str = "no number found") -> Judgement:
    """Nothing can be said."""
    return Judgement("cannot say", why, number, published)


def decide(number: Number, holds: bool, contradicted: bool, published: str = "no number found") -> Judgement:
    """Judge by a number: whether its interval lies where the claim says, or excludes that.

    Without an interval, or with too few observations, nothing is said whatever the flags.
    """
    if number.n < FEWEST:
        return cannot_say(f"{number.n} observations, {FEWEST} are needed", number, published)
    if not number.known:
        return cannot_say(f"{number.name} has no interval", number, published)
    if holds or contradicted:
        return Judgement("pass" if holds else "differs", str(number), number, published)
    return cannot_say(f"the interval and its test allow either: {number}", number, published)


def above(number: Number, bound: float, published: str = "no number found") -> Judgement:
    """Pass if the interval lies above a bound, differs if it lies below."""
    return decide(number, number.low > bound, number.high < bound, published)


def below(number: Number, bound: float, published: str = "no number found") -> Judgement:
    """Pass if the interval lies below a bound, differs if it lies above."""
    return decide(number, number.high < bound, number.low > bound, published)


def all_of(judgements: Sequence[Judgement], published: str = "no number found") -> Judgement:
    """Judge a claim of several parts: it differs if a part does, passes if all do. The worst part decides."""
    worst = next(own for verdict in ("differs", "cannot say", "pass") for own in judgements if own.verdict == verdict)
    reason = worst.reason if worst.verdict != "pass" else "; ".join(own.reason for own in judgements)
    return Judgement(worst.verdict, reason, worst.number, published)


def measured(name: str, ends: Iterable[Any], n: Any, p: Any = np.nan, unit: Literal["", "%", "points"] = "") -> Number:
    """Number of a table's cells; `ends` are its value and the low and high end of its interval."""
    value, low, high = map(float, ends)
    return Number(name, value, low, high, int(n), float(p), unit)


# ---------------------------------------------------------------- as tables and text

Judged = Sequence[tuple[Claim, Judgement]]
WORDS: Mapping[Verdict, str] = {"pass": "Pass", "differs": "Differs", "cannot say": "Cannot be judged"}


def claims_table(judged: Judged) -> pd.DataFrame:
    """One row per claim: its verdict, the number that decides, its interval and p, the published number, the reason."""
    rows = []
    for claim, own in judged:
        number = own.number
        some = number is not None and number.known
        rows.append(
            {
                "claim": claim.name,
                "verdict": own.verdict,
                "decided by": None if number is None else number.name,
                "value": number.show(number.value) if number is not None and some else None,
                "95% interval": number.interval if number is not None and some else None,
                "p": None if number is None else number.p,
                "n": None if number is None else number.n,
                "published": own.published,
                "reason": own.reason,
            }
        )
    return pd.DataFrame(rows)


def terminal_lines(judged: Judged) -> list[str]:
    """One line per claim: verdict, name, reason."""
    width = max(len(claim.name) for claim, _ in judged)
    return [f"  {own.verdict:10s}  {claim.name:{width}s}  {own.reason}" for claim, own in judged]


def told(claim: Claim, own: Judgement) -> str:
    """The verdict on a claim, what the paper says and what was found, in one paragraph."""
    found = f"{own.reason[:1].upper()}{own.reason[1:]}." if own.reason else ""
    return f"{WORDS[own.verdict]}: {claim.name}. {claim.says} {found}"


def plain(claim: Claim, own: Judgement) -> dict[str, Any]:
    """A judged claim for JSON, which has no NaN."""
    number = None if own.number is None else {k: None if v != v else v for k, v in vars(own.number).items()}
    words = {"claim": claim.name, "says": claim.says, "rule": claim.rule, "verdict": own.verdict}
    return words | {"reason": own.reason, "number": number, "published": own.published}
