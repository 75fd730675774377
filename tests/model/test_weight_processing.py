"""Processed weights compute what the published ones do, and say that they are processed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_qwen2_vl as tiny
import torch
from families import model_and_inputs
from torch import Tensor
from transformer_lens.weight_processing import ProcessWeights

from hooked_vlm import CheckpointError, HookedVLM, InputError
from hooked_vlm.model.weight_processing import center_unembed, fold_ln, fold_value_biases, untie

FUNCTIONS: dict[str, Callable[[Any], None]] = {
    "fold_ln": fold_ln,
    "center_unembed": center_unembed,
    "fold_value_biases": fold_value_biases,
}
CASES = ("qwen2-vl", "qwen2-vl tied", "internvl2")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model of the test's own, and inputs with images."""
    family, *tied = request.param.split()
    model, inputs = model_and_inputs(family, "padded")
    return copy.deepcopy(tiny.tiny_model(tied=True) if tied else model), inputs


@torch.no_grad()
def log_probs(model: Any, inputs: Any) -> Tensor:
    return model(inputs)[inputs.attention_mask.bool()].log_softmax(-1)


@pytest.mark.parametrize("names", [*[(name,) for name in FUNCTIONS], tuple(FUNCTIONS)], ids="+".join)
def test_the_function_stays_to_1e_5(case: tuple[Any, Any], names: tuple[str, ...]) -> None:
    model, inputs = case
    before, published = log_probs(model, inputs), {n: p.clone() for n, p in model.named_parameters()}
    assert model.cfg.processed == ()
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
    state = ProcessWeights.center_unembed(state, cfg=model.cfg)
    state = ProcessWeights.fold_value_biases(state, model.cfg)
    for fold in FUNCTIONS.values():
        fold(model)
    for name, found in model.tl_state_dict().items():
        if name.endswith(("ln1.w", "ln2.w", "ln_final.w")):
            assert found.eq(1).all()
        else:
            torch.testing.assert_close(found, state[name], atol=1e-5, rtol=1e-5, msg=name)


def test_folded_norms_leave_hooks_without_weight(case: tuple[Any, Any]) -> None:
    model, inputs = case
    _, before = model.run_with_cache(inputs)
    weight = model.blocks[1].ln1.weight.clone()
    fold_ln(model)
    _, after = model.run_with_cache(inputs)
    real = inputs.attention_mask.bool()
    read, normalized = "blocks.1.ln1.hook_out", "blocks.1.ln1.hook_normalized"
    torch.testing.assert_close(after[read][real] * weight, before[read][real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[normalized][real], before[normalized][real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after["q", 1][real], before["q", 1][real], atol=1e-5, rtol=1e-5)


def test_a_tied_model_is_untied_first_and_its_embedding_stays() -> None:
    model = copy.deepcopy(tiny.tiny_model(tied=True))
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
    FUNCTIONS[name](model)
    before = log_probs(model, inputs)
    with pytest.raises(InputError, match="before"):
        FUNCTIONS[name](model)
    assert log_probs(model, inputs).equal(before) and model.cfg.processed == (name,)


def test_without_value_biases_there_is_nothing_to_fold() -> None:
    model = copy.deepcopy(tiny.tiny_model())
    for block in model.blocks:
        block.attn.v_proj.bias = None
    with pytest.raises(InputError, match="bias"):
        fold_value_biases(model)


def test_a_model_that_shares_its_weights_keeps_them_and_loading_gives_them_back(tmp_path: Any) -> None:
    hf_model = copy.deepcopy(tiny.tiny_hf())
    before = {name: p.clone() for name, p in hf_model.named_parameters()}
    model = HookedVLM.from_hf(hf_model)
    for fold in FUNCTIONS.values():
        fold(model)
    assert all(p.equal(before[name]) for name, p in hf_model.named_parameters())
    assert HookedVLM.from_hf(hf_model).cfg.processed == ()
    with pytest.raises(CheckpointError, match=r"o_proj\.bias"):
        model.save_pretrained(tmp_path / "folded")
