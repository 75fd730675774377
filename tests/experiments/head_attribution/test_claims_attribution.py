"""Rules of the head-attribution paper, by hand on made-up findings: pass, differs, cannot say."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_results import by_name, evidence, verdict

from hooked_vlm.analysis.statistics import Estimate
from hooked_vlm.experiments.head_attribution.claims import BASELINES, CLAIMS
from hooked_vlm.experiments.head_attribution.rankings import RANKINGS
from hooked_vlm.experiments.head_attribution.show_curves import NEEDED_BOTH

NAN = float("nan")
FEWER, MORE, OPEN = (-4.0, -5.0, -3.0, 0.001), (4.0, 3.0, 5.0, 0.001), (-0.5, -2.0, 1.0, 0.4)
"""Heads that attribution needs minus those of a baseline: value, low, high, p."""


def differences(ranking: str, against: dict[str, tuple[float, ...]], names: int = 10) -> pd.DataFrame:
    rows = []
    for name, (value, low, high, p) in against.items():
        row = {"ranking": RANKINGS[ranking], "against": RANKINGS[name], "value": value, "p, by name": p}
        row |= {"low, by name": low, "high, by name": high, "names": names, "pictures": 30}
        rows += [row | {"measure": NEEDED_BOTH}, row | {"measure": "faithfulness area", "low, by name": 9.0}]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("found", "names", "expected"),
    [(FEWER, 10, "pass"), (MORE, 10, "differs"), (OPEN, 10, "cannot say"), (FEWER, 3, "cannot say")],
)
def test_single_heads_fail_at_an_equal_budget(found: tuple[float, ...], names: int, expected: str) -> None:
    at_all_masks = differences("attribution", {"single": MORE})
    table = pd.concat([at_all_masks, differences("attribution_1x", {"single": found}, names)])
    assert verdict(CLAIMS, "single heads fail", evidence({"curve_differences": table}))[0] == expected
    assert verdict(CLAIMS, "single heads fail", evidence({"curve_differences": at_all_masks}))[0] == "cannot say"


@pytest.mark.parametrize(
    ("worst", "expected"),
    [
        (FEWER, "pass"),
        (MORE, "differs"),
        (OPEN, "cannot say"),
        ((1.0, 0.1, 2.0, 0.04), "cannot say"),  # above 0, but not by Holm's p over the baselines
    ],
)
def test_attribution_needs_fewer_heads_than_every_baseline(worst: tuple[float, ...], expected: str) -> None:
    against = dict.fromkeys(BASELINES, FEWER) | {"gradient": worst}
    if worst[3] == 0.04:
        against |= dict.fromkeys(("random", "attention"), OPEN)
    table = differences("attribution", against)
    assert verdict(CLAIMS, "fewer heads", evidence({"curve_differences": table}))[0] == expected
    assert verdict(CLAIMS, "fewer heads", evidence())[0] == "cannot say"


@pytest.mark.parametrize(
    ("low", "high", "layers", "expected"),
    [(15, 18, 28, "pass"), (8, 12, 28, "differs"), (12, 15, 28, "cannot say"), (2.0, 2.5, 4, "cannot say")],
)
def test_important_heads_lie_in_mid_to_late_layers(low: float, high: float, layers: int, expected: str) -> None:
    found = {"mean layer of coefficients": by_name((low + high) / 2, low, high)}
    assert verdict(CLAIMS, "mid to late layers", evidence(findings=found, n_layers=layers))[0] == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.1, 0.3, "pass"), (0.45, 0.6, "differs"), (-0.7, -0.5, "differs"), (0.3, 0.5, "cannot say")],
)
def test_attention_is_weakly_related_to_importance(low: float, high: float, expected: str) -> None:
    found = {"Spearman of coefficients with attention to the image": by_name((low + high) / 2, low, high)}
    assert verdict(CLAIMS, "attention is no guide", evidence(findings=found))[0] == expected


@pytest.mark.parametrize(
    ("same", "other", "repeated", "expected"),
    [
        ((0.8, 0.9), (0.3, 0.5), 6, "pass"),
        ((0.1, 0.2), (0.3, 0.5), 6, "differs"),
        ((0.4, 0.9), (0.3, 0.5), 6, "cannot say"),
        ((0.8, 0.9), (0.3, 0.5), 2, "cannot say"),
    ],
)
def test_heads_are_alike_for_the_same_name(same: Any, other: Any, repeated: int, expected: str) -> None:
    pairs = {"same name": same, "other names": other}
    found = {f"cosine between pictures, {name}": by_name(sum(ends) / 2, *ends) for name, ends in pairs.items()}
    names = [f"name {i}" for i in range(repeated)] * 2 + ["alone", "alone too", "alone as well"]
    own = evidence({"fits": pd.DataFrame({"name": names})}, findings=found)
    assert verdict(CLAIMS, "alike by name", own)[0] == expected


@pytest.mark.parametrize(
    ("worst", "expected"),
    [
        (("more similar", 0.4, 0.2, 0.6, 0.01), "pass"),
        (("no evidence", -0.4, -0.6, -0.2, 0.01), "differs"),
        (("no evidence", -0.4, -0.6, -0.2, 0.2), "cannot say"),
        (("no evidence", 0.1, -0.2, 0.4, 0.5), "cannot say"),
        (("cannot say", NAN, NAN, NAN, NAN), "cannot say"),
    ],
)
def test_semantics_rather_than_appearance(worst: tuple[Any, ...], expected: str) -> None:
    rows = [("outline", "more similar", 0.5, 0.3, 0.7, 0.01), ("pixels", *worst)]
    columns = ["appearance", "conclusion", "partial", "low, by name", "high, by name", "adjusted p"]
    table = pd.DataFrame(rows, columns=columns).assign(cause="same name", names=10)
    others = table.assign(cause="name similarity", conclusion="no evidence")  # decides nothing
    found = verdict(CLAIMS, "semantics, not appearance", evidence({"explained": pd.concat([others, table])}))
    assert found[0] == expected
    if worst[0] == "cannot say":
        assert "unreliable" in found[1] and "pixels" in found[1]
    assert verdict(CLAIMS, "semantics, not appearance", evidence())[0] == "cannot say"


NONE = Estimate(NAN, NAN, NAN, 0)


@pytest.mark.parametrize(
    ("header", "question", "image", "expected"),
    [
        ((2, 6), (3, 5), (10, 12), "pass"),
        (None, (3, 5), (10, 12), "pass"),  # the header receives nothing: the final token alone counts
        ((-6, -2), (3, 5), (10, 12), "differs"),
        ((2, 6), (13, 15), (10, 12), "differs"),
        ((-1, 6), (3, 5), (10, 12), "cannot say"),
        ((2, 6), (3, 11), (10, 12), "cannot say"),
        (None, None, (10, 12), "cannot say"),
    ],
)
def test_text_arrives_first_and_the_image_later(header: Any, question: Any, image: Any, expected: str) -> None:
    def own(ends: Any) -> Estimate:
        return NONE if ends is None else by_name(sum(ends) / 2, *ends)

    found = {
        "layers from question → assistant header to image → assistant header": own(header),
        "mean layer: question → final": own(question),
        "mean layer: image → final": own(image),
    }
    assert verdict(CLAIMS, "text first, image later", evidence(findings=found))[0] == expected


@pytest.mark.parametrize(
    ("header", "final", "question", "expected"),
    [
        ((0.0, 0.1), (0.6, 0.9), (0.1, 0.3), "pass"),
        ((0.6, 0.9), (0.0, 0.1), (0.1, 0.3), "pass"),
        ((0.0, 0.1), (0.1, 0.2), (0.4, 0.6), "differs"),
        ((0.0, 0.1), (0.2, 0.5), (0.1, 0.3), "cannot say"),
        ((-0.2, 0.0), (-0.1, 0.1), (-0.4, -0.3), "cannot say"),  # nothing receives the image
    ],
)
def test_role_and_final_tokens_receive_the_image(header: Any, final: Any, question: Any, expected: str) -> None:
    losses = {"assistant header": header, "final": final, "question": question}
    found: dict[str, Estimate] = {
        f"share lost if this does not see the image: {name}": by_name(sum(ends) / 2, *ends)
        for name, ends in losses.items()
    }
    found["share kept if only this sees the image: question"] = by_name(5, 4, 6)  # decides nothing
    assert verdict(CLAIMS, "role and final tokens receive", evidence(findings=found))[0] == expected
    assert verdict(CLAIMS, "role and final tokens receive", evidence())[0] == "cannot say"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(10, 40, "pass"), (60, 90, "differs"), (30, 60, "cannot say"), (NAN, NAN, "cannot say")],
)
def test_few_image_tokens_suffice(low: float, high: float, expected: str) -> None:
    """Of 200 tokens."""
    row = {"level": 0.8, "of": 200, "value": (low + high) / 2, "low, by name": low, "high, by name": high, "names": 9}
    row |= {"low, by picture": NAN, "high, by picture": NAN, "pictures": 20}
    rows = [row | {"ranking": "random", "low, by name": 150.0}, row | {"ranking": "token attribution"}]
    assert verdict(CLAIMS, "sparse image tokens", evidence({"keep_only": pd.DataFrame(rows)}))[0] == expected
    assert verdict(CLAIMS, "sparse image tokens", evidence())[0] == "cannot say"


@pytest.mark.parametrize(
    ("auc", "top", "expected"),
    [
        ((0.6, 0.7), (0.7, 0.9), "pass"),
        ((0.3, 0.4), (0.7, 0.9), "differs"),
        ((0.6, 0.7), (1.0, 1.0), "differs"),  # no background
        ((0.4, 0.6), (0.7, 0.9), "cannot say"),
        ((0.6, 0.7), (0.7, 1.0), "cannot say"),
    ],
)
def test_object_tokens_and_some_background(auc: Any, top: Any, expected: str) -> None:
    found = {f"object tokens: {name}": by_name(np.mean(ends).item(), *ends)
             for name, ends in {"AUC": auc, "share of the top tokens": top}.items()}  # fmt: skip
    assert verdict(CLAIMS, "object and background", evidence(findings=found))[0] == expected
    assert verdict(CLAIMS, "object and background", evidence())[0] == "cannot say"
