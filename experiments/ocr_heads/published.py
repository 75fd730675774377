"""The head lists and the sparsity table published with the paper, and how a run's heads compare with them.

`published.json` names its source. Lists are decoded from figures, so a head's score is known by its range only.
"""

import json
from importlib import resources
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_vlm.analysis.statistics import bootstrap
from hooked_vlm.experiments.common.frames import each_row
from hooked_vlm.experiments.ocr_heads.config import CompareConfig
from hooked_vlm.experiments.ocr_heads.scoring import Scores
from hooked_vlm.experiments.ocr_heads.selection import ranked
from hooked_vlm.experiments.ocr_heads.similarity import jaccard, spearman
from hooked_vlm.experiments.ocr_heads.study import Finding, Study

RANGES = ("[0, 0.01)", "[0.01, 0.1]", "(0.1, 0.3]", "(0.3, 0.5]", "(0.5, 1]")
"""The paper's score ranges."""
_UPPER = np.array([0.01, 0.1, 0.3, 0.5, 1.0])


def published_models() -> dict[str, dict[str, Any]]:
    """The published record of each of the paper's models."""
    text = resources.files(str(__package__)).joinpath("published.json").read_text(encoding="utf-8")
    return json.loads(text)["models"]


def published_for(model_name: str) -> dict[str, Any] | None:
    """The record of a model, by the last part of its name or path; None if there is none."""
    wanted = PurePosixPath(model_name.replace("\\", "/")).name.lower()
    found = published_models().items()
    return next((m | {"name": name} for name, m in found if name.split("/")[1].lower() == wanted), None)


def per_range(scores: Float[np.ndarray, "layer head"]) -> dict[str, int]:
    """Heads in each of the paper's score ranges."""
    at = np.where(scores < 0.01, 0, np.searchsorted(_UPPER, scores.clip(0.01, 1.0), side="left").clip(1))
    return {name: int((at == i).sum()) for i, name in enumerate(RANGES)}


def compare(study: Study, config: CompareConfig) -> Finding:
    """Overlap, rank correlation and counts per range, for OCR and retrieval heads; the published table otherwise."""
    record = published_for(config.model)
    shape = study.ocr.mean.shape
    if record is None or shape != (record["n_layers"], record["n_heads"]):
        return _only_published(study, config)
    counts, overlap = [], []
    for kind, scores in (("ocr", study.ocr), ("retrieval", study.retrieval)):
        prefix = "" if kind == "ocr" else "retrieval_"
        here = per_range(scores.mean)
        counts += [(kind, name, record[f"{prefix}heads_per_bin"][name], here[name]) for name in RANGES]
        groups = record["ocr_heads" if kind == "ocr" else "retrieval_heads"]
        overlap += [(kind, *row) for row in overlap_rows(scores, groups, config.seed)]
    count_table = pd.DataFrame(counts, columns=["heads", "score range", "published", "here"])
    overlap_table = pd.DataFrame(overlap, columns=["heads", "measure", "value", "low", "high", "n"])
    lines = [
        f"against the heads published for {record['name']}",
        "  heads       measure                                  value  95% interval    n",
    ]
    lines += [
        f"  {r.heads:10s}  {r.measure:38s}  {r.value:.3f}  {r.low:.3f} to {r.high:.3f}  {r.n}"
        for r in each_row(overlap_table)
    ]
    lines += ["  heads       score range    published   here"]
    lines += [f"  {r[1]:10s}  {r[2]:12s}  {r[3]:9d}  {r[4]:5d}" for r in count_table.itertuples()]
    tables = {
        "published-overlap": (overlap_table, "Our heads against the published lists", None),
        "published-counts": (count_table, "Heads per score range, published and here", None),
    }
    about = ["Published scores are known by their range only; ranks are those of ranges. The published retrieval "
             "heads were found with the code's protocol (--compat)."]  # fmt: skip
    return Finding("Comparison with the published heads", lines, about, {}, tables)


def overlap_rows(
    scores: Scores, groups: dict[str, list[list[int]]], seed: int
) -> list[tuple[str, float, float, float, int]]:
    """(measure, value, low, high, n) of scores against published lists {score range: heads}."""
    theirs = np.zeros(scores.mean.shape)
    for name, heads in groups.items():
        for layer, head in heads:
            theirs[layer, head] = RANGES.index(name)
    lowest = min(RANGES.index(name) for name in groups)
    edge = float(_UPPER[lowest - 1])
    listed, ours = (theirs > 0).ravel(), (scores.mean > edge).ravel()

    same = bootstrap(jaccard, listed, ours, seed=seed, draws=500)
    rank = bootstrap(spearman, theirs.ravel(), scores.mean.ravel(), seed=seed, draws=500)
    rows = [(f"Jaccard of heads above {edge:g}", same.value, same.low, same.high, same.n)]
    rows.append(("Spearman of scores", rank.value, rank.low, rank.high, rank.n))
    for name in ("(0.5, 1]",):
        top = {(layer, head) for layer, head in groups[name]}
        found = len(top & set(ranked(scores.mean)[: len(top)])) / len(top)
        rows.append((f"published {name} in our top {len(top)}", found, np.nan, np.nan, len(top)))
    return rows


def _only_published(study: Study, config: CompareConfig) -> Finding:
    """For a model the paper does not have: its own shares beside the published ones."""
    here = per_range(study.ocr.mean)
    rows = [(config.model, "OCR", *(here[name] / study.ocr.mean.size * 100 for name in RANGES))]
    for name, record in published_models().items():
        for kind, label in (("ocr", "OCR"), ("retrieval_text_model", f"retrieval, {record['text_model']}")):
            rows.append((name, label, *record["percent_per_range"][kind]))
    table = pd.DataFrame(rows, columns=["model", "heads", *RANGES])
    lines = [f"no heads are published for {config.model}; percent of heads per score range beside the paper's models"]
    lines += ["  " + f"{'model':28s} {'heads':38s}" + "".join(f"{name:>12s}" for name in RANGES)]
    lines += [
        f"  {row[0].split('/')[-1]:28s} {row[1]:38s}" + "".join(f"{value:12.2f}" for value in row[2:]) for row in rows
    ]
    caption = "Percent of heads in each score range; all but the first row as published"
    return Finding("Comparison with the published heads", lines, [], {}, {"published": (table, caption, None)})
