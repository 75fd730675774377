"""Experiment: attention taken from the first token and given to the others, in the top heads (papers 1.11)."""

from hooked_vlm.experiments.ocr_heads import plots
from hooked_vlm.experiments.ocr_heads.changed import (
    UNCHANGED,
    Condition,
    answer_all,
    summarize,
    summary_lines,
    tasks_of,
)
from hooked_vlm.experiments.ocr_heads.config import SinkConfig
from hooked_vlm.experiments.ocr_heads.masking import check_counts
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_names
from hooked_vlm.interventions import RedistributeSink


def sink(study: Study, config: SinkConfig) -> Finding:
    """Every task unmodified, and with the sink's share scaled in OCR, retrieval and random heads, for every beta."""
    check_counts(study, config.sink_heads, "sink-heads")
    conditions = [UNCHANGED]
    for k in config.sink_heads:
        tops = {"OCR": study.top(study.ocr, k), "retrieval": study.top(study.retrieval, k)}
        randoms = study.random_sets("others", tops["OCR"], k, config.draws)
        for beta in config.betas:
            control = f"random {k}, beta {beta:g}" if randoms else ""
            for kind, heads in tops.items():
                name = f"top {k} {kind}, beta {beta:g}"
                conditions.append(Condition(name, heads, RedistributeSink(heads, float(beta)), control=control))
            for draw, heads in enumerate(randoms):
                conditions.append(Condition(control, heads, RedistributeSink(heads, float(beta)), draw))
    answers = answer_all(study, tasks_of(study, config), conditions, "sink")
    summary = summarize(answers, conditions, config.seed)
    chosen = summary.loc[summary["chosen"]]
    notes = [
        f"top {k} OCR heads: {head_names(study.top(study.ocr, k))}; "
        f"top {k} retrieval heads: {head_names(study.top(study.retrieval, k))}"
        for k in config.sink_heads
    ]
    about = [
        *notes,
        "The sink is the first token. A query that sees nothing else keeps its attention, so causality holds "
        "(the published code spreads the first row over later tokens).",
    ]
    figures = {"sink": (plots.over_beta(chosen), "Change of each task's metric against the unmodified model, by beta")}
    tables = {
        "sink": (chosen.drop(columns="chosen"), "Each task's own metric; p: paired against random heads", None),
        "sink-all-metrics": (summary.drop(columns="chosen"), "All metrics", 0),
    }
    return Finding("Sink redistribution", [*notes, "", *summary_lines(summary)], about, figures, tables)
