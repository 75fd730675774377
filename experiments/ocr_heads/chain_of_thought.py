"""Experiment: chain of thought.

The paper mentions chain of thought without a protocol; this protocol is ours. Every question is asked directly and with
steps ("step by step"; the toy models follow no instructions, so they are asked for the whole line, which they were
trained to write from its key on). Reported: the share of replies that contain the answer, with OCR, retrieval, random
or no heads masked, and every head's OCR score on either kind of reply.
"""

from dataclasses import replace
from functools import partial

import pandas as pd

from hooked_vlm.analysis.statistics import bootstrap
from hooked_vlm.experiments.ocr_heads import changed, effects, plots
from hooked_vlm.experiments.ocr_heads.config import ThoughtConfig
from hooked_vlm.experiments.ocr_heads.data.store import DataSet, load_or_build
from hooked_vlm.experiments.ocr_heads.data.tasks import QATask
from hooked_vlm.experiments.ocr_heads.examples import Example
from hooked_vlm.experiments.ocr_heads.head_profile import RESAMPLES, measures
from hooked_vlm.experiments.ocr_heads.masking import masked
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_table

STEPS = "\nThink step by step: first say where in the image the answer is written, then read it out."
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
    conditions = [changed.UNCHANGED, *changed.against_random(study, config, k, zero)]
    sets = study.sets(False, config.seed + 1, config.task_samples * len(direct))  # heads were not scored on these
    tasks = [QATask(data, "contains") for data in sets]
    tasks_with_steps = [QATask(_with_steps(study, data), "contains") for data in sets]
    answers = pd.concat(
        [
            changed.answer_all(study, tasks, conditions, "direct"),
            changed.answer_all(long, tasks_with_steps, conditions, "with steps"),
        ],
        ignore_index=True,
    )
    summary = effects.summarize(answers, conditions, config.seed)
    tests = effects.against_controls(answers, conditions, "worse", config.seed)
    chosen = summary.loc[summary["chosen"]]
    heads = head_table({name: s.mean for name, s in scores.items()})
    heads = heads.sort_values("direct", ascending=False, ignore_index=True)
    a, b = (s.mean.ravel() for s in scores.values())
    lines = [
        *effects.effect_lines(summary, tests),
        "",
        "  OCR scores of all heads, direct against with steps",
    ]
    rows = []
    for name, measure, _ in measures(config.threshold)[:2]:
        found = bootstrap(measure, a, b, seed=config.seed, draws=RESAMPLES)
        rows.append((name, found.value, found.low, found.high, found.n))
        lines.append(f"    {name:24s} {found.value:.3f} ({found.low:.3f} to {found.high:.3f}, {found.n} heads)")
    similarity = pd.DataFrame(rows, columns=["measure", "value", "low", "high", "n heads"])
    tables = {
        "thought": (chosen.drop(columns="chosen"), "Share of replies that contain the answer", None),
        "thought-heads": (heads, "OCR score of every head, asked directly and with steps", 20),
        "thought-similarity": (similarity, "OCR scores, direct against with steps", None),
    }
    figures = {"thought": (plots.bars(chosen), "Share of replies that contain the answer; 95% intervals over samples")}
    return Finding("Chain of thought", lines, [_protocol()], figures, tables)


def _protocol() -> str:
    return " ".join(line.strip() for line in (__doc__ or "").split("\n\n", 1)[1].splitlines())


def _with_steps(study: Study, data: DataSet) -> DataSet:
    def build() -> tuple[list[Example], str]:
        return [replace(e, question=stepwise(e.question)) for e in data.examples], f"{data.source}, asked with steps"

    return load_or_build(study.data_folder, f"{data.name}-steps", {"of": data.digest}, build)


def stepwise(question: str) -> str:
    """Ask for steps before the answer."""
    if question.startswith(TOY_QUESTION):
        return question.replace(TOY_QUESTION, TOY_STEPS)
    return question + STEPS
