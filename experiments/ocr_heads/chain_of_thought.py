"""Experiment: chain of thought.

The paper mentions chain of thought without a protocol; this protocol is ours. Every question is asked directly and with
steps ("step by step"; the toy models follow no instructions, so they are asked for the whole line, which they were
trained to write from its key on). Reported: the share of replies that contain the answer, with OCR, retrieval, random
or no heads masked, and every head's OCR score on either kind of reply.

A longer reply has more chances to contain an answer. So a reply with steps is judged twice: as a whole, and by its end
alone, as many tokens as a direct reply may have (in which the answer is to stand: the question asks for it last). The
conclusion is drawn from the ends. OCR scores among answered samples are compared, because among all samples they would
rise with the share of replies that contain the answer.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pandas as pd

from hooked_vlm.experiments.ocr_heads import changed, effects, plots
from hooked_vlm.experiments.ocr_heads.answers import judge
from hooked_vlm.experiments.ocr_heads.config import ThoughtConfig
from hooked_vlm.experiments.ocr_heads.controls import choose_heads
from hooked_vlm.experiments.ocr_heads.data.store import DataSet, load_or_build
from hooked_vlm.experiments.ocr_heads.data.tasks import QATask
from hooked_vlm.experiments.ocr_heads.examples import Example
from hooked_vlm.experiments.ocr_heads.masking import masked
from hooked_vlm.experiments.ocr_heads.similarity import measures, over_samples
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_table
from hooked_vlm.model.vlm import HookedVLM

STEPS = "\nThink step by step: first say where in the image the answer is written, then read it out."
ENDS = ", ends"
"""Suffix of a task that is judged by the ends of its replies."""
SHARE = "Share of replies that contain the answer; with steps, in their ends of equal length, and as a whole"
TOY_QUESTION, TOY_STEPS = "What is the value of ", "What is the text of "


def thought(study: Study, config: ThoughtConfig) -> Finding:
    """Measure accuracy and OCR scores, asked directly and with steps."""
    direct = study.scored(as_text=False)
    steps = [_with_steps(study, data) for data in direct]
    long = Study(replace(study.config, max_new_tokens=4 * study.config.new_tokens), study.model, study.workers)
    scores = {
        "direct": study.ocr,
        "with steps": long.score("ocr", steps, study.model, study.identity),
    }
    k = study.default_counts()[0]
    zero = partial(masked, mode="zero")
    conditions = [changed.UNCHANGED, *changed.conditions_of(choose_heads(study, config, k), zero)]
    sets = study.sets(False, config.seed + 1, config.task_samples * len(direct))  # heads were not scored on these
    tasks = study.asked([QATask(data, "contains") for data in sets])
    tasks_with_steps = study.asked([QATask(_with_steps(study, data), "contains") for data in sets])
    whole = changed.answer_all(long, tasks_with_steps, conditions, "with steps")
    direct_answers = changed.answer_all(study, tasks, conditions, "direct")
    ends = judged_by_ends(study.model, whole, tasks_with_steps, study.config.new_tokens)
    answers = pd.concat([direct_answers, ends, whole], ignore_index=True)
    summary = effects.summarize(answers, conditions, config.seed)
    tests = effects.against_controls(answers, conditions, "worse", config.seed)
    chosen = summary.loc[summary["chosen"]]
    lengths = reply_lengths(study.model, answers)
    answered = {f"{name}, answered": s.mean_answered for name, s in scores.items()}
    heads = head_table({name: s.mean for name, s in scores.items()} | answered)
    heads = heads.sort_values("direct", ascending=False, ignore_index=True)
    answered_samples = [s.answered for s in scores.values()]
    lines = [
        *effects.effect_lines(effects.without_repeats(summary, conditions), tests),
        "",
        "  OCR scores of all heads among answered samples, direct against with steps",
    ]
    rows = []
    for measure in measures(config.threshold)[:2] if all(map(len, answered_samples)) else []:
        found = over_samples(measure, answered_samples[0], answered_samples[1], config.seed)
        rows.append((measure.name, found.value, found.low, found.high, found.n))
        lines.append(f"    {measure.name:24s} {found.value:.3f} ({found.low:.3f} to {found.high:.3f})")
    similarity = pd.DataFrame(rows, columns=["measure", "value", "low", "high", "n"])
    tables = {
        "thought": (chosen.drop(columns="chosen"), SHARE, None),
        "thought-lengths": (lengths, "Tokens of the replies of the unchanged model", None),
        "thought-heads": (heads, "OCR scores, asked directly and with steps, of all and of answered samples", 20),
        "thought-similarity": (similarity, "OCR scores among answered samples, direct against with steps", None),
    }
    figures = {"thought": (plots.bars(chosen), f"{SHARE}; 95% intervals over samples")}
    return Finding("Chain of thought", lines, [_protocol()], figures, tables)


def judged_by_ends(model: HookedVLM, answers: pd.DataFrame, tasks: Sequence[QATask], n_tokens: int) -> pd.DataFrame:
    """Answers of `changed.answer_all`, each reply cut to its last tokens and judged again, as tasks of their own."""
    examples = {task.name: task.data.examples for task in tasks}
    replies = [_end(model, reply, n_tokens) for reply in answers["reply"]]
    rows = zip(answers["task"], answers["sample"], replies, strict=True)
    judged = pd.DataFrame([judge(examples[task][i], reply) for task, i, reply in rows], index=answers.index)
    return answers.assign(reply=replies, task=[f"{task}{ENDS}" for task in answers["task"]], **judged)


def _end(model: HookedVLM, reply: str, n_tokens: int) -> str:
    ids = model.tokenizer(reply, add_special_tokens=False)["input_ids"]
    return str(model.to_string(ids[-n_tokens:]))


def reply_lengths(model: HookedVLM, answers: pd.DataFrame) -> pd.DataFrame:
    """Mean and largest number of tokens of the unchanged model's replies, by task."""
    own = answers.loc[answers["condition"] == changed.UNCHANGED.name]
    n = [len(model.tokenizer(reply, add_special_tokens=False)["input_ids"]) for reply in own["reply"]]
    table = own.assign(tokens=n).groupby("task", sort=False)["tokens"].agg(["mean", "max", "size"]).reset_index()
    return table.set_axis(["task", "mean tokens", "most tokens", "n"], axis=1)


def _protocol() -> str:
    return " ".join((__doc__ or "").split("\n\n", 1)[1].split())


def _with_steps(study: Study, data: DataSet) -> DataSet:
    def build() -> tuple[list[Example], str]:
        return [replace(e, question=stepwise(e.question)) for e in data.examples], f"{data.source}, asked with steps"

    return load_or_build(study.data_folder, f"{data.name}-steps", {"of": data.digest}, build)


def stepwise(question: str) -> str:
    """Ask for steps before the answer."""
    if question.startswith(TOY_QUESTION):
        return question.replace(TOY_QUESTION, TOY_STEPS)
    return question + STEPS
