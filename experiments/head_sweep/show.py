"""The report of a sweep over heads: which heads the answers need, with intervals and tests over pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from hooked_vlm.analysis.intervals import FEWEST, mean_interval, mean_p
from hooked_vlm.analysis.multiple_testing import holm
from hooked_vlm.analysis.text_tables import text_table
from hooked_vlm.experiments.common.frames import each_row
from hooked_vlm.experiments.common.plots import heatmap
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.head_sweep.results import Results

LEVEL = 0.05
"""Adjusted p below which a head's effect is called one."""
SMALLEST = 0.0005
"""Effects below are shown as 0."""
SHOWN = 10
"""Heads in the terminal."""
DONE = {
    "zero": "Zeroing the output of",
    "mean": "Replacing by its mean the output of",
    "scale": "Scaling the output of",
    "image-kv": "Hiding the image's content (mean keys and values) from",
    "knockout": "Hiding the image from",
}
MEASURED = {
    "log-prob": ("log-probability of the answer's first token", "nats"),
    "logit-diff": ("logit of the answer's first token minus that of the strongest other token", "logits"),
    "answer": ("share of samples whose greedy answer begins with this one", ""),
}


@dataclass(frozen=True, eq=False)
class Shown:
    """What a report says."""

    answer: list[str]
    table: pd.DataFrame
    """One row for each head, the largest mean effect first."""


def head_table(results: Results, seed: int, bound: float = np.inf) -> pd.DataFrame:
    """Mean effect of every head with its 95% interval, p and adjusted p, the largest first.

    Means are over samples. Intervals and tests (two-sided t) take pictures as independent, not samples: all samples of
    a picture are one group. Holm's adjustment is over all heads. Effects that are the same number for all samples have
    no interval, and no p unless that number is 0 (then it is 1): they do not show how far effects scatter. `bound` is
    the largest possible effect, at which intervals end.
    """
    effects, groups = results.effects.astype(float), _groups(results)
    same = effects.min(0) == effects.max(0)
    low, high = (np.where(same, np.nan, end.clip(-bound, bound)) for end in mean_interval(effects, seed, groups))
    p = np.where(same & effects.any(0), np.nan, mean_p(effects, groups))
    layer, head = np.array(results.heads, dtype=int).T
    table = pd.DataFrame(
        {"layer": layer, "head": head, "effect": effects.mean(0), "low": low, "high": high}
        | {"p": p, "p, Holm": holm(p), "lowered": (effects < 0).mean(0)}
    )
    order = np.argsort(-np.abs(table["effect"].to_numpy()), kind="stable")
    return table.iloc[order].reset_index(drop=True)


def _groups(results: Results) -> Int[np.ndarray, "sample"]:
    return np.unique(results.pictures, return_inverse=True)[1]


def write_report(out: Path, results: Results, record: Mapping[str, Any]) -> Shown:
    """Write report.html with its figure and tables, and return what it says."""
    settings = record["settings"]
    table = head_table(results, settings["seed"], 1.0 if settings["metric"] == "answer" else np.inf)
    shown = Shown(_answer(table, results, record), table)
    name, unit = MEASURED[settings["metric"]]
    tower = "the vision tower" if settings["tower"] == "vision" else "the language model"
    report = Report(f"What the heads of {tower} do for the answers of {settings['model']}")
    report.answer = shown.answer
    report.section(
        "Effect of every head",
        f"Effect: the {name} with the intervention on one head minus that without, averaged over samples. Intervals "
        "(95%, bootstrap, or t below 10 pictures) and tests (two-sided t against no effect) take pictures as "
        f"independent; p is adjusted over the heads that are tested (Holm), intervals are of each head alone. Neither "
        "is there for a head whose effect is the same for all samples.",
    )
    layers, heads = (sorted(set(table[axis])) for axis in ("layer", "head"))
    values, framed = _as_matrix(table, layers, heads)
    labels = ("layer", "head", f"mean effect{f' ({unit})' if unit else ''}")
    caption = f"Mean effect of every head; frames: p below {LEVEL} after Holm's adjustment"
    report.figure("effects", heatmap(values, layers, heads, labels, framed=framed), caption)
    report.table("heads", table, "Every head: mean effect, its interval and test; lowered: share of samples", shown=20)
    report.section("Samples")
    strongest = np.abs(results.effects).argmax(1)
    samples = results.samples().assign(
        **{"strongest head": [f"{layer}.{head}" for layer, head in (results.heads[i] for i in strongest)]},
        **{"its effect": np.take_along_axis(results.effects, strongest[:, None], 1)[:, 0]},
    )
    report.table("samples", samples, "Every sample: its answer, the metric without intervention", shown=20)
    report.write(out, record)
    return shown


def _as_matrix(table: pd.DataFrame, layers: list[int], heads: list[int]) -> tuple[Float[np.ndarray, "layer head"], Any]:
    values = np.full((len(layers), len(heads)), np.nan)
    framed = np.zeros(values.shape, dtype=bool)
    at = [layers.index(layer) for layer in table["layer"]], [heads.index(head) for head in table["head"]]
    values[at], framed[at] = table["effect"].to_numpy(), table["p, Holm"].to_numpy() < LEVEL
    return values, framed


def _answer(table: pd.DataFrame, results: Results, record: Mapping[str, Any]) -> list[str]:
    """Sentences to quote."""
    settings = record["settings"]
    name, unit = MEASURED[settings["metric"]]
    n, n_pictures = len(results.cases), len(set(results.pictures))
    first = next(each_row(table))
    change = f"{first.effect:+.3f}{f' {unit}' if unit else ''}"
    interval = "" if np.isnan(first.low) else f" (95% interval {first.low:+.3f} to {first.high:+.3f})"
    over = _counted(n, "sample") + ("" if n == n_pictures else f" of {_counted(n_pictures, 'picture')}")
    effect, p = (table[column].to_numpy(dtype=float) for column in ("effect", "p, Holm"))
    if np.abs(results.effects).max() < SMALLEST:
        return [
            f"{DONE[settings['intervention']]} a head changes the {name} by less than {SMALLEST} for each of {over}, "
            f"whichever of {_counted(len(table), 'head')} it is.",
            *_skipped(record),
        ]
    n_equal = int((np.abs(effect) == abs(effect[0])).sum()) - 1
    equal = f", as large as that of {n_equal} more" if n_equal else ""
    sentences = [
        f"{DONE[settings['intervention']]} head {first.layer}.{first.head} has the largest effect of {len(table)} "
        f"heads{equal}: it changes the {name} by {change}{interval} on average over {over}."
    ]
    if n_pictures >= FEWEST:
        untested = int(np.isnan(p).sum())
        if untested:
            sentences.append(f"{untested} of the heads change it by the same for all samples: they cannot be tested.")
        lower, higher = (int((moved & (p < LEVEL)).sum()) for moved in (effect < 0, effect > 0))
        none = "No other head changes it" if untested else "No head changes it"
        found = f"{lower} heads lower it and {higher} raise it" if lower + higher else none
        if tested := len(table) - untested:
            sentences.append(f"{found} at p < {LEVEL} (two-sided t over pictures, Holm over {tested} heads).")
    else:
        sentences.append("There are too few pictures for tests and intervals: three at least.")
    return sentences + _skipped(record)


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _skipped(record: Mapping[str, Any]) -> list[str]:
    """A sentence on samples that could not be used, if there are any."""
    n = record["skipped"]
    return [f"{_counted(n, 'sample')} could not be used; skipped.csv says why."] if n else []


def _signed(number: float) -> str:
    return "nan" if np.isnan(number) else f"{number:+.3f}"


def in_terminal(shown: Shown) -> str:
    """The answer and the strongest heads."""
    rows = [
        [f"{row.layer}.{row.head}", *map(_signed, row[2:5]), f"{row.p_holm:.2g}", f"{row.lowered:.0%}"]
        for row in each_row(shown.table.rename(columns={"p, Holm": "p_holm"}).head(SHOWN))
    ]
    header = ["head", "effect", "low", "high", "p (Holm)", "lowered"]
    return "\n".join([*shown.answer, "", text_table(header, rows)])
