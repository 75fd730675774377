"""Experiment: mask the top heads, with random heads as control (papers 1.10 and part 3)."""

from functools import partial

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.ocr_heads import changed, effects, plots
from hooked_vlm.experiments.ocr_heads.config import MaskConfig
from hooked_vlm.experiments.ocr_heads.controls import different
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_names
from hooked_vlm.interventions import Head, Intervention, UniformAttention, ZeroHeads


def mask(study: Study, config: MaskConfig) -> Finding:
    """Answer every task with nothing masked, and with OCR, retrieval and random heads masked."""
    counts = config.mask_heads or study.default_counts()
    check_counts(study, counts, "mask-heads")
    conditions = masking_conditions(study, config, counts)
    answers = changed.answer_all(study, changed.tasks_of(study, config), conditions, "masking")
    summary = effects.summarize(answers, conditions, config.seed)
    tests = effects.against_controls(answers, conditions, "worse", config.seed)
    notes = [line for k in counts for line in changed.describe_heads(study, config, k)]
    figures = {"masking": (plots.bars(summary.loc[summary["chosen"]]), "Tasks with heads masked; 95% intervals")}
    tables = {**effects.effect_tables("masking", summary, tests), "masking-answers": (answers, "All replies", 0)}
    answer = []
    for kind, heads in different(changed.top_heads(study, counts[0])).items():
        what = f"Masking the top {counts[0]} {kind} heads ({head_names(heads)})"
        first = next(c.name for c in conditions if set(c.heads) == set(heads))
        answer += effects.effect_answer(what, first, summary, tests)
    lines = [*notes, "", *effects.effect_lines(effects.without_repeats(summary, conditions), tests)]
    return Finding("Masking", lines, notes, figures, tables, answer)


def masking_conditions(study: Study, config: MaskConfig, counts: tuple[int, ...]) -> list[changed.Condition]:
    """Unchanged first; then, for every number of heads and mode, the top heads of both kinds, and random sets."""
    conditions = [changed.UNCHANGED]
    for k in counts:
        for mode in config.modes:
            label = "" if mode == "zero" else f", {mode}"
            conditions += changed.against_random(study, config, k, partial(masked, mode=mode), label)
    return conditions


def masked(heads: tuple[Head, ...], mode: str) -> Intervention:
    """Zero the heads' outputs, or make their attention uniform for generated tokens (Wu et al.)."""
    return ZeroHeads(heads) if mode == "zero" else UniformAttention(heads, "generated")


def check_counts(study: Study, counts: tuple[int, ...], option: str) -> None:
    """Refuse more heads than the model has.

    Raises:
        StudyError: names the option.
    """
    for k in counts:
        if k > study.n_heads:
            raise StudyError(f"--{option} {k} is more than the {study.n_heads} heads of the model")
