"""Names and meanings as in TransformerLens 4.3: norms, q/k norms, inputs of heads, `get_act_name`."""

from typing import Any

import pytest
import tiny_internvl
import tiny_qwen2_vl as tiny
import torch
from by_hand import normed
from families import model_and_inputs, own_copy
from torch import Tensor
from transformer_lens.utilities import get_act_name

from hooked_vlm import HookError, InputError, VLMInputs
from hooked_vlm.interventions import mean_image_kv
from hooked_vlm.nn.components import Norm
from hooked_vlm.nn.hooks import is_quadratic

# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", ["one image", "padded"])
def test_hook_out_is_hook_normalized_times_weight_plus_bias(family: str, rows: str, dtype: torch.dtype) -> None:
    model, inputs = model_and_inputs(family, rows)
    model = own_copy(model).to(dtype)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, Norm)}
    seen = 0
    for name, norm in norms.items():
        if f"{name}.hook_out" not in cache:
            continue
        seen += 1
        normalized, out = cache[f"{name}.hook_normalized"], cache[f"{name}.hook_out"]
        assert out.dtype == dtype
        in_full = norm.centered or norm.offset  # what the reference multiplies in float32
        assert normalized.dtype == (torch.float32 if in_full else dtype)
        expected = normalized * (1 + norm.weight.float() if norm.offset else norm.weight)
        expected = (expected if norm.bias is None else expected + norm.bias).to(dtype)
        real = normalized.abs().sum(-1) > 0  # padding of packed rows is zero behind the bias, too
        assert out[real].equal(expected[real])
        size = normalized.float().pow(2).mean(-1)[real]
        assert (size - 1).abs().max() < 0.02
    vision, of_block = model.cfg.vision, 4 if model.cfg.use_normalization_before_and_after else 2
    of_tower = 2 * vision.n_layers_run + vision.pre_norm + vision.post_norm
    assert seen == of_block * model.cfg.n_layers + 1 + of_tower + hasattr(model.projector, "ln") + model.cfg.n_deepstack


@torch.no_grad()
def test_what_reads_a_norm_reads_hook_out(family: str) -> None:
    model, inputs = model_and_inputs(family, "one image")

    def logits(name: str, factor: float) -> Tensor:
        return model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: x * factor)])

    projector = ["projector.ln"] * hasattr(model.projector, "ln")
    for name in ("ln_final", "blocks.1.ln2", "vision.blocks.0.ln1", *projector):
        norm = model.get_submodule(name)
        if norm.bias is None:  # nothing lies between the two points but a product
            torch.testing.assert_close(logits(f"{name}.hook_out", 2), logits(f"{name}.hook_normalized", 2))
        else:
            assert not torch.allclose(logits(f"{name}.hook_out", 2), logits(f"{name}.hook_normalized", 2))


# ---------------------------------------------------------------- norms of queries and keys


def normed_tower() -> tuple[Any, VLMInputs]:
    """A vision tower in the manner of InternViT-6B."""
    model = tiny_internvl.tiny_model("llama")
    return model, model.inputs_from_hf(tiny_internvl.hf_batch([[5, ("image", 2), 7, 8]]))


@torch.no_grad()
def test_queries_and_keys_before_and_behind_their_norm() -> None:
    model, inputs = normed_tower()
    _, cache = model.run_with_cache(inputs)
    attn = model.vision.blocks[1].attn
    read = cache["vision.blocks.1.ln1.hook_out"]
    for side, linear, norm in (("q", attn.q_proj, attn.q_norm), ("k", attn.k_proj, attn.k_norm)):
        before, behind = (cache[f"vision.blocks.1.attn.hook_{side}{end}"] for end in ("", "_normed"))
        assert before.shape == behind.shape
        torch.testing.assert_close(before.flatten(-2), linear(read))
        flat = before.flatten(-2)
        expected = flat * (flat.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
        torch.testing.assert_close(behind.flatten(-2), expected)


@torch.no_grad()
def test_an_edit_of_one_heads_queries_before_the_norm_moves_the_others() -> None:
    model, inputs = normed_tower()
    at, normed = "vision.blocks.0.attn.hook_q", "vision.blocks.0.attn.hook_q_normed"
    _, plain = model.run_with_cache(inputs, names_filter=normed)

    def edit(q: Tensor, hook: Any) -> None:
        q[:, :, 1] *= 3

    with model.hooks(fwd_hooks=[(at, edit)]):
        _, cache = model.run_with_cache(inputs, names_filter=normed)
    assert not torch.allclose(cache[normed][:, :, 0], plain[normed][:, :, 0])


@torch.no_grad()
def test_patterns_of_a_normed_tower_are_derived_from_what_is_compared() -> None:
    model, inputs = normed_tower()
    _, derived = model.run_with_cache(inputs)
    _, stored = model.run_with_cache(inputs, names_filter=is_quadratic)
    for layer in range(model.cfg.vision.n_layers_run):
        for what in ("pattern", "attn_scores"):
            torch.testing.assert_close(derived.vision[what, layer], stored.vision[what, layer], atol=1e-6, rtol=1e-5)


def test_means_of_a_data_set_are_taken_behind_a_norm_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is turned is what is averaged; no text tower has such a norm yet, so its name alone is looked at."""
    model, inputs = model_and_inputs("qwen2-vl", "one image")
    asked: list[Any] = []

    def look(batch: Any, names_filter: Any, **kwargs: Any) -> Any:
        asked.extend(names_filter)
        raise StopIteration

    for block in model.blocks:
        monkeypatch.setattr(block.attn, "has_qk_norm", True)
    monkeypatch.setattr(model, "run_with_cache", look)
    for before_rope in (True, False):
        with pytest.raises((StopIteration, RuntimeError)):
            mean_image_kv(model, [inputs], before_rope)
    assert "blocks.0.attn.hook_k_normed" in asked and "blocks.0.attn.hook_rot_k" in asked
    assert "blocks.0.attn.hook_k" not in asked


# ---------------------------------------------------------------- inputs of heads


@pytest.mark.parametrize("rows", ["one image", "padded"])
@torch.no_grad()
def test_an_edit_of_a_heads_input_is_a_pass_in_which_its_projections_read_it(family: str, rows: str) -> None:
    """By hand: head 1's stream shifted before ln1; key-value heads read the inputs of the first heads."""
    model, inputs = model_and_inputs(family, rows)
    model = own_copy(model)
    plain = model(inputs)
    model.set_use_attn_in(True)
    real = inputs.attention_mask.bool()
    torch.testing.assert_close(model(inputs)[real], plain[real], atol=1e-5, rtol=1e-5)
    torch.manual_seed(1)
    shift = torch.randn(model.cfg.d_model)

    def edit(x: Tensor, hook: Any) -> None:
        x[:, :, 1] += shift

    edited = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_attn_in", edit)])
    model.set_use_attn_in(False)
    block, d = model.blocks[1], model.cfg.d_head
    _, cache = model.run_with_cache(inputs, names_filter="blocks.1.hook_resid_pre")
    stream = cache["resid_pre", 1] + shift
    read = normed(block.ln1, stream)

    def made(side: str, n: int) -> Any:
        own = getattr(block.attn, f"{side}_proj")(read).unflatten(-1, (n, d))[:, :, 1]

        def put(x: Tensor, hook: Any) -> None:
            x[:, :, 1] = own

        return (f"blocks.1.attn.hook_{side}", put)

    n_kv = model.cfg.n_key_value_heads
    made_anew = [made("q", model.cfg.n_heads)]
    if n_kv >= 2:  # head 1 of keys and values reads the input of query head 1
        made_anew += [made("k", n_kv), made("v", n_kv)]
    by_hand = model.run_with_hooks(inputs, fwd_hooks=made_anew)
    torch.testing.assert_close(edited[real], by_hand[real], atol=2e-5, rtol=1e-4)
    assert (by_hand - plain)[real].abs().max() > 0.01


def test_the_two_switches_for_inputs_of_heads_exclude_each_other(family: str) -> None:
    model = own_copy(model_and_inputs(family, "one image")[0])
    model.set_use_attn_in(True)
    with pytest.raises(InputError, match="use_attn_in"):
        model.set_use_split_qkv_input(True)
    model.set_use_attn_in(False)
    model.set_use_split_qkv_input(True)
    with pytest.raises(InputError, match="use_split_qkv_input"):
        model.set_use_attn_in(True)
    assert model.cfg.use_split_qkv_input and not model.cfg.use_attn_in


# ---------------------------------------------------------------- get_act_name


ALIASES = ("q_input", "k_input", "v_input", "attn_in", "q_normed", "k_normed")


@pytest.mark.parametrize("short", ALIASES)
def test_names_of_get_act_name_are_accepted_wherever_a_name_is(short: str) -> None:
    model = own_copy(tiny.tiny_model())
    inputs = tiny.inputs(tiny.ONE_IMAGE)
    alias = get_act_name(short, 1)
    own = f"blocks.1.attn.hook_{short}"
    assert alias == f"blocks.1.hook_{short}"
    if short.endswith("normed"):  # no text tower has them yet: refused by the name that was given
        with pytest.raises(HookError, match=alias):
            model.run_with_hooks(inputs, fwd_hooks=[(alias, lambda x, hook: x)])
        return
    with pytest.raises(HookError, match="set_use_"):
        model.run_with_hooks(inputs, fwd_hooks=[(alias, lambda x, hook: x)])
    getattr(model, f"set_use_{'attn_in' if short == 'attn_in' else 'split_qkv_input'}")(True)
    seen: list[str] = []
    note = [(alias, lambda x, hook: seen.append(hook.name))]
    model.run_with_hooks(inputs, fwd_hooks=note)
    with model.hooks(fwd_hooks=note):
        model(inputs)
    model.add_hook(alias, note[0][1])
    model(inputs)
    model.reset_hooks()
    model.generate(inputs, 1, fwd_hooks=note)
    assert seen == [own] * 4
    _, cache = model.run_with_cache(inputs, names_filter=alias)
    assert list(cache.cache_dict) == [own]
    for key in (alias, own, (short, 1), (short, -2)):
        assert cache[key] is cache[own]
    assert alias in cache and own in cache


def test_names_of_get_act_name_are_accepted_in_the_vision_tower() -> None:
    model, inputs = normed_tower()
    _, cache = model.run_with_cache(inputs, names_filter="vision.blocks.0.hook_q_normed")
    assert cache.vision["q_normed", 0] is cache["vision.blocks.0.attn.hook_q_normed"]
    assert "vision.blocks.0.hook_q_normed" in cache
