"""Claims of the OCR-heads paper about tasks with heads changed, and their rules.

Each rule has one test, fixed before the run: the first task of a list that the run has, and the smallest number of
heads. So its p needs no correction; the study's report has every other task and number of heads, corrected.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd

from hooked_vlm.experiments.common.claims import (
    ALPHA,
    Claim,
    Evidence,
    Judgement,
    Number,
    cannot_say,
    decide,
    measured,
)

READING = ("docvqa", "mpdocvqa", "passkey", "page")
"""Tasks that need text in images to be read; the paper's first."""
TEXT = ("nq", "hotpotqa", "text")
"""Tasks about text."""
DAMAGE = 0.02
"""Smallest loss against random heads that counts: masking differs from the paper if this much is excluded."""
FLOOR = 0.2
"""Metric of the unchanged model below which there is too little to lose."""
GAIN = 0.009
"""The paper's largest gain in F1 by redistributing the sink."""
BETA = 0.4
DIRECTION = "direction only: the table of results was not found"


def masking_hurts(evidence: Evidence, kind: str, tasks: Sequence[str]) -> Judgement:
    """Masking the top heads of a kind damages a task more than masking random heads does."""
    tests = evidence.table("masking-against-random")
    found = _first(tests, tasks, f" {kind}")
    if found is None:
        return cannot_say(_no_test(tests, tasks), None, DIRECTION)
    unchanged = _of(evidence.table("masking"), found.task, "unchanged")
    number = _number(f"{found.task}, {found.condition} masked, minus {found.control}", found)
    if unchanged["low"] < FLOOR:
        why = f"the unchanged model has {unchanged['value']:.1%} in {found.task}: too little to lose"
        return cannot_say(why, number, DIRECTION)
    damaged = number.high < 0 and number.p <= ALPHA
    if not damaged and number.high < 0:
        return cannot_say(_too_few_draws(number, found.draws), number, DIRECTION)
    return decide(number, damaged, number.low > -DAMAGE, DIRECTION)


def sink_improves(evidence: Evidence) -> Judgement:
    """Moving attention from the first token to the others in the top two OCR heads improves reading."""
    tests, published = evidence.table("sink-against-random"), "DocVQA F1 up to +0.9 points"
    found = _first(tests, READING, " OCR", f", beta {BETA:g}")
    if found is None:
        return cannot_say(_no_test(tests, READING), None, published)
    every = evidence.table("sink-all-metrics")
    before, after = (_of(every, found.task, name, "f1") for name in ("unchanged", found.condition))
    name = f"F1 in {found.task}, {found.condition}, minus unchanged"
    ends = (after["change"], after["change_low"], after["change_high"])
    number = measured(name, ends, after["n"], found.p, "points")
    if 1 - before["value"] < 2 * GAIN:
        return cannot_say(f"the unchanged model has {before['value']:.1%}: too little to gain", number, published)
    improved = number.low > 0 and number.p <= ALPHA
    if not improved and number.low > 0:
        return cannot_say(_too_few_draws(number, found.draws), number, published)
    return decide(number, improved, number.high < GAIN, published)


def _first(tests: pd.DataFrame, tasks: Sequence[str], kind: str, beta: str = "") -> Any:
    """The fixed test of a claim, as a named tuple; None if the run has none."""
    if not len(tests):
        return None
    of_kind = tests.loc[tests["condition"].str.startswith("top ") & tests["condition"].str.endswith(kind + beta)]
    for task in tasks:
        own = of_kind.loc[of_kind["task"] == task]
        if len(own):
            size = own["condition"].str.split().str[1].astype(int)
            return next(own.loc[size == size.min()].head(1).itertuples(index=False))
    return None


def _of(table: pd.DataFrame, task: str, condition: str, metric: str | None = None) -> pd.Series:
    """Row of a task under a condition."""
    own = table.loc[(table["task"] == task) & (table["condition"] == condition)]
    return (own if metric is None else own.loc[own["metric"] == metric]).iloc[0]


def _number(name: str, test: Any) -> Number:
    return measured(name, (test.difference, test.low, test.high), test.n, test.p, "points")


def _no_test(tests: pd.DataFrame, tasks: Sequence[str]) -> str:
    if not len(tests):
        return "there are too few heads for a random control"
    return f"the run has none of the tasks {', '.join(tasks)}"


def _too_few_draws(number: Number, draws: int) -> str:
    return (
        f"the interval lies on the claim's side, but as much is found among {draws} draws of random heads "
        f"(p = {number.p:.2g}): {number}"
    )


HURTS = (
    "For the first of {tasks} that was run and the smallest number of heads, the interval of the difference to as many "
    f"random heads lies below 0 and its rank among these gives p <= {ALPHA}; it differs if a loss of {DAMAGE:.0%} is "
    "excluded."
)
EFFECTS = (
    Claim(
        "masking OCR heads",
        "Masking OCR heads hurts reading text in images more than masking random heads.",
        HURTS.format(tasks=", ".join(READING)),
        partial(masking_hurts, kind="OCR", tasks=READING),
    ),
    Claim(
        "masking retrieval heads",
        "Retrieval heads matter for text: masking them hurts answers about text more than masking random heads.",
        HURTS.format(tasks=", ".join(TEXT)),
        partial(masking_hurts, kind="retrieval", tasks=TEXT),
    ),
    Claim(
        "sink redistribution",
        "Redistributing the first token's attention in OCR heads improves reading.",
        f"For the first of {', '.join(READING)} that was run, two heads and beta {BETA:g}, the interval of the change "
        f"of F1 lies above 0 and the task's own metric ranks among random heads with p <= {ALPHA}; it differs if the "
        f"paper's gain of {100 * GAIN:.1f} points is excluded.",
        sink_improves,
    ),
)
