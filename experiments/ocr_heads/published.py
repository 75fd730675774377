"""Head lists and sparsity table published with the paper, and their comparison with a run's heads.

`published.json` names its source. The lists are decoded from figures, so only the range of a head's score is known.
"""

import json
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from hooked_vlm.analysis.statistics import half_sampling
from hooked_vlm.experiments.common.frames import each_row
from hooked_vlm.experiments.ocr_heads.config import CompareConfig
from hooked_vlm.experiments.ocr_heads.scoring import Scores
from hooked_vlm.experiments.ocr_heads.selection import ranked
from hooked_vlm.experiments.ocr_heads.similarity import Measure, against_chance, jaccard, spearman, within_limits
from hooked_vlm.experiments.ocr_heads.study import Finding, Study

RANGES = ("[0, 0.01)", "[0.01, 0.1]", "(0.1, 0.3]", "(0.3, 0.5]", "(0.5, 1]")
"""Score ranges of the paper."""
PERMUTATIONS = 2000
_UPPER = np.array([0.01, 0.1, 0.3, 0.5, 1.0])


def published_models() -> dict[str, dict[str, Any]]:
    """Published records by model name."""
    text = resources.files(str(__package__)).joinpath("published.json").read_text(encoding="utf-8")
    return json.loads(text)["models"]


def published_for(model_name: str) -> dict[str, Any] | None:
    """Published record of a model, by the last part of its name or path; None if there is none."""
    wanted = PurePosixPath(model_name.replace("\\", "/")).name.lower()
    found = published_models().items()
    return next((m | {"name": name} for name, m in found if name.split("/")[1].lower() == wanted), None)


def range_of(scores: Float[np.ndarray, "layer head"]) -> Int[np.ndarray, "layer head"]:
    """Index of the paper's score range that each score lies in."""
    return np.where(scores < 0.01, 0, np.searchsorted(_UPPER, scores.clip(0.01, 1.0), side="left").clip(1))


def per_range(scores: Float[np.ndarray, "layer head"]) -> dict[str, int]:
    """Number of heads per score range of the paper."""
    at = range_of(scores)
    return {name: int((at == i).sum()) for i, name in enumerate(RANGES)}


def compare(study: Study, config: CompareConfig) -> Finding:
    """Compare OCR and retrieval heads with the published lists, or with the published table if there is no list."""
    record = published_for(config.model)
    shape = study.ocr.mean.shape
    if record is None or shape != (record["n_layers"], record["n_heads"]):
        return _only_published(study, config)
    counts, overlap = [], []
    ocr = in_order_of_names(study)
    for kind, scores in (("ocr", ocr), ("retrieval", study.retrieval)):
        prefix = "" if kind == "ocr" else "retrieval_"
        here = per_range(scores.mean)
        counts += [(kind, name, record[f"{prefix}heads_per_bin"][name], here[name]) for name in RANGES]
        groups = record["ocr_heads" if kind == "ocr" else "retrieval_heads"]
        overlap += [(kind, *row) for row in overlap_rows(scores, groups, config.seed)]
    count_table = pd.DataFrame(counts, columns=["heads", "score range", "published", "here"])
    overlap_table = pd.DataFrame(overlap, columns=["heads", "measure", "value", "low", "high", "chance", "p", "n"])
    lines = [
        f"comparison with the heads published for {record['name']}",
        "  heads       measure                                  value  95% interval    chance  p       n",
    ]
    lines += [
        f"  {r.heads:10s}  {r.measure:38s}  {r.value:.3f}  "
        + ("" if np.isnan(r.low) else f"{r.low:.3f} to {r.high:.3f}  {r.chance:.3f}   {r.p:.4f}  {r.n}")
        for r in each_row(overlap_table)
    ]
    lines += ["  heads       score range    published   here"]
    lines += [f"  {r[1]:10s}  {r[2]:12s}  {r[3]:9d}  {r[4]:5d}" for r in count_table.itertuples()]
    tables = {
        "published-overlap": (
            overlap_table,
            "Agreement with the published lists: interval over samples; chance and one-sided p of more agreement "
            "permute scores over the heads of each layer",
            None,
        ),
        "published-counts": (count_table, "Heads per score range, published and here", None),
    }
    about = ["Only the ranges of published scores are known, so published ranks are ranks of ranges. The published "
             "retrieval heads were found with the code's protocol (--compat). OCR scores are compared with pages in "
             "the order of their files' names, as the published ones were measured: from 11 pages on, boxes then lie "
             "on other pages than the answers."]  # fmt: skip
    agreement = overlap_table.iloc[0]
    answer = [
        f"Against the OCR heads published for {record['name']}: {agreement['measure']} {agreement['value']:.2f} "
        f"({agreement['low']:.2f} to {agreement['high']:.2f}), by chance within layers {agreement['chance']:.2f} "
        f"(p = {agreement['p']:.4f} for more)."
    ]
    return Finding("Comparison with the published heads", lines, about, {}, tables, answer)


def in_order_of_names(study: Study) -> Scores:
    """OCR scores with the pages in the order that the published scores contain ("10" before "2")."""
    config = study.config
    if config.protocol.page_order == "name" or all(
        len(e.images) <= 10 for data in study.scored(as_text=False) for e in data.examples
    ):
        return study.ocr
    protocol = replace(config.protocol, page_order="name")
    return Study(replace(config, protocol=protocol), study.model, study.workers).ocr


def overlap_rows(
    scores: Scores, groups: dict[str, list[list[int]]], seed: int
) -> list[tuple[str, float, float, float, float, float, int]]:
    """Compare scores with published lists {score range: heads}.

    Returns:
        (measure, value, low, high, chance, p, n) rows: the interval is over our instances; chance, and the one-sided p
        of being more similar, permute our scores over the heads of each layer; n counts instances, or heads.
    """
    theirs = np.zeros(scores.mean.shape)
    for name, heads in groups.items():
        for layer, head in heads:
            theirs[layer, head] = RANGES.index(name)
    lowest = min(RANGES.index(name) for name in groups)
    edge = float(_UPPER[lowest - 1])
    rows = []
    for measure in (
        Measure(f"Jaccard of heads above {edge:g}", lambda listed, ours: jaccard(listed > 0, ours > edge)),
        Measure("Spearman of scores", spearman, limits=(-1.0, 1.0)),
    ):
        agreement = partial(_agreement, measure, theirs)
        found = within_limits(half_sampling(agreement, scores.instances, seed=seed), measure)
        chance, more, _ = against_chance(measure, theirs, scores.mean, seed, PERMUTATIONS)
        rows.append((measure.name, found.value, found.low, found.high, chance, more, len(scores.instances)))
    for name in ("(0.5, 1]",):
        top = {(layer, head) for layer, head in groups[name]}
        found = len(top & set(ranked(scores.mean)[: len(top)])) / len(top)
        rows.append((f"published {name} in our top {len(top)}", found, np.nan, np.nan, np.nan, np.nan, len(top)))
    return rows


def _agreement(measure: Measure, theirs: np.ndarray, instances: np.ndarray) -> float:
    return measure.of(theirs, instances.mean(0))


def _only_published(study: Study, config: CompareConfig) -> Finding:
    """Compare shares per score range with the paper's models, for a model that is not among them."""
    here = per_range(study.ocr.mean)
    rows = [(config.model, "OCR", *(here[name] / study.ocr.mean.size * 100 for name in RANGES))]
    for name, record in published_models().items():
        for kind, label in (("ocr", "OCR"), ("retrieval_text_model", f"retrieval, {record['text_model']}")):
            rows.append((name, label, *record["percent_per_range"][kind]))
    table = pd.DataFrame(rows, columns=["model", "heads", *RANGES])
    lines = [f"no heads are published for {config.model}; percent of heads per score range, with the paper's models:"]
    lines += ["  " + f"{'model':28s} {'heads':38s}" + "".join(f"{name:>12s}" for name in RANGES)]
    lines += [
        f"  {row[0].split('/')[-1]:28s} {row[1]:38s}" + "".join(f"{value:12.2f}" for value in row[2:]) for row in rows
    ]
    caption = "Percent of heads per score range; all rows but the first as published"
    return Finding("Comparison with the published heads", lines, [], {}, {"published": (table, caption, None)})
