"""TransformerLens' own tools run with an image in the input, in every family, and give the numbers of a hand.

Expected values never come from the tool under test: they are hand-written patches, autograd, or the logits.
"""

# TransformerLens annotates inputs as token tensors and results as unions; what it accepts and returns is tested here:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false, reportOptionalSubscript=false

import copy
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from functools import lru_cache
from typing import Any

import pandas as pd
import pytest
import torch
from by_hand import factor, head_output, normed
from families import KINDS, inputs_of, model_and_inputs, tiny_model
from torch import Tensor
from transformer_lens import ActivationCache, HookedRootModule, SVDInterpreter, patching
from transformer_lens.head_detector import detect_head
from transformer_lens.tools.analysis import (
    attribution_patch,
    direct_logit_attribution,
    interchange,
    logit_lens,
    logit_readout,
)
from transformer_lens.tools.analysis.projection_kernel import attention_head_subspace_affinity
from transformer_lens.weight_processing import ProcessWeights

from hooked_vlm import HookedVLM, VLMCache, VLMInputs
from hooked_vlm.nn.weight_access import AbsentBias

ANSWER, OTHER = 17, 42
current = "qwen3-vl"


@pytest.fixture(autouse=True)
def the_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that `model` and `pictured` give."""
    monkeypatch.setattr(sys.modules[__name__], "current", family)


@lru_cache
def _model(family: str) -> Any:  # the tools' annotations name a bridge and token tensors
    return HookedVLM.from_hf(KINDS[family].hf())


def model() -> Any:
    """Shared weights, switches of its own."""
    return _model(current)


def pictured(seed: int) -> Any:
    """The same words about a picture of its own."""
    return inputs_of(current, [[5, "small", 7]], seed)


def clean() -> Any:
    return pictured(0)


def corrupt() -> Any:
    return pictured(1)


def last() -> int:
    """Position of the last token."""
    return clean().shape[1] - 1


def image_tokens() -> list[int]:
    """Positions of the picture's tokens."""
    return clean().image_tokens(0).tolist()


@lru_cache
def _cached(family: str, which: Callable[[], Any], patterns: bool) -> VLMCache:
    names = (lambda name: True) if patterns else None
    with torch.no_grad():
        return model().run_with_cache(which(), names_filter=names)[1]


def cached(which: Callable[[], Any], patterns: bool = False) -> VLMCache:
    return _cached(current, which, patterns)


def metric(logits: Tensor) -> Tensor:
    """Difference of two logits at the last position."""
    return (logits[:, -1, ANSWER] - logits[:, -1, OTHER]).mean()


def true_difference(which: Callable[[], Any]) -> float:
    with torch.no_grad():
        return metric(model()(which())).item()


def uncapped(logits: Tensor) -> Tensor:
    """Logits before their soft cap, what parts of the stream sum to."""
    cap = model().cfg.output_logits_soft_cap
    return logits if cap is None else cap * torch.atanh(logits / cap)


def uncapped_difference(which: Callable[[], Any]) -> float:
    with torch.no_grad():
        return metric(uncapped(model()(which()))).item()


def close(a: Any, b: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=atol, rtol=1e-4)


# ---- what the tools ask of a model ----


def test_the_model_is_a_hooked_root_module_in_eval_mode_with_gradients_on():
    assert isinstance(model(), HookedRootModule)
    assert not any(module.training for module in model().modules())
    assert all(parameter.requires_grad for parameter in model().parameters())


NAMES = """
to_tokens to_string to_str_tokens to_single_token tokenizer tokens_to_residual_directions accumulated_bias
blocks_with tl_parameters W_E W_U b_U blocks ln_final unembed embed hook_dict mod_dict cfg set_use_attn_result
set_use_split_qkv_input set_use_attn_in set_use_hook_mlp_in run_with_cache run_with_hooks hooks
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_the_model_has(name):
    assert hasattr(model(), name)


@pytest.mark.parametrize(
    ("field", "value"),
    {
        "n_layers": 3,
        "n_heads": 4,
        "d_model": 64,
        "d_mlp": 96,
        "d_vocab": 200,
        "normalization_type": "RMS",
        "gated_mlp": True,
        "attn_only": False,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "use_attn_result": False,
        "use_split_qkv_input": False,
        "use_hook_mlp_in": False,
        "final_rms": True,
    }.items(),
)
def test_the_config_has(field, value):
    published = KINDS[current].hf().config.get_text_config()
    assert model().cfg.n_ctx == published.max_position_embeddings
    assert model().cfg.n_key_value_heads == published.num_key_value_heads
    assert model().cfg.d_head == (getattr(published, "head_dim", None) or 16)
    assert model().cfg.act_fn == ("gelu_tanh" if "gemma" in current else "silu")
    assert getattr(model().cfg, field) == value
    with pytest.raises(FrozenInstanceError):
        setattr(model().cfg, field, value)


@pytest.mark.parametrize("switch", ["use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"])
def test_a_switch_replaces_the_config(switch):
    before = model().cfg
    getattr(model(), f"set_{switch}")(True)
    assert getattr(model().cfg, switch) and not getattr(before, switch)
    getattr(model(), f"set_{switch}")(False)
    assert model().cfg == before


def test_the_config_follows_moves_and_casts():
    moved = copy.deepcopy(model()).to(torch.bfloat16)
    assert moved.cfg.dtype == torch.bfloat16
    assert moved.to("meta").cfg.device == torch.device("meta")
    assert model().cfg.dtype == torch.float32


SHAPES = {
    "attn.W_Q": ("head", 64, "d_head"),
    "attn.W_K": ("kv_head", 64, "d_head"),
    "attn.W_V": ("kv_head", 64, "d_head"),
    "attn.W_O": ("head", "d_head", 64),
    "attn.b_Q": ("head", "d_head"),
    "attn.b_K": ("kv_head", "d_head"),
    "attn.b_V": ("kv_head", "d_head"),
    "attn.b_O": (64,),
    "mlp.W_in": (64, 96),
    "mlp.W_gate": (64, 96),
    "mlp.W_out": (96, 64),
    "mlp.b_in": (96,),
    "mlp.b_out": (64,),
    "ln1.w": (64,),
    "ln2.w": (64,),
}


@pytest.mark.parametrize("name", SHAPES)
def test_block_weights_have_transformer_lens_shapes_and_are_views(name):
    own = copy.deepcopy(model())
    part, attribute = name.split(".")
    sizes: Any = {"head": 4, "kv_head": own.cfg.n_key_value_heads, "d_head": own.cfg.d_head}
    shape = tuple(sizes.get(axis, axis) for axis in SHAPES[name])
    for layer, block in enumerate(own.blocks):
        assert getattr(getattr(block, part), attribute).shape == shape
        assert own.tl_parameters()[f"blocks.{layer}.{name}"].shape == shape
        assert block.hook_out_is_single_residual_stream
    stacked = None if part.startswith("ln") else getattr(own, attribute)
    assert stacked is None or stacked.shape == (3, *shape)
    weight = own.tl_parameters()[f"blocks.2.{name}"]
    if isinstance(weight, AbsentBias):
        assert weight.eq(0).all()
        with pytest.raises(RuntimeError, match="bias"):
            weight[:] = 1.0
        assert f"blocks.2.{name}" in own.absent_biases
        return
    with torch.no_grad():
        before = own(clean())
        weight[0] = 0.0
        assert not own(clean()).equal(before)
        if stacked is not None:
            assert not getattr(own, attribute).equal(stacked)


def test_embedding_and_unembedding_are_views_and_b_U_is_closed():
    assert model().W_E.shape == (200, 64) and model().W_U.shape == (64, 200) and model().b_U.shape == (200,)
    assert model().W_U.data_ptr() == model().unembed.weight.data_ptr()
    tied = tiny_model(f"{current}, tied" if f"{current}, tied" in KINDS else "qwen2-vl, tied")
    assert tied.W_E.data_ptr() == tied.W_U.data_ptr()
    with pytest.raises(RuntimeError, match="bias"):
        model().b_U.add_(1.0)
    assert not isinstance(model().b_U + 1.0, AbsentBias)


def test_residual_directions_are_columns_of_W_U():
    assert model().tokens_to_residual_directions(ANSWER).equal(model().W_U[:, ANSWER])
    ids = torch.tensor([[3, 4, 5]])
    assert model().tokens_to_residual_directions(ids).equal(model().W_U.T[ids])


def test_accumulated_bias_is_zero_where_the_checkpoint_has_none():
    assert model().accumulated_bias(3).eq(0).all() and model().accumulated_bias(1, mlp_input=True).eq(0).all()


def test_every_block_has_attention():
    assert [i for i, _ in model().blocks_with("attn")] == [0, 1, 2]
    assert model().blocks_with("ssm") == []


# ---- activation patching ----

# tool: (hook, columns of its index, where the index points in the tensor)
PATCHES: dict[str, tuple[str, str, Callable[..., tuple]]] = {
    "resid_pre": ("hook_resid_pre", "layer pos", lambda pos: (slice(None), pos)),
    "resid_mid": ("hook_resid_mid", "layer pos", lambda pos: (slice(None), pos)),
    "attn_out": ("hook_attn_out", "layer pos", lambda pos: (slice(None), pos)),
    "mlp_out": ("hook_mlp_out", "layer pos", lambda pos: (slice(None), pos)),
    **{
        f"attn_head_{short}_by_pos": (f"attn.hook_{full}", "layer pos head", lambda pos, h: (slice(None), pos, h))
        for short, full in (("out", "z"), ("q", "q"), ("k", "k"), ("v", "v"))
    },
    **{
        f"attn_head_{short}_all_pos": (f"attn.hook_{full}", "layer head", lambda h: (slice(None), slice(None), h))
        for short, full in (("out", "z"), ("q", "q"), ("k", "k"), ("v", "v"))
    },
    "attn_head_pattern_by_pos": (
        "attn.hook_pattern",
        "layer head_index dest_pos",
        lambda h, dest: (slice(None), h, dest),
    ),
    "attn_head_pattern_dest_src_pos": (
        "attn.hook_pattern",
        "layer head_index dest_pos src_pos",
        lambda h, dest, src: (slice(None), h, dest, src),
    ),
    "attn_head_pattern_all_pos": ("attn.hook_pattern", "layer head_index", lambda h: (slice(None), h)),
}


def patched_by_hand(hook: str, layer: int, at: tuple) -> float:
    """The metric of the corrupted run with one piece of the clean run put in."""
    name = f"blocks.{layer}.{hook}"
    piece = cached(clean, patterns=True)[name][at]

    def put(x, hook):
        x = x.clone()
        x[at] = piece
        return x

    with torch.no_grad():
        return metric(model().run_with_hooks(corrupt(), fwd_hooks=[(name, put)])).item()


@pytest.mark.parametrize("tool", PATCHES)
@torch.no_grad()
def test_activation_patching_equals_a_patch_by_hand(tool):
    hook, columns, where = PATCHES[tool]
    values = {"pos": "pos", "dest_pos": "pos"}
    rows = []
    for layer, pos in ((0, image_tokens()[0]), (2, last())):
        known = {"layer": layer, "head": 1, "head_index": 1, "src_pos": image_tokens()[0], "pos": pos, "dest_pos": pos}
        rows.append([known[values.get(c, c)] for c in columns.split()])
    frame = pd.DataFrame(rows, columns=columns.split())
    results = getattr(patching, f"get_act_patch_{tool}")(
        model(), corrupt(), cached(clean, patterns=True), metric, index_axis_names=None, index_df=frame
    )
    close(results, [patched_by_hand(hook, row[0], where(*row[1:])) for row in rows])
    assert (results - true_difference(corrupt)).abs().max() > 1e-4  # the patches do something


@pytest.mark.repeats_shapes
@torch.no_grad()
def test_whole_sweeps_and_every_reduction_have_the_right_shape_and_ends():
    cache = cached(clean)
    blocks = patching.get_act_patch_block_every(model(), corrupt(), cache, metric)
    assert blocks.shape == (3, 3, last() + 1)
    close(blocks[0, 0, 2], patched_by_hand("hook_resid_pre", 0, (slice(None), 2)))
    heads = patching.get_act_patch_attn_head_all_pos_every(model(), corrupt(), cache, metric)
    assert heads.shape == (5, 3, 4)
    n_kv = model().cfg.n_key_value_heads
    assert heads[2:4, :, n_kv:].eq(0).all()  # keys and values have fewer heads
    close(heads[0, 1, 3], patched_by_hand("attn.hook_z", 1, (slice(None), slice(None), 3)))
    close(heads[2, 1, n_kv - 1], patched_by_hand("attn.hook_k", 1, (slice(None), slice(None), n_kv - 1)))

    def per_example(logits: Tensor) -> Tensor:
        return logits[:, -1, ANSWER] - logits[:, -1, OTHER]

    both, both_clean = VLMInputs.concat([corrupt(), clean()]), VLMInputs.concat([clean(), clean()])
    _, cache = model().run_with_cache(both_clean)
    result = patching.get_act_patch_attn_head_out_all_pos(
        model(), both, cache, per_example, reduce="none", baseline=True
    )
    assert result.values.shape == (3, 4, 2)
    close(result.baseline, [true_difference(corrupt), true_difference(clean)])
    close(result.values[..., 0], heads[0])
    close(result.values[..., 1], torch.full((3, 4), true_difference(clean)))


@pytest.mark.slow
@torch.no_grad()
def test_the_sweep_over_heads_and_positions_runs_whole():
    every = patching.get_act_patch_attn_head_by_pos_every(model(), corrupt(), cached(clean), metric)
    assert every.shape == (5, 3, last() + 1, 4)
    close(every[1, 1, 2, 3], patched_by_hand("attn.hook_q", 1, (slice(None), 2, 3)))


@torch.no_grad()
def test_direct_path_patching_equals_a_query_recomputed_by_hand():
    src, src_head = 0, 2

    def patched() -> Tensor:
        caches = cached(clean), cached(corrupt)
        chosen: Any = {"src_layer": src, "src_head": src_head, "verbose": False}
        return patching.get_act_patch_direct_path(model(), corrupt(), *caches, metric, **chosen)

    if model().cfg.use_normalization_before_and_after:
        with pytest.raises(ValueError, match=r"ln1_post\.hook_out, after the head sum"):
            patched()
        return
    results = patched()
    assert not model().cfg.use_split_qkv_input
    assert results[0].eq(0).all()
    write = (cached(clean)["z", src] - cached(corrupt)["z", src])[:, :, src_head] @ model().blocks[src].attn.W_O[
        src_head
    ]
    for layer, head in ((1, 3), (2, 0)):
        block = model().blocks[layer]
        resid = cached(corrupt)["resid_pre", layer] + write
        q = normed(block.ln1, resid) @ block.attn.W_Q[head] + block.attn.b_Q[head]

        def put(x, hook, head=head, q=q):
            x = x.clone()
            x[:, :, head] = q
            return x

        logits = model().run_with_hooks(corrupt(), fwd_hooks=[(f"blocks.{layer}.attn.hook_q", put)])
        close(results[layer, head], metric(logits))


# ---- head detection ----


def detection_score(detection: Tensor) -> Tensor:
    """Share of each head's attention that falls on the pattern, by the stored patterns."""
    patterns = torch.stack([cached(clean, patterns=True)["pattern", layer][0] for layer in range(3)])
    return (patterns * detection).sum((-1, -2)) / patterns.sum((-1, -2))


@torch.no_grad()
def test_heads_are_detected_by_a_pattern_given_as_a_tensor():
    detection = torch.zeros(last() + 1, last() + 1)
    detection[last(), image_tokens()] = 1  # the last token looks at the image
    close(detect_head(model(), clean(), detection), detection_score(detection))


@pytest.mark.parametrize("head_name", ["previous_token_head", "duplicate_token_head", "induction_head"])
@torch.no_grad()
def test_heads_are_detected_by_name(head_name):
    tokens = clean().tokens[0]
    position = torch.arange(len(tokens))
    same = tokens[:, None] == tokens[None, :]
    earlier = position[:, None] > position[None, :]
    expected = {
        "previous_token_head": position[:, None] == position[None, :] + 1,
        "duplicate_token_head": same & earlier,
        # after an earlier occurrence of this token
        "induction_head": torch.cat((torch.zeros(len(tokens), 1).bool(), (same & earlier)[:, :-1]), dim=1),
    }[head_name]
    close(detect_head(model(), clean(), head_name), detection_score(expected.float()))


# ---- reading the residual stream ----


@torch.no_grad()
def test_logit_lens_reads_every_layer_through_the_whole_norm():
    result = logit_lens(model(), clean(), positions=None)
    close(result.values[-1], model()(clean()))
    for layer in range(3):
        expected = model().unembed(model().ln_final(cached(clean)["resid_pre", layer]))
        close(result.values[layer], expected)


@torch.no_grad()
def test_logit_readout_ranks_targets():
    resid = cached(clean)["resid_post", 2]
    logits = model()(clean())
    out = logit_readout(model(), resid, targets=[ANSWER, OTHER], return_type="log_probs")
    close(out.values, logits.log_softmax(-1)[..., [ANSWER, OTHER]])
    assert out.target_ranks[..., 0].equal((logits > logits[..., ANSWER, None]).sum(-1))


@pytest.mark.parametrize("unit", ["component", "head", "layer"])
@torch.no_grad()
def test_direct_logit_attribution_adds_up_to_the_true_logit_difference(unit):
    out = direct_logit_attribution(model(), clean(), ANSWER, OTHER, unit=unit)
    total = out.attribution[-1] if unit == "layer" else out.attribution.sum(0)
    close(total, [uncapped_difference(clean)], atol=5e-5)
    assert len(out.labels) == len(out.attribution)


@torch.no_grad()
def test_the_attribution_of_a_head_is_its_write_through_the_frozen_norm():
    out = direct_logit_attribution(model(), clean(), ANSWER, OTHER, unit="head")
    cache = cached(clean)
    write = head_output(model(), cache, 1, 2)[0, -1]
    read = write / cache["ln_final.hook_scale"][0, -1] * factor(model().ln_final)
    expected = read @ (model().W_U[:, ANSWER] - model().W_U[:, OTHER])
    close(out.attribution[out.labels.index("L1H2"), 0], expected)


# ---- decompositions of the cache ----


DECOMPOSITIONS: dict[str, Callable[[ActivationCache, bool], Tensor]] = {
    "decompose_resid": lambda c, ln: c.decompose_resid(apply_ln=ln).sum(0),
    "accumulated_resid": lambda c, ln: c.accumulated_resid(apply_ln=ln)[-1],
    "stack_head_results": lambda c, ln: c.stack_head_results(incl_remainder=True, apply_ln=ln).sum(0),
    "stack_neuron_results": lambda c, ln: c.stack_neuron_results(3, incl_remainder=True, apply_ln=ln).sum(0),
    "get_full_resid_decomposition": lambda c, ln: c.get_full_resid_decomposition(apply_ln=ln).sum(0),
}


@pytest.mark.parametrize("removed", [False, True], ids=["batch", "no batch axis"])
@pytest.mark.parametrize("name", DECOMPOSITIONS)
@torch.no_grad()
def test_decompositions_sum_to_the_stream_and_with_the_norm_to_the_logits(name, removed):
    logits, cache = model().run_with_cache(clean(), remove_batch_dim=removed)
    logits = logits[0] if removed else logits
    close(DECOMPOSITIONS[name](cache, False), cache["resid_post", 2])
    close(DECOMPOSITIONS[name](cache, True) @ model().W_U, uncapped(logits), atol=5e-5)


@pytest.mark.parametrize(("layer", "mlp_input", "norm"), [(1, False, "ln1"), (1, True, "ln2"), (0, True, "ln2")])
@torch.no_grad()
def test_the_norms_of_inner_layers_are_applied_whole(layer, mlp_input, norm):
    cache = cached(clean)
    parts = cache.decompose_resid(layer, mlp_input=mlp_input, apply_ln=True)
    close(parts.sum(0), cache[f"blocks.{layer}.{norm}.hook_out"])


@torch.no_grad()
def test_neurons_projected_on_a_direction_give_its_logit():
    direction = model().W_U[:, ANSWER]
    _, cache = model().run_with_cache(clean())
    parts = cache.stack_neuron_results(3, incl_remainder=True, apply_ln=True, project_output_onto=direction)
    close(parts.sum(0), uncapped(model()(clean()))[..., ANSWER], atol=5e-5)


@torch.no_grad()
def test_neuron_results_and_stacked_activations_are_those_of_the_cache():
    cache, block = cached(clean), model().blocks[1]
    neurons = cache.get_neuron_results(1)
    written = cache["post", 1][..., None] * block.mlp.W_out
    if block.post_norms:
        whole = cache["post", 1] @ block.mlp.W_out
        scale = (whole.pow(2).mean(-1, keepdim=True) + model().cfg.eps).sqrt()[..., None]
        written = written / scale * factor(block.ln2_post)
    close(neurons, written)
    close(neurons.sum(-2), cache["mlp_out", 1])
    close(cache.get_neuron_results(1, 3), written[..., 3, :])
    close(cache.get_neuron_results(1, 3, pos_slice=-1), written[:, -1, 3])
    for direction in (model().W_U[:, ANSWER], model().W_U[:, :2]):
        close(cache.get_neuron_results(1, 3, project_output_onto=direction), written[..., 3, :] @ direction)
        close(cache.get_neuron_results(1, project_output_onto=direction), written @ direction)
    close(cache.stack_activation("resid_mid"), torch.stack([cache["resid_mid", layer] for layer in range(3)]))
    close(cache.stack_activation("pattern"), torch.stack([cache["pattern", layer] for layer in range(3)]))


@torch.no_grad()
def test_decompositions_of_padded_rows_with_images_rebuild_their_last_logits():
    shared, inputs = model_and_inputs(current, "padded")
    logits, cache = shared.run_with_cache(inputs)
    for parts in (cache.decompose_resid(pos_slice=-1), cache.stack_head_results(pos_slice=-1, incl_remainder=True)):
        attrs = cache.logit_attrs(parts, tokens=ANSWER, pos_slice=-1)
        close(attrs.sum(0).flatten(), uncapped(logits)[:, -1, ANSWER], atol=5e-5)


@torch.no_grad()
def test_logit_attrs_add_up_to_the_logits():
    cache = cached(clean)
    attrs = cache.logit_attrs(cache.decompose_resid(), tokens=ANSWER)
    close(attrs.sum(0), uncapped(model()(clean()))[..., ANSWER], atol=5e-5)


@torch.no_grad()
def test_head_results_computed_from_the_cache_are_those_of_the_switch():
    _, cache = model().run_with_cache(clean())
    cache.compute_head_results()
    model().set_use_attn_result(True)
    try:
        _, expected = model().run_with_cache(clean(), names_filter=lambda n: n.endswith("hook_result"))
    finally:
        model().set_use_attn_result(False)
    for layer in range(3):
        close(cache["result", layer], expected["result", layer])


# ---- attribution patching and interchange ----


def test_attribution_patching_scores_are_the_derivatives_of_real_patches():
    scores = attribution_patch(model(), clean(), corrupt(), metric).node_scores
    by_key = {(n.kind, n.layer, n.position, n.head): s for n, s in scores.items()}
    seen, end = image_tokens()[1], last()
    for key, name, at in (
        (("embed", None, seen, None), "hook_embed", (0, seen)),
        (("attn_head_out", 1, end, 2), "blocks.1.attn.hook_z", (0, end, 2)),
        (("attn_head_out", 0, seen, 0), "blocks.0.attn.hook_z", (0, seen, 0)),
        (("mlp_out", 2, end, None), "blocks.2.hook_mlp_out", (0, end)),
    ):
        share = torch.zeros((), requires_grad=True)
        step = torch.zeros_like(cached(clean)[name])
        step[at] = (cached(clean)[name] - cached(corrupt)[name])[at]

        def mix(x, hook, share=share, step=step):
            return x + share * step

        metric(model().run_with_hooks(corrupt(), fwd_hooks=[(name, mix)])).backward()
        assert share.grad is not None
        close(by_key[key], share.grad.item())
    model().zero_grad(set_to_none=True)


def test_attribution_patching_of_a_batch_is_the_mean_of_its_rows():
    pairs = [(clean(), corrupt()), (pictured(2), clean())]
    one_by_one = [attribution_patch(model(), a, b, metric).node_scores for a, b in pairs]
    both = attribution_patch(
        model(), VLMInputs.concat([a for a, _ in pairs]), VLMInputs.concat([b for _, b in pairs]), metric
    ).node_scores
    assert set(both) == set(one_by_one[0])
    close([both[n] for n in both], [(one_by_one[0][n] + one_by_one[1][n]) / 2 for n in both])
    model().zero_grad(set_to_none=True)


def task_logits(inputs: VLMInputs) -> Tensor:
    return model()(inputs)[:, -1, [ANSWER, OTHER]]


HOOK = "blocks.1.hook_resid_post"


def three(seed: int) -> Any:
    return VLMInputs.concat([pictured(seed + i) for i in range(3)])


def test_interchange_collects_activations_and_puts_them_in():
    base, source, positions = three(0), three(5), torch.tensor([*image_tokens()[:2], last()])
    acts = interchange.collect_activations(model(), HOOK, source, task_logits, positions=positions, batch_size=2)
    with torch.no_grad():
        resid = model()(source, stop_at_layer=2)
    close(acts, resid[torch.arange(3), positions])

    everything = interchange.SubspaceInterchange(torch.eye(64))
    out = interchange.intervened_logits(
        model(), HOOK, everything, base, acts, task_logits, positions=positions, batch_size=2
    )
    with torch.no_grad():
        mixed = model()(base, stop_at_layer=2)
        mixed[torch.arange(3), positions] = acts
        expected = model()(base, start_at_layer=2, resid=mixed)[:, -1, [ANSWER, OTHER]]
    close(out, expected)


def test_das_learns_a_direction_that_carries_the_answer_and_leaves_the_model_as_it_was():
    positions = torch.full((3,), last())
    fitted = interchange.fit_das(
        model(),
        "blocks.2.hook_resid_post",
        three(0),
        three(5),
        torch.tensor([0, 1, 0]),
        task_logits,
        rank=2,
        base_positions=positions,
        source_positions=positions,
        epochs=6,
        lr=0.1,
    )
    assert fitted.losses[-1] < fitted.losses[0]
    close(fitted.basis.T @ fitted.basis, torch.eye(2))
    assert all(parameter.requires_grad for parameter in model().parameters())


@torch.no_grad()
def test_a_reinitialized_copy_has_all_parameters_drawn_anew():
    for kind in KINDS.keys() & {current, f"{current}, tied"}:
        trained = tiny_model(kind)
        before = {name: p.clone() for name, p in trained.named_parameters()}
        fresh: Any = interchange.reinitialized(trained, seed=0)
        assert [n for n, p in fresh.named_parameters() if p.equal(before[n])] == []
        assert all(p.equal(before[n]) for n, p in trained.named_parameters())
        assert (fresh.W_E.data_ptr() == fresh.W_U.data_ptr()) == ("tied" in kind)
        assert fresh(torch.arange(5, 12)[None]).isfinite().all()


# ---- weights ----


@pytest.mark.parametrize("role", ["Q", "K", "V"])
@torch.no_grad()
def test_subspace_affinity_is_that_of_orthonormal_bases(role):
    result = attention_head_subspace_affinity(model(), target_role=role, layer_order="all")
    n_targets = 4 if role == "Q" else model().cfg.n_key_value_heads
    assert result.scores.shape == (3, 4, 3, n_targets)
    written = torch.linalg.qr(model().blocks[0].attn.W_O[3].T).Q
    read = torch.linalg.qr(getattr(model().blocks[2].attn, f"W_{role}")[1]).Q
    close(result.scores[0, 3, 2, 1], (written.T @ read).pow(2).sum(), atol=1e-4)


@torch.no_grad()
def test_folded_and_centred_weights_copied_back_through_the_views_keep_the_log_probs():
    own = copy.deepcopy(model())
    before = own(clean()).log_softmax(-1)
    state = ProcessWeights.fold_layer_norm(own.tl_state_dict(), own.cfg, fold_biases=False, center_weights=False)
    if own.cfg.output_logits_soft_cap is None:
        state = ProcessWeights.center_unembed(state, cfg=own.cfg)
    views = own.tl_parameters()
    for name, view in views.items():
        *at, last = name.split(".")
        if isinstance(view, AbsentBias):
            continue
        new = state.get(".".join([*at, f"_{last}"]), state.get(name))
        # a norm that was folded away is one of ones (zeros, where they are offsets from 1)
        view.copy_(torch.full_like(view, 0.0 if own.cfg.rmsnorm_uses_offset else 1.0) if new is None else new)
    assert factor(own.ln_final).eq(1).all() and factor(own.blocks[1].ln1).eq(1).all()
    assert not own(clean()).equal(model()(clean()))
    close(own(clean()).log_softmax(-1), before, atol=5e-5)


@torch.no_grad()
def test_folded_value_biases_are_what_they_add_to_the_stream():
    state = ProcessWeights.fold_value_biases(model().tl_state_dict(), model().cfg)
    for layer, block in enumerate(model().blocks):
        b_V = block.attn.b_V.repeat_interleave(4 // len(block.attn.b_V), dim=0)
        close(state[f"blocks.{layer}.attn.b_O"], torch.einsum("hd,hdm->m", b_V, block.attn.W_O))
        assert state[f"blocks.{layer}.attn._b_V"].eq(0).all()


@pytest.mark.parametrize("kind", ["OV", "w_in", "w_out"])
@torch.no_grad()
def test_singular_vectors_are_those_of_the_weights(kind):
    out = SVDInterpreter(model()).get_singular_vectors(kind, layer_index=1, num_vectors=3, head_index=0)
    block = model().blocks[1]
    matrix = {
        "OV": block.attn.W_V[0] @ block.attn.W_O[0],
        "w_in": block.mlp.W_in.T * factor(block.ln2),
        "w_out": block.mlp.W_out,
    }[kind]
    directions = torch.linalg.svd(matrix.double()).Vh[:3].float()
    close(out[:, 0].abs(), (model().W_U.T @ directions.T).abs(), atol=1e-3)
