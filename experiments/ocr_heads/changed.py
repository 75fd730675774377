"""Tasks answered with heads changed: what masking, sink redistribution and written-out steps have in common."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from hooked_vlm.runtime.tasks import SharedSetup, Task


@dataclass(frozen=True, eq=False)
class Condition:
    """A change of some heads, in all tasks."""

    name: str
    heads: tuple[Head, ...] = ()
    change: Intervention | None = None
    draw: int = 0
    """Which of several random sets."""
    control: str = ""
    """The name of the random condition it is held against."""


UNCHANGED = Condition("unchanged")
OWN_METRIC = "Each task's own metric; p: paired, against the mean of the control's draws"
"""What the table of the tasks' chosen metrics shows."""


def tasks_of(study: Study, config: TaskConfig) -> list[QATask]:
    """The tasks asked for, with samples that heads were not scored on."""
    names = config.tasks or study.default_tasks()
    return load_tasks(study.data_folder, names, config.seed + 1, config.task_samples, config.lengths, config.task_files)


def answer_all(study: Study, tasks: Sequence[QATask], conditions: Sequence[Condition], what: str) -> pd.DataFrame:
    """One row per condition, draw, task and sample: the reply and every metric.

    Images are encoded once; finished parts are taken up again.
    """
    config, frames = study.config, []
    for task in tasks:
        examples = task.data.examples
        units: list[Task] = []
        asked: list[tuple[list[int], Condition]] = []
        for group, n_tokens in study.groups(study.model, examples, config.new_tokens):
            prompts = SharedSetup(encoded, ([examples[i] for i in group], study.pixels))
            for condition in conditions:
                key = {
                    "answers": task.data.digest,
                    "weights": study.weights,
                    "examples": group,
                    "pixels": study.pixels,
                    "change": repr(condition.change),
                    "new_tokens": config.new_tokens,
                }
                units.append(study.unit(key, answers_of, (condition.change, config.new_tokens), n_tokens, prompts))
                asked.append((group, condition))
        for (group, condition), found in zip(asked, study.tables(units, f"{what}, {task.name}"), strict=True):
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


def encoded(model: Any, examples: Sequence[Example], pixels: int | None) -> VLMInputs:
    """Prompts that are answered together, with their images encoded."""
    inputs = to_inputs(model, examples, pixels)
    if inputs.has_visuals:
        features = model.encode_images(inputs).detach()
        # the features stand in for the pixels, which are fifty times as large
        inputs = replace(inputs.with_image_features(features), pixel_values=None)
    return inputs


def answers_of(model: Any, inputs: VLMInputs, change: Intervention | None, new_tokens: int) -> pd.DataFrame:
    """A column of replies."""
    hooks = [] if change is None else change.hooks(model, inputs)
    replies = model.generate(inputs, new_tokens, fwd_hooks=hooks, return_type="str")
    return pd.DataFrame({"reply": [replies] if isinstance(replies, str) else replies})


def summarize(answers: pd.DataFrame, conditions: Sequence[Condition], seed: int) -> pd.DataFrame:
    """One row per task, condition and metric: mean and 95% bootstrap interval over samples.

    `change`: against the unchanged model, sample by sample. `p`: a paired test of the samples against the random
    control's mean over its draws; it takes these draws as given, so `draws as low` says which share of them leaves no
    more. Random conditions are averaged over draws sample by sample; `lowest` and `highest` are their extreme draws.
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
                as_low = np.nan if control is None else (control.mean(axis=0) <= estimate.value + 1e-12).mean()
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
                        "draws as low": as_low,
                        "lowest": draws.min(),
                        "highest": draws.max(),
                        "draws": len(draws),
                        "n": estimate.n,
                    }
                )
    return pd.DataFrame(rows)


def summary_lines(summary: pd.DataFrame) -> list[str]:
    """The chosen metric of every task, for the terminal."""
    shown = summary[summary["chosen"]]
    width = max(len(name) for name in shown["condition"])
    lines = []
    for task in dict.fromkeys(shown["task"]):
        own = shown.loc[shown["task"] == task].rename(columns={"draws as low": "as_low"})
        lines.append(f"  {task} ({own['metric'].iloc[0]}, {own['n'].iloc[0]} samples)")
        for row in each_row(own):
            spread = f"{row.draws} draws, {row.lowest:.1%} to {row.highest:.1%}" if row.draws > 1 else ""
            p = "" if np.isnan(row.p) else f"p against random {row.p:.4f}, {row.as_low:.0%} of the draws as low"
            text = f"    {row.condition:{width}s}  {row.value:6.1%} ({row.low:.1%} to {row.high:.1%})"
            lines.append("  ".join(part for part in (text, spread, p) if part))
    return lines
