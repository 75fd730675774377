"""Estimates are derivatives of real patches; paths and knock-out equal their literal forms."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import head_output, normed
from pairs import last_logits, model_and_pair, patched_by_hand
from torch import Tensor

from hooked_vlm import InputError
from hooked_vlm.metrics import answered, log_prob, logit_difference
from hooked_vlm.patching import Pair, answers_without, attention_knockout, attribute, patch, patch_paths, sweep_knockout
from hooked_vlm.patching.cells import Cells
from hooked_vlm.patching.exact import source_activations

METRIC = log_prob(5)
MLP_MODES: tuple[Any, ...] = ("frozen", "follow")


# ---- attribution patching ----


@pytest.mark.parametrize("tower", ["language", "vision"])
@pytest.mark.parametrize("what", ["resid_pre", "attn_out", "z", "k", "pattern"])
def test_an_estimate_is_the_derivative_of_a_real_patch(family: str, what: Any, tower: Any) -> None:
    """In float64: a thousandth of the step there and back, against the gradient's estimate."""
    model, pair = model_and_pair(family)
    model = copy.deepcopy(model).double()
    where = ("image", "final") if tower == "language" else "image"
    found = attribute(model, pair, what, METRIC, where=where, layers=(0, 1), tower=tower, check=0)
    cells = Cells.of(model, [pair], what, where, tower, "denoising", (0, 1), None)
    there = source_activations(model, pair.clean, pair, cells)
    _, here = model.run_with_cache(pair.corrupt, names_filter=cells.names)
    checked = 0
    for (layer, head, _), full in zip(cells, cells.interventions(pair, there), strict=True):
        if (layer, head) not in ((1, None), (0, 1), (1, 0)):
            continue
        ends = []
        for step in (-1e-3, 1e-3):
            name = cells.name(layer)
            part = type(full)(name, here[name] + step * (there[name] - here[name]), full.positions, full.heads)
            with torch.no_grad():
                logits = model.run_with_hooks(pair.corrupt, fwd_hooks=part.hooks(model, pair.corrupt))
            ends.append(METRIC(last_logits(logits, pair.corrupt)).item())
        labels = dict(zip(found.axes, (layer, *(() if head is None else (head,)), _), strict=True))
        estimate = found.select(**labels).effects.item()
        assert estimate == pytest.approx((ends[1] - ends[0]) / 2e-3, abs=1e-6, rel=1e-3)
        checked += abs(estimate) > 1e-5
    assert checked


def test_rows_are_estimated_in_one_pass_and_weights_keep_no_gradient(family: str) -> None:
    model, pair = model_and_pair(family, "padded")
    both: Any = attribute(model, pair, "mlp_out", METRIC, where=("final", "question"), check=0)
    assert both.values.shape == (3, 2, 3) and both.estimated and both.agreement is None
    assert all(p.grad is None for p in model.parameters())
    real: Any = patch(model, pair, "mlp_out", METRIC, where=("final", "question"))
    np.testing.assert_allclose(both.base, real.base, atol=1e-5)
    np.testing.assert_allclose(both.source, real.source, atol=1e-5)


@pytest.mark.repeats_shapes
def test_the_check_patches_cells_for_real(family: str) -> None:
    model, pair = model_and_pair(family)
    found = attribute(model, pair, "mlp_out", METRIC, where="each", check=12)
    real = patch(model, pair, "mlp_out", METRIC, where="each")
    assert found.agreement is not None and found.agreement.n == 12
    whole = np.corrcoef(found.effects.ravel(), real.effects.ravel())[0, 1]
    assert whole > 0.5  # random weights, whole steps: a first-order estimate is no more than that
    everything = attribute(model, pair, "mlp_out", METRIC, where="each", check=10**6)
    assert everything.agreement is not None and everything.agreement.pearson == pytest.approx(whole, abs=1e-4)


def test_frozen_weights_do_not_matter_and_a_metric_without_gradient_does(family: str) -> None:
    model, pair = model_and_pair(family)
    frozen = copy.deepcopy(model).requires_grad_(False)
    for tower, what in (("language", "z"), ("vision", "resid_pre")):
        a, b = (
            attribute(m, pair, what, METRIC, where="image", tower=tower, check=0)  # type: ignore[arg-type]
            for m in (model, frozen)
        )
        np.testing.assert_allclose(a.effects, b.effects, atol=1e-5)
    with pytest.raises(InputError, match="gradient"):
        attribute(model, pair, "z", lambda logits: logits.argmax(-1).float(), where="final")


@pytest.mark.repeats_shapes
def test_estimates_approach_real_patches_as_the_change_becomes_small() -> None:
    """In the vision tower, whole regions included: what large changes lack is the rest of the Taylor series."""
    model, pair = model_and_pair("qwen2-vl")
    model = copy.deepcopy(model).double()
    wrong = []
    for size in (1.0, 1e-1, 1e-2):
        clean, corrupt = pair.clean.pixel_values, pair.corrupt.pixel_values
        assert clean is not None and corrupt is not None
        pixels = clean + size * (corrupt - clean)
        near = Pair(pair.clean, replace(pair.clean, pixel_values=pixels))
        found = attribute(model, near, "resid_pre", METRIC, where=("image", 3), tower="vision", check=0)
        real = patch(model, near, "resid_pre", METRIC, where=("image", 3), tower="vision")
        wrong.append(np.abs(found.effects - real.effects).max() / np.abs(real.effects).max())
    assert wrong[0] > 3 * wrong[1] > 9 * wrong[2] and wrong[2] < 0.03


# ---- path patching ----


@pytest.mark.parametrize("reads", ["q", "k", "v"])
@pytest.mark.parametrize("where", ["all", "image"])
def test_a_path_is_the_receivers_input_recomputed(family: str, reads: Any, where: str) -> None:
    model, pair = model_and_pair(family)
    senders, receivers = [(0, 2), (1, 3), (2, 0)], [(1, 1), (2, 0)]
    result = patch_paths(model, pair, senders, receivers, reads, METRIC, where=where)
    assert result.axes == {"sender": ("0.2", "1.3", "2.0"), "receiver": ("1.1", "2.0")}
    with torch.no_grad():
        _, clean = model.run_with_cache(pair.clean)
        _, corrupt = model.run_with_cache(pair.corrupt)
    at = slice(None) if where == "all" else pair.clean.positions.image[0]
    for i, (a, b) in enumerate(senders):
        for j, (layer, head) in enumerate(receivers):
            if a >= layer:
                assert result.effects[i, j, 0] == 0
                continue
            attn = model.blocks[layer].attn
            change = head_output(model, corrupt, a, b, (clean["z", a] - corrupt["z", a])[:, :, b])
            weights = getattr(attn, f"W_{reads.upper()}")[head], getattr(attn, f"b_{reads.upper()}")[head]
            stream = normed(model.blocks[layer].ln1, corrupt["resid_pre", layer] + change)
            made = stream @ weights[0] + weights[1]

            def put(x: Tensor, source: Tensor, head=head, made=made) -> None:
                x[:, at, head] = made[:, at].detach()

            name = f"blocks.{layer}.attn.hook_{reads}"
            expected = METRIC(patched_by_hand(model, pair, "denoising", name, put))
            np.testing.assert_allclose(result.values[i, j], expected, atol=2e-5)
    assert np.abs(result.effects).max() > 1e-5


def frozen_but_one(model: Any, pair: Pair, sender: tuple[int, int], mlps: str, record: list[str]) -> dict[str, Tensor]:
    """Wang et al.'s recording run: every head has its output of the corrupt run, the sender that of the clean one, and
    MLPs theirs of the corrupt run or what they make of the changed stream. Norms behind attention have the denominators
    of the corrupt run."""
    with torch.no_grad():
        _, clean = model.run_with_cache(pair.clean)
        _, corrupt = model.run_with_cache(pair.corrupt)
    kept: dict[str, Tensor] = {}

    def freeze(x: Tensor, hook: Any) -> Tensor:
        x = corrupt[hook.name].clone()
        if hook.name == f"blocks.{sender[0]}.attn.hook_z":
            x[:, :, sender[1]] = clean[hook.name][:, :, sender[1]]
        return x

    def keep(x: Tensor, hook: Any) -> None:
        kept[hook.name] = x.detach().clone()

    hooks: list = [(f"blocks.{layer}.attn.hook_z", freeze) for layer in range(model.cfg.n_layers)]
    hooks += [
        (f"blocks.{i}.ln1_post.hook_scale", lambda x, hook: corrupt[hook.name])
        for i, block in enumerate(model.blocks)
        if block.post_norms
    ]
    if mlps == "frozen":
        hooks += [(f"blocks.{i}.hook_mlp_out", lambda x, hook: corrupt[hook.name]) for i in range(model.cfg.n_layers)]
    with torch.no_grad():
        model.run_with_hooks(pair.corrupt, fwd_hooks=[*hooks, *((name, keep) for name in record)])
    return kept


@pytest.mark.parametrize("mlps", ["frozen", "follow"])
@pytest.mark.parametrize("reads", ["q", "k", "v"])
def test_paths_equal_wang_et_als_two_runs(family: str, reads: Any, mlps: Any) -> None:
    """A run that records what receivers read, and a run in which they read it; one receiver, several, the logits."""
    model, pair = model_and_pair(family)
    last = model.cfg.n_layers - 1
    senders = [(0, 2), (1, 3), (last, 0)]
    receivers: list[Any] = [(1, 1), ((1, 0), (2, 1), (2, 0)), "logits"]
    found = patch_paths(model, pair, senders, receivers, reads, METRIC, mlps=mlps)
    assert found.axes["receiver"] == ("1.1", "1.0+2.1+2.0", "logits")
    final = f"blocks.{last}.hook_resid_post"
    for i, sender in enumerate(senders):
        for j, receiver in enumerate(receivers):
            heads = [] if receiver == "logits" else [receiver] if isinstance(receiver[0], int) else list(receiver)
            names = [final] if not heads else sorted({f"blocks.{layer}.attn.hook_{reads}" for layer, _ in heads})
            kept = frozen_but_one(model, pair, sender, mlps, names)

            def put(x: Tensor, hook: Any, heads=heads, kept=kept) -> Tensor:
                if not heads:
                    return kept[hook.name]
                x = x.clone()
                for layer, head in heads:
                    if hook.layer() == layer:
                        x[:, :, head] = kept[hook.name][:, :, head]
                return x

            with torch.no_grad():
                logits = model.run_with_hooks(pair.corrupt, fwd_hooks=[(name, put) for name in names])
            expected = METRIC(last_logits(logits, pair.corrupt))
            np.testing.assert_allclose(found.values[i, j], expected, atol=2e-5)
    assert np.abs(found.effects[:2]).max() > 1e-5
    assert found.effects[2, 0, 0] == found.effects[2, 1, 0] == 0 != found.effects[2, 2, 0]


def test_mlps_that_follow_carry_a_part_of_the_effect(family: str) -> None:
    model, pair = model_and_pair(family, "padded")
    both = [patch_paths(model, pair, [(0, 2)], ["logits"], None, METRIC, mlps=mlps).effects for mlps in MLP_MODES]
    assert np.abs(both[0] - both[1]).max() > 1e-5
    only_last = patch_paths(model, pair, [(0, 2)], ["logits"], None, METRIC, where="final").effects
    np.testing.assert_allclose(only_last, both[0], atol=1e-5)  # the metric reads the last position alone
    model, pair = model_and_pair(family)
    nowhere = patch_paths(model, pair, [(0, 2)], ["logits"], None, METRIC, where="image")
    # up to the rounding of float32 in a batch of other shape: a few units in the last place of the metric
    np.testing.assert_allclose(nowhere.values, nowhere.values - nowhere.effects, rtol=5e-7)


def test_paths_from_heads_that_do_not_exist_are_refused() -> None:
    model, pair = model_and_pair("qwen2-vl")
    with pytest.raises(InputError, match=r"0\.9"):
        patch_paths(model, pair, [(0, 9)], [(1, 0)], "q", METRIC)
    with pytest.raises(InputError, match="key-value head 2"):
        patch_paths(model, pair, [(0, 0)], [(1, 2)], "v", METRIC)
    with pytest.raises(InputError, match=r"senders.*0.*1"):
        patch_paths(model, pair, [], [(1, 1)], "v", METRIC)
    with pytest.raises(InputError, match="reads"):
        patch_paths(model, pair, [(0, 0)], [(1, 1), "logits"], None, METRIC)
    with pytest.raises(InputError, match="senders"):
        patch_paths(model, pair, [(0, 0)], [()], "q", METRIC)


def test_a_sender_named_twice_has_its_effect_twice_and_answers_are_metrics(family: str) -> None:
    model, pair = model_and_pair(family)
    found = patch_paths(model, pair, [(0, 1), (0, 1)], [(2, 1)], "q", METRIC)
    assert abs(found.effects[0, 0, 0]) > 1e-6
    np.testing.assert_allclose(found.values[0], found.values[1], atol=1e-6)
    longer = Pair(pair.clean.append([5]), pair.corrupt.append([5]))
    said = patch_paths(model, longer, [(0, 1)], [(2, 1)], "q", answered(longer.clean), logits_at="all")
    assert set(said.values.ravel()) <= {0.0, 1.0}


# ---- attention knock-out ----


def test_knock_out_equals_scores_of_minus_infinity(family: str) -> None:
    model, pair = model_and_pair(family)
    inputs = pair.clean
    edges = [("final", "image"), ("question", "here"), ("final+question", "image+here")]
    result = sweep_knockout(model, inputs, logit_difference(5, 9), edges=edges, window=2, places={"here": (1, 2)})
    assert result.axes["layers"] == ("0-1", "1-2") and result.source is None
    groups = {**{name: own[0] for name, own in vars(inputs.positions).items()}, "here": torch.tensor([1, 2])}
    for i, edge in enumerate(edges):
        queries, keys = (torch.cat([groups[name] for name in side.split("+")]) for side in edge)

        def cut(scores: Tensor, hook: Any, queries=queries, keys=keys) -> Tensor:
            scores = scores.clone()
            scores[:, :, queries[:, None], keys] = -torch.inf
            return scores

        for j, layers in enumerate(((0, 1), (1, 2))):
            hooks = [(f"blocks.{layer}.attn.hook_attn_scores", cut) for layer in layers]
            with torch.no_grad():
                logits = last_logits(model.run_with_hooks(inputs, fwd_hooks=hooks), inputs)
            np.testing.assert_allclose(result.values[i, j], logits[:, 5] - logits[:, 9], atol=2e-5)
    assert np.abs(result.effects).max() > 1e-3


def test_knock_out_acts_at_every_step_of_generation(family: str) -> None:
    """The answer of a model that cannot look at the image is that of its whole passes, token by token."""
    model, pair = model_and_pair(family)
    inputs = pair.clean
    cut = attention_knockout(model, inputs, range(3), ("final+generated", "image"))
    found = model.generate(inputs, max_new_tokens=3, stop_at_eos=False, fwd_hooks=cut.hooks(model, inputs))
    grown = inputs
    for _ in range(3):
        own = attention_knockout(model, grown, range(3), ("final+generated", "image"))
        with torch.no_grad():
            logits = model.run_with_hooks(grown, fwd_hooks=own.hooks(model, grown))
        grown = grown.append(last_logits(logits, grown).argmax(-1)[:, None])
    assert found.equal(grown.tokens)


def test_answers_without_an_edge(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pair = model_and_pair(family)
    monkeypatch.setattr(model, "to_string", lambda tokens: str(tokens.tolist()))
    frame = answers_without(model, pair.clean, edges=[("final+generated", "image")], window=3, max_new_tokens=2)
    cut = attention_knockout(model, pair.clean, range(3), ("final+generated", "image"))
    tokens = model.generate(pair.clean, max_new_tokens=2, fwd_hooks=cut.hooks(model, pair.clean))
    assert frame["answer"].tolist() == [str(tokens[0, pair.clean.shape[1] :].tolist())]
    assert frame["layers"].tolist() == ["0-2"] and frame["edge"].tolist() == ["final+generated to image"]


def test_windows_and_places_that_do_not_fit_are_refused() -> None:
    model, pair = model_and_pair("qwen2-vl")
    with pytest.raises(InputError, match=r"window.*4"):
        sweep_knockout(model, pair.clean, METRIC, edges=[("final", "image")], window=4)
    with pytest.raises(InputError, match=r"'sign'.*all, text"):
        sweep_knockout(model, pair.clean, METRIC, edges=[("final", "sign")], window=1)
    refused: Any = (
        (pair.clean, {"edges": []}, "1.*0 edges"),
        ([], {}, "0 inputs.*1"),
        ([pair.clean], {"places": [{}, {}]}, "2 places.*1"),
        (pair.clean, {"edges": [("generated", "image")]}, "row 0.*generated"),
    )
    for inputs, settings, says in refused:
        with pytest.raises(InputError, match=says):
            sweep_knockout(model, inputs, METRIC, **{"edges": [("final", "image")], "window": 1, **settings})


def test_an_edge_that_a_row_does_not_have_is_no_effect_of_zero(family: str) -> None:
    model, pair = model_and_pair(family, "padded")
    with pytest.raises(InputError, match=r"row 1.*image.*final"):
        sweep_knockout(model, pair.clean, METRIC, edges=[("final", "image")], window=1)
    found = sweep_knockout(model, pair.clean, METRIC, edges=[("final+generated", "text")], window=3)
    assert found.n_examples == 3 and np.abs(found.effects).min() > 1e-5
