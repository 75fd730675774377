"""Experiment: mask the top heads, with random heads as control (papers 1.10 and part 3)."""

from collections.abc import Sequence
from functools import partial

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.ocr_heads import changed, effects, plots
from hooked_vlm.experiments.ocr_heads.config import MaskConfig
from hooked_vlm.experiments.ocr_heads.controls import ChangedHeads, choose_heads, different
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_names
from hooked_vlm.interventions import Head, Intervention, UniformAttention, ZeroHeads


def mask(study: Study, config: MaskConfig) -> Finding:
    """Answer every task with nothing masked, and with OCR, retrieval and random heads masked."""
    counts = config.mask_heads or study.default_counts()
    check_counts(study, counts, "mask-heads")
    chosen = [choose_heads(study, config, k) for k in counts]
    conditions = masking_conditions(chosen, config.modes)
    answers = changed.answer_all(study, changed.tasks_of(study, config), conditions, "masking")
    summary = effects.summarize(answers, conditions, config.seed)
    tests = effects.against_controls(answers, conditions, "worse", config.seed)
    notes = [line for own in chosen for line in own.describe()]
    figures = {"masking": (plots.bars(summary.loc[summary["chosen"]]), "Tasks with heads masked; 95% intervals")}
    tables = {**effects.effect_tables("masking", summary, tests), "masking-answers": (answers, "All replies", 0)}
    answer = []
    for kinds, heads in different(chosen[0].tops).items():
        what = f"Masking the top {counts[0]} {' and '.join(kinds)} heads ({head_names(heads)})"
        condition = f"top {counts[0]} {kinds[0]}{_label(config.modes[0])}"
        answer += effects.effect_answer(what, condition, summary, tests)
    lines = [*notes, "", *effects.effect_lines(effects.without_repeats(summary, conditions), tests)]
    return Finding("Masking", lines, notes, figures, tables, answer)


def masking_conditions(chosen: Sequence[ChangedHeads], modes: Sequence[str]) -> list[changed.Condition]:
    """Unchanged first; then, for every number of heads and mode, the top heads of both kinds, and random sets."""
    conditions = [changed.UNCHANGED]
    for own in chosen:
        for mode in modes:
            conditions += changed.conditions_of(own, partial(masked, mode=mode), _label(mode))
    return conditions


def _label(mode: str) -> str:
    return "" if mode == "zero" else f", {mode}"


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
