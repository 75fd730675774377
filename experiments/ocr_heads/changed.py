"""Tasks answered with some heads changed: shared by masking, sink redistribution and chain of thought."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.ocr_heads.answers import METRICS, judge
from hooked_vlm.experiments.ocr_heads.config import TaskConfig
from hooked_vlm.experiments.ocr_heads.controls import ChangedHeads, different
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
    controls: tuple[str, ...] = ()
    """Names of the random conditions that it is compared with."""
    same_as: str = ""
    """Name of an earlier condition with the same heads."""


UNCHANGED = Condition("unchanged")


def conditions_of(
    chosen: ChangedHeads, change: Callable[[tuple[Head, ...]], Intervention], label: str = ""
) -> list[Condition]:
    """Change the top heads of every kind, and their random controls.

    Args:
        label: suffix of the conditions' names.
    """
    conditions: list[Condition] = []
    for kinds, heads in different(chosen.tops).items():
        names = [chosen.name(kind) + label for kind in kinds]
        for kind, name in zip(kinds, names, strict=True):
            tested = tuple(own[kind].name + label for own in chosen.randoms if own[kind].sets)
            same = "" if name == names[0] else names[0]
            conditions.append(Condition(name, chosen.tops[kind], change(heads), controls=tested, same_as=same))
    for control in chosen.controls:
        conditions += [
            Condition(control.name + label, heads, change(heads), draw) for draw, heads in enumerate(control.sets)
        ]
    return conditions


def tasks_of(study: Study, config: TaskConfig) -> list[QATask]:
    """Configured tasks, with samples that heads were not scored on."""
    names = config.tasks or study.default_tasks()
    found = load_tasks(
        study.data_folder, names, config.seed + 1, config.task_samples, config.lengths, config.task_files
    )
    return study.asked(found)


def tasks_with_pictures(study: Study, config: TaskConfig) -> tuple[list[QATask], list[str]]:
    """Configured tasks whose samples all have pictures, and the names of those left out.

    Raises:
        StudyError: there are none, or --tasks names one that is left out.
    """
    tasks = tasks_of(study, config)
    seen = [task for task in tasks if all(example.images for example in task.data.examples)]
    blind = [task.name for task in tasks if task not in seen]
    if not seen or (blind and config.tasks is not None):
        raise StudyError(f"--tasks {blind[0]} has samples without a picture, in which the vision tower does not run")
    return seen, blind


def answer_all(
    study: Study, tasks: Sequence[QATask], conditions: Sequence[Condition], what: str, encode: bool = True
) -> pd.DataFrame:
    """Answer every task under every condition, one row per condition, draw, task and sample: reply and metrics.

    Images are encoded once if `encode`: not for conditions that change the vision tower. Stored results are reused.
    """
    config, frames = study.config, []
    for task in tasks:
        examples = task.data.examples
        units: list[Task] = []
        answered: list[tuple[list[int], Condition]] = []
        for group, n_tokens in study.groups(study.model, examples, config.new_tokens):
            prompts = SharedSetup(encoded if encode else to_inputs, ([examples[i] for i in group], study.pixels))
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
