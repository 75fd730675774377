"""Effects of changed heads on tasks: means with intervals, and tests against random heads."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_vlm.analysis.multiple_testing import holm
from hooked_vlm.analysis.statistics import Estimate, bootstrap_two_way, mean_score, paired_change, rank_p
from hooked_vlm.experiments.common.frames import each_row
from hooked_vlm.experiments.common.words import listed
from hooked_vlm.experiments.ocr_heads.answers import METRICS
from hooked_vlm.experiments.ocr_heads.changed import UNCHANGED, Condition

Tested = Literal["worse", "better"]
"""The direction of a test against random heads: masking is expected to damage, sink redistribution to improve."""
ADJUSTED = "p, Holm"


def summarize(answers: pd.DataFrame, conditions: Sequence[Condition], seed: int) -> pd.DataFrame:
    """Mean and 95% interval of every metric, one row per task, condition and metric.

    Intervals generalise over samples, those of random conditions over draws too. `change` is the difference from the
    unchanged model, sample by sample; `lowest` and `highest` are the extreme draws.
    """
    rows = []
    for task, metric, chosen, values in _by_metric(answers):
        unchanged = values[UNCHANGED.name].mean(axis=0)
        for name in dict.fromkeys(condition.name for condition in conditions):
            table = values[name]
            value, change, draws = _mean(table, seed), _difference(table, unchanged, seed), table.mean(axis=1)
            rows.append(
                {"task": task, "condition": name, "metric": metric, "chosen": chosen}
                | {"value": value.value, "low": value.low, "high": value.high}
                | {"change": change.value, "change_low": change.low, "change_high": change.high}
                | {"lowest": draws.min(), "highest": draws.max(), "draws": len(draws), "n": value.n}
            )
    return pd.DataFrame(rows)


def against_controls(answers: pd.DataFrame, conditions: Sequence[Condition], tested: Tested, seed: int) -> pd.DataFrame:
    """Test every condition against each of its random controls, one row per task, condition, control and metric; a
    condition with the heads of an earlier one is not tested twice.

    `difference` is the condition's mean minus the control's, with a 95% interval over draws and samples. `p` is the
    one-sided rank of the condition among the control's distinct draws: the share of draws, with itself, that are at
    least as bad ("worse") or as good ("better"). Its adjustment (Holm) is over all tests of the tasks' own metrics.
    """
    rows = []
    for task, metric, chosen, values in _by_metric(answers):
        for condition in (c for c in conditions if not c.same_as):
            for control in condition.controls:
                own, drawn = values[condition.name].mean(axis=0), values[control].mean(axis=1)
                found = _difference(own[None], values[control], seed)
                tail = "lower" if tested == "worse" else "higher"
                rows.append(
                    {"task": task, "condition": condition.name, "control": control, "metric": metric, "chosen": chosen}
                    | {"difference": found.value, "low": found.low, "high": found.high, "tested": tested}
                    | {"p": rank_p(float(own.mean()), drawn, tail), "draws": len(drawn), "n": found.n}
                )
    columns = ["task", "condition", "control", "metric", "chosen", "difference", "low", "high", "tested", "p", "draws"]
    table = pd.DataFrame(rows, columns=[*columns, "n"])
    table.insert(columns.index("p") + 1, ADJUSTED, holm(table["p"].where(table["chosen"]).to_numpy(dtype=float)))
    return table


def _by_metric(answers: pd.DataFrame) -> list[tuple[str, str, bool, dict[str, Float[np.ndarray, "draw sample"]]]]:
    """(task, metric, whether it is the task's own, condition -> values of each draw and sample)."""
    found = []
    for task in dict.fromkeys(answers["task"]):
        own = answers[answers["task"] == task]
        parts = dict(list(own.groupby("condition", sort=False)))
        for metric in METRICS:
            values = {
                name: part.pivot(index="draw", columns="sample", values=metric).to_numpy(dtype=float)
                for name, part in parts.items()
            }
            found.append((task, metric, metric == own["metric"].iloc[0], values))
    return found


def _mean(values: Float[np.ndarray, "draw sample"], seed: int) -> Estimate:
    """Mean of metrics in [0, 1]."""
    if len(values) > 1:
        found = bootstrap_two_way(values, seed)
        if found.low < found.high:  # no resample differs where all values are equal
            return found
    return mean_score(values.mean(axis=0))


def _difference(
    values: Float[np.ndarray, "draw sample"], reference: Float[np.ndarray, "*draw sample"], seed: int
) -> Estimate:
    """Mean of `values` minus that of the reference, paired by sample; one of them may have many draws."""
    difference = values - reference
    if len(difference) > 1:
        found = bootstrap_two_way(difference, seed)
        if found.low < found.high:
            return found
    return paired_change(np.zeros(difference.shape[1]), difference.mean(axis=0))


# ---------------------------------------------------------------- in words


def effect_tables(
    name: str, summary: pd.DataFrame, tests: pd.DataFrame
) -> dict[str, tuple[pd.DataFrame, str, int | None]]:
    """Report tables of a summary and its tests: each task's own metric, and all metrics."""
    own, own_tests = (table.loc[table["chosen"]].drop(columns="chosen") for table in (summary, tests))
    tables: dict[str, tuple[pd.DataFrame, str, int | None]] = {
        name: (
            own,
            "Each task's own metric, with 95% intervals over samples (and draws, for random heads); change: "
            "difference from the unchanged model",
            None,
        )
    }
    if len(own_tests):
        tables[f"{name}-against-random"] = (
            own_tests,
            "Against random heads: difference of means with its 95% interval over draws and samples; p: one-sided rank "
            f"among the distinct draws, in the direction tested; Holm over the {len(own_tests)} tests of this table",
            None,
        )
    tables[f"{name}-all-metrics"] = (summary.drop(columns="chosen"), "All metrics", 0)
    return tables


def without_repeats(summary: pd.DataFrame, conditions: Sequence[Condition]) -> pd.DataFrame:
    """Leave out conditions that change the same heads in the same way as an earlier one."""
    return summary.loc[~summary["condition"].isin([c.name for c in conditions if c.same_as])]


def effect_lines(summary: pd.DataFrame, tests: pd.DataFrame) -> list[str]:
    """Each task's own metric under every condition, for the terminal; tests below the condition they are of."""
    own, own_tests = summary.loc[summary["chosen"]], tests.loc[tests["chosen"]]
    width = max(len(name) for name in own["condition"])
    lines = []
    for task in dict.fromkeys(own["task"]):
        here = own.loc[own["task"] == task]
        lines.append(f"  {task} ({here['metric'].iloc[0]}, {here['n'].iloc[0]} samples)")
        for row in each_row(here):
            spread = f"  {row.draws} draws, {row.lowest:.1%} to {row.highest:.1%}" if row.draws > 1 else ""
            lines.append(f"    {row.condition:{width}s}  {interval(row)}{spread}")
            of_it = own_tests.loc[(own_tests["task"] == task) & (own_tests["condition"] == row.condition)]
            lines += [f"      {test_words(t)}" for t in each_row(of_it)]
    return lines


def effect_answer(what: str, condition: str, summary: pd.DataFrame, tests: pd.DataFrame) -> list[str]:
    """Sentences to quote: the tasks' own metrics under a condition, and its tests against its first control.

    Args:
        what: subject of the sentence, e.g. "Masking the top 2 OCR heads (2.1, 2.0)".
    """
    own = summary[summary["chosen"]].set_index(["condition", "task"])
    tasks = list(dict.fromkeys(summary["task"]))
    before = own["value"][UNCHANGED.name]
    changes = [f"{task} from {before[task]:.1%} to {interval(own.loc[(condition, task)])}" for task in tasks]
    counts = ", ".join(map(str, dict.fromkeys(own["n"])))
    sentences = [f"{what} takes {listed(changes)} (n = {counts})."]
    own_tests = tests.loc[tests["chosen"] & (tests["condition"] == condition)]
    if len(own_tests):
        first = own_tests.loc[own_tests["control"] == own_tests["control"].iloc[0]]
        found = [f"{t.task} {test_words(t, named=False)}" for t in each_row(first)]
        draws, lowest = first["draws"].iloc[0], first[ADJUSTED].min()
        sentences.append(
            f"Against {draws} distinct draws of {first['control'].iloc[0]}: {'; '.join(found)}. "
            f"Over all {len(tests.loc[tests['chosen']])} tests the smallest p after Holm's correction is {lowest:.3f}."
        )
    return sentences


def interval(row: Any) -> str:
    """A share with its interval, in percent."""
    return f"{row.value:.1%} ({row.low:.1%} to {row.high:.1%})"


def points(test: Any, unit: str = "") -> str:
    """A difference from random heads with its interval, in percentage points."""
    difference, low, high = (f"{100 * x:+.1f}" for x in (test.difference, test.low, test.high))
    return f"{difference}{unit} ({low} to {high})"


def test_words(test: Any, named: bool = True) -> str:
    """A test against random heads: the difference, the direction tested, the rank among the draws."""
    as_far = round(test.p * (test.draws + 1)) - 1
    against = f" against {test.control}" if named else ""
    return (
        f"{points(test, ' points')}{against}, p = {test.p:.3f} for {test.tested} "
        f"({as_far or 'none'} of {test.draws} draws as {WORD[test.tested]})"
    )


WORD = {"worse": "bad", "better": "good"}
