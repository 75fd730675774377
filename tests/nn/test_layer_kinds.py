"""Layers of several kinds and blocks of tokens that see each other both ways, against a decoder written out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from by_hand import sees
from families import ROWS, inputs_of
from layer_kinds import BOTH_WAYS, FAR, NEAR, OF_KINDS, with_kinds
from references import KV_CACHE
from torch import Tensor
from transformers import Gemma2Config, Gemma3TextConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

from hooked_vlm import InputError
from hooked_vlm.config import LayerKind, RopeScaling
from hooked_vlm.model.cache import VLMCache
from hooked_vlm.nn.forward_pass import block_spans, inputs_masks

FAMILY = "internvl2"  # its text positions are plain
MODES = list(BOTH_WAYS)
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}


def answered(family: str, rows: str) -> Any:
    """Prompts with answers of two lengths."""
    inputs = inputs_of(family, ROWS[rows])
    return inputs.append([[7, 8, 9][: 3 - row % 2] for row in range(len(inputs))])


def rotated(x: Tensor, kind: LayerKind) -> Tensor:
    """[pos, head, d_head] turned pair by pair."""
    half = x.shape[-1] // 2
    factor = 1.0 if kind.rope_scaling is None else kind.rope_scaling.factor
    angles = torch.arange(len(x))[:, None] / factor / kind.rope_theta ** (torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x.split(half, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def written_out(model: Any, inputs: Any, row: int) -> Tensor:
    """Logits [pos, d_vocab] of a row's real tokens, layer by layer in plain torch."""
    cfg, (first, stop) = model.cfg, (inputs.first[row], inputs.stop[row])
    x = model.run_with_cache(inputs, names_filter="hook_embed", stop_at_layer=0)[1]["hook_embed"][row, first:stop]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + cfg.eps) * weight

    for layer, block in enumerate(model.blocks):
        attn, kind, normed = block.attn, cfg.kind_of(layer), norm(x, block.ln1.w)
        q, k, v = (
            torch.einsum("pm,hmd->phd", normed, w) + b
            for w, b in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
        )
        k, v = (t.repeat_interleave(cfg.n_heads // cfg.n_key_value_heads, 1) for t in (rotated(k, kind), v))
        scores = torch.einsum("qhd,khd->hqk", rotated(q, kind), k) / cfg.d_head**0.5
        at = range(first, stop)
        seen = torch.tensor([[sees(cfg, inputs, row, layer, query, key) for key in at] for query in at])
        z = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
        x = x + torch.einsum("qhd,hdm->qm", z, attn.W_O)
        normed, mlp = norm(x, block.ln2.w), block.mlp
        x = x + (torch.nn.functional.silu(normed @ mlp.W_gate) * (normed @ mlp.W_in)) @ mlp.W_out
    return norm(x, model.ln_final.w) @ model.W_U


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_answer", [False, True], ids=["prompt", "answered"])
@torch.no_grad()
def test_logits_are_those_of_a_decoder_written_out(mode: str, rows: str, with_answer: bool) -> None:
    model = with_kinds(FAMILY, mode)
    inputs = answered(FAMILY, rows) if with_answer else inputs_of(FAMILY, ROWS[rows])
    logits = model(inputs)
    for row, (first, stop) in enumerate(zip(inputs.first, inputs.stop, strict=True)):
        torch.testing.assert_close(logits[row, first:stop], written_out(model, inputs, row), **CLOSE)


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("causal", {"layer_kinds": (replace(NEAR, rope_theta=1e6), FAR)}),
        ("causal", {"layer_kinds": (NEAR, replace(FAR, rope_scaling=None))}),
        ("causal", {"layer_kinds": (replace(NEAR, window=None), FAR)}),
        ("causal", {"layer_kind_of": (1, 0, 0)}),
        ("image, cut", {"bidirectional": None}),
        ("image, cut", {"window_cuts_blocks": False}),
        ("prompt, cut", {"bidirectional": None}),
        ("prompt, cut", {"bidirectional": "image"}),
        ("prompt, cut", {"window_cuts_blocks": False}),
    ],
    ids=str,
)
@torch.no_grad()
def test_every_setting_moves_numbers(family: str, mode: str, changes: dict[str, Any]) -> None:
    inputs = inputs_of(family, ROWS["two images"])
    with_it, without = with_kinds(family, mode)(inputs), with_kinds(family, mode, **changes)(inputs)
    assert (with_it - without).abs().max() > 1e-3


@torch.no_grad()
def test_a_model_of_one_kind_is_the_same_with_and_without_its_name(family: str) -> None:
    inputs = inputs_of(family, ROWS["padded"])
    plain = {"layer_kinds": (), "layer_kind_of": (), "sliding_window": 4}
    named = {"layer_kinds": (LayerKind(4, 1e6),), "layer_kind_of": (0, 0, 0)}
    assert torch.equal(with_kinds(family, "causal", **plain)(inputs), with_kinds(family, "causal", **named)(inputs))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_the_explicit_kernel_and_derived_patterns_agree_with_the_fused(family: str, mode: str, tmp_path: Any) -> None:
    model, inputs = with_kinds(family, mode), answered(family, "padded")
    logits, cache = model.run_with_cache(inputs)
    explicit, stored = model.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_pattern"))
    torch.testing.assert_close(explicit, logits, **CLOSE)
    cache.save(tmp_path)
    again = VLMCache.load(tmp_path)
    for layer in range(model.cfg.n_layers):
        torch.testing.assert_close(cache["pattern", layer], stored["pattern", layer], **CLOSE)
        assert torch.equal(again["pattern", layer], cache["pattern", layer])
        for row, (first, stop) in enumerate(zip(inputs.first, inputs.stop, strict=True)):
            at = range(first, stop)
            seen = torch.tensor([[sees(model.cfg, inputs, row, layer, query, key) for key in at] for query in at])
            assert torch.equal(stored["pattern", layer][row, 0, first:stop, first:stop] > 0, seen)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_rows_are_what_they_are_alone_and_without_packing(family: str, mode: str) -> None:
    model, inputs = with_kinds(family, mode), answered(family, "padded")
    logits = model(inputs)
    for row, (first, stop) in enumerate(zip(inputs.first, inputs.stop, strict=True)):
        alone = model(inputs[row])[0, inputs[row].first[0] : inputs[row].stop[0]]
        torch.testing.assert_close(logits[row, first:stop], alone, **CLOSE)
    handle = model.blocks[0].mlp.register_forward_hook(lambda *args: None)  # whoever looks at modules sees padded rows
    real = inputs.attention_mask.bool()
    torch.testing.assert_close(model(inputs)[real], logits[real], **CLOSE)
    handle.remove()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_steps_behind_a_cache_are_those_of_one_pass(family: str, mode: str, rows: str) -> None:
    model, prompt = with_kinds(family, mode), inputs_of(family, ROWS[rows])
    n, n_rows = prompt.shape[1], len(prompt)
    answer = torch.tensor([7, 8, 9, 11]).repeat(n_rows, 1)
    whole = model(prompt.append(answer))
    past = model.new_kv_cache(n_rows, n)
    torch.testing.assert_close(model(prompt, past_kv_cache=past)[:, -1], whole[:, n - 1], **CLOSE)
    together = past.repeat(1)
    for step, token in enumerate(answer.T):
        torch.testing.assert_close(model.next_logits(token, past), whole[:, n + step], **CLOSE)
    new = replace(model.as_inputs(answer), n_generated=(answer.shape[1],) * n_rows)
    torch.testing.assert_close(model(new, past_kv_cache=together), whole[:, n:], **CLOSE)


@pytest.mark.parametrize("mode", MODES[:3])
@torch.no_grad()
def test_a_picture_may_come_behind_a_cache(mode: str) -> None:
    model, rows = with_kinds(FAMILY, mode), [[5, 6, 11, 12, "small", 7, 8]]
    whole, first = inputs_of(FAMILY, rows), inputs_of(FAMILY, [rows[0][:3]])
    past = model.new_kv_cache(1, whole.shape[1])
    model(first, past_kv_cache=past)
    rest = inputs_of(FAMILY, [rows[0][3:]])
    torch.testing.assert_close(model(rest, past_kv_cache=past), model(whole)[:, 3:], **CLOSE)


def test_a_prompt_behind_a_cache_is_refused() -> None:
    model, inputs = with_kinds(FAMILY, "prompt, cut"), inputs_of(FAMILY, ROWS["one image"])
    past = model.new_kv_cache(1, 40)
    model(inputs, past_kv_cache=past)
    with pytest.raises(InputError, match=r"run it in one pass.*n_generated"):
        model(torch.tensor([[7, 8]]), past_kv_cache=past)


@torch.no_grad()
def test_a_loss_over_tokens_that_see_their_targets_is_refused() -> None:
    inputs = answered(FAMILY, "padded")
    with pytest.raises(InputError, match=r"see each other both ways.*log_probs"):
        with_kinds(FAMILY, "prompt, cut")(inputs, return_type="loss")
    model = with_kinds(FAMILY, "image, cut")  # of a picture's tokens none is a target
    assert model(inputs, return_type="loss").isfinite()
    assert with_kinds(FAMILY, "prompt, cut").log_probs(inputs_of(FAMILY, ROWS["padded"]), [7, 8]).isfinite().all()


@pytest.mark.parametrize("window", [2, 3, 6])
@pytest.mark.parametrize("cuts", [True, False], ids=["Gemma 3", "PaliGemma 2"])
def test_masks_are_those_of_the_reference(window: int, cuts: bool) -> None:
    inputs = answered(FAMILY, "padded")
    kinds = (LayerKind(window, 1e6), LayerKind(None, 1e6))
    mode = "image, cut" if cuts else "prompt, whole"
    model = with_kinds(FAMILY, mode, layer_kinds=kinds)
    blocks = torch.full(inputs.shape, -1)
    for number, (row, start, stop) in enumerate(block_spans(model.cfg, inputs)):
        blocks[row, start:stop] = number
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "sliding_window": window, "attn_implementation": "eager"}
    x, mask = torch.zeros(*inputs.shape, 8), inputs.attention_mask
    if cuts:
        theirs = create_masks_for_vision_model(Gemma3TextConfig(**sizes), x, mask, None, None, blocks)
        expected = (theirs["sliding_attention"], theirs["full_attention"])
    else:
        given = {"inputs_embeds": x, "attention_mask": mask, KV_CACHE: None, "position_ids": None}
        given |= {"config": Gemma2Config(**sizes), "block_sequence_ids": blocks}
        expected = (create_sliding_window_causal_mask(**given), create_causal_mask(**given))
    real = mask.bool()
    n = inputs.shape[1]
    for ours, reference in zip(inputs_masks(model.cfg, inputs, None), expected, strict=True):
        seen = ours.dense(n, n, x.device).expand(len(inputs), -1, -1, -1)[:, 0]
        assert torch.equal(seen[real], (reference == 0)[:, 0][real])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_kind_of": (0, 1)}, "each of 3 layers, got 2"),
        ({"layer_kind_of": (0, 1, 2)}, "kinds 0 to 1"),
        ({"layer_kinds": ()}, "kinds 0 to -1"),
        ({"sliding_window": 4}, "leave sliding_window"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, "leave sliding_window"),
        ({"rope_theta": 5.0}, "one of the layer_kinds"),
        ({"bidirectional": "text"}, "bidirectional"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):  # annotations that are executed refuse some before
        with_kinds(FAMILY, "causal", **{**OF_KINDS, **changes})
