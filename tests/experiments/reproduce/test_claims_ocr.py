"""Rules of the OCR-heads paper, by hand on made-up tables: pass, differs, cannot say."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_results import evidence, scores, verdict

from hooked_vlm.experiments.common.claims import VERDICTS
from hooked_vlm.experiments.ocr_heads.published import RANGES, published_models
from hooked_vlm.experiments.reproduce.claims_ocr import CLAIMS

NAN = float("nan")
HIGH, EDGE, ZERO = (0.6, 0.5, 0.7), (0.11, 0.07, 0.16), (0.0, 0.0, 0.02)
"""(score, low, high) of heads that are surely, possibly and surely not above 0.1."""


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ([(1, *HIGH), (99, *ZERO)], "pass"),
        ([(100, *ZERO)], "differs"),
        ([(1, *EDGE), (99, *ZERO)], "cannot say"),
        ([(1, 0.14, 0.101, 0.19), (999, *ZERO)], "cannot say"),  # not certain among a thousand heads
    ],
)
def test_ocr_heads_exist(heads: list[Any], expected: str) -> None:
    assert verdict(CLAIMS, "exist", evidence({"ocr-scores": scores(*heads)}))[0] == expected


@pytest.mark.parametrize(("p", "expected"), [(0.01, "pass"), (0.3, "cannot say"), (NAN, "cannot say")])
def test_a_head_that_looks_at_a_place_is_no_ocr_head(p: float, expected: str) -> None:
    table = scores((1, *HIGH), (99, *ZERO))
    heads = table[["layer", "head"]].iloc[::-1].assign(**{"p, adjusted": [0.01] * 99 + [p]})
    assert verdict(CLAIMS, "exist", evidence({"ocr-scores": table, "heads": heads}))[0] == expected


def test_three_samples_show_nothing() -> None:
    table = scores((1, 1.0, 0.6, 1.0), (99, *ZERO), n=3)
    assert verdict(CLAIMS, "exist", evidence({"ocr-scores": table}))[0] == "cannot say"


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ([(16, *HIGH), (4, *EDGE), (80, *ZERO)], "pass"),
        ([(26, *HIGH), (74, *ZERO)], "differs"),
        ([(20, *HIGH), (10, *EDGE), (70, *ZERO)], "cannot say"),
        ([(1, *HIGH), (15, *ZERO)], "cannot say"),  # one of 16 heads
    ],
)
def test_ocr_heads_are_sparse(heads: list[Any], expected: str) -> None:
    assert verdict(CLAIMS, "sparse", evidence({"ocr-scores": scores(*heads)}))[0] == expected


@pytest.mark.parametrize(
    ("ocr", "retrieval", "expected"),
    [
        ([(16, *HIGH), (84, *ZERO)], [(5, *HIGH), (5, *EDGE), (90, *ZERO)], "pass"),
        ([(5, *HIGH), (95, *ZERO)], [(9, *HIGH), (91, *ZERO)], "differs"),
        ([(9, *HIGH), (91, *ZERO)], [(9, *HIGH), (91, *ZERO)], "differs"),  # as sparse is not less sparse
        ([(16, *HIGH), (84, *ZERO)], [(5, *HIGH), (15, *EDGE), (80, *ZERO)], "cannot say"),
        ([(4, *HIGH), (12, *ZERO)], [(1, *HIGH), (15, *ZERO)], "cannot say"),
    ],
)
def test_ocr_heads_are_less_sparse(ocr: list[Any], retrieval: list[Any], expected: str) -> None:
    tables = {"ocr-scores": scores(*ocr), "retrieval-scores": scores(*retrieval)}
    assert verdict(CLAIMS, "less sparse", evidence(tables))[0] == expected


def test_the_text_only_sibling_is_what_the_paper_compares_with() -> None:
    few, many, ocr = scores((2, *HIGH), (98, *ZERO)), scores((50, *HIGH), (50, *ZERO)), scores((9, *HIGH), (91, *ZERO))
    tables = {"ocr-scores": ocr, "retrieval-scores": many}
    assert verdict(CLAIMS, "less sparse", evidence(tables))[0] == "differs"
    found = verdict(CLAIMS, "less sparse", evidence(tables | {"retrieval-in-the-text-model-scores": few}))
    assert found[0] == "pass" and "text-only" in found[1]


@pytest.mark.parametrize(
    ("value", "low", "high", "p", "expected"),
    [
        (0.2, 0.1, 0.3, 0.001, "pass"),
        (0.2, 0.1, 0.3, 0.2, "cannot say"),
        (0.7, 0.5, 0.9, 0.001, "cannot say"),
        (0.95, 0.9, 1.0, 0.8, "differs"),
        (NAN, NAN, NAN, NAN, "cannot say"),
    ],
)
def test_ocr_heads_are_distinct(value: float, low: float, high: float, p: float, expected: str) -> None:
    row = {"measure": "Jaccard, score > 0.1", "value": value, "low": low, "high": high}
    table = pd.DataFrame([row | {"same heads": 0.8, "p different": p}])
    own = evidence({"similarity": table, "ocr-scores": scores((100, *ZERO))})
    assert verdict(CLAIMS, "distinct", own)[0] == expected


@pytest.mark.parametrize(
    ("pearson", "low", "high", "heads", "expected"),
    [
        (0.98, 0.95, 0.99, 50, "pass"),
        (0.8, 0.7, 0.9, 50, "differs"),
        (0.93, 0.9, 0.96, 50, "cannot say"),
        (0.99, 0.98, 1.0, 2, "cannot say"),
        (NAN, NAN, NAN, 50, "cannot say"),
    ],
)
def test_ocr_heads_are_static(pearson: float, low: float, high: float, heads: int, expected: str) -> None:
    columns = ["heads", "granularity", "pearson", "low", "high", "n heads", "instances"]
    by_token = ("OCR", "token", 1.0, 1.0, 1.0, 50, 400)  # by definition: does not count
    table = pd.DataFrame([by_token, ("OCR", "sample", pearson, low, high, heads, 100)], columns=columns)
    assert verdict(CLAIMS, "static", evidence({"activation": table}))[0] == expected


def masked(kind: str, task: str, difference: float, low: float, high: float, p: float, unchanged: float = 0.9) -> Any:
    row = {"difference": difference, "low": low, "high": high, "p": p, "draws": 20, "n": 100, "control": "random 10"}
    rows = [row | {"task": task, "condition": f"top 10 {kind}"}]
    # neither the second task, nor more heads, nor the other kind decides
    rows.insert(0, row | {"task": "mpdocvqa", "condition": "top 10 OCR", "low": 0.5, "high": 0.6})
    rows.insert(0, row | {"task": task, "condition": f"top 20 {kind}", "low": 0.5, "high": 0.6})
    other = "retrieval" if kind == "OCR" else "OCR"
    rows.insert(0, row | {"task": task, "condition": f"top 10 {other}", "low": 0.5, "high": 0.6})
    before = {"task": task, "condition": "unchanged", "value": unchanged, "low": unchanged - 0.05}
    return evidence({"masking-against-random": pd.DataFrame(rows), "masking": pd.DataFrame([before])})


@pytest.mark.parametrize(
    ("claim", "kind", "task"),
    [("masking OCR heads", "OCR", "docvqa"), ("masking retrieval heads", "retrieval", "nq")],
)
@pytest.mark.parametrize(
    ("difference", "low", "high", "p", "unchanged", "expected"),
    [
        (-0.5, -0.6, -0.4, 1 / 21, 0.9, "pass"),
        (-0.5, -0.6, -0.4, 2 / 21, 0.9, "cannot say"),  # a draw is as bad
        (-0.1, -0.25, 0.05, 1 / 21, 0.9, "cannot say"),
        (0.0, -0.01, 0.01, 0.5, 0.9, "differs"),
        (0.1, 0.05, 0.15, 1.0, 0.9, "differs"),
        (0.0, -0.01, 0.01, 0.5, 0.05, "cannot say"),  # nothing to lose
    ],
)
def test_masking_hurts(
    claim: str, kind: str, task: str, difference: float, low: float, high: float, p: float, unchanged: float,
    expected: str,
) -> None:  # fmt: skip
    assert verdict(CLAIMS, claim, masked(kind, task, difference, low, high, p, unchanged))[0] == expected


@pytest.mark.parametrize(
    ("change", "low", "high", "p", "unchanged", "expected"),
    [
        (0.008, 0.002, 0.014, 1 / 21, 0.8, "pass"),
        (0.008, 0.002, 0.014, 0.3, 0.8, "cannot say"),  # random heads gain as much
        (0.0, -0.06, 0.06, 1.0, 0.8, "cannot say"),
        (0.0, -0.005, 0.005, 1.0, 0.8, "differs"),  # the paper's 0.9 points are excluded
        (-0.1, -0.2, -0.05, 1.0, 0.8, "differs"),
        (0.0, -0.005, 0.005, 1.0, 1.0, "cannot say"),  # nothing to gain
    ],
)
def test_sink_redistribution_improves(
    change: float, low: float, high: float, p: float, unchanged: float, expected: str
) -> None:
    condition = "top 2 OCR, beta 0.4"
    test = {"task": "page", "condition": condition, "control": "random 2", "p": p, "draws": 20}
    f1 = {"task": "page", "metric": "f1", "n": 100}
    rows = [
        f1 | {"condition": "unchanged", "value": unchanged},
        f1 | {"condition": condition, "change": change, "change_low": low, "change_high": high},
        f1 | {"condition": condition, "metric": "exact", "change": 1.0, "change_low": 1.0, "change_high": 1.0},
    ]
    tables = {"sink-against-random": pd.DataFrame([test]), "sink-all-metrics": pd.DataFrame(rows)}
    assert verdict(CLAIMS, "sink redistribution", evidence(tables))[0] == expected


@pytest.mark.parametrize("claim", ["masking OCR heads", "masking retrieval heads", "sink redistribution"])
def test_without_random_heads_or_tasks_nothing_is_said(claim: str) -> None:
    assert verdict(CLAIMS, claim, evidence())[0] == "cannot say"
    naming = pd.DataFrame([{"task": "naming", "condition": "top 2 OCR", "p": 0.01}])
    own = evidence({"masking-against-random": naming, "sink-against-random": naming})
    assert verdict(CLAIMS, claim, own)[0] == "cannot say"


NAME = "Qwen/Qwen2-VL-2B-Instruct"


@pytest.mark.parametrize("kind", ["OCR heads", "retrieval heads"])
@pytest.mark.parametrize(
    ("value", "low", "high", "more", "expected"),
    [
        (0.95, 0.9, 1.0, {}, "pass"),
        (0.5, 0.4, 0.6, {}, "differs"),
        (0.8, 0.7, 0.9, {}, "cannot say"),
        (0.95, 0.9, 1.0, {"compat": False}, "cannot say"),
        (0.95, 0.9, 1.0, {"published": None}, "cannot say"),
    ],
)
def test_the_published_lists(kind: str, value: float, low: float, high: float, more: Any, expected: str) -> None:
    names = {"OCR heads": ("ocr", "retrieval"), "retrieval heads": ("retrieval", "ocr")}[kind]
    rows = [(names[0], value, low, high), (names[1], 0.1, 0.0, 0.2)]
    columns = ["heads", "value", "low", "high"]
    table = pd.DataFrame(rows, columns=columns).assign(measure="Jaccard of heads above 0.1", n=336)
    told = {"published": published_models()[NAME], "compat": True, **more}
    own = evidence({"published-overlap": table}, **told)
    assert verdict(CLAIMS, f"published list, {kind}", own)[0] == expected


@pytest.mark.parametrize(
    ("moved", "width", "compat", "expected"),
    [(0, 2, True, "pass"), (9, 2, True, "differs"), (0, 60, True, "cannot say"), (0, 2, False, "cannot say")],
)
def test_the_published_shares_per_range(moved: int, width: int, compat: bool, expected: str) -> None:
    """Heads per range as published; `moved` heads from the first range to the second; `width` heads are in doubt."""
    record = published_models()[NAME]
    counts = (np.array(record["percent_per_range"]["ocr"]) * 336 / 100).round().astype(int)
    counts[:2] += (-moved, moved)
    table = pd.DataFrame({"score range": RANGES, "n": counts, "surely": counts - width, "possibly": counts + width})
    own = evidence({"sparsity": table.assign(heads="OCR, here", instances=600)}, published=record, compat=compat)
    assert verdict(CLAIMS, "shares per range", own)[0] == expected


def test_every_claim_has_a_rule_and_its_own_name() -> None:
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.says.endswith(".") and claim.rule.endswith(".") for claim in CLAIMS)
    assert VERDICTS == ("pass", "differs", "cannot say")
