"""Attributions are exact where the model is linear, and derivatives of ablations everywhere."""

from typing import Any

import numpy as np
import pytest
import torch
from families import model_and_inputs, own_copy
from jaxtyping import TypeCheckError
from planted import PLACES, RESID, dictionary_at, random_dictionary
from scipy.stats import spearmanr
from torch import Tensor

from hooked_vlm import HookedVLM, InputError, sweep
from hooked_vlm.errors import FeatureError
from hooked_vlm.features import Dictionary, EditFeatures, feature_attribution, feature_edges, run_with_features
from hooked_vlm.metrics import LogProb, log_prob
from hooked_vlm.toys import NAMING_PROMPT, naming_sample

LAST = "blocks.2.hook_resid_post"


def double(family: str, rows: str = "one image") -> tuple[Any, Any]:
    """A model in float64 whose weights have no gradient."""
    model, batch = model_and_inputs(family, rows)
    return own_copy(model).double().requires_grad_(False), batch


def plain_features(model: Any, batch: Any, own: Dictionary) -> Tensor:
    with torch.no_grad():
        return run_with_features(model, batch, {own.hook_name: own})[1][own.hook_name]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rows", ["one image", "padded"])
def test_the_gradient_is_that_of_an_edit(family: str, place: str, rows: str) -> None:
    """In float64, against a step there and back, with a second dictionary in the run that changes nothing."""
    model, batch = double(family, rows)
    own = dictionary_at(model, place).to(torch.float64)
    other = dictionary_at(model, "last block" if place != "last block" else "stream").to(torch.float64)
    metric = log_prob(7)
    found = feature_attribution(model, batch, {d.hook_name: d for d in (own, other)}, metric)[own.hook_name]
    features = plain_features(model, batch, own)
    assert found.shape == features.shape
    steps = [EditFeatures(own, (i,), scale=1 + step) for i in range(8) for step in (-1e-4, 1e-4)]
    ends = sweep(model, batch, steps, metric).values.sum(1)
    slopes = (ends[1::2] - ends[::2]) / 2e-4
    whole = found.flatten(0, -2).sum(0)[:8]
    torch.testing.assert_close(whole.float(), slopes.float(), atol=1e-5, rtol=1e-3)
    assert bool((whole.abs() > 1e-6).any())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.repeats_shapes
def test_an_integrated_attribution_sums_to_the_whole_change(family: str, place: str) -> None:
    model, batch = double(family)
    own, metric = dictionary_at(model, place).to(torch.float64), log_prob(7)
    places = {own.hook_name: own}
    found = feature_attribution(model, batch, places, metric, method="integrated", steps=25)[own.hook_name]
    without = EditFeatures(own, tuple(range(own.n_features)))
    result = sweep(model, batch, [without], metric)
    change = -float(result.effects.double().sum())
    assert found.sum().item() == pytest.approx(change, rel=0.03, abs=2e-3)
    baseline = {own.hook_name: torch.full((own.n_features,), 0.5, dtype=torch.float64)}
    half = EditFeatures(own, tuple(range(own.n_features)), add=0.5)
    found = feature_attribution(model, batch, places, metric, method="integrated", steps=25, baseline=baseline)
    change = -float(sweep(model, batch, [half], metric).effects.double().sum())
    assert found[own.hook_name].sum().item() == pytest.approx(change, rel=0.03, abs=2e-3)


def test_where_the_model_is_linear_both_ways_are_the_ablation() -> None:
    """The stream behind the final norm's input is not linear; a metric on the stream itself is."""
    model, batch = double("internvl2", "padded")
    own = random_dictionary(model.cfg.d_model, hook_name="ln_final.hook_out").to(torch.float64)
    places: Any = {own.hook_name: own}

    def logits_of_two(logits: Tensor) -> Tensor:
        return 2 * logits[:, 5] - logits[:, 9]

    direction = 2 * model.unembed.weight[5] - model.unembed.weight[9]
    effects = own.W_dec @ direction
    for settings in ({}, {"method": "integrated", "steps": 3}):
        found = feature_attribution(model, batch, places, logits_of_two, logits_at="last", **settings)[own.hook_name]
        features = plain_features(model, batch, own)
        for row, stop in enumerate(batch.stop):
            expected = features[row, stop - 1] * effects
            at = found[row, stop - 1] if found.shape[1] > 1 else found[row, 0]
            torch.testing.assert_close(at, expected)


def test_the_ranking_on_a_trained_model_is_that_of_ablations() -> None:
    """Features of a bundled model, which answers about a page, against single ablations."""
    model = HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")
    sample = naming_sample(np.random.default_rng(0), name="square")
    inputs = model.to_inputs(NAMING_PROMPT, images=sample.image)
    d = model.cfg.d_model
    basis = torch.linalg.qr(torch.randn(d, d))[0]
    both = torch.cat((basis, -basis))
    hook = f"blocks.{model.cfg.n_layers - 1}.hook_resid_pre"
    own = Dictionary(hook, both.T.contiguous(), torch.zeros(2 * d), both, torch.zeros(d))
    with torch.no_grad():
        answer = int(model(inputs)[0, -1].argmax())
    metric = LogProb(answer)
    real = -sweep(model, inputs, [EditFeatures(own, (i,)) for i in range(2 * d)], metric).effects[:, 0].double()
    found = feature_attribution(model, inputs, {hook: own}, metric)[hook].sum((0, 1))
    correlation: Any = spearmanr(found, real)
    assert correlation.statistic > 0.7
    strongest = real.abs().topk(10).indices
    assert len(set(found.abs().topk(10).indices.tolist()) & set(strongest.tolist())) >= 6


def test_weights_and_inputs_are_left_as_they_were() -> None:
    model, batch = model_and_inputs("gemma3", "padded")
    own = dictionary_at(model, "stream")
    before = model(batch).detach()
    feature_attribution(model, batch, {RESID: own}, log_prob(7))
    feature_edges(model, batch, own, random_dictionary(model.cfg.d_model, hook_name=LAST, seed=2))
    assert all(p.grad is None for p in model.parameters()) and torch.equal(model(batch), before)
    assert all(not x.requires_grad for x in own.tensors.values())


def test_what_has_no_attribution_is_refused() -> None:
    model, batch = model_and_inputs("qwen3-vl", "one image")
    own = dictionary_at(model, "stream")
    with pytest.raises(InputError, match="no gradient"):
        feature_attribution(model, batch, {RESID: own}, lambda logits: logits.argmax(-1).float())
    with pytest.raises(InputError, match="at least one step"):
        feature_attribution(model, batch, {RESID: own}, log_prob(7), steps=0)
    with pytest.raises(FeatureError, match="reads"):
        feature_attribution(model, batch, {LAST: own}, log_prob(7))
    with pytest.raises(FeatureError, match="no dictionary is given"):
        feature_attribution(model, batch, {}, log_prob(7))
    for shape in ((3,), (1,), (*batch.shape, 3)):
        with pytest.raises(FeatureError, match="a baseline is"):
            feature_attribution(model, batch, {RESID: own}, log_prob(7), baseline={RESID: torch.zeros(shape)})
    with pytest.raises((InputError, TypeCheckError), match="method"):  # the second where annotations are executed
        feature_attribution(model, batch, {RESID: own}, log_prob(7), method="ig")  # pyright: ignore[reportArgumentType]
    with pytest.raises(FeatureError, match="no dictionary, for"):
        feature_attribution(model, batch, {RESID: own}, log_prob(7), baseline={LAST: torch.zeros(24)})
    above = random_dictionary(model.cfg.d_model, hook_name=LAST)
    with pytest.raises(FeatureError, match="is read before"):
        feature_edges(model, batch, above, own)


# ---- edges ----


@pytest.mark.parametrize("positions", ["final", None, "image"])
def test_edges_at_one_hook_point_are_products_of_directions(family: str, positions: Any) -> None:
    model, batch = model_and_inputs(family, "padded")
    lower = dictionary_at(model, "stream")
    upper = random_dictionary(model.cfg.d_model, n_features=9, seed=5)
    table = feature_edges(model, batch, lower, upper, positions=positions)
    f, g = plain_features(model, batch, lower), plain_features(model, batch, upper)
    expected = {}
    for row in range(len(batch)):
        chosen = {
            "final": batch.positions.final[row].tolist(),
            None: range(batch.first[row], batch.stop[row]),
            "image": batch.positions.image[row].tolist(),
        }[positions]
        for position in chosen:
            for u in range(9):
                for i in range(24):
                    weight = f[row, position, i] * (lower.W_dec[i] @ upper.W_enc[:, u])
                    if g[row, position, u] > 0 and weight != 0:
                        expected[row, position, i, row, position, u] = weight.item()
    found = {tuple(map(int, edge[:6])): edge[6] for edge in table.itertuples(index=False)}
    assert found.keys() == expected.keys() and len(found) > 10
    for edge, weight in expected.items():
        assert found[edge] == pytest.approx(weight, rel=1e-4, abs=1e-6)
    assert bool((table["weight"].abs().diff().dropna() <= 0).all())


@pytest.mark.parametrize(
    "place", [place for place in PLACES if place not in ("last block", "skip transcoder across blocks")]
)
def test_an_edge_is_the_derivative_of_the_upper_feature_under_an_edit(family: str, place: str) -> None:
    model, batch = double(family)
    lower = dictionary_at(model, place).to(torch.float64)
    upper = random_dictionary(model.cfg.d_model, n_features=9, hook_name=LAST, seed=5).to(torch.float64)
    table = feature_edges(model, batch, lower, upper)
    by_lower: Any = table.groupby(["lower feature", "upper feature"])["weight"].sum()
    plain = plain_features(model, batch, upper)[0, -1]
    assert set(table["upper position"]) == {batch.shape[1] - 1}
    for i in {int(feature) for feature in table["lower feature"][:6]}:
        ends = []
        for step in (-1e-5, 1e-5):
            with torch.no_grad():
                edit = EditFeatures(lower, (i,), scale=1 + step)
                ends.append(run_with_features(model, batch, {LAST: upper}, edits=[edit])[1][LAST][0, -1])
        slopes = (ends[1] - ends[0]) / 2e-5
        for u in range(9):
            weight = by_lower.get((i, u), 0.0)
            assert weight == pytest.approx(slopes[u].item() if plain[u] > 0 else 0.0, rel=1e-3, abs=1e-6)


@pytest.mark.repeats_shapes
def test_edges_of_a_metric_are_the_part_that_goes_through_the_upper_feature() -> None:
    """A dictionary with both signs of a basis passes everything on: its edges sum to the lower attributions."""
    model, batch = double("qwen3-vl")
    d = model.cfg.d_model
    lower = dictionary_at(model, "stream").to(torch.float64)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    both, zeros = torch.cat((basis, -basis)), torch.zeros(2 * d, dtype=torch.float64)
    upper = Dictionary("blocks.2.hook_resid_mid", both.T.contiguous(), zeros, both, zeros[:d])
    metric = log_prob(7)
    table = feature_edges(model, batch, lower, upper, positions=None, metric=metric)
    found = torch.zeros(batch.shape[1], 24, dtype=torch.float64)
    for edge in table.itertuples(index=False):
        found[int(edge[1]), int(edge[2])] += edge[6]
    expected = feature_attribution(model, batch, {RESID: lower}, metric)[RESID][0]
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)
