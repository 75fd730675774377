"""Experiment: attention taken from the first token and given to the others, in the top heads (papers 1.11)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

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
from hooked_vlm.experiments.ocr_heads.config import SinkConfig
from hooked_vlm.experiments.ocr_heads.masking import check_counts
from hooked_vlm.experiments.ocr_heads.sink_shares import PLACES, QUERIES, share_of, sink_attention, sink_table
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_names
from hooked_vlm.interventions import Head, RedistributeSink


def sink(study: Study, config: SinkConfig) -> Finding:
    """Every task unmodified, and with the sink's share scaled in OCR, retrieval and random heads, for every beta."""
    check_counts(study, config.sink_heads, "sink-heads")
    conditions = [UNCHANGED]
    for k in config.sink_heads:
        tops = {"OCR": study.top(study.ocr, k), "retrieval": study.top(study.retrieval, k)}
        randoms = study.random_sets("others", [*tops["OCR"], *tops["retrieval"]], k, config.draws)
        for beta in config.betas:
            control = f"random {k}, beta {beta:g}" if randoms else ""
            for kind, heads in tops.items():
                name = f"top {k} {kind}, beta {beta:g}"
                conditions.append(Condition(name, heads, RedistributeSink(heads, float(beta)), control=control))
            for draw, heads in enumerate(randoms):
                conditions.append(Condition(control, heads, RedistributeSink(heads, float(beta)), draw))
    tasks = tasks_of(study, config)
    shares = sink_attention(study, tasks)
    answers = answer_all(study, tasks, conditions, "sink")
    summary = summarize(answers, conditions, config.seed)
    chosen = summary.loc[summary["chosen"]]
    notes = [
        _given_to_sink(f"top {k} {kind} heads", study.top(scores, k), shares, config.seed)
        for k in config.sink_heads
        for kind, scores in (("OCR", study.ocr), ("retrieval", study.retrieval))
    ]
    most = sink_table(shares, config.seed)
    top = most.iloc[0]
    notes.append(_given_to_sink("of all heads the most", ((int(top["layer"]), int(top["head"])),), shares, config.seed))
    about = [
        *notes,
        "The sink is the first token. A query that sees nothing else keeps its attention, so causality holds "
        "(the published code spreads the first row over later tokens).",
        "Attention on the first token is that of the last position of each prompt, where the answer begins, and the "
        f"mean over up to {QUERIES} positions spread through it (early ones see few others). The less of it, the "
        "less there is to redistribute.",
    ]
    figures = {"sink": (plots.over_beta(chosen), "Change of each task's metric against the unmodified model, by beta")}
    tables = {
        "sink": (
            chosen.drop(columns="chosen"),
            OWN_METRIC,
            None,
        ),
        "sink-all-metrics": (summary.drop(columns="chosen"), "All metrics", 0),
        "sink-attention": (
            most,
            f"Share of each head's attention on the first token, unmodified model; 95% intervals over {len(shares)} "
            "samples of all tasks",
            20,
        ),
    }
    return Finding("Sink redistribution", [*notes, "", *summary_lines(summary)], about, figures, tables)


def _given_to_sink(
    name: str, heads: Sequence[Head], shares: Float[np.ndarray, "sample place layer head"], seed: int
) -> str:
    found = [(place, share_of(heads, shares, place, seed)) for place in PLACES]
    said = ", ".join(f"{e.value:.2%} ({e.low:.2%} to {e.high:.2%}) {place}" for place, e in found)
    return f"{name}: {head_names(heads)}; of their attention the first token gets {said} (n = {len(shares)})"
