"""Processed weights compute what the published ones do, and say that they are processed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_hand import factor
from families import FAMILIES, KINDS, ROWS, inputs_of, own_copy, plain_first, tiny_model
from torch import Tensor
from transformer_lens.weight_processing import ProcessWeights

from hooked_vlm import CheckpointError, HookedVLM, InputError
from hooked_vlm.model.weight_processing import center_unembed, fold_ln, fold_value_biases, untie

FUNCTIONS: dict[str, Callable[[Any], None]] = {
    "fold_ln": fold_ln,
    "center_unembed": center_unembed,
    "fold_value_biases": fold_value_biases,
}
TIED = [kind for kind in KINDS if kind.endswith(", tied")]


def folds_of(model: Any) -> list[str]:
    """Those that have something to fold: not every family has value biases, and a soft cap keeps `W_U` as it is."""
    none = {"fold_value_biases"} if model.blocks[0].attn.v_proj.bias is None else set()
    none |= set() if model.cfg.output_logits_soft_cap is None else {"center_unembed"}
    return [name for name in FUNCTIONS if name not in none]


@pytest.fixture(params=[*plain_first([*FAMILIES, *TIED[:-1]]), TIED[-1]])
def case(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model of the test's own, and inputs with images."""
    return own_copy(tiny_model(request.param)), inputs_of(request.param, ROWS["padded"])


@torch.no_grad()
def log_probs(model: Any, inputs: Any) -> Tensor:
    return model(inputs)[inputs.attention_mask.bool()].log_softmax(-1)


@pytest.mark.parametrize("names", [*[(name,) for name in FUNCTIONS], tuple(FUNCTIONS)], ids="+".join)
def test_the_function_stays_to_1e_5(case: tuple[Any, Any], names: tuple[str, ...]) -> None:
    model, inputs = case
    before, published = log_probs(model, inputs), {n: p.clone() for n, p in model.named_parameters()}
    assert model.cfg.processed == ()
    if len(names) == 1 and names[0] not in folds_of(model):
        with pytest.raises(InputError, match=r"this model has none|soft cap"):
            FUNCTIONS[names[0]](model)
        assert all(p.equal(published[n]) for n, p in model.named_parameters()) and model.cfg.processed == ()
        return
    names = tuple(name for name in names if name in folds_of(model))
    for name in names:
        FUNCTIONS[name](model)
    after = log_probs(model, inputs)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert model.cfg.processed == names
    assert any(not p.equal(published.get(n, p + 1)) for n, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    generated = model.generate(inputs, max_new_tokens=3)
    assert generated.shape[1] == inputs.shape[1] + 3


def test_weights_are_those_of_transformer_lens(case: tuple[Any, Any]) -> None:
    model, _ = case
    state = ProcessWeights.fold_layer_norm(model.tl_state_dict(), model.cfg, fold_biases=False, center_weights=False)
    if model.cfg.output_logits_soft_cap is None:
        state = ProcessWeights.center_unembed(state, cfg=model.cfg)
    state = ProcessWeights.fold_value_biases(state, model.cfg)
    for fold in folds_of(model):
        FUNCTIONS[fold](model)
    for name, found in model.tl_state_dict().items():
        if name.endswith(("ln1.w", "ln2.w", "ln_final.w")):
            assert found.eq(0.0 if model.cfg.rmsnorm_uses_offset else 1.0).all()
        else:
            torch.testing.assert_close(found, state[name], atol=1e-5, rtol=1e-5, msg=name)


def test_folded_norms_leave_hooks_without_weight(case: tuple[Any, Any]) -> None:
    model, inputs = case
    _, before = model.run_with_cache(inputs)
    weight = factor(model.blocks[1].ln1).clone()
    fold_ln(model)
    _, after = model.run_with_cache(inputs)
    real = inputs.attention_mask.bool()
    read, normalized = "blocks.1.ln1.hook_out", "blocks.1.ln1.hook_normalized"
    torch.testing.assert_close(after[read][real] * weight, before[read][real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[normalized][real], before[normalized][real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after["q", 1][real], before["q", 1][real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_model_is_untied_first_and_its_embedding_stays(kind: str) -> None:
    model = own_copy(tiny_model(kind))
    embedding = model.W_E.clone()
    fold_ln(model)
    assert model.W_E.equal(embedding) and not model.W_U.T.equal(embedding)
    assert model.W_E.data_ptr() != model.W_U.data_ptr() and not model.cfg.tie_word_embeddings
    untied = model.unembed.weight
    untie(model)
    assert model.unembed.weight is untied


@pytest.mark.parametrize("name", FUNCTIONS)
def test_folding_twice_is_an_error(case: tuple[Any, Any], name: str) -> None:
    model, inputs = case
    if name not in folds_of(model):
        with pytest.raises(InputError, match=r"biases|soft cap"):
            FUNCTIONS[name](model)
        return
    FUNCTIONS[name](model)
    before = log_probs(model, inputs)
    with pytest.raises(InputError, match="before"):
        FUNCTIONS[name](model)
    assert log_probs(model, inputs).equal(before) and model.cfg.processed == (name,)


def test_without_value_biases_there_is_nothing_to_fold() -> None:
    model = own_copy(tiny_model("qwen2-vl"))
    for block in model.blocks:
        block.attn.v_proj.bias = None
    with pytest.raises(InputError, match="bias"):
        fold_value_biases(model)


def test_a_model_that_shares_its_weights_keeps_them_and_loading_gives_them_back(family: str, tmp_path: Any) -> None:
    hf_model = copy.deepcopy(KINDS[family].hf())
    before = {name: p.clone() for name, p in hf_model.named_parameters()}
    model = HookedVLM.from_hf(hf_model)
    folds = folds_of(model)
    for fold in folds:
        FUNCTIONS[fold](model)
    assert all(p.equal(before[name]) for name, p in hf_model.named_parameters())
    assert HookedVLM.from_hf(hf_model).cfg.processed == ()
    if "fold_value_biases" in folds:
        with pytest.raises(CheckpointError, match=r"o_proj\.bias"):
            model.save_pretrained(tmp_path / "folded")
    else:
        model.save_pretrained(tmp_path / "folded")
        loaded: Any = HookedVLM.from_pretrained(tmp_path / "folded", device="cpu")
        assert all(p.equal(loaded.get_parameter(name)) for name, p in model.named_parameters())
