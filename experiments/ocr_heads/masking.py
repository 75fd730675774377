"""Experiment: mask the top heads, with random heads as control (papers 1.10 and part 3); or heads of the vision tower,
named by the user since no score ranks them."""

from collections.abc import Sequence
from functools import partial

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.ocr_heads import changed, effects, plots
from hooked_vlm.experiments.ocr_heads.config import MaskConfig
from hooked_vlm.experiments.ocr_heads.controls import ChangedHeads, choose_heads, different, vision_heads
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_names
from hooked_vlm.interventions import Head, Intervention, UniformAttention, ZeroHeads
from hooked_vlm.interventions.base import Tower


def mask(study: Study, config: MaskConfig) -> Finding:
    """Answer every task with nothing masked, and with OCR, retrieval and random heads masked, or with the named heads
    of the vision tower and random ones."""
    vision, blind = config.tower == "vision", []
    if vision:
        chosen = [vision_heads(study, config)]
        tasks, blind = changed.tasks_with_pictures(study, config)
    else:
        counts = config.mask_heads or study.default_counts()
        check_counts(study, counts, "mask-heads")
        chosen = [choose_heads(study, config, k) for k in counts]
        tasks = changed.tasks_of(study, config)
    conditions = masking_conditions(chosen, config.modes, config.tower)
    answers = changed.answer_all(study, tasks, conditions, "masking", encode=not vision)
    summary = effects.summarize(answers, conditions, config.seed)
    tests = effects.against_controls(answers, conditions, "worse", config.seed)
    notes = [line for own in chosen for line in own.describe()]
    if blind:
        notes.append(f"left out: {', '.join(blind)}, without a picture for the vision tower")
    figures = {"masking": (plots.bars(summary.loc[summary["chosen"]]), "Tasks with heads masked; 95% intervals")}
    tables = {**effects.effect_tables("masking", summary, tests), "masking-answers": (answers, "All replies", 0)}
    answer = []
    for kinds, heads in different(chosen[0].tops).items():
        what = f"Masking the {chosen[0].name(' and '.join(kinds))} heads ({head_names(heads)})"
        condition = f"{chosen[0].name(kinds[0])}{_label(config.modes[0])}"
        answer += effects.effect_answer(what, condition, summary, tests)
    lines = [*notes, "", *effects.effect_lines(effects.without_repeats(summary, conditions), tests)]
    return Finding("Masking", lines, notes, figures, tables, answer)


def masking_conditions(
    chosen: Sequence[ChangedHeads], modes: Sequence[str], tower: Tower = "language"
) -> list[changed.Condition]:
    """Unchanged first; then, for every number of heads and mode, the top heads of both kinds, and random sets."""
    conditions = [changed.UNCHANGED]
    for own in chosen:
        for mode in modes:
            conditions += changed.conditions_of(own, partial(masked, mode=mode, tower=tower), _label(mode))
    return conditions


def _label(mode: str) -> str:
    return "" if mode == "zero" else f", {mode}"


def masked(heads: tuple[Head, ...], mode: str, tower: Tower = "language") -> Intervention:
    """Zero the heads' outputs, or make their attention uniform: for generated tokens (Wu et al.), for all patches."""
    if mode == "zero":
        return ZeroHeads(heads, tower=tower)
    return UniformAttention(heads, "generated" if tower == "language" else None, tower)


def check_counts(study: Study, counts: tuple[int, ...], option: str) -> None:
    """Refuse more heads than the model has.

    Raises:
        StudyError: names the option.
    """
    for k in counts:
        if k > study.n_heads:
            raise StudyError(f"--{option} {k} is more than the {study.n_heads} heads of the model")
