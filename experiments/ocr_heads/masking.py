"""Experiment: mask the top heads, with random heads as control (papers 1.10 and part 3)."""

from functools import partial

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.ocr_heads import changed, plots
from hooked_vlm.experiments.ocr_heads.config import MaskConfig
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_names
from hooked_vlm.interventions import Head, Intervention, UniformAttention, ZeroHeads


def mask(study: Study, config: MaskConfig) -> Finding:
    """Answer every task with nothing masked, and with OCR, retrieval and random heads masked."""
    counts = config.mask_heads or study.default_counts()
    check_counts(study, counts, "mask-heads")
    conditions = masking_conditions(study, config, counts)
    answers = changed.answer_all(study, changed.tasks_of(study, config), conditions, "masking")
    summary = changed.summarize(answers, conditions, config.seed)
    notes = [note for k in counts for note in _masked_heads(study, config, k, conditions)]
    figures = {
        "masking": (plots.bars(summary.loc[summary["chosen"]]), "Tasks with heads masked; 95% intervals over samples")
    }
    tables = {**changed.metric_tables("masking", summary), "masking-answers": (answers, "All replies", 0)}
    return Finding(
        "Masking", [changed.headline(summary), *notes, "", *changed.summary_lines(summary)], notes, figures, tables
    )


def _masked_heads(study: Study, config: MaskConfig, k: int, conditions: list[changed.Condition]) -> list[str]:
    """Lines that name the top heads and the random control."""
    tops = changed.top_heads(study, k)
    lines = [f"top {k} {kind} heads: {head_names(heads)}" for kind, heads in tops.items()]
    for source in config.random_from:
        n = len(study.candidates(source, [*tops["OCR"], *tops["retrieval"]]))
        if any(c.name.startswith(f"random {k} {source}") for c in conditions):
            lines.append(f"random {k} {source}: {config.draws} draws from {n} heads")
        else:
            lines.append(f"no random control: only {n} {source} heads, {k} are needed")
    return lines


def masking_conditions(study: Study, config: MaskConfig, counts: tuple[int, ...]) -> list[changed.Condition]:
    """Unchanged first; then, for every number of heads and mode, the top heads of both kinds, and random sets."""
    conditions = [changed.UNCHANGED]
    for k in counts:
        sources = {f"random {k} {source}": source for source in config.random_from}
        for mode in config.modes:
            label = "" if mode == "zero" else f", {mode}"
            conditions += changed.against_random(study, k, sources, config.draws, partial(masked, mode=mode), label)
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
