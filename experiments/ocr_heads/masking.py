"""Experiment: top heads masked, against as many random ones (papers 1.10 and part 3)."""

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.ocr_heads import plots
from hooked_vlm.experiments.ocr_heads.changed import (
    OWN_METRIC,
    UNCHANGED,
    Condition,
    answer_all,
    summarize,
    summary_lines,
    tasks_of,
)
from hooked_vlm.experiments.ocr_heads.config import MaskConfig
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_names
from hooked_vlm.interventions import Head, Intervention, UniformAttention, ZeroHeads


def mask(study: Study, config: MaskConfig) -> Finding:
    """Every task with nothing masked, and with OCR, retrieval and random heads masked."""
    counts = config.mask_heads or study.default_counts()
    check_counts(study, counts, "mask-heads")
    conditions, notes = masking_conditions(study, config, counts), []
    answers = answer_all(study, tasks_of(study, config), conditions, "masking")
    summary = summarize(answers, conditions, config.seed)
    for k in counts:
        tops = {"OCR": study.top(study.ocr, k), "retrieval": study.top(study.retrieval, k)}
        notes += [f"top {k} {kind} heads: {head_names(heads)}" for kind, heads in tops.items()]
        for source in config.random_from:
            n = len(study.candidates(source, [*tops["OCR"], *tops["retrieval"]]))
            if not any(c.name.startswith(f"random {k} {source}") for c in conditions):
                notes.append(f"no random control: only {n} {source} heads, {k} are needed")
            else:
                notes.append(f"random {k} {source}: {config.draws} draws from {n} heads")
    chosen = summary.loc[summary["chosen"]]
    figures = {"masking": (plots.bars(chosen), "Tasks with heads masked; bars are 95% intervals over samples")}
    tables = {
        "masking": (
            chosen.drop(columns="chosen"),
            OWN_METRIC,
            None,
        ),
        "masking-all-metrics": (summary.drop(columns="chosen"), "All metrics", 0),
        "masking-answers": (answers, "Every reply", 0),
    }
    return Finding("Masking", [*notes, "", *summary_lines(summary)], notes, figures, tables)


def masking_conditions(study: Study, config: MaskConfig, counts: tuple[int, ...]) -> list[Condition]:
    """Unchanged first; then for every number of heads and mode the top heads of both kinds, and random sets."""
    conditions = [UNCHANGED]
    for k in counts:
        tops = {"OCR": study.top(study.ocr, k), "retrieval": study.top(study.retrieval, k)}
        chosen = [*tops["OCR"], *tops["retrieval"]]
        randoms = {source: study.random_sets(source, chosen, k, config.draws) for source in config.random_from}
        for mode in config.modes:
            label = "" if mode == "zero" else f", {mode}"
            control = next((f"random {k} {s}{label}" for s, sets in randoms.items() if sets), "")
            for kind, heads in tops.items():
                conditions.append(Condition(f"top {k} {kind}{label}", heads, masked(heads, mode), control=control))
            for source, sets in randoms.items():
                for draw, heads in enumerate(sets):
                    name = f"random {k} {source}{label}"
                    conditions.append(Condition(name, heads, masked(heads, mode), draw))
    return conditions


def masked(heads: tuple[Head, ...], mode: str) -> Intervention:
    """Heads that write nothing, or look everywhere alike while they generate (Wu et al.)."""
    return ZeroHeads(heads) if mode == "zero" else UniformAttention(heads, "generated")


def check_counts(study: Study, counts: tuple[int, ...], option: str) -> None:
    """Refuse more heads than there are.

    Raises:
        StudyError: names the option.
    """
    for k in counts:
        if k > study.n_heads:
            raise StudyError(f"--{option} {k}: the model has {study.n_heads} heads")
