"""Experiment: redistribute attention from the first token to the others, in the top heads (papers 1.11)."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from hooked_vlm.experiments.ocr_heads import changed, plots
from hooked_vlm.experiments.ocr_heads.config import SinkConfig
from hooked_vlm.experiments.ocr_heads.masking import check_counts
from hooked_vlm.experiments.ocr_heads.official import SINK_BETA, official_code
from hooked_vlm.experiments.ocr_heads.sink_shares import PLACES, QUERIES, share_of, sink_attention, sink_table
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_names
from hooked_vlm.interventions import Head, RedistributeSink
from hooked_vlm.model.vlm import HookedVLM

BETAS = (0.0, 0.2, 0.4, 0.6, 0.8)


def sink(study: Study, config: SinkConfig) -> Finding:
    """Answer every task unchanged, and with the sink scaled by every beta in OCR, retrieval and random heads."""
    check_counts(study, config.sink_heads, "sink-heads")
    conditions = sink_conditions(study, config)
    tasks = study.asked(changed.tasks_of(study, config))
    shares = sink_attention(study, tasks)
    answers = changed.answer_all(study, tasks, conditions, "sink")
    summary = changed.summarize(answers, conditions, config.seed)
    notes = [
        _sink_line(f"top {k} {kind} heads", heads, shares, config.seed)
        for k in config.sink_heads
        for kind, heads in changed.top_heads(study, k).items()
    ]
    by_head = sink_table(shares, config.seed)
    most = by_head.iloc[0]
    notes.append(_sink_line("most of all heads", ((int(most["layer"]), int(most["head"])),), shares, config.seed))
    about = [
        *notes,
        "The sink is the first token. " + _rule(study),
        "Attention on the first token is measured at the last position of each prompt, where the answer begins, and as "
        f"the mean over up to {QUERIES} positions spread over the prompt (early ones see few other tokens). Little "
        "attention on the first token leaves little to redistribute.",
    ]
    caption = "Change of each task's metric against the unchanged model, by beta"
    tables = {
        **changed.metric_tables("sink", summary),
        "sink-attention": (
            by_head,
            f"Share of each head's attention on the first token, unchanged model; 95% intervals over {len(shares)} "
            "samples of all tasks",
            20,
        ),
    }
    figures = {"sink": (plots.over_beta(summary.loc[summary["chosen"]]), caption)}
    lines = [changed.headline(summary), *notes, "", *changed.summary_lines(summary)]
    return Finding("Sink redistribution", lines, about, figures, tables)


def sink_conditions(study: Study, config: SinkConfig) -> list[changed.Condition]:
    """Unchanged first; then, for every number of heads and beta, the top heads of both kinds, and random sets."""
    conditions = [changed.UNCHANGED]
    for k in config.sink_heads:
        for beta in config.betas or ((SINK_BETA,) if config.compat else BETAS):
            change = redistribution(study.model, float(beta), config.compat)
            conditions += changed.against_random(
                study, k, {f"random {k}": "others"}, config.draws, change, f", beta {beta:g}"
            )
    return conditions


def redistribution(model: HookedVLM, beta: float, compat: bool) -> Callable[[tuple[Head, ...]], RedistributeSink]:
    """The intervention on some heads: with --compat as the published code makes it for this kind of model."""
    options = official_code(model).sink if compat else {}
    return partial(RedistributeSink, beta=beta, **options)


def _rule(study: Study) -> str:
    """What becomes of causality, in words."""
    if not study.config.compat:
        return (
            "A query that sees no other token keeps its attention, so causality holds (the published code spreads it "
            "over later tokens, and has no causal mask over the prompt of Qwen2-VL: --compat)."
        )
    if official_code(study.model).sink.get("causal", True):
        return "As in the published code, a query that sees no other token spreads its attention over later ones."
    return "As in the published code, the changed heads attend over the whole prompt, without a causal mask."


def _sink_line(
    name: str, heads: Sequence[Head], shares: Float[np.ndarray, "sample place layer head"], seed: int
) -> str:
    found = [(place, share_of(heads, shares, place, seed)) for place in PLACES]
    values = ", ".join(f"{e.value:.2%} ({e.low:.2%} to {e.high:.2%}) {place}" for place, e in found)
    return f"attention on the first token, {name} ({head_names(heads)}): {values} (n = {len(shares)})"
