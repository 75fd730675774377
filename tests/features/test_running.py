"""A run with features is the plain run, or the run of the reconstruction; gradients and edits act on the features."""

from typing import Any

import pytest
import torch
from families import ROWS, inputs_of, model_and_inputs, own_copy
from planted import PLACES, RESID, dictionary_at, random_dictionary
from torch import Tensor

from hooked_vlm.errors import FeatureError, HookError, InputError
from hooked_vlm.features import EditFeatures, reconstruction_quality, run_with_features
from hooked_vlm.interventions import Compose, ZeroHeads


def of_places(model: Any, *places: str) -> dict[str, Any]:
    found = [dictionary_at(model, place) for place in places]
    return {own.hook_name: own for own in found}


SEVERAL = ("stream", "normalised", "all heads", "transcoder", "vision stream", "vision transcoder", "image features")


@pytest.mark.parametrize("rows", ROWS)
def test_with_the_error_the_run_is_the_plain_one(family: str, rows: str) -> None:
    model, batch = model_and_inputs(family, rows)
    with torch.no_grad():
        out, features = run_with_features(model, batch, of_places(model, *SEVERAL))
        real = batch.attention_mask.bool()
        torch.testing.assert_close(out[real], model(batch)[real], atol=2e-5, rtol=1e-5)
    assert set(features) == set(of_places(model, *SEVERAL))
    assert not any(f.requires_grad for f in features.values())


@pytest.mark.parametrize("place", PLACES)
def test_features_are_those_of_the_stream_and_zero_at_padding(family: str, place: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    own = dictionary_at(model, place)
    with torch.no_grad():
        _, features = run_with_features(model, batch, {own.hook_name: own})
        _, cache = model.run_with_cache(batch, names_filter=own.hook_name)
    found, x = features[own.hook_name], cache[own.hook_name]
    x = x.flatten(-2) if x.shape[-1] != own.d_in else x
    expected = own.encode(x)
    assert found.shape == expected.shape
    padding = (x == 0).all(-1)
    assert bool(padding.any()) or place in ("image features",) or "vision" in place
    torch.testing.assert_close(found[~padding], expected[~padding], atol=1e-5, rtol=1e-5)
    assert not found[padding].any() and bool(expected[~padding].any())


@pytest.mark.parametrize("place", PLACES)
def test_without_the_error_the_stream_is_the_reconstruction(family: str, place: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    own, kept = dictionary_at(model, place), {}

    def read(x: Tensor, hook: Any) -> None:
        kept["x"] = x.flatten(-2) if x.shape[-1] != own.d_in else x

    def write(y: Tensor, hook: Any) -> Tensor:
        return own.decode(own.encode(kept["x"]), kept["x"]).view(y.shape)

    with torch.no_grad():
        out, _ = run_with_features(model, batch, {own.hook_name: own}, error_term=False)
        expected = model.run_with_hooks(batch, fwd_hooks=[(own.hook_name, read), (own.out_hook_name, write)])
    real = batch.attention_mask.bool()
    torch.testing.assert_close(out[real], expected[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error_term", [True, False])
def test_the_gradient_at_a_feature_is_that_of_its_edit(family: str, place: str, error_term: bool) -> None:
    """In float64, against a step there and back."""
    model, batch = model_and_inputs(family, "one image")
    model = own_copy(model).double().requires_grad_(False)
    own = dictionary_at(model, place).to(torch.float64)
    places = {own.hook_name: own}
    logits, features = run_with_features(model, batch, places, error_term=error_term)
    logits[0, -1].log_softmax(-1)[7].backward()
    gradient = features[own.hook_name].grad
    assert gradient is not None and gradient.shape == features[own.hook_name].shape
    for feature in (0, 5):
        ends = []
        for step in (-1e-4, 1e-4):
            edit = EditFeatures(own, (feature,), scale=1.0, add=step)
            with torch.no_grad():
                out, _ = run_with_features(model, batch, places, error_term=error_term, edits=[edit])
            ends.append(out[0, -1].log_softmax(-1)[7].item())
        whole = gradient[..., feature].sum().item()
        assert whole == pytest.approx((ends[1] - ends[0]) / 2e-4, rel=1e-4, abs=1e-8)


def test_the_error_is_a_constant_to_gradients() -> None:
    """What reaches the layer before passes encoder and decoder, as in SAELens."""
    model, batch = model_and_inputs("qwen3-vl", "one image")
    own = dictionary_at(model, "stream")
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> Tensor:
        seen["x"] = x = x.detach().requires_grad_()
        return x

    out, _ = run_with_features(model, batch, {RESID: own})
    logits = []
    for hooks in ([("blocks.1.hook_resid_mid", keep)], []):
        logits.append(run_with_features(model, batch, {RESID: own}, fwd_hooks=hooks)[0])
    torch.testing.assert_close(logits[0], logits[1])
    logits[0][0, -1, 5].backward()
    error = None

    def by_hand(x: Tensor, hook: Any) -> Tensor:
        nonlocal error
        reconstruction = own.decode(own.encode(x))
        error = (x - reconstruction).detach()
        return reconstruction + error

    gradient = seen["x"].grad
    expected = model.run_with_hooks(batch, fwd_hooks=[("blocks.1.hook_resid_mid", keep), (RESID, by_hand)])
    expected[0, -1, 5].backward()
    assert gradient is not None and seen["x"].grad is not None
    torch.testing.assert_close(gradient, seen["x"].grad)
    assert out.shape == expected.shape


@pytest.mark.parametrize("place", PLACES)
def test_an_edit_within_a_run_equals_the_edit_alone(family: str, place: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    own = dictionary_at(model, place)
    on_image = "vision" in place or place == "image features"
    edit = EditFeatures(own, (5, 6), scale=0.5, add=4.0, positions=(1,) if on_image else "final")
    with torch.no_grad():
        out, features = run_with_features(model, batch, {own.hook_name: own}, edits=[edit])
        expected = model.run_with_hooks(batch, fwd_hooks=edit.hooks(model, batch))
        _, plain = run_with_features(model, batch, {own.hook_name: own})
    real = batch.attention_mask.bool()
    torch.testing.assert_close(out[real], expected[real], atol=3e-5, rtol=1e-4)
    changed = (features[own.hook_name] != plain[own.hook_name]).any(0)
    changed = changed.any(0) if changed.ndim == 2 else changed
    assert changed.nonzero()[:, 0].tolist() == [5, 6]
    at = (features[own.hook_name] != plain[own.hook_name]).any(-1)
    places = at.nonzero().tolist()
    assert {index[-1] for index in places} == {1} if on_image else len(places) == len(batch)


def test_other_interventions_act_before_the_dictionary_reads() -> None:
    model, batch = model_and_inputs("internvl2", "padded")
    own, ablation = dictionary_at(model, "stream"), ZeroHeads(((0, 1), (1, 2)))
    with torch.no_grad():
        out, features = run_with_features(model, batch, {RESID: own}, edits=[ablation])
        with model.hooks(ablation.hooks(model, batch)):
            logits, cache = model.run_with_cache(batch, names_filter=RESID)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(out[real], logits[real], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(features[RESID][real], own.encode(cache[RESID])[real])


@torch.no_grad()
def test_edits_of_a_composed_intervention_change_the_features_one_after_the_other() -> None:
    model, batch = model_and_inputs("qwen3-vl", "padded")
    own, other = dictionary_at(model, "stream"), ZeroHeads(((0, 1),))
    edits = [EditFeatures(own, (3, 5)), EditFeatures(own, (5,), scale=1.0, add=2.0)]
    out, features = run_with_features(model, batch, {RESID: own}, edits=[Compose((Compose((*edits,)), other))])
    expected, by_one = run_with_features(model, batch, {RESID: own}, edits=[other, *edits])
    real = batch.attention_mask.bool()
    assert torch.equal(out, expected) and torch.equal(features[RESID], by_one[RESID])
    assert not features[RESID][..., 3].any() and bool((features[RESID][real][:, 5] == 2).all())


@torch.no_grad()
def test_a_dictionary_reads_what_others_write_there_in_any_order() -> None:
    model, batch = model_and_inputs("qwen3-vl", "padded")
    first = dictionary_at(model, "transcoder")
    own = random_dictionary(model.cfg.d_model, hook_name=first.out_hook_name, seed=5)
    edit, kept = EditFeatures(first, (0, 1), add=9.0), {}

    def read(x: Tensor, hook: Any) -> None:
        kept["x"] = x.clone()

    def write(y: Tensor, hook: Any) -> Tensor:
        kept["f"] = own.encode(first.decode(edit.edited(first.encode(kept["x"]))))
        return own.decode(kept["f"])

    expected = model.run_with_hooks(batch, fwd_hooks=[(first.hook_name, read), (first.out_hook_name, write)])
    real = batch.attention_mask.bool()
    for pair in ((first, own), (own, first)):
        places = {each.hook_name: each for each in pair}
        out, features = run_with_features(model, batch, places, error_term=False, edits=[edit])
        torch.testing.assert_close(out[real], expected[real], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(features[own.hook_name][real], kept["f"][real], atol=1e-5, rtol=1e-4)
    ends = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")
    both = [random_dictionary(model.cfg.d_model, hook_name=a, out_hook_name=b) for a, b in (ends, ends[::-1])]
    with pytest.raises(FeatureError, match="writes where another reads"):
        run_with_features(model, batch, {each.hook_name: each for each in both})


@torch.no_grad()
def test_features_behind_a_cache_are_those_of_the_whole_and_edits_are_refused() -> None:
    """Positions of an edit count from the beginning of the cache, which these inputs do not hold."""
    model, begin = model_and_inputs("qwen3-vl", "padded")
    own = dictionary_at(model, "stream")
    more = inputs_of("qwen3-vl", [[7], [9, 10], [11, 12]])  # padded in front, behind the cache
    past = model.new_kv_cache(len(begin), 40)
    model(begin, past_kv_cache=past)
    _, features = run_with_features(model, more, {RESID: own}, past_kv_cache=past.repeat(1))
    _, cache = model.run_with_cache(more, past_kv_cache=past.repeat(1), names_filter=RESID)
    real = more.attention_mask.bool()
    torch.testing.assert_close(features[RESID][real], own.encode(cache[RESID])[real])
    assert features[RESID].shape[:2] == more.shape and not features[RESID][~real].any()
    edit = EditFeatures(own, (0,), add=5.0, positions="final")
    with pytest.raises(InputError, match="key-value cache"):
        run_with_features(model, more, {RESID: own}, edits=[edit], past_kv_cache=past.repeat(1))


@pytest.mark.parametrize("place", ["vision stream", "image features"])
def test_a_dictionary_of_images_has_nothing_to_read_in_text(place: str) -> None:
    model = model_and_inputs("qwen3-vl", "one image")[0]
    own, text = dictionary_at(model, place), inputs_of("qwen3-vl", [[5, 6, 7, 8]])
    with pytest.raises(HookError, match="no image"):
        run_with_features(model, text, {own.hook_name: own})
    with pytest.raises(HookError, match="no image"):
        reconstruction_quality(model, [text], own)


def test_a_cut_run_and_the_last_position() -> None:
    model, batch = model_and_inputs("qwen3-vl", "padded")
    places = of_places(model, "stream", "transcoder")
    with torch.no_grad():
        resid, features = run_with_features(model, batch, places, stop_at_layer=2)
        assert resid.shape == (*batch.shape, model.cfg.d_model) and set(features) == set(places)
        last, _ = run_with_features(model, batch, of_places(model, "skip transcoder across blocks"), logits_at="last")
        torch.testing.assert_close(last, model(batch, logits_at="last"), atol=2e-5, rtol=1e-5)
        with pytest.raises(HookError, match="stops before layer 1"):
            run_with_features(model, batch, places, stop_at_layer=1)


@torch.no_grad()
def test_the_ends_of_rows_that_end_at_different_positions(family: str) -> None:
    """What is kept of each row is no padding, wherever padding of other rows stands."""
    model, batch = model_and_inputs(family, "padded")
    batch = batch.append([[7], [8, 9], [7, 8, 9]])
    name = "ln_final.hook_out"
    own = random_dictionary(model.cfg.d_model, hook_name=name)
    out, found = run_with_features(model, batch, {name: own}, logits_at="last")
    _, everywhere = run_with_features(model, batch, {name: own})
    ends = torch.tensor(batch.stop) - 1
    assert bool(found[name].any(-1).all()) and len(set(batch.stop)) > 1
    torch.testing.assert_close(found[name][:, 0], everywhere[name][range(len(batch)), ends], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, model(batch, logits_at="last"), atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("point", ["hook_k", "hook_v"])
def test_the_only_head_of_a_layer_is_read_as_joined_heads_are(point: str) -> None:
    model, batch = model_and_inputs("paligemma, one key-value head", "padded")
    name = f"blocks.1.attn.{point}"
    own = random_dictionary(model.cfg.d_head, hook_name=name)
    _, found = run_with_features(model, batch, {name: own})
    _, cache = model.run_with_cache(batch, names_filter=name)
    real = batch.attention_mask.bool()
    assert cache[name].shape[2] == 1
    assert found[name].shape == (*batch.shape, own.n_features)
    torch.testing.assert_close(found[name][real], own.encode(cache[name][:, :, 0])[real])
    assert not found[name][~real].any()


def test_low_precision_is_the_plain_run_bit_for_bit() -> None:
    model, batch = model_and_inputs("qwen3-vl", "padded")
    model = own_copy(model).to(torch.bfloat16)
    with torch.no_grad():
        out, features = run_with_features(model, batch, of_places(model, "stream", "transcoder"))
        assert torch.equal(out, model(batch)) and features[RESID].dtype == torch.float32


class Doubled:
    """A dictionary of a class of its own: one feature, twice the first entry of the stream."""

    hook_name = out_hook_name = RESID
    n_features = 1

    def __init__(self, d: int) -> None:
        self.d_in = self.d_out = d

    def encode(self, x: Tensor) -> Tensor:
        return 2 * x[..., :1]

    def decode(self, features: Tensor, x: Tensor | None = None) -> Tensor:
        return torch.cat((features / 2, features.new_zeros(*features.shape[:-1], self.d_out - 1)), dim=-1)


def test_a_dictionary_of_a_class_of_its_own_takes_part() -> None:
    model, batch = model_and_inputs("qwen3-vl", "one image")
    own = Doubled(model.cfg.d_model)

    def ablate(x: Tensor, hook: Any) -> None:
        x[..., 0] = 0

    with torch.no_grad():
        out, features = run_with_features(model, batch, {RESID: own}, edits=[EditFeatures(own, (0,))])
        expected = model.run_with_hooks(batch, fwd_hooks=[(RESID, ablate)])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert features[RESID].shape == (*batch.shape, 1) and not features[RESID].any()


def test_a_dictionary_of_another_place_is_refused() -> None:
    model, batch = model_and_inputs("qwen3-vl", "one image")
    own = dictionary_at(model, "stream")
    with pytest.raises(FeatureError, match=r"given for .*hook_resid_pre.* reads .*hook_resid_post"):
        run_with_features(model, batch, {"blocks.1.hook_resid_pre": own})
    with pytest.raises(FeatureError, match="reads 5 numbers"):
        run_with_features(model, batch, {RESID: random_dictionary(5)})
