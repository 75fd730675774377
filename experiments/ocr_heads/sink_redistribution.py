"""Experiment: redistribute attention from the first token to the others, in the top heads (papers 1.11)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_vlm.experiments.common.frames import each_row
from hooked_vlm.experiments.ocr_heads import changed, effects, plots
from hooked_vlm.experiments.ocr_heads.config import SinkConfig
from hooked_vlm.experiments.ocr_heads.controls import ChangedHeads, choose_heads
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
    chosen = [choose_heads(study, config, k) for k in config.sink_heads]
    conditions = sink_conditions(study, config, chosen)
    tasks = changed.tasks_of(study, config)
    shares = sink_attention(study, tasks)
    answers = changed.answer_all(study, tasks, conditions, "sink")
    summary = effects.summarize(answers, conditions, config.seed)
    tests = effects.against_controls(answers, conditions, "better", config.seed)
    held = [
        _sink_line(f"top {own.k} {kind} heads", heads, shares) for own in chosen for kind, heads in own.tops.items()
    ]
    by_head = sink_table(shares)
    most = by_head.iloc[0]
    held.append(_sink_line("most of all heads", ((int(most["layer"]), int(most["head"])),), shares))
    notes = [*held, *(line for own in chosen for line in own.describe())]
    about = [
        *notes,
        f"The sink is {first_token(study.model)}. {_rule(study)}",
        "Attention on the first token is measured at the last position of each prompt, where the answer begins, and as "
        f"the mean over up to {QUERIES} positions spread over the prompt (early ones see few other tokens). Little "
        "attention on the first token leaves little to redistribute.",
    ]
    caption = "Change of each task's metric against the unchanged model, by beta"
    tables = {
        **effects.effect_tables("sink", summary, tests),
        "sink-attention": (
            by_head,
            f"Share of each head's attention on the first token, unchanged model; 95% intervals over {len(shares)} "
            "samples of all tasks",
            20,
        ),
    }
    figures = {"sink": (plots.over_beta(summary.loc[summary["chosen"]]), caption)}
    lines = [*notes, "", *_beta_lines(effects.without_repeats(summary, conditions), tests)]
    return Finding("Sink redistribution", lines, about, figures, tables, _answer(config, chosen[0], summary, tests))


def sink_conditions(study: Study, config: SinkConfig, chosen: Sequence[ChangedHeads]) -> list[changed.Condition]:
    """Unchanged first; then, for every number of heads and beta, the top heads of both kinds, and random sets."""
    conditions = [changed.UNCHANGED]
    for own in chosen:
        for beta in betas_of(config):
            change = redistribution(study.model, float(beta), config.compat)
            conditions += changed.conditions_of(own, change, f", beta {beta:g}")
    return conditions


def betas_of(config: SinkConfig) -> tuple[float, ...]:
    """Betas of a run: those configured, or the published code's one under --compat, or a range."""
    return config.betas or ((SINK_BETA,) if config.compat else BETAS)


def _answer(config: SinkConfig, chosen: ChangedHeads, summary: pd.DataFrame, tests: pd.DataFrame) -> list[str]:
    """Sentences to quote: the top OCR heads at the beta nearest to the paper's."""
    k, beta = chosen.k, min(betas_of(config), key=lambda beta: abs(beta - SINK_BETA))
    heads = chosen.tops["OCR"]
    what = f"Leaving the first token {beta:g} of its attention in the top {k} OCR heads ({head_names(heads)})"
    return effects.effect_answer(what, f"top {k} OCR, beta {beta:g}", summary, tests)


def _beta_lines(summary: pd.DataFrame, tests: pd.DataFrame) -> list[str]:
    """One line for each kind of heads and beta, all tasks side by side."""
    own = summary.loc[summary["chosen"]]
    own_tests = tests.loc[tests["chosen"]].drop_duplicates(["task", "condition"]).set_index(["task", "condition"])
    unchanged = [f"{row.task} {effects.interval(row)}, {row.metric}" for row in each_row(own) if _is_unchanged(row)]
    lines = [f"  unchanged: {'; '.join(unchanged)}"]
    if len(own_tests):
        lines.append("  points more than random heads, with 95% interval and one-sided p for better")
    for name in dict.fromkeys(own.loc[own["condition"].str.startswith("top"), "condition"]):
        cells = []
        for row in each_row(own.loc[own["condition"] == name]):
            key = (row.task, name)
            cells.append(f"{row.task} {row.value:.1%}")
            if key in own_tests.index:
                cells[-1] += f" {effects.points(own_tests.loc[key])}, p = {own_tests.loc[key, 'p']:.3f}"
        lines.append(f"    {name:26s}  {'   '.join(cells)}")
    return lines


def _is_unchanged(row: Any) -> bool:
    return row.condition == changed.UNCHANGED.name


def redistribution(model: HookedVLM, beta: float, compat: bool) -> Callable[[tuple[Head, ...]], RedistributeSink]:
    """The intervention on some heads: with --compat as the published code makes it for this kind of model."""
    options = official_code(model).sink if compat else {}
    return partial(RedistributeSink, beta=beta, **options)


def first_token(model: HookedVLM) -> str:
    """The sink in words: the prompts of a style without chats begin with their pictures."""
    plain = model.input_builder.text.style.plain
    return "the first token" + (", one of the picture's in this model's prompts that have one" if plain else "")


def _rule(study: Study) -> str:
    """What becomes of causality, in words."""
    if not study.config.compat:
        return (
            "A query that sees no other token keeps its attention, so that none sees more than before (the published "
            "code spreads it over later tokens, and has no causal mask over the prompt of Qwen2-VL: --compat)."
        )
    if official_code(study.model).sink.get("causal", True):
        return "As in the published code, a query that sees no other token spreads its attention over later ones."
    return "As in the published code, the changed heads attend over the whole prompt, without a causal mask."


def _sink_line(name: str, heads: Sequence[Head], shares: Float[np.ndarray, "sample place layer head"]) -> str:
    found = [(place, share_of(heads, shares, place)) for place in PLACES]
    values = ", ".join(f"{e.value:.2%} ({e.low:.2%} to {e.high:.2%}) {place}" for place, e in found)
    return f"attention on the first token, {name} ({head_names(heads)}): {values} (n = {len(shares)})"
