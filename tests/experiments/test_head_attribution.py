"""The head-attribution study: its numbers against literal re-computations, its laws, its files, its refusals."""

import copy
import json
import sys
from dataclasses import replace
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import roc_auc_score

from hooked_vlm import HookedVLM, cli
from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.head_attribution import All, Attribute, Compare, Curves, Tokens, compare, run
from hooked_vlm.experiments.head_attribution import measurements as measure_module
from hooked_vlm.experiments.head_attribution.ablation import Probe, make_probes, metric_of
from hooked_vlm.experiments.head_attribution.agreement import (
    cosine,
    explained,
    jaccard,
    mean_of_pairs,
    partial_correlation,
    spearman,
)
from hooked_vlm.experiments.head_attribution.coco import object_mask
from hooked_vlm.experiments.head_attribution.config import n_masks
from hooked_vlm.experiments.head_attribution.curves import (
    area,
    first_at,
    mean_curve,
    measure_curves,
    measures_of_all,
    orders,
    shares,
    sizes,
)
from hooked_vlm.experiments.head_attribution.image_flow import attention_to_tokens, coverage, inside
from hooked_vlm.experiments.head_attribution.items import Item
from hooked_vlm.experiments.head_attribution.masks import as_frame, from_frame, random_masks
from hooked_vlm.experiments.head_attribution.pages import heads_page, tokens_page
from hooked_vlm.experiments.head_attribution.rankings import attention_scores_of, gradients, other_rankings
from hooked_vlm.experiments.head_attribution.regression import chosen, convergence, fit, least_squares, settled_at
from hooked_vlm.experiments.head_attribution.tasks import (
    Case,
    ask,
    folder_items,
    is_right,
    items_of,
    right_cases,
    toy_items,
)
from hooked_vlm.experiments.head_attribution.text_flow import (
    blocked_edges,
    mean_layer,
    receivers,
    text_groups,
    windows,
    with_losses,
)
from hooked_vlm.interventions import ReplaceImageKV, mean_image_kv
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import InProcess
from hooked_vlm.toys.drawings import OBJECTS
from hooked_vlm.toys.pages import NAMING_PROMPT
from hooked_vlm.viewer.quantisation import decoded
from tools.toy_training.families import FAMILIES

SMALL: dict[str, Any] = {
    "samples": 4,
    "masks": 60,
    "token_masks": 90,
    "bootstrap": 20,
    "random_rankings": 2,
    "quiet": True,
}


@lru_cache
def bundled(name: str) -> HookedVLM:
    return HookedVLM.from_pretrained(name, device="cpu")


def toy_case(name: str, index: int) -> Case:
    """One of the drawn objects."""
    model, item = bundled(name), toy_items(index + 1, 0, NAMING_PROMPT)[index]
    inputs = model.to_inputs(item.question, images=item.image)
    inputs = inputs.with_image_features(model.encode_images(inputs).detach())
    return Case(item, inputs, model.to_single_token(item.name), model.to_single_token("moon"))


@lru_cache
def probe_of(name: str, **changes: Any) -> Probe:
    """One drawn star."""
    case = toy_case(name, 3)
    return Probe(bundled(name), case, metric_of(case, "logit"), **changes)


@pytest.fixture(params=FAMILIES)
def toy(request: pytest.FixtureRequest) -> str:
    """The bundled models' names, one after the other."""
    return request.param


def value_under(probe: Probe, hooks: list) -> float:
    """The target's logit in a pass of its own."""
    with torch.no_grad():
        logits = probe.model.run_with_hooks(probe.case.inputs, fwd_hooks=hooks)
    return float(logits[0, -1, probe.case.target])


# ---------------------------------------------------------------- regression


def linear_case(rng: np.random.Generator, noise: float, n: int = 320) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks over 16 parts, values linear in them but for noise, and the coefficients."""
    kept, true = rng.random((n, 16)) < 0.5, rng.normal(size=16)
    return kept, 3.0 + kept @ true + noise * rng.normal(size=n), true


def test_regression_recovers_known_coefficients_and_foretells_what_it_has_not_seen() -> None:
    kept, values, true = linear_case(np.random.default_rng(0), noise=0)
    found = fit(kept, values, "ols", 0.1, 50, seed=0)
    np.testing.assert_allclose(found.coefficients, true, atol=1e-10)
    assert found.intercept == pytest.approx(3.0) and (found.n_train, found.n_held_out) == (288, 32)
    assert found.pearson == pytest.approx(1) and found.r2 == pytest.approx(1)


def test_held_out_measures_are_of_the_last_masks_alone() -> None:
    kept, values, _ = linear_case(np.random.default_rng(1), noise=1.0)
    found = fit(kept, values, "ols", 0.25, 20, seed=0)
    foretold = LinearRegression().fit(kept[:240], values[:240]).predict(kept[240:])
    assert found.pearson == pytest.approx(np.corrcoef(foretold, values[240:])[0, 1])
    assert found.r2 == pytest.approx(1 - np.mean((values[240:] - foretold) ** 2) / values[240:].var())
    constant = fit(kept, np.ones(320), "ols", 0.25, 20, seed=0)
    assert np.isnan(constant.pearson) and np.isnan(constant.r2)


def test_bootstrap_intervals_cover_the_coefficients_at_the_stated_rate() -> None:
    covered = []
    for repeat in range(60):
        kept, values, true = linear_case(np.random.default_rng([7, repeat]), noise=2.0)
        found = fit(kept, values, "ols", 0.1, 200, seed=repeat)
        covered += ((found.low <= true) & (true <= found.high)).tolist()
    assert 0.92 <= np.mean(covered) <= 0.98  # 960 intervals of 95%


@pytest.mark.parametrize("penalty", [0.0, 4.0])
def test_weighted_least_squares_are_those_of_scikit_learn(penalty: float) -> None:
    rng = np.random.default_rng(2)
    kept, values, _ = linear_case(rng, noise=1.0, n=60)
    x, weights = kept.astype(float), rng.integers(0, 4, 60).astype(float)
    model = Ridge(alpha=penalty) if penalty else LinearRegression()
    expected = model.fit(x, values, sample_weight=weights).coef_
    np.testing.assert_allclose(least_squares(x, values, weights, penalty), expected, atol=1e-8)


def test_penalties_are_chosen_by_what_the_masks_say() -> None:
    rng = np.random.default_rng(3)
    kept = rng.random((200, 40)) < 0.5
    values = 2.0 * kept[:, 0] - 1.5 * kept[:, 1] + 0.3 * rng.normal(size=200)
    lasso = fit(kept, values, "lasso", 0.1, 5, seed=0)
    assert set(np.argsort(-np.abs(lasso.coefficients))[:2]) == {0, 1}
    assert (lasso.coefficients == 0).sum() > 10 and lasso.pearson > 0.95
    exact = kept[:, :16] @ np.arange(16.0)
    ridge = chosen("ridge", kept[:, :16].astype(float), exact).fit(kept[:, :16].astype(float), exact)
    np.testing.assert_allclose(ridge.coef_, np.arange(16.0), atol=1e-2)


def test_coefficients_settle_with_more_masks() -> None:
    kept, values, _ = linear_case(np.random.default_rng(4), noise=2.0, n=2000)
    curve = convergence(kept, values, "ols", 0.1)
    assert curve["n"].iloc[-1] == 900
    assert curve["reliability"].iloc[-1] > 0.95 > curve["reliability"].iloc[0]
    first, second = (LinearRegression().fit(kept[a:b], values[a:b]).coef_ for a, b in ((0, 900), (900, 1800)))
    assert curve["reliability"].iloc[-1] == pytest.approx(np.corrcoef(first, second)[0, 1])


@pytest.mark.parametrize(
    ("reliability", "expected"),
    [([0.5, 0.96, 0.9, 0.97, 0.99], 40.0), ([0.96, 0.99, 0.99, 1, 1], 10.0), ([0.9, 0.9, 0.9, 0.99, 0.9], np.nan)],
)
def test_settled_means_for_good(reliability: list[float], expected: float) -> None:
    curve = pd.DataFrame({"n": [10, 20, 30, 40, 50], "reliability": reliability})
    assert settled_at(curve) == pytest.approx(expected, nan_ok=True)


def test_masks_are_kept_whole_and_keep_their_share() -> None:
    kept = random_masks(400, 19, 0.3, [0, 1])
    assert abs(kept.mean() - 0.3) < 0.03
    back, values = from_frame(as_frame(kept, np.arange(400.0)), 19)
    assert (back == kept).all() and (values == np.arange(400)).all()
    assert [n_masks(None, 16), n_masks(None, 784), n_masks(50, 784)] == [320, 3920, 50]


# ---------------------------------------------------------------- curves


def test_areas_and_numbers_of_heads_by_hand() -> None:
    k = np.array([0, 1, 2, 4])
    curve = np.array([0.0, 0.5, 0.9, 1.0])
    assert area(k, curve) == pytest.approx((0.25 + 0.7 + 1.9) / 4)
    assert first_at(k, 0.8, curve) == 2 and first_at(k, 0.95, curve) == 4
    assert first_at(k, 0.8, curve, np.array([0.0, 0.9, 0.7, 0.8])) == 4
    assert np.isnan(first_at(k, 1.1, curve))
    assert sizes(4).tolist() == [0, 1, 2, 3, 4]
    assert sizes(784)[0] == 0 and sizes(784)[-1] == 784 and len(sizes(784)) <= 33


def test_faithfulness_and_completeness_go_from_none_to_all(toy: str) -> None:
    probe = probe_of(toy)
    scores = np.random.default_rng(0).normal(size=len(probe.heads))
    frame = measure_curves(probe.over_heads, orders({"attribution": scores}, 3, [0, 0]))
    found = shares(frame)
    for ranking in ("attribution", "random"):
        own = found.query(f"ranking == '{ranking}'")[["faithfulness", "completeness"]].to_numpy()
        assert (own[0] == 0).all() and (own[-1] == 1).all()
    # one point by hand: only the top five keep the image in sight
    top = [probe.heads[i] for i in np.argsort(-scores)[:5]]
    rest = [head for head in probe.heads if head not in top]
    full, none = value_under(probe, []), value_under(probe, _ablation(probe, probe.heads))
    kept, lost = value_under(probe, _ablation(probe, rest)), value_under(probe, _ablation(probe, top))
    (point,) = found.query("ranking == 'attribution' and k == 5").to_dict("records")
    assert point["faithfulness"] == pytest.approx((kept - none) / (full - none), abs=1e-4)
    assert point["completeness"] == pytest.approx((full - lost) / (full - none), abs=1e-4)


def _ablation(probe: Probe, heads: Any) -> list:
    return ReplaceImageKV(tuple(heads)).hooks(probe.model, probe.case.inputs)


def test_pictures_that_add_nothing_have_no_shares() -> None:
    frame = measure_curves(lambda kept: kept.sum(1) * 0.1, orders({"attribution": np.arange(3.0)}, 0, [0]))
    assert shares(frame)[["faithfulness", "completeness"]].isna().to_numpy().all()


def test_random_orders_are_measured_one_by_one() -> None:
    """Of two heads one does it all: the k at which the mean of both orders' curves reaches 0.8 is 2, the mean k 1.5."""
    ranked = {("attribution", 0): np.array([0, 1]), ("random", 0): np.array([0, 1]), ("random", 1): np.array([1, 0])}
    frame = shares(measure_curves(lambda kept: kept[:, 0].astype(float), ranked))
    table = measures_of_all({"a": frame}, ["attribution", "random"]).set_index("ranking")
    assert table["heads needed for 0.8 of both"].to_dict() == {"attribution": 1.0, "random": 1.5}
    assert table["faithfulness area"].to_dict() == {"attribution": 0.75, "random": 0.5}
    assert mean_curve(frame, "random", "faithfulness").tolist() == [0.0, 0.5, 1.0]


# ---------------------------------------------------------------- other rankings


def test_attention_scores_are_those_of_the_pattern(toy: str) -> None:
    probe = probe_of(toy)
    _, cache = probe.model.run_with_cache(probe.case.inputs)
    mass, of_final, weighted = attention_scores_of(probe)
    share = probe.model.cfg.n_heads // probe.model.cfg.n_key_value_heads
    for layer, head in ((0, 1), (2, 3), (3, 2)):
        pattern = cache["pattern", layer][0, head][list(probe.text)][:, list(probe.image)]
        assert mass[layer, head] == pytest.approx(float(pattern.sum(1).mean()), rel=1e-4)
        assert of_final[layer, head] == pytest.approx(float(pattern[-1].sum()), rel=1e-4)
        values = cache["v", layer][0, list(probe.image), head // share]
        written = (values @ probe.model.blocks[layer].attn.W_O[head]).detach()
        assert weighted[layer, head] == pytest.approx(float((pattern @ written.norm(dim=-1)).mean()), rel=1e-4)


def test_attribution_patching_is_the_slope_of_ablating_a_little(toy: str) -> None:
    probe, step = probe_of(toy), 0.02
    found = gradients(probe)
    for layer, head in ((0, 0), (2, 3), (3, 1)):
        ((name, ablate),) = _ablation(probe, [(layer, head)])

        def shifted(z: torch.Tensor, hook: Any, by: float, ablate: Any = ablate) -> torch.Tensor:
            return z + by * (z - ablate(z, hook))

        less, more = (value_under(probe, [(name, partial(shifted, by=by))]) for by in (-step, step))
        assert found[layer, head] == pytest.approx((more - less) / (2 * step), rel=0.02, abs=0.01)


def test_single_heads_are_ablated_and_kept_one_by_one(toy: str) -> None:
    probe = probe_of(toy)
    table: Any = other_rankings(probe)
    full, none = value_under(probe, []), value_under(probe, _ablation(probe, probe.heads))
    index = probe.heads.index((2, 3))
    assert tuple(table.loc[index, ["layer", "head"]]) == (2, 3)
    others = [head for head in probe.heads if head != (2, 3)]
    assert table["single"][index] == pytest.approx(full - value_under(probe, _ablation(probe, [(2, 3)])), abs=1e-4)
    assert table["alone"][index] == pytest.approx(value_under(probe, _ablation(probe, others)) - none, abs=1e-4)


# ---------------------------------------------------------------- token flow


def test_text_behind_the_image_is_shared_out_between_the_groups(toy: str) -> None:
    probe = probe_of(toy)
    groups = text_groups(probe)
    assert set(groups) == {"closing marks", "question", "assistant header", "final"}
    assert sorted(p for members in groups.values() for p in members) == list(probe.text)
    asked = [probe.case.inputs.tokens[0, p].item() for p in groups["question"]]
    assert str(probe.model.to_string(asked)).strip() == NAMING_PROMPT


def test_losses_of_text_groups_are_those_of_passes_of_their_own(toy: str) -> None:
    probe = probe_of(toy)
    frame = receivers(probe, None)
    table: Any = frame.set_index(["text", "change", "first", "stop"])["value"]
    groups, inputs = text_groups(probe), probe.case.inputs
    final = ReplaceImageKV(tuple(h for h in probe.heads if h[0] == 3), queries="final").hooks(probe.model, inputs)
    assert table["final", "ablated", 3, 4] == pytest.approx(value_under(probe, final), abs=1e-4)
    others = tuple(p for p in probe.text if p not in groups["question"])
    alone = ReplaceImageKV(probe.heads, queries=others).hooks(probe.model, inputs)
    assert table["question", "kept alone", 0, 4] == pytest.approx(value_under(probe, alone), abs=1e-4)
    last = frame["text"].iloc[-1]  # as a single token
    assert table[last, "one token ablated", 0, 4] == pytest.approx(table["final", "ablated", 0, 4], abs=1e-4)


def test_losses_of_cut_edges_are_those_of_hooked_scores(toy: str) -> None:
    probe = probe_of(toy)
    table: Any = blocked_edges(probe, 2).set_index(["source", "receiver", "first", "stop"])["value"]
    groups = text_groups(probe)

    def cut(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        for query in groups["final"]:
            scores[:, :, query, list(groups["question"])] = -torch.inf
        return scores

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", cut) for layer in (1, 2)]
    assert table["question", "final", 1, 3] == pytest.approx(value_under(probe, hooks), abs=1e-4)


def test_windows_and_mean_layers_by_hand() -> None:
    assert windows(4, None) == [(0, 4), (0, 1), (1, 2), (2, 3), (3, 4)]
    assert windows(28, None)[:3] == [(0, 28), (0, 7), (1, 8)] and windows(2, 5) == [(0, 2)]
    edge = pd.DataFrame({"first": [0, 0, 1, 2], "stop": [4, 2, 3, 4], "value": [0.0, 9.0, 6.0, 10.5]})
    losses = with_losses(edge, full=10.0, gap=10.0)
    assert losses["loss"].tolist() == pytest.approx([1.0, 0.1, 0.4, -0.05])
    assert mean_layer(losses, 4) == pytest.approx((0.5 * 0.1 + 1.5 * 0.4) / 0.5)
    assert np.isnan(mean_layer(with_losses(edge, full=0.1, gap=10.0), 4))


def test_tokens_that_are_not_kept_are_replaced_for_all_heads(toy: str) -> None:
    probe = probe_of(toy)
    some = np.random.default_rng(0).random(len(probe.image)) < 0.7
    every = np.ones_like(some)
    lost = tuple(position for position, keep in zip(probe.image, some, strict=True) if not keep)
    expected = ReplaceImageKV(probe.heads, tokens=lost).hooks(probe.model, probe.case.inputs)
    found = probe.over_tokens(np.stack([some, every, ~every]))
    full, none = value_under(probe, []), value_under(probe, _ablation(probe, probe.heads))
    np.testing.assert_allclose(found, [value_under(probe, expected), full, none], atol=1e-4)


def test_object_tokens_cover_the_object(toy: str) -> None:
    probe = probe_of(toy)
    covered, mask = coverage(probe), probe.case.item.object_mask
    assert covered is not None and mask is not None and 0.02 < mask.mean() < 0.6
    boxes = [probe.case.inputs.box_of_token(position) for position in probe.image]
    areas = np.array([(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes])
    exact = toy == "toy-qwen2-vl"  # there every token is 16 x 16 whole pixels
    assert (covered * areas).sum() / areas.sum() == pytest.approx(mask.mean(), abs=1e-9 if exact else 0.03)
    unknown = replace(probe.case, item=Item(probe.case.item.image, "star", "?"))
    assert coverage(replace(probe, case=unknown)) is None


def test_attention_to_tokens_is_the_last_row_of_all_patterns(toy: str) -> None:
    probe = probe_of(toy)
    _, cache = probe.model.run_with_cache(probe.case.inputs)
    rows = sum(cache["pattern", layer][0, :, -1].sum(0) for layer in range(probe.model.cfg.n_layers))
    assert isinstance(rows, torch.Tensor)
    np.testing.assert_allclose(attention_to_tokens(probe), rows[list(probe.image)].numpy(), rtol=1e-4, atol=1e-5)


def test_the_objects_share_by_hand() -> None:
    coefficients = np.array([3.0, -1.0, 2.0, 1.0, 0.5, 0.5, 0.0, -2.0, 0.0, 0.0])
    on_object = np.array([True, False, True, False, True, False, False, False, False, False])
    found = inside(coefficients, on_object)
    assert found["share of all tokens"] == 0.3 and found["share of the top tokens"] == 1.0
    assert found["share of positive coefficients"] == pytest.approx(5.5 / 7)
    assert found["AUC"] == pytest.approx(roc_auc_score(on_object, coefficients))
    assert np.isnan(inside(coefficients, np.ones(10, dtype=bool))["AUC"])


# ---------------------------------------------------------------- agreement


def test_similarities_by_hand() -> None:
    vectors = np.array([[3.0, 2.0, 1.0, 0.0], [4.0, 1.0, 2.0, 0.0], [0.0, 0.0, 5.0, 5.0]])
    assert cosine(vectors)[0, 1] == pytest.approx(16 / np.sqrt(14 * 21))
    assert spearman(vectors)[0, 1] == pytest.approx(0.8)
    np.testing.assert_allclose(jaccard(vectors, 2), [[1, 1 / 3, 0], [1 / 3, 1, 1 / 3], [0, 1 / 3, 1]])


def test_means_of_pairs_take_each_pair_once() -> None:
    similarity = np.array([[1.0, 0.2, 0.4], [0.2, 1.0, 0.9], [0.4, 0.9, 1.0]])
    same = np.array([[True, True, False], [True, True, False], [False, False, True]])
    assert (mean_of_pairs(similarity, same, 0).value, mean_of_pairs(similarity, same, 0).n) == (0.2, 1)
    others = mean_of_pairs(similarity, ~same, 0)
    assert others.value == pytest.approx(0.65) and others.n == 2 and others.low <= 0.65 <= others.high
    assert mean_of_pairs(similarity, np.eye(3, dtype=bool), 0).n == 0


def pair_causes(rng: np.random.Generator, n: int = 24) -> dict[str, np.ndarray]:
    names = np.arange(n) % 4
    words, looks = rng.normal(size=(4, 3))[names], rng.normal(size=(n, 6))
    same = (names[:, None] == names[None]).astype(float)
    return {"same name": same, "name similarity": cosine(words), "picture similarity": cosine(looks)}


def test_partial_correlations_are_those_of_residuals() -> None:
    rng = np.random.default_rng(5)
    causes = pair_causes(rng)
    similarity = 0.5 * causes["same name"] + 0.2 * causes["picture similarity"]
    noise = rng.normal(size=similarity.shape)
    similarity = similarity + 0.3 * (noise + noise.T)
    upper = np.triu_indices(len(similarity), 1)
    y, a, b = (square[upper] for square in (similarity, causes["same name"], causes["picture similarity"]))
    residuals = [v - LinearRegression().fit(b[:, None], v).predict(b[:, None]) for v in (y, a)]
    found = partial_correlation(similarity, causes["same name"], [causes["picture similarity"]])
    assert found == pytest.approx(np.corrcoef(*residuals)[0, 1])
    assert partial_correlation(similarity, causes["same name"], []) == pytest.approx(np.corrcoef(y, a)[0, 1])
    assert np.isnan(partial_correlation(similarity, np.ones_like(similarity), [causes["picture similarity"]]))
    twice = np.full(len(similarity), 2)
    assert partial_correlation(similarity, causes["same name"], [], twice) == pytest.approx(np.corrcoef(y, a)[0, 1])


def test_the_planted_cause_is_found_and_the_other_is_not() -> None:
    rng = np.random.default_rng(6)
    causes = pair_causes(rng)
    centres = rng.normal(size=(4, 16))
    vectors = centres[np.arange(24) % 4] + 0.5 * rng.normal(size=(24, 16))
    table = explained(cosine(vectors), causes, seed=0, draws=200)
    by_cause: Any = table.set_index(["cause", "controlled for"])
    same, looks = ("same name", "picture similarity"), ("picture similarity", "same name, name similarity")
    assert by_cause["p"][same] == pytest.approx(1 / 201) and by_cause["low"][same] > 0.5
    assert by_cause["p"][looks] > 0.05
    assert set(table["images"]) == {24} and set(table["pairs"]) == {276}


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("reply", "name", "expected"),
    [("Dog", "dog", True), (" dog.", "dog", True), ("Dining  table!", "dining table", True), ("hot dog", "dog", False)],
)
def test_a_reply_is_the_name(reply: str, name: str, expected: bool) -> None:
    assert is_right(reply, name) == expected


def test_drawn_objects_come_equally_often_and_lie_where_they_are_said_to() -> None:
    items = toy_items(20, 3, NAMING_PROMPT)
    assert [item.name for item in items] == [*OBJECTS, *OBJECTS] and len({item.id for item in items}) == 20
    again = toy_items(20, 3, NAMING_PROMPT)
    assert [item.id for item in items] == [item.id for item in again]
    for item in items[:10]:
        mask, pixels = item.object_mask, np.asarray(item.image).astype(float)
        assert mask is not None and mask.shape == pixels.shape[:2]
        jumps = np.abs(np.diff(pixels, axis=1)).max(2) > 40
        near = ndimage.binary_dilation(jumps, iterations=3)  # an outline is up to five pixels wide
        outline = mask[:, 1:] ^ mask[:, :-1]
        assert near[outline].all() and near[~outline].mean() < 0.4


def coco_folder(folder: Path) -> tuple[Path, Path]:
    """Four pictures: a fair single object, two objects, a crowd, one too small."""
    shapes = {1: [(10, 10, 60, 60)], 2: [(0, 0, 50, 50), (50, 50, 99, 79)], 3: [(10, 10, 60, 60)], 4: [(0, 0, 5, 5)]}
    annotations, images = [], []
    for image, boxes in shapes.items():
        Image.new("RGB", (100, 80), "white").save(folder / f"{image}.png")
        images.append({"id": image, "file_name": f"{image}.png", "width": 100, "height": 80})
        for x0, y0, x1, y1 in boxes:
            outline = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            area = (x1 - x0) * (y1 - y0)
            own = {"image_id": image, "category_id": 7, "area": area, "iscrowd": int(image == 3)}
            annotations.append(own | {"segmentation": outline})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "dog"}]}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json", folder


def test_coco_pictures_have_one_object_of_a_fair_size(tmp_path: Path) -> None:
    annotations, images = coco_folder(tmp_path)
    config = Attribute(annotations=annotations, images=images)
    assert config.source == "coco"
    (item,) = items_of(config)
    assert item.name == "dog" and "one word" in item.question
    assert item.object_mask is not None and item.object_mask.shape == (80, 100)
    assert item.object_mask[10:60, 10:60].all() and abs(item.object_mask.sum() - 2500) < 120
    with pytest.raises(StudyError, match=r"90%.*100%"):
        items_of(replace(config, min_object=0.9, max_object=1.0))
    Image.new("RGB", (80, 100)).save(tmp_path / "1.png")
    with pytest.raises(StudyError, match=r"80 x 100.*100 x 80"):
        items_of(config)
    content = json.loads(annotations.read_text())
    for missing in ("categories", "images", "annotations"):
        annotations.write_text(json.dumps({name: part for name, part in content.items() if name != missing}))
        with pytest.raises(StudyError, match=f"COCO.*{missing}"):
            items_of(config)
    annotations.write_text(json.dumps(content | {"categories": []}))
    with pytest.raises(StudyError, match="COCO"):
        items_of(config)


@pytest.mark.parametrize("outline", [None, [], {"counts": "x", "size": [80, 100]}])
def test_coco_objects_without_polygons_have_no_mask(outline: Any, tmp_path: Path) -> None:
    annotations, images = coco_folder(tmp_path)
    content = json.loads(annotations.read_text())
    for own in content["annotations"]:
        own["segmentation"] = outline
    annotations.write_text(json.dumps(content))
    (item,) = items_of(Attribute(annotations=annotations, images=images))
    assert item.name == "dog" and item.object_mask is None


def test_masks_of_several_polygons() -> None:
    mask = object_mask([[0, 0, 3, 0, 3, 3, 0, 3], [6, 6, 9, 6, 9, 9, 6, 9]], (12, 10))
    assert mask.shape == (10, 12) and mask[1, 1] and mask[8, 8] and not mask[5, 5]


def test_a_folder_of_pictures_is_named_by_its_folders(tmp_path: Path) -> None:
    for name in ("dog", "dining_table"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / name / "a.png")
        (tmp_path / name / "notes.txt").write_text("no picture")
    items = folder_items(tmp_path, "What?", 5, 0)
    assert {item.name for item in items} == {"dog", "dining table"}
    with pytest.raises(StudyError, match="--images"):
        folder_items(tmp_path / "dog", "What?", 5, 0)
    Image.new("RGB", (20, 10)).save(tmp_path / "dog" / "again.png")
    assert sorted(item.name for item in items_of(Attribute(images=tmp_path))) == ["dining table", "dog"]


def test_only_right_answers_are_studied(toy: str, tmp_path: Path) -> None:
    model = bundled(toy)
    items = toy_items(3, 0, NAMING_PROMPT)
    items[1] = Item(items[1].image, "elephant", NAMING_PROMPT)
    answers = ask(InProcess(model), items, ResultStore(tmp_path), {}, quiet=True)
    cases = right_cases(model, items, answers)
    assert answers["right"].tolist() == [True, False, True]
    assert [case.item.name for case in cases] == ["circle", "triangle"]
    assert [case.target for case in cases] == [model.to_single_token(name) for name in ("circle", "triangle")]
    assert cases[0].foil == cases[1].target  # the only other name
    with pytest.raises(StudyError, match=r"1.*'square'.*'elephant'"):
        right_cases(model, items[1:2], answers[1:2].reset_index())


def test_targets_and_baselines(toy: str) -> None:
    model, case = bundled(toy), probe_of(toy).case
    config = Attribute()
    logits = torch.randn(1, model.cfg.d_vocab)
    right, wrong = logits[0, case.target], logits[0, case.foil]
    assert metric_of(case, "difference")(logits)[0] == pytest.approx(float(right - wrong), abs=1e-5)
    log_prob = float(logits.log_softmax(-1)[0, case.target])
    assert metric_of(case, "log_prob")(logits)[0] == pytest.approx(log_prob, abs=1e-5)
    with pytest.raises(StudyError, match="--target"):
        metric_of(replace(case, foil=None), "difference")
    other = toy_case(toy, 1)
    kept = random_masks(3, len(probe_of(toy).heads), 0.5, [0])
    values = {}
    for baseline in ("mean", "dataset", "zero", "knockout"):
        for rope in ("before", "after"):
            probe, _ = make_probes(model, [case, other], replace(config, baseline=baseline, rope=rope))
            found = probe.over_heads(kept)
            lost = [head for head, keep in zip(probe.heads, kept[0], strict=True) if not keep]
            pair = [case.inputs, other.inputs]
            real = mean_image_kv(model, pair, rope == "before") if baseline == "dataset" else baseline
            expected = ReplaceImageKV(tuple(lost), real, rope == "before").hooks(model, case.inputs)
            assert found[0] == pytest.approx(value_under(probe, expected), abs=1e-4)
            if rope == "before" or baseline in ("mean", "dataset"):  # the others have no keys to rotate
                values[baseline, rope] = found
    for (first, a), (second, b) in combinations(values.items(), 2):
        assert np.abs(a - b).max() > 1e-3, (first, second)


# ---------------------------------------------------------------- the whole study


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three: dict[str, Any] = {**SMALL, "samples": 3}
    model, config = bundled("toy-qwen2-vl"), All(out=tmp_path / "whole", **three)
    run(config, model)
    calls = []

    def interrupted(*arguments: Any) -> pd.DataFrame:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return blocked_edges(*arguments)

    resumed = replace(config, out=tmp_path / "resumed")
    monkeypatch.setattr(measure_module, "blocked_edges", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(resumed, model)
    assert not (resumed.out / "report.html").exists()
    run(resumed, model)
    assert len(calls) == 4  # the one done before is not done again
    whole = files_of(config.out)
    assert {name.split("/")[0] for name in whole} == {"parts", "tables", "figures", "run.json", "report.html"}
    assert files_of(resumed.out) == whole


@pytest.mark.parametrize("name", FAMILIES)
def test_attribution_foretells_and_needs_fewer_heads_than_other_rankings(name: str, tmp_path: Path) -> None:
    # as many masks as by default; more of them held out, since a correlation over 32 is itself uncertain by 0.05
    config = Curves(out=tmp_path, samples=8, held_out=0.25, bootstrap=20, random_rankings=1, quiet=True)
    result = run(config, bundled(name))
    found = result.findings
    assert found["answered correctly"].value >= 0.8
    assert found["held-out Pearson"].low >= 0.9
    needed = {
        key.split(", ")[1]: value.value
        for key, value in found.items()
        if key.startswith("heads needed for 0.8 of both")
    }
    assert needed["head attribution"] < needed["single-head ablation"]
    assert needed["head attribution"] < needed["attention to the image"]
    assert needed["head attribution"] < needed["random"]
    table: Any = pd.read_parquet(tmp_path / "tables" / "summary.parquet").set_index("measure")
    assert table["value"]["held-out Pearson"] == found["held-out Pearson"].value


def test_a_picture_of_a_run_is_a_page(tmp_path: Path) -> None:
    found = run(Attribute(samples=2, masks=40, bootstrap=20, out=tmp_path / "heads", quiet=True)).measured
    probe = found.probes[1]
    view = heads_page(found, 1)
    best = int(np.argmax(found.coefficients[1]))
    assert view.ranked[0] == probe.heads[best] and len(set(view.ranked)) == len(probe.heads)
    pattern = probe.model.run_with_cache(probe.case.inputs)[1]["pattern", 2][0, :, -1]
    shape = (len(view.layers), len(view.heads), len(probe.image))
    shown, _ = decoded(view.packed.rows[0], shape, view.packed.zero)
    assert shown[2] == pytest.approx(pattern[:, list(probe.image)].detach().numpy(), abs=0.003)
    mask = probe.case.item.object_mask
    ((x0, y0, x1, y1),) = view.scene.evidence[0]
    assert mask is not None
    inside = mask[int(y0) : int(y1), int(x0) : int(x1)]
    columns, rows = np.any(inside, axis=0), np.any(inside, axis=1)
    assert inside.sum() == mask.sum() and all((columns[0], columns[-1], rows[0], rows[-1]))
    with pytest.raises(StudyError, match=r"3.*heads.*2"):
        heads_page(found, 3)
    with pytest.raises(StudyError, match="image tokens"):
        tokens_page(found)
    found = run(Tokens(samples=2, token_masks=60, bootstrap=20, out=tmp_path / "tokens", quiet=True)).measured
    page = tokens_page(found, 1)
    shown, _ = decoded(page.packed.rows[0], (1, 1, len(probe.image)), page.packed.zero)
    coefficients = found.tokens[1].fit.coefficients
    assert shown[0, 0] == pytest.approx(coefficients, abs=0.01 * np.abs(coefficients).max())


def test_runs_are_compared_side_by_side(tmp_path: Path) -> None:
    for name in FAMILIES:
        run(Attribute(model=name, out=tmp_path / name, **SMALL), bundled(name))
    page = compare(Compare(tuple(tmp_path / name for name in FAMILIES), tmp_path / "both"))
    text = page.read_text(encoding="utf-8")
    assert all(name in text for name in FAMILIES) and "held-out Pearson" in text
    with pytest.raises(StudyError, match="finished"):
        compare(Compare((tmp_path / "both",), tmp_path / "again"))
    with pytest.raises(StudyError, match="--runs"):
        compare(Compare((), tmp_path / "again"))


def test_tokens_alone_need_no_masks_over_heads(tmp_path: Path) -> None:
    two: dict[str, Any] = {**SMALL, "samples": 2}
    model = bundled("toy-internvl2")
    found = measure_module.measure(model, Tokens(out=tmp_path, **two), InProcess(model))
    assert not (tmp_path / "parts" / "heads_masks").exists()
    assert len(found.tokens) == len(found.edges) == 2 and not found.heads


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 0}, "--samples"),
        ({"keep": 1.0}, "--keep"),
        ({"object_overlap": 2.0}, "--object-overlap"),
        ({"data": "folder"}, "--data folder.*--images"),
        ({"images": Path("/nowhere")}, "--images.*/nowhere"),
        ({"seed": -1}, "--seed"),
        ({"masks": 11}, r"--masks 11.*--held-out 0\.1.*9.*10"),
        ({"held_out": 0.99}, r"--masks 320.*--held-out 0\.99.*3"),
        ({"min_object": 0.9}, r"--min-object 0\.9.*--max-object 0\.8"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        replace(All(), **changes).check()


@pytest.mark.parametrize("regression", ["ols", "ridge", "lasso"])
def test_the_fewest_masks_are_enough_for_every_regression(regression: Any) -> None:
    Attribute(masks=12, regression=regression).check()
    kept, values, _ = linear_case(np.random.default_rng(0), noise=1.0, n=12)
    assert fit(kept, values, regression, 0.1, 5, seed=0).n_train == 10
    assert convergence(kept, values, regression, 0.1)["n"].tolist() == [5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"top": 17}, "--top 17.*16"), ({"window": 5}, "--window 5.*4")],
)
def test_more_heads_or_layers_than_there_are_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=words):
        run(All(out=tmp_path, **SMALL, **changes), bundled("toy-qwen2-vl"))


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    mute = copy.copy(bundled("toy-qwen2-vl"))
    mute.tokenizer = None
    with pytest.raises(StudyError, match="tokenizer"):
        run(Attribute(out=tmp_path, quiet=True), mute)


def test_the_command_line_has_one_command_for_each_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["hooked-vlm", "head-attribution", *arguments])
        cli.main()

    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "quiet"]
    call("attribute", *small, "--quiet", "--out", str(tmp_path / "a"))
    assert "held-out Pearson" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        call("compare", "--runs", str(tmp_path), "--out", str(tmp_path / "c"))
    assert "finished" in str(stopped.value)
    with pytest.raises(SystemExit):
        call("--help")
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("all", "attribute", "curves", "where", "tokens", "compare"))
