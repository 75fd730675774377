"""Experiment: OCR score and text retrieval score of every head."""

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from hooked_vlm.analysis.rows import attention_rows
from hooked_vlm.analysis.statistics import share
from hooked_vlm.experiments.ocr_heads import plots
from hooked_vlm.experiments.ocr_heads.config import Protocol
from hooked_vlm.experiments.ocr_heads.deviations import DEVIATIONS_CAPTION, deviation_table
from hooked_vlm.experiments.ocr_heads.examples import Box, Example, as_asked, picture_size, to_inputs
from hooked_vlm.experiments.ocr_heads.official import INTERNVL2, QWEN2_VL
from hooked_vlm.experiments.ocr_heads.reading import until_stop
from hooked_vlm.experiments.ocr_heads.scoring import Scores, find_copies
from hooked_vlm.experiments.ocr_heads.selection import ranked
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_table

PAGES_SHOWN = 6
UNANSWERED = (
    "One rule for OCR and retrieval scores: every sample counts, whether the model answered it or not, and a part of "
    "the answer that it did not write was not copied. Scores among answered samples, whose reply contains (on toy "
    "data: is) the answer, stand beside them; retrieval heads are usually scored on those alone (Wu et al.)."
)


def score(study: Study) -> Finding:
    """Report scores as tables and heatmaps, and pages with the tokens the top head attends to."""
    sibling = study.sibling  # first: a wrong --text-model should fail before hours of scoring
    config, ocr, retrieval = study.config, study.ocr, study.retrieval
    named = {"OCR": ocr, "retrieval": retrieval}
    if sibling is not None:
        named["retrieval in the text model"] = sibling
    tables: dict[str, tuple[pd.DataFrame, str, int | None]] = {}
    for name, scores in named.items():
        tables[f"{name.lower().replace(' ', '-')}-scores"] = (
            score_table(study, scores),
            f"{name[0].upper() + name[1:]} score of every head, 95% intervals over "
            f"{len(scores.instances)} {scores.granularity}s",
            20,
        )
    figures = {
        f"{name.lower().replace(' ', '-')}-heatmap": (
            plots.heatmap(scores.mean, study.selected(scores), f"{name} score"),
            f"{name[0].upper() + name[1:]} score by layer and head, {len(scores.instances)} {scores.granularity}s; "
            "selected heads are framed",
        )
        for name, scores in named.items()
    }
    figures["pages"] = (
        looks(study),
        "Pages with the boxes of the answer's characters and the tokens the top head attends to most while the model "
        "reads them",
    )
    tables["deviations"] = (deviation_table(), DEVIATIONS_CAPTION, None)
    lines = [_answered(study, "OCR", ocr), *_top_lines(study, ocr)]
    for name, scores in list(named.items())[1:]:
        lines += ["", _answered(study, name, scores), *_top_lines(study, scores, 5)]
    about = [f"Measured by {protocol_name(config.protocol)}.", UNANSWERED]
    about += [f"{data.name}: {data.source}, {len(data.examples)} examples." for data in _sets(study)]
    return Finding("Scores", lines, about, figures, tables)


def score_table(study: Study, scores: Scores) -> pd.DataFrame:
    """One row per head, top head first: score with interval, score among answered samples, activation frequency, output
    norm, selected."""
    low, high = scores.interval
    table = head_table(
        {
            "score": scores.mean,
            "low": low,
            "high": high,
            "score among answered": scores.mean_answered,
            "frequency": scores.frequency(study.config.threshold),
            "output_norm": scores.output_norm,
            "selected": study.selected(scores),
            "n": np.full(scores.mean.shape, len(scores.instances)),
            "n answered": np.full(scores.mean.shape, len(scores.answered)),
        }
    )
    return table.sort_values(["score", "layer", "head"], ascending=[False, True, True], ignore_index=True)


def protocol_name(protocol: Protocol) -> str:
    """Name of a protocol, in words."""
    if protocol == Protocol():
        return "the paper's definition"
    if protocol in (QWEN2_VL.protocol, INTERNVL2.protocol):
        return "the paper's code (compat)"
    return "a custom protocol (see the configuration)"


def _sets(study: Study) -> list:
    return [*study.scored(as_text=False), *study.scored(as_text=True)]


def _answered(study: Study, name: str, scores: Scores) -> str:
    right = share(scores.right, scores.n_asked)
    what = "pages" if scores.kind == "ocr" else "texts"
    return (
        f"{name} scores: {scores.n_asked} {what} ({study.config.data}), {right.value:.1%} answered correctly "
        f"({right.low:.1%} to {right.high:.1%}), {len(scores.instances)} {scores.granularity}s scored"
    )


def _top_lines(study: Study, scores: Scores, most: int = 10) -> list[str]:
    threshold, chosen = study.config.threshold, study.selected(scores)
    low, high = scores.interval
    mean, answered, frequency = scores.mean, scores.mean_answered, scores.frequency(threshold)
    kind = "OCR" if scores.kind == "ocr" else "retrieval"
    lines = ["  head    score  95% interval     answered   active   selected"]
    n_chosen = int(chosen.sum())
    for at in ranked(mean)[: max(most, min(20, n_chosen))]:
        mark = f"   {kind} head" if chosen[at] else ""
        name = f"{at[0]}.{at[1]}"
        interval = f"{low[at]:.3f} to {high[at]:.3f}"
        alone = "   none" if np.isnan(answered[at]) else f"{answered[at]:7.3f}"
        lines.append(f"  {name:6s}  {mean[at]:.3f}  {interval}  {alone}    {frequency[at]:6.1%}{mark}")
    rule = f"score > {threshold:g} in at least {study.config.min_frequency:.0%} of the {scores.granularity}s"
    if study.config.protocol.frequency_rule == "inverted":
        rule = f"zero in more than {study.config.min_frequency:.0%} of the {scores.granularity}s (the code's rule)"
    count = f"  {n_chosen} of {mean.size} heads are {kind} heads: mean score > {threshold:g} and {rule}"
    return [count, *lines]


@torch.no_grad()
def looks(study: Study) -> Figure:
    """Draw some pages with the boxes of the tokens the top head attends to most while the model reads the answer."""
    model, config = study.model, study.config
    layer, head = ranked(study.ocr.mean)[0]
    shown: list[tuple[Example, list[Box], str]] = []
    stops = [*model.cfg.eos_token_ids, *config.protocol.stop_ids]
    for made in study.scored(as_text=False)[0].examples[:PAGES_SHOWN]:
        example = as_asked(made, config.protocol)
        inputs = to_inputs(model, [example], study.pixels)
        generated = model.generate(inputs, study.scored_tokens, eos_token_id=stops or None)[0, inputs.shape[1] :]
        reply = until_stop(generated.tolist(), stops)
        continued = inputs.append([torch.tensor(reply, dtype=torch.long)])
        copies = find_copies(model, continued, 0, example, reply, protocol=config.protocol)
        positions = [c.position for c in copies if c.position is not None]
        boxes = []
        if positions:
            rows = attention_rows(model, continued, torch.tensor([positions]), [layer])[0, 0, head]
            page = continued.visuals[example.evidence[0].image]
            keys = [int(k) for k in rows.argmax(-1)]
            seen = [continued.box_of_token(k) for k in keys if page.holds(k)]
            scale = np.divide(picture_size(example.images[page.index]), continued.image_grid(page.index).image_size)
            # a line break has no box
            boxes = [tuple(np.multiply(box, [*scale, *scale]).tolist()) for box in seen if box is not None]
        text = str(model.to_string(reply)).strip()
        shown.append((example, boxes, f"{example.question}\nanswer {example.answer}, reply {text}"))
    examples, boxes, titles = zip(*shown, strict=True)
    return plots.sample_pages(examples, boxes, titles)
