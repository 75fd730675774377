"""Every intervention does what a literal few lines do, in both families, and acts in generation."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from by_hand import keys_seen
from by_hand import scores as scores_of
from every_kind import HEADS, KINDS, of_every_kind, some_of_the_image
from families import ROWS, inputs_of, model_and_inputs
from families import tiny_model as model_of
from tiny_qwen2_vl import PADDED, inputs, tiny_model
from torch import Tensor

from hooked_vlm import InputError
from hooked_vlm.interventions import (
    AddVector,
    BlockAttention,
    Compose,
    CustomHooks,
    ImageMeans,
    Intervention,
    MeanHeads,
    PatchActivation,
    RedistributeSink,
    ReplaceImageKV,
    ReplaceImageTokens,
    ScaleHeads,
    UniformAttention,
    ZeroHeads,
    mean_head_outputs,
    mean_image_kv,
    patterns,
)
from hooked_vlm.interventions.attention import all_heads
from hooked_vlm.interventions.base import position_table
from hooked_vlm.nn.forward_pass import inputs_rotations
from hooked_vlm.nn.scores import attention_scores


@pytest.fixture(params=list(ROWS))
def case(request: pytest.FixtureRequest, family: str) -> tuple[Any, Any]:
    return model_and_inputs(family, request.param)


def edited(model: Any, batch: Any, intervention: Intervention) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(batch, fwd_hooks=intervention.hooks(model, batch))


def by_hand(model: Any, batch: Any, hooks: list) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(batch, fwd_hooks=hooks)


def same(model: Any, batch: Any, intervention: Intervention, expected: Tensor, acts: bool = True) -> None:
    found, real = edited(model, batch, intervention), batch.attention_mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.allclose(found[real], model(batch)[real], atol=1e-5) != acts


# ---- heads ----


def test_zero_heads_equals_removing_their_rows_of_W_O(case: tuple[Any, Any]) -> None:
    model, batch = case
    saved = [block.attn.W_O.detach().clone() for block in model.blocks]
    with torch.no_grad():
        for layer, head in HEADS:
            model.blocks[layer].attn.W_O[head] = 0
        expected = model(batch)
        for block, weight in zip(model.blocks, saved, strict=True):
            block.attn.W_O[:] = weight
    same(model, batch, ZeroHeads(HEADS), expected)


def test_scaled_heads_at_some_positions(case: tuple[Any, Any]) -> None:
    model, batch = case

    def scale(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        for row, final in enumerate(batch.positions.final):
            z[row, final, 1] *= -2.0
        return z

    expected = by_hand(model, batch, [("blocks.1.attn.hook_z", scale)])
    same(model, batch, ScaleHeads(((1, 1),), -2.0, positions="final"), expected)


def test_mean_heads_write_their_mean_over_a_dataset(case: tuple[Any, Any]) -> None:
    model, batch = case
    means = mean_head_outputs(model, [batch, batch])
    _, cache = model.run_with_cache(batch)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(means[1, 2], cache["z", 1][real][:, 2].mean(0), atol=1e-6, rtol=1e-5)

    def write(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, 2] = means[1, 2]
        return z

    same(model, batch, MeanHeads(((1, 2),), means), by_hand(model, batch, [("blocks.1.attn.hook_z", write)]))


# ---- image keys and values ----


def literal_replacement(
    model: Any,
    batch: Any,
    head: tuple[int, int],
    baseline: Any,
    before_rope: bool,
    queries: Any = None,
    some: Any = None,
) -> list:
    """One head's z recomputed, query by query, from keys and values with the image's (or `some` of them) replaced."""
    layer, h = head
    seen: dict[str, Tensor] = {}
    at = f"blocks.{layer}.attn."
    rotate = inputs_rotations(model.cfg, batch, model.cfg.dtype)[model.cfg.kind_number(layer)]
    unrotated = "hook_k_normed" if model.cfg.qk_norm else "hook_k"  # what rotation reads

    def keep(x: Tensor, hook: Any) -> None:
        seen[hook.name.removeprefix(at)] = x.clone()

    def again(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        group = h // (model.cfg.n_heads // model.cfg.n_key_value_heads)
        for row in range(len(batch)):
            own = [v for v in batch.visuals if v.row == row]
            k, rotated = seen[unrotated][row].clone(), seen["hook_rot_k"][row].clone()
            v = seen["hook_v"][row].clone()
            hidden = torch.zeros(len(k), dtype=torch.bool)
            for visual in own:
                span = visual.positions
                hidden[span] = True
                if baseline == "mean":
                    k[span], v[span] = k[span].mean(0), v[span].mean(0)
                    rotated[span] = rotated[span].mean(0)
                elif baseline == "zero":
                    k[span], v[span], rotated[span] = 0, 0, 0
                elif baseline != "knockout":
                    k[span], v[span] = baseline.keys[layer], baseline.values[layer]
                    rotated[span] = baseline.keys[layer]
            turned = rotate.rows(row)(k[None])[0]
            is_image = hidden.clone()
            if some is not None:
                hidden = torch.zeros_like(hidden)
                hidden[list(some[row])] = True
                v = torch.where(hidden[:, None, None], v, seen["hook_v"][row])
            keys = torch.where(hidden[:, None, None], turned if before_rope else rotated, seen["hook_rot_k"][row])
            for query in range(batch.first[row], batch.stop[row]):
                if queries is not None and query not in getattr(batch.positions, queries)[row]:
                    continue
                behind = own if model.cfg.bidirectional == "prompt" else [v for v in own if v.start < query]
                if is_image[query] or not behind:
                    continue
                visible = keys_seen(model, batch, row, layer, query)
                if baseline == "knockout":
                    visible &= ~hidden
                own_scores = scores_of(model.cfg, seen["hook_rot_q"][row, query, h], keys[visible, group])
                z[row, query, h] = own_scores.softmax(-1) @ v[visible, group]
        return z

    names = (unrotated, "hook_v", "hook_rot_k", "hook_rot_q")
    return [*((at + name, keep) for name in names), (at + "hook_z", again)]


@pytest.mark.parametrize("before_rope", [True, False], ids=["before RoPE", "after RoPE"])
@pytest.mark.parametrize("baseline", ["mean", "zero", "knockout", "dataset"])
def test_image_keys_and_values_are_replaced_for_text_queries_of_one_head(
    case: tuple[Any, Any], baseline: Any, before_rope: bool
) -> None:
    model, batch = case
    if baseline == "dataset":
        baseline = mean_image_kv(model, [batch], before_rope)
    expected = by_hand(model, batch, literal_replacement(model, batch, (1, 2), baseline, before_rope))
    same(model, batch, ReplaceImageKV(((1, 2),), baseline, before_rope), expected)


@pytest.mark.parametrize("queries", [None, "final", "question"])
@pytest.mark.parametrize("baseline", ["mean", "zero", "knockout"])
def test_some_image_tokens_are_replaced_for_some_queries(case: tuple[Any, Any], baseline: Any, queries: Any) -> None:
    model, batch = case
    some = some_of_the_image(batch)
    expected = by_hand(model, batch, literal_replacement(model, batch, (1, 2), baseline, True, queries, some))
    iv = ReplaceImageKV(((1, 2),), baseline, queries=queries, tokens=some)
    assert batch.positions.final[0] in batch.positions.question[0]  # of these prompts without chat markers
    same(model, batch, iv, expected)
    all_tokens = by_hand(model, batch, literal_replacement(model, batch, (1, 2), baseline, True, queries))
    same(model, batch, ReplaceImageKV(((1, 2),), baseline, queries=queries), all_tokens)


def test_without_any_head_seeing_the_image_its_content_does_not_matter(family: str) -> None:
    model, batch = model_and_inputs(family, "two images")
    with torch.no_grad():
        features = model.encode_images(batch)
        others = [batch.with_image_features(features), batch.with_image_features(5 * torch.randn_like(features))]
        plain = [model(inputs)[0, batch.stop[0] - 1] for inputs in others]
        found = [edited(model, inputs, ReplaceImageKV(all_heads(model), "knockout")) for inputs in others]
    last_image = max(visual.stop for visual in batch.visuals)
    assert not torch.allclose(*plain, atol=1e-2)
    torch.testing.assert_close(*(logits[0, last_image:] for logits in found), atol=1e-6, rtol=0)


def test_the_image_itself_and_text_before_it_are_left_alone(case: tuple[Any, Any]) -> None:
    """Where a prompt's tokens see each other both ways, all text sees the image, which later sees changed text: there
    its tokens are left alone in the first layer."""
    model, batch = case
    both_ways = model.cfg.bidirectional == "prompt"
    name = "blocks.0.attn.hook_z" if both_ways else "ln_final.hook_out"
    hooks = ReplaceImageKV(all_heads(model), "knockout").hooks(model, batch)
    with torch.no_grad():
        plain = model.run_with_cache(batch, names_filter=name)[1][name]
        with model.hooks(fwd_hooks=hooks):
            found = model.run_with_cache(batch, names_filter=name)[1][name]
    for row in range(len(batch)):
        own = [v for v in batch.visuals if v.row == row]
        untouched = list(range(batch.first[row], min((v.runs[0][1] for v in own), default=batch.stop[row])))
        if both_ways and own:
            untouched = [p for v in own for p in v.positions.tolist()]
        assert found[row, untouched].equal(plain[row, untouched])


def test_knocking_out_the_image_equals_blocking_the_edges_from_text_to_it(case: tuple[Any, Any]) -> None:
    model, batch = case
    heads = all_heads(model)
    blocked = edited(model, batch, BlockAttention(heads, query="text", key="image"))
    same(model, batch, ReplaceImageKV(heads, "knockout"), blocked)


@pytest.mark.parametrize(("before_rope", "keys"), [(True, "k"), (False, "rot_k")])
def test_dataset_means_are_of_image_tokens(before_rope: bool, keys: str) -> None:
    model, batch = tiny_model(), inputs(PADDED)
    means = mean_image_kv(model, [batch], before_rope)
    _, cache = model.run_with_cache(batch)
    for found, name in ((means.keys, keys), (means.values, "v")):
        tokens = torch.cat([cache[name, 2][v.row, v.positions] for v in batch.visuals])
        torch.testing.assert_close(found[2], tokens.mean(0), atol=1e-6, rtol=1e-5)
    with pytest.raises(InputError, match=f"before_rope={before_rope}.*before_rope={not before_rope}"):
        ReplaceImageKV(HEADS, means, not before_rope).hooks(model, batch)


# ---- attention ----


def test_blocked_edges(case: tuple[Any, Any]) -> None:
    model, batch = case

    def block(scores: Tensor, hook: Any) -> Tensor:
        for row in range(len(batch)):
            for query in batch.positions.final[row].tolist():
                for key in batch.positions.image[row].tolist():
                    scores[row, 3, query, key] = -torch.inf
        return scores

    expected = by_hand(model, batch, [("blocks.1.attn.hook_attn_scores", block)])
    same(model, batch, BlockAttention(((1, 3),), query="final", key="image"), expected)


def test_a_query_with_nothing_left_attends_to_nothing(case: tuple[Any, Any]) -> None:
    model, batch = case
    iv = BlockAttention.in_layers(model, range(1, 2), query="final")
    with torch.no_grad(), model.hooks(fwd_hooks=iv.hooks(model, batch)):
        _, cache = model.run_with_cache(batch)
    for row, final in enumerate(batch.positions.final):
        assert cache["pattern", 1][row, :, final].eq(0).all()
        assert cache["z", 1][row, final].eq(0).all()


def test_redistributed_sink(case: tuple[Any, Any]) -> None:
    model, batch = case
    beta = 0.4

    def literal(pattern: Tensor, hook: Any) -> Tensor:
        for row in range(len(batch)):
            sink = batch.first[row]
            for query in range(sink, batch.stop[row]):
                a = pattern[row, 2, query].clone()
                rest = a.sum() - a[sink]
                if rest < 1e-9:
                    continue
                for key in range(sink, batch.stop[row]):
                    pattern[row, 2, query, key] = (
                        beta * a[sink] if key == sink else a[key] + (1 - beta) * a[sink] * a[key] / rest
                    )
        return pattern

    expected = by_hand(model, batch, [("blocks.1.attn.hook_pattern", literal)])
    iv = RedistributeSink(((1, 2),), beta)
    same(model, batch, iv, expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("alone", ["keep", "spread"])
def test_sink_redistribution_as_the_papers_code_does_it(case: tuple[Any, Any], causal: bool, alone: Any) -> None:
    """Without a causal mask, and with the first query's attention spread over later keys."""
    model, batch = case
    assert model.cfg.kind_of(1).window is None
    beta, scores = 0.4, {}

    def keep(x: Tensor, hook: Any) -> None:
        scores[hook.name.rsplit(".", 1)[1]] = x.detach().clone()

    def literal(pattern: Tensor, hook: Any) -> Tensor:
        q, k = (scores[name][:, :, head] for name, head in (("hook_rot_q", 2), ("hook_rot_k", 1)))
        for row in range(len(batch)):
            sink, stop = batch.first[row], batch.stop[row]
            for query in range(sink, stop):
                seen = keys_seen(model, batch, row, 1, query) if causal else batch.attention_mask[row].bool()
                a = torch.zeros(pattern.shape[-1])
                a[seen] = scores_of(model.cfg, q[row, query], k[row, seen]).softmax(-1)
                rest = a.sum() - a[sink]
                for key in range(sink, stop):
                    if rest > 1e-9:
                        share = a[key] / rest
                    else:
                        share = torch.tensor(1 / (stop - sink - 1) if alone == "spread" else float(key == sink))
                    moved = (1 - beta) * a[sink] * share
                    pattern[row, 2, query, key] = a[key] + moved if key != sink else beta * a[sink]
                    if key == sink and rest <= 1e-9 and alone == "keep":
                        pattern[row, 2, query, key] = a[sink]
        return pattern

    names = [("blocks.1.attn.hook_rot_q", keep), ("blocks.1.attn.hook_rot_k", keep)]
    expected = by_hand(model, batch, [*names, ("blocks.1.attn.hook_pattern", literal)])
    same(model, batch, RedistributeSink(((1, 2),), beta, causal=causal, alone=alone), expected)


def test_without_a_causal_mask_no_window_hides_what_the_mask_shows() -> None:
    """A prompt that sees itself both ways does so in spite of windows. Without a causal mask an answer is as if it were
    a part of the prompt."""
    model, prompt = model_of("paligemma2"), inputs_of("paligemma2", [["small", 7, 8]])
    assert model.cfg.kind_of(0).window < prompt.shape[1]
    answered, found = prompt.append([9, 10]), []

    def keep(z: Tensor, hook: Any) -> None:
        found.append(z[:, :, 1].clone())

    iv = RedistributeSink(((0, 1),), 1.0, causal=False)
    by_hand(model, answered, [*iv.hooks(model, answered), ("blocks.0.attn.hook_z", keep)])
    by_hand(model, replace(answered, n_generated=(0,)), [("blocks.0.attn.hook_z", keep)])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", [None, "text", "final"])
def test_uniform_attention(case: tuple[Any, Any], positions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "QUERIES_AT_ONCE", 3)
    model, batch = case
    table = position_table(positions, batch)

    def literal(pattern: Tensor, hook: Any) -> Tensor:
        for row in range(len(batch)):
            for query in range(batch.first[row], batch.stop[row]):
                if table[row, query]:
                    seen = keys_seen(model, batch, row, 1, query)
                    pattern[row, 2, query] = seen / seen.sum()
        return pattern

    expected = by_hand(model, batch, [("blocks.1.attn.hook_pattern", literal)])
    same(model, batch, UniformAttention(((1, 2),), positions), expected)


# ---- activations ----


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("blocks.1.hook_resid_pre", None),
        ("blocks.1.hook_mlp_out", None),
        ("blocks.1.attn.hook_z", (0, 3)),
        ("blocks.2.attn.hook_k", (1,)),
        ("blocks.1.attn.hook_pattern", (2,)),
        ("hook_embed", None),
        ("ln_final.hook_out", None),
    ],
)
@pytest.mark.parametrize("positions", [None, "question", "image"])
def test_patched_activation(case: tuple[Any, Any], name: str, heads: Any, positions: Any) -> None:
    model, batch = case
    with torch.no_grad():
        noise = torch.randn_like(model.embed.weight[batch.tokens])
        with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x + noise)]):
            _, cache = model.run_with_cache(batch, names_filter=name)
    source = cache[name]
    axis = 2 if name.endswith("pattern") else 1
    head_axis = 1 if axis == 2 else 2

    def literal(x: Tensor, hook: Any) -> None:
        for row in range(len(batch)):
            own = range(batch.first[row], batch.stop[row])
            chosen = own if positions is None else getattr(batch.positions, positions)[row].tolist()
            for p in chosen:
                for h in range(x.shape[head_axis]) if heads is None and x.ndim == 4 else heads or (None,):
                    at: list[Any] = [row] + [slice(None)] * (x.ndim - 1)
                    at[axis] = p
                    if h is not None:
                        at[head_axis] = h
                    x[tuple(at)] = source[tuple(at)]

    expected = by_hand(model, batch, [(name, literal)])
    same(model, batch, PatchActivation(name, source, positions, heads), expected)


def test_patched_image_side(family: str) -> None:
    model, batch = model_and_inputs(family, "two images")
    _, cache = model.run_with_cache(batch)
    source = cache["vision.blocks.1.hook_resid_pre"].flip(-1)

    def literal(x: Tensor, hook: Any) -> None:
        x[:, 1], x[:, 3] = source[:, 1], source[:, 3]

    expected = by_hand(model, batch, [("vision.blocks.1.hook_resid_pre", literal)])
    same(model, batch, PatchActivation("vision.blocks.1.hook_resid_pre", source, (1, 3)), expected)
    features = cache["hook_image_features"].flip(0)

    def literal_features(x: Tensor, hook: Any) -> None:
        x[2] = features[2]

    expected = by_hand(model, batch, [("hook_image_features", literal_features)])
    same(model, batch, PatchActivation("hook_image_features", features, (2,)), expected)


def test_added_vector(case: tuple[Any, Any]) -> None:
    model, batch = case
    vector = torch.randn(model.cfg.d_model)

    def literal(x: Tensor, hook: Any) -> None:
        for row, positions in enumerate(batch.positions.question):
            x[row, positions] += 3 * vector

    expected = by_hand(model, batch, [("blocks.1.hook_resid_post", literal)])
    same(model, batch, AddVector("blocks.1.hook_resid_post", vector, 3.0, "question"), expected)


@pytest.mark.parametrize("values", ["mean", "zero", "vector"])
def test_replaced_image_tokens(case: tuple[Any, Any], values: Any) -> None:
    model, batch = case
    n_inner, shape = model.cfg.n_deepstack, (model.cfg.d_model,)
    values = torch.randn((1 + n_inner, *shape) if n_inner else shape) if values == "vector" else values
    names = ["hook_embed", *(f"blocks.{block}.hook_deepstack" for block in range(n_inner))]
    chosen = tuple(tuple(positions[1:4].tolist()) for positions in batch.positions.image)

    def literal(x: Tensor, hook: Any) -> Tensor:
        new, entry = x.clone(), names.index(hook.name)
        for row, positions in enumerate(chosen):
            for p in positions:
                if isinstance(values, Tensor):
                    new[row, p] = values[entry] if n_inner else values
                else:
                    own = next(v for v in batch.visuals if v.row == row and v.holds(p))
                    new[row, p] = 0 if values == "zero" else x[row, own.positions].mean(0)
        return new

    same(model, batch, ReplaceImageTokens(chosen, values), by_hand(model, batch, [(name, literal) for name in names]))


# ---- together, and in generation ----


def test_several_at_one_point_act_in_order() -> None:
    model, batch = tiny_model(), inputs(PADDED)
    both = Compose((ScaleHeads(((1, 2),), 3.0), ScaleHeads(((1, 2),), -1.0), ZeroHeads(((0, 0),))))
    expected = by_hand(
        model,
        batch,
        ScaleHeads(((1, 2),), -3.0).hooks(model, batch) + ZeroHeads(((0, 0),)).hooks(model, batch),
    )
    same(model, batch, both, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ["one image", "padded"])
@pytest.mark.repeats_shapes
def test_generation_under_an_intervention_equals_passes_without_a_cache(family: str, rows: str, kind: str) -> None:
    model, batch = model_and_inputs(family, rows)
    iv = of_every_kind(model, batch)[kind]
    tokens = model.generate(batch, 4, stop_at_eos=False, fwd_hooks=iv.hooks(model, batch))
    new = tokens[:, batch.shape[1] :]
    placeholders = torch.tensor(batch.spec.placeholder_ids)
    for step in range(4):
        if torch.isin(new[:, :step], placeholders).any():  # random weights may write one; a prompt cannot hold it
            assert step > 1
            break
        # the hooks are made for the prompt: generated tokens lie past its end
        with torch.no_grad():
            continued = batch.append(new[:, :step]) if step else batch
            logits = model.run_with_hooks(continued, fwd_hooks=iv.hooks(model, batch))
        assert logits[:, -1].argmax(-1).tolist() == new[:, step].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.repeats_shapes
def test_inputs_and_model_are_as_before(family: str, kind: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    with torch.no_grad():
        encoded = batch.with_image_features(model.encode_images(batch))
        before, features = model(encoded), encoded.image_features.clone()
        model.run_with_hooks(encoded, fwd_hooks=of_every_kind(model, batch)[kind].hooks(model, encoded))
        assert model(encoded).equal(before) and encoded.image_features.equal(features)


# ---- what cannot be done ----


@pytest.mark.parametrize("head", [(3, 0), (0, 4), (-1, 0)])
def test_a_head_the_model_does_not_have_is_refused(head: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"{head[0]}\.{head[1]}.*2.*3"):
        ZeroHeads((head,)).hooks(tiny_model(), inputs(PADDED))


def unchecked(intervention: Intervention, **values: Any) -> Intervention:
    """With values that the annotations, checked in tests only, would refuse."""
    for name, value in values.items():
        object.__setattr__(intervention, name, value)
    return intervention


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: ZeroHeads(HEADS, "answer"), "'answer'"),
        (lambda model: ZeroHeads(HEADS, (1,)), "1.*row 1"),
        (lambda model: ZeroHeads(HEADS, ((1,), (14,))), "2 rows.*3"),
        (lambda model: unchecked(ReplaceImageKV(HEADS), baseline="median"), "'median'"),
        (lambda model: ReplaceImageKV(HEADS, queries="image"), "queries"),
        (lambda model: ReplaceImageKV(HEADS, tokens="text"), "image token"),
        (lambda model: RedistributeSink(HEADS, 1.5), "beta"),
        (lambda model: RedistributeSink(HEADS, 0.5, sink=7), "sink=7"),
        (lambda model: RedistributeSink(HEADS, 0.5, alone="drop"), "drop"),
        (lambda model: MeanHeads(HEADS, torch.zeros(3, 4, 8)), r"\(3, 4, 16\).*\(3, 4, 8\)"),
        (lambda model: PatchActivation("blocks.0.hook_mlp_out", torch.zeros(1), heads=(1,)), "head"),
        (lambda model: PatchActivation("blocks.0.hook_mlp_out", torch.zeros(3, 20, 64)), r"\(3, 20, 64\).*13"),
        (lambda model: PatchActivation("blocks.0.hook_mlp_out", torch.zeros(3, 9, 64)), r"\(3, 9, 64\).*13"),
        (lambda model: PatchActivation("blocks.0.hook_mlp_out", torch.zeros(3, 13, 8)), r"\(3, 13, 8\).*64"),
        (
            lambda model: Compose((RedistributeSink(HEADS, 0.5), ReplaceImageKV(((1, 3),)))),
            r"head 1\.3",
        ),
        (lambda model: ReplaceImageTokens("video"), "no video"),
        (lambda model: AddVector("blocks.0.hook_mlp_out", torch.zeros(8)), r"\(8,\).*64"),
        (lambda model: AddVector("vision.hook_embed", torch.zeros(32), positions="text"), "vision.*'text'"),
        (lambda model: ReplaceImageTokens("text"), "image token"),
        (lambda model: unchecked(ReplaceImageTokens(), values="noise"), "'noise'"),
        (lambda model: ReplaceImageTokens(values=torch.zeros(3)), r"64.*\(3,\)"),
        (lambda model: ReplaceImageTokens(values=torch.zeros(1)), r"64.*\(1,\)"),
        (
            lambda model: ReplaceImageKV(HEADS, ImageMeans(torch.zeros(3, 4, 16), torch.zeros(3, 4, 16))),
            r"\(3, 2, 16\).*\(3, 4, 16\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    model, batch = tiny_model(), inputs(PADDED)
    with pytest.raises(InputError, match=message):
        model.run_with_hooks(batch, fwd_hooks=make(model).hooks(model, batch))


def test_text_alone_has_no_image_to_replace() -> None:
    model, batch = tiny_model(), inputs([[5, 6, 7]])
    with pytest.raises(InputError, match="no image"):
        ReplaceImageKV(HEADS).hooks(model, batch)
    with pytest.raises(InputError, match="no image"):
        mean_image_kv(model, [batch])


def test_hooks_of_your_own_are_taken_as_they_are() -> None:
    model, batch = tiny_model(), inputs(PADDED)
    iv = CustomHooks([("blocks.1.hook_mlp_out", lambda x, hook: x * 2)], "twice the MLP")
    assert str(iv) == "twice the MLP"
    same(model, batch, iv, by_hand(model, batch, list(iv.fwd_hooks)))


def test_scores_in_float16_do_not_overflow_where_they_fit() -> None:
    q, k = torch.full((1, 1, 1, 128), 64.0, dtype=torch.float16), torch.full((1, 2, 1, 128), 8.5, dtype=torch.float16)
    expected = torch.full((1, 1, 1, 2), 69632 / 128**0.5)  # beyond float16 before it is scaled
    torch.testing.assert_close(attention_scores(q, k).float(), expected, rtol=2e-3, atol=0)


def test_numbers_that_are_not_finite_are_not_hidden_by_blocking() -> None:
    model, batch = tiny_model(), inputs(PADDED)
    broken = AddVector("blocks.1.attn.hook_q", torch.full((4, 16), torch.nan), positions="final")
    both = Compose((broken, BlockAttention(((1, 1),), "final", "final")))
    assert edited(model, batch, both)[:, -1].isnan().all()


def test_scores_of_chosen_queries_and_heads_equal_those_of_all() -> None:
    model, batch = tiny_model(), inputs(PADDED)
    queries = torch.tensor([[10, 11]])

    def check(z: Tensor, hook: Any) -> None:
        call = hook.ctx["attention"]
        whole = attention_scores(call.q, call.k).masked_fill(
            ~call.mask.dense(z.shape[1], call.k.shape[1], z.device), -torch.inf
        )
        torch.testing.assert_close(call.scores(queries), whole[:, :, [10, 11]])
        torch.testing.assert_close(call.scores(queries, [3, 1]), whole[:, [3, 1]][:, :, [10, 11]])
        torch.testing.assert_close(call.rows(1, 3).scores(queries), whole[1:, :, [10, 11]])

    model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.hook_z", check)])
