"""Tasks answered with some heads changed: shared by masking, sink redistribution and chain of thought."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from hooked_vlm.analysis.statistics import bootstrap_mean, paired_p
from hooked_vlm.experiments.common.frames import each_row
from hooked_vlm.experiments.ocr_heads.answers import METRICS, judge
from hooked_vlm.experiments.ocr_heads.config import TaskConfig
from hooked_vlm.experiments.ocr_heads.data.tasks import QATask, load_tasks
from hooked_vlm.experiments.ocr_heads.examples import Example, to_inputs
from hooked_vlm.experiments.ocr_heads.study import Study, head_names
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import Head, Intervention
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.tasks import SharedSetup, Task


@dataclass(frozen=True, eq=False)
class Condition:
    """An intervention on some heads, applied in all tasks."""

    name: str
    heads: tuple[Head, ...] = ()
    change: Intervention | None = None
    draw: int = 0
    """Number of the random set."""
    control: str = ""
    """Name of the random condition that it is compared with."""


UNCHANGED = Condition("unchanged")
RANK = "rank among random draws"
"""Column: share of the control's draws with a metric at most as high."""


def top_heads(study: Study, k: int) -> dict[str, tuple[Head, ...]]:
    """Top `k` OCR heads and top `k` retrieval heads."""
    return {"OCR": study.top(study.ocr, k), "retrieval": study.top(study.retrieval, k)}


def against_random(
    study: Study, k: int, sources: Mapping[str, str], draws: int, change: Callable[[tuple[Head, ...]], Intervention],
    label: str = "",
) -> list[Condition]:  # fmt: skip
    """Change the top `k` heads of either kind, and as many random heads.

    Args:
        sources: name of each random condition -> source of its heads (`Study.candidates`); the first with enough heads
            is the control.
        label: suffix of the conditions' names.
    """
    tops = top_heads(study, k)
    excluded = [*tops["OCR"], *tops["retrieval"]]
    randoms = {name + label: study.random_sets(source, excluded, k, draws) for name, source in sources.items()}
    control = next((name for name, sets in randoms.items() if sets), "")
    conditions = [
        Condition(f"top {k} {kind}{label}", heads, change(heads), control=control) for kind, heads in tops.items()
    ]
    for name, sets in randoms.items():
        conditions += [Condition(name, heads, change(heads), draw) for draw, heads in enumerate(sets)]
    return conditions


def tasks_of(study: Study, config: TaskConfig) -> list[QATask]:
    """Configured tasks, with samples that heads were not scored on."""
    names = config.tasks or study.default_tasks()
    return load_tasks(study.data_folder, names, config.seed + 1, config.task_samples, config.lengths, config.task_files)


def answer_all(study: Study, tasks: Sequence[QATask], conditions: Sequence[Condition], what: str) -> pd.DataFrame:
    """Answer every task under every condition, one row per condition, draw, task and sample: reply and metrics.

    Images are encoded once; stored results are reused.
    """
    config, frames = study.config, []
    for task in tasks:
        examples = task.data.examples
        units: list[Task] = []
        answered: list[tuple[list[int], Condition]] = []
        for group, n_tokens in study.groups(study.model, examples, config.new_tokens):
            prompts = SharedSetup(encoded, ([examples[i] for i in group], study.pixels))
            for condition in conditions:
                key = {
                    "answers": task.data.digest,
                    "model": study.identity,
                    "examples": group,
                    "pixels": study.pixels,
                    "change": repr(condition.change),
                    "new_tokens": config.new_tokens,
                }
                units.append(study.unit(key, answers_of, (condition.change, config.new_tokens), n_tokens, prompts))
                answered.append((group, condition))
        for (group, condition), found in zip(answered, study.tables(units, f"{what}, {task.name}"), strict=True):
            judged = pd.DataFrame([judge(examples[i], r) for i, r in zip(group, found["reply"], strict=True)])
            frames.append(
                judged.assign(
                    task=task.name,
                    metric=task.metric,
                    condition=condition.name,
                    draw=condition.draw,
                    heads=head_names(condition.heads),
                    sample=group,
                    reply=list(found["reply"]),
                )
            )
    table = pd.concat(frames, ignore_index=True)
    columns = ["task", "condition", "draw", "heads", "sample", "reply", "metric", *METRICS]
    return table.loc[:, columns].sort_values(["task", "condition", "draw", "sample"], ignore_index=True)


def encoded(model: HookedVLM, examples: Sequence[Example], pixels: int | None) -> VLMInputs:
    """Batch of prompts with image features."""
    inputs = to_inputs(model, examples, pixels)
    if inputs.has_visuals:
        features = model.encode_images(inputs).detach()
        # pixels are fifty times as large as the features
        inputs = replace(inputs.with_image_features(features), pixel_values=None)
    return inputs


def answers_of(model: HookedVLM, inputs: VLMInputs, change: Intervention | None, new_tokens: int) -> pd.DataFrame:
    """Replies under an intervention, as a column."""
    hooks = [] if change is None else change.hooks(model, inputs)
    replies = model.generate(inputs, new_tokens, fwd_hooks=hooks, return_type="str")
    return pd.DataFrame({"reply": [replies] if isinstance(replies, str) else replies})


def summarize(answers: pd.DataFrame, conditions: Sequence[Condition], seed: int) -> pd.DataFrame:
    """Mean and 95% bootstrap interval over samples, one row per task, condition and metric.

    `change` is the difference from the unchanged model, sample by sample. `p` is a paired test of the samples against
    the random control's mean over its draws; it treats these draws as fixed, so `rank among random draws` gives the
    share of draws with a metric at most as high. Random conditions are averaged over draws sample by sample; `lowest`
    and `highest` are their extreme draws.
    """
    controls = {condition.name: condition.control for condition in conditions}
    rows = []
    for task in dict.fromkeys(answers["task"]):
        own = answers[answers["task"] == task]
        for metric in METRICS:
            samples = {
                name: part.pivot(index="sample", columns="draw", values=metric)
                for name, part in own.groupby("condition", sort=False)
            }
            for name in dict.fromkeys(controls):
                values = samples[name]
                mean = values.mean(axis=1).to_numpy()
                estimate, draws = bootstrap_mean(mean, seed), values.mean(axis=0)
                change = bootstrap_mean(mean - samples[UNCHANGED.name].mean(axis=1).to_numpy(), seed)
                control = samples.get(controls[name])
                p = np.nan if control is None else paired_p(mean, control.mean(axis=1).to_numpy(), seed)
                rank = np.nan if control is None else (control.mean(axis=0) <= estimate.value + 1e-12).mean()
                rows.append(
                    {
                        "task": task,
                        "condition": name,
                        "metric": metric,
                        "chosen": metric == own["metric"].iloc[0],
                        "value": estimate.value,
                        "low": estimate.low,
                        "high": estimate.high,
                        "change": change.value,
                        "change_low": change.low,
                        "change_high": change.high,
                        "p": p,
                        "control": controls[name],
                        RANK: rank,
                        "lowest": draws.min(),
                        "highest": draws.max(),
                        "draws": len(draws),
                        "n": estimate.n,
                    }
                )
    return pd.DataFrame(rows)


def metric_tables(name: str, summary: pd.DataFrame) -> dict[str, tuple[pd.DataFrame, str, int | None]]:
    """Report tables of a summary: each task's own metric, and all metrics."""
    chosen = summary.loc[summary["chosen"]].drop(columns="chosen")
    caption = (
        "Each task's own metric. p: paired, against the mean of the control's draws; rank among random draws: share of "
        "them with a metric at most as high"
    )
    return {name: (chosen, caption, None), f"{name}-all-metrics": (summary.drop(columns="chosen"), "All metrics", 0)}


def headline(summary: pd.DataFrame) -> str:
    """One line: each task's own metric, unchanged and under the first change."""
    shown = summary[summary["chosen"]]
    first = next(name for name in shown["condition"] if name != UNCHANGED.name)
    values = shown.set_index(["condition", "task"])["value"]
    tasks = [f"{task} {values[UNCHANGED.name, task]:.1%} -> {values[first, task]:.1%}" for task in values[first].index]
    return f"unchanged -> {first}: {', '.join(tasks)}"


def summary_lines(summary: pd.DataFrame) -> list[str]:
    """Each task's own metric under every condition, for the terminal."""
    shown = summary[summary["chosen"]]
    width = max(len(name) for name in shown["condition"])
    lines = []
    for task in dict.fromkeys(shown["task"]):
        own = shown.loc[shown["task"] == task].rename(columns={RANK: "rank"})
        lines.append(f"  {task} ({own['metric'].iloc[0]}, {own['n'].iloc[0]} samples)")
        for row in each_row(own):
            spread = f"{row.draws} draws, {row.lowest:.1%} to {row.highest:.1%}" if row.draws > 1 else ""
            p = "" if np.isnan(row.p) else f"p against random {row.p:.4f}, rank among random draws {row.rank:.0%}"
            text = f"    {row.condition:{width}s}  {row.value:6.1%} ({row.low:.1%} to {row.high:.1%})"
            lines.append("  ".join(part for part in (text, spread, p) if part))
    return lines
