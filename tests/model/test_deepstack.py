"""DeepStack: every feature of an image enters the stream where it should, under its own name, and can be taken out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import inputs_of, model_and_inputs, tiny_model
from torch import Tensor

from hooked_vlm import InputError, sweep
from hooked_vlm.errors import HookError
from hooked_vlm.interventions import CustomHooks, ReplaceImageTokens
from hooked_vlm.lens import logit_attribution
from hooked_vlm.metrics import log_prob
from hooked_vlm.patching import Pair, patch

FAMILY, N = "qwen3-vl", 2
TWO = [[5, 6, "small", 7, 8], [11, 12, 13], [5, "large", "small", 9]]
POINTS = [f"blocks.{block}.hook_deepstack" for block in range(N)]


@pytest.fixture(params=["one image", "two images", "padded"])
def rows(request: pytest.FixtureRequest) -> str:
    return request.param


def by_hand(model: Any, inputs: Any, block: int) -> Tensor:
    """What a block adds, written out."""
    features = model.encode_images(inputs)
    added = torch.zeros(*inputs.shape, model.cfg.d_model)
    at = 0
    for visual in inputs.in_feature_order:
        for position in visual.positions.tolist():
            added[visual.row, position] = features[at, 1 + block]
            at += 1
    return added


@torch.no_grad()
def test_what_enters_behind_a_block_is_its_feature_at_image_tokens_and_nothing_else(rows: str) -> None:
    model, inputs = model_and_inputs(FAMILY, rows)
    _, cache = model.run_with_cache(inputs)
    real = inputs.attention_mask.bool()
    for block, name in enumerate(POINTS):
        torch.testing.assert_close(cache[name], by_hand(model, inputs, block))
        parts = cache["resid_mid", block] + cache["mlp_out", block] + cache[name]
        torch.testing.assert_close(cache["resid_post", block][real], parts[real])
    assert POINTS[-1].replace(str(N - 1), str(N)) not in model.hook_dict
    torch.testing.assert_close(cache["hook_image_features"], model.encode_images(inputs)[:, 0])
    assert torch.equal(cache["resid_post", 0][real], cache["resid_pre", 1][real])


@torch.no_grad()
def test_taking_the_embedding_alone_leaves_the_picture_in() -> None:
    model = tiny_model(FAMILY)
    one, other = (inputs_of(FAMILY, TWO, seed) for seed in (1, 2))
    real = one.attention_mask.bool()
    text = torch.ones_like(real)
    for visual in one.visuals:
        text[visual.row, visual.positions] = False

    def logits(inputs: Any, intervention: Any) -> Tensor:
        return model.run_with_hooks(inputs, fwd_hooks=intervention.hooks(model, inputs))[real]

    zero = ReplaceImageTokens(values="zero")
    assert torch.equal(logits(one, zero), logits(other, zero))
    embedding = CustomHooks([("hook_image_features", lambda x, hook: torch.zeros_like(x))])
    assert (logits(one, embedding) - logits(other, embedding)).abs().max() > 0.01
    nothing = one.with_image_features(torch.zeros_like(model.encode_images(one)))
    assert torch.equal(model(nothing)[real], logits(one, zero))


@torch.no_grad()
def test_means_and_vectors_replace_every_feature() -> None:
    model, inputs = model_and_inputs(FAMILY, "two images")
    features = model.encode_images(inputs)
    means, at = features.clone(), 0
    for visual in inputs.in_feature_order:
        means[at : at + visual.n_tokens] = features[at : at + visual.n_tokens].mean(0)
        at += visual.n_tokens
    hooks = ReplaceImageTokens().hooks(model, inputs)
    torch.testing.assert_close(
        model.run_with_hooks(inputs, fwd_hooks=hooks), model(inputs.with_image_features(means)), atol=1e-5, rtol=1e-5
    )
    vectors = torch.randn(1 + N, model.cfg.d_model)
    hooks = ReplaceImageTokens(values=vectors).hooks(model, inputs)
    torch.testing.assert_close(
        model.run_with_hooks(inputs, fwd_hooks=hooks),
        model(inputs.with_image_features(vectors.expand(len(features), -1, -1))),
    )
    with pytest.raises(InputError, match=rf"one behind each of {N} blocks, \(3, 64\), got \(64,\)"):
        ReplaceImageTokens(values=vectors[0]).hooks(model, inputs)
    with pytest.raises(InputError, match=r"\(\d+, 3, 64\).*each of 3 places.*got \(\d+, 64\)"):
        inputs.with_image_features(features[:, 0])


@torch.no_grad()
def test_a_pass_from_a_later_layer_encodes_what_enters_behind_it() -> None:
    model, inputs = model_and_inputs(FAMILY, "padded")
    logits, cache = model.run_with_cache(inputs)
    for layer in range(1, 3):
        resid = cache["resid_pre", layer]
        torch.testing.assert_close(model(inputs, start_at_layer=layer, resid=resid), logits)
    resid = cache["resid_pre", 1]
    seen: list[str] = []
    keep = [("vision.blocks.1.hook_resid_post", lambda x, hook: seen.append(hook.name))]
    model.run_with_hooks(inputs, start_at_layer=1, resid=resid, fwd_hooks=keep)
    assert seen == ["vision.blocks.1.hook_resid_post"]
    for name, start in (("hook_image_features", 1), ("hook_embed", 1), ("vision.hook_embed", 2), (POINTS[0], 1)):
        with pytest.raises(HookError, match="starts"):
            model.run_with_hooks(
                inputs, start_at_layer=start, resid=cache["resid_pre", start], fwd_hooks=[(name, print)]
            )


@torch.no_grad()
def test_text_alone_passes_no_such_point() -> None:
    model = tiny_model(FAMILY)
    text = inputs_of(FAMILY, [[5, 6, 7]])
    _, cache = model.run_with_cache(text)
    assert not set(POINTS) & set(cache.keys())
    with pytest.raises(HookError, match="no image"):
        model.run_with_hooks(text, fwd_hooks=[(POINTS[0], print)])
    assert cache.decompose_resid(return_labels=True)[1][-1] == "2_mlp_out"


@torch.no_grad()
def test_generation_meets_the_features_in_its_first_step_only() -> None:
    model, inputs = model_and_inputs(FAMILY, "one image")
    seen: list[tuple[int, ...]] = []
    hooks = [(name, lambda x, hook: seen.append(tuple(x.shape))) for name in POINTS]
    cached = model.generate(inputs, max_new_tokens=5, fwd_hooks=hooks, stop_at_eos=False)
    assert seen == [(1, inputs.shape[1], 64)] * N
    longer = inputs
    for _ in range(5):
        longer = longer.append([int(model(longer)[0, -1].argmax())])
    assert torch.equal(cached[0, -5:], longer.tokens[0, -5:])


@pytest.mark.parametrize("ln", [False, True])
@torch.no_grad()
def test_decompositions_sum_to_the_stream(rows: str, ln: bool) -> None:
    model, inputs = model_and_inputs(FAMILY, rows)
    _, cache = model.run_with_cache(inputs)
    real = inputs.attention_mask.bool()
    for layer in (1, 2, 3):
        stream = cache["resid_post", layer - 1]
        expected = cache.apply_ln_to_stack(stream[None], layer)[0] if ln else stream
        parts, labels = cache.decompose_resid(layer, apply_ln=ln, return_labels=True)
        assert [label for label in labels if "deepstack" in label] == [f"{b}_deepstack" for b in range(min(layer, N))]
        torch.testing.assert_close(parts.sum(0)[real], expected[real], atol=1e-4, rtol=1e-4)
        full = cache.get_full_resid_decomposition(layer, expand_neurons=False, apply_ln=ln)
        torch.testing.assert_close(full.sum(0)[real], expected[real], atol=1e-4, rtol=1e-4)
        onto = torch.randn(64, 2)
        full = cache.get_full_resid_decomposition(layer, apply_ln=ln, project_output_onto=onto)
        torch.testing.assert_close(full.sum(0)[real], (expected @ onto)[real], atol=1e-3, rtol=1e-3)
    without = cache.decompose_resid(incl_embeds=False, return_labels=True)[1]
    assert not any("deepstack" in label for label in without)


@torch.no_grad()
def test_a_cache_that_lost_its_inputs_does_not_leave_the_features_out() -> None:
    model, inputs = model_and_inputs(FAMILY, "one image")
    names = [name for name in model.hook_dict if name.endswith(("hook_embed", "attn_out", "mlp_out"))]
    _, cache = model.run_with_cache(inputs, names_filter=names)
    with pytest.raises(KeyError, match="hook_deepstack"):
        cache.decompose_resid()
    cache.inputs = None
    with pytest.raises(InputError, match=r"no blocks\.0\.hook_deepstack.*cache\.inputs"):
        cache.decompose_resid()


@pytest.mark.parametrize("unit", ["layer", "component", "head"])
@torch.no_grad()
def test_a_logit_at_an_image_token_has_deepstack_parts(unit: Any) -> None:
    model = tiny_model(FAMILY)
    batch = inputs_of(FAMILY, [[5, 6, "small"]])
    last = batch.visuals[0].stop  # the prompt ends with an image token
    inputs = type(batch)(
        tokens=batch.tokens[:, :last],
        spec=batch.spec,
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.image_grid_thw,
    )
    found = logit_attribution(model, inputs, 7, 9, unit=unit)
    parts = dict(zip(found.labels, found.values[:, 0], strict=True))
    assert all(abs(parts[f"L{block} deepstack"]) > 1e-4 for block in range(N))
    assert abs(found.values.sum() - found.logit.sum()) < 1e-4


def shifted(x: Tensor, hook: Any) -> Tensor:
    """An edit that no norm takes out again."""
    return x + 0.3 * torch.linspace(-1, 1, x.shape[-1])


@torch.no_grad()
def test_a_sweep_over_all_points_of_the_way_in_equals_the_loop(rows: str) -> None:
    model, inputs = model_and_inputs(FAMILY, rows)
    names = [
        *("vision.hook_embed", "vision.blocks.0.hook_attn_out", "vision.blocks.1.hook_mlp_out"),
        *("vision.blocks.2.hook_resid_post", "projector.deepstack.0.hook_post", "projector.deepstack.1.ln.hook_out"),
        *("projector.hook_pre", "hook_image_features", "hook_embed", *POINTS, "blocks.1.hook_resid_post"),
    ]
    runs = [CustomHooks([(name, shifted)], name) for name in names]
    runs += [ReplaceImageTokens(), ReplaceImageTokens(values="zero")]
    metric = log_prob(7)
    for given in (inputs, inputs.with_image_features(model.encode_images(inputs))):
        kept = [iv for iv in runs if given is inputs or not str(iv).startswith(("vision", "projector"))]
        found = sweep(model, given, kept, metric)
        for number, intervention in enumerate(kept):
            logits = model.run_with_hooks(given, fwd_hooks=intervention.hooks(model, given), logits_at="last")[:, 0]
            torch.testing.assert_close(found.values[number], metric(logits), atol=2e-5, rtol=1e-5)
        assert found.effects.abs().amax(1).min() > 1e-5


def test_what_enters_behind_a_block_can_be_patched() -> None:
    model = tiny_model(FAMILY)
    pair = Pair(*(inputs_of(FAMILY, [[5, 6, "large", 7, 8]], seed) for seed in (1, 2)))
    metric = log_prob(7)
    result = patch(model, pair, "deepstack", metric, where="image")
    assert result.axes["layer"] == tuple(range(N))
    _, cache = model.run_with_cache(pair.clean)
    for layer, name in enumerate(POINTS):
        hooks = [(name, lambda x, hook: cache[hook.name])]
        logits = model.run_with_hooks(pair.corrupt, fwd_hooks=hooks, logits_at="last")[:, 0]
        found = result.select(layer=layer).values.reshape(-1)
        torch.testing.assert_close(
            torch.from_numpy(found), metric(logits).detach(), atol=2e-5, rtol=1e-5, check_dtype=False
        )
    with pytest.raises(InputError, match="no deepstack"):
        patch(tiny_model("qwen2-vl"), pair, "deepstack", metric, where="image")


@torch.no_grad()
def test_features_follow_their_rows() -> None:
    model = tiny_model(FAMILY)
    inputs = inputs_of(FAMILY, TWO)
    encoded = inputs.with_image_features(model.encode_images(inputs))
    logits = model(encoded)
    for row in range(3):
        n = int(inputs.attention_mask[row].sum())
        torch.testing.assert_close(model(encoded[row])[0, -n:], logits[row, -n:], atol=1e-5, rtol=1e-5)
    joined = type(inputs).concat([encoded[2], encoded[0]])
    torch.testing.assert_close(model(joined)[0, -1], logits[2, -1], atol=1e-5, rtol=1e-5)


def test_deepstack_reads_blocks_that_run() -> None:
    model = tiny_model(FAMILY)
    vision = model.cfg.vision
    with pytest.raises(InputError, match=r"deepstack_layers.*0 to 2.*\(0, 3\)"):
        replace(vision, deepstack_layers=(0, 3))
    with pytest.raises(ValueError, match=r"behind 2 blocks.*1 layers"):
        model.cfg.with_(n_layers=1)
