"""Weights in TransformerLens' shapes: they are what the hooks see them do, and editing a view edits the model."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny_qwen2_vl import ONE_IMAGE, PADDED, hf_batch, inputs, tiny_hf, tiny_model
from torch import Tensor

from hooked_vlm import HookedVLM

ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
MLP = ("W_in", "W_gate", "W_out")
ABSENT = [f"blocks.{layer}.{name}" for layer in range(3) for name in ("attn.b_O", "mlp.b_in", "mlp.b_out")]


class Pair:
    """A reference and a model of its own on the same storage, to be edited."""

    def __init__(self, tied: bool = False) -> None:
        self.hf: Any = deepcopy(tiny_hf(tied))
        self.model: Any = HookedVLM.from_hf(self.hf)

    @torch.no_grad()
    def logits(self) -> tuple[Tensor, Tensor]:
        batch = hf_batch(ONE_IMAGE)
        return self.model(self.model.inputs_from_hf(batch)), self.hf(**batch).logits


@pytest.fixture
def pair() -> Pair:
    return Pair()


def close(a: Tensor, b: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---------------------------------------------------------------- what the weights do


@pytest.mark.parametrize("side", ["", "vision."])
@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_activations_are_products_of_the_weights(side: str, layer: int) -> None:
    model = tiny_model()
    _, cache = model.run_with_cache(inputs(ONE_IMAGE))
    block: Any = (model.vision.blocks if side else model.blocks)[layer]
    at, attn, mlp = f"{side}blocks.{layer}", block.attn, block.mlp
    normalized = cache[f"{at}.ln1.hook_out"]
    for name in "QKV":
        made = torch.einsum("bpm,hmd->bphd", normalized, getattr(attn, f"W_{name}")) + getattr(attn, f"b_{name}")
        close(cache[f"{at}.attn.hook_{name.lower()}"], made)
    out = torch.einsum("bphd,hdm->bpm", cache[f"{at}.attn.hook_z"], attn.W_O) + attn.b_O
    close(cache[f"{at}.hook_attn_out"], out)
    normalized = cache[f"{at}.ln2.hook_out"]
    if mlp.W_gate is None:
        close(cache[f"{at}.mlp.hook_pre"], normalized @ mlp.W_in + mlp.b_in)
    else:
        close(cache[f"{at}.mlp.hook_pre"], normalized @ mlp.W_gate)
        close(cache[f"{at}.mlp.hook_pre_linear"], normalized @ mlp.W_in + mlp.b_in)
    close(cache[f"{at}.hook_mlp_out"], cache[f"{at}.mlp.hook_post"] @ mlp.W_out + mlp.b_out)
    scale, stream = cache[f"{at}.ln1.hook_scale"], cache[f"{at}.hook_resid_pre"]
    shifted = stream - stream.mean(-1, keepdim=True) if side else stream
    bias = block.ln1.bias if side else 0
    close(cache[f"{at}.ln1.hook_normalized"], shifted / scale)
    close(cache[f"{at}.ln1.hook_out"], shifted / scale * block.ln1.w + bias)


@torch.no_grad()
def test_embedding_and_unembedding_are_products_of_the_weights() -> None:
    model, batch = tiny_model(), inputs(ONE_IMAGE)
    logits, cache = model.run_with_cache(batch)
    close(logits, cache["ln_final.hook_out"] @ model.W_U + model.b_U)
    text = batch.tokens[0] != 100
    assert torch.equal(cache["hook_embed"][0, text], model.W_E[batch.tokens[0, text]])


@torch.no_grad()
def test_the_residual_stream_is_a_sum_of_head_outputs_and_biases() -> None:
    model, batch = tiny_model(), inputs(PADDED)
    model.set_use_attn_result(True)
    try:
        _, cache = model.run_with_cache(batch)
    finally:
        model.set_use_attn_result(False)
    parts = cache["hook_embed"] + model.accumulated_bias(2, mlp_input=True)
    for layer in range(3):
        parts = parts + cache["result", layer].sum(2) + cache["mlp_out", layer]
    real = batch.attention_mask.bool()
    close(parts[real], cache["resid_post", 2][real])


# ---------------------------------------------------------------- views and copies


def edits() -> list[str]:
    names = [f"attn.{name}" for name in ATTENTION] + [f"mlp.{name}" for name in MLP]
    return [*(f"blocks.1.{name}" for name in (*names, "ln1.w", "ln2.w")), "ln_final.w", "embed.W_E", "unembed.W_U"]


@pytest.mark.parametrize("name", edits())
@torch.no_grad()
def test_an_edit_in_place_edits_the_model_and_the_reference_it_shares_storage_with(pair: Pair, name: str) -> None:
    before, _ = pair.logits()
    weight = pair.model.tl_parameters()[name]
    if name == "blocks.1.attn.W_O":
        pair.model.blocks[1].attn.W_O[2] *= 3  # one head, written through a view of the view
    else:
        weight.mul_(1.5)
    ours, theirs = pair.logits()
    assert (ours - before).abs().max() > (1e-4 if name != "blocks.1.attn.b_K" else 1e-9)
    close(ours, theirs)


@torch.no_grad()
def test_assigning_to_a_view_writes_into_the_model(pair: Pair) -> None:
    attn, mlp = pair.model.blocks[1].attn, pair.model.blocks[0].mlp
    expected = attn.W_O * 2
    attn.W_O *= 2
    assert torch.equal(attn.W_O, expected)
    attn.b_Q += 0.5
    mlp.W_out = torch.zeros(96, 64)
    pair.model.W_E *= 1.5
    pair.model.vision.blocks[0].attn.b_O += 0.5
    attn.W_K = torch.nn.Parameter(attn.W_K * 2)
    close(*pair.logits())
    with pytest.raises(RuntimeError, match="bias"):
        attn.b_O = torch.ones(64)
    with pytest.raises(AttributeError, match=r"model\.blocks\[layer\]\.attn\.W_O"):
        pair.model.W_O *= 2


@torch.no_grad()
def test_an_edit_of_the_reference_edits_the_model(pair: Pair) -> None:
    before, _ = pair.logits()
    for parameter in pair.hf.parameters():
        parameter.mul_(1.1)
    ours, theirs = pair.logits()
    assert (ours - before).abs().max() > 1e-2
    close(ours, theirs)


@torch.no_grad()
def test_no_parameter_is_copied_from_the_reference(pair: Pair) -> None:
    storages = {p.untyped_storage().data_ptr() for p in pair.hf.parameters()}
    assert {p.untyped_storage().data_ptr() for p in pair.model.parameters()} == storages
    assert all(p.requires_grad and p.is_leaf for p in pair.model.parameters()) and not pair.model.training


@pytest.mark.parametrize("name", [*ATTENTION, *MLP, "b_O", "b_in", "b_out"])
@torch.no_grad()
def test_stacked_weights_are_copies_of_all_layers(pair: Pair, name: str) -> None:
    stacked = getattr(pair.model, name)
    part = "mlp" if name in (*MLP, "b_in", "b_out") else "attn"
    for layer, block in enumerate(pair.model.blocks):
        assert torch.equal(stacked[layer], getattr(getattr(block, part), name))
    before, _ = pair.logits()
    stacked.fill_(7.0)
    assert torch.equal(pair.logits()[0], before)


@torch.no_grad()
def test_tied_embeddings_are_one_matrix() -> None:
    pair = Pair(tied=True)
    pair.model.W_U[:, 5] = 2.0
    assert pair.model.W_E[5].eq(2.0).all()
    assert pair.model.embed.weight is pair.model.unembed.weight
    close(*pair.logits())
    untied = Pair()
    untied.model.W_U[:, 5] = 2.0
    assert not untied.model.W_E[5].eq(2.0).any()


# ---------------------------------------------------------------- absent biases


def test_absent_biases_are_listed_read_as_zeros_and_refuse_edits() -> None:
    model = tiny_model()
    assert model.absent_biases == [*ABSENT, "unembed.b_U"]
    bias = model.blocks[0].attn.b_O
    assert bias.shape == (64,) and not bias.any()

    def out() -> None:
        torch.add(torch.ones(64), 1, out=bias)

    def item() -> None:
        bias[0] = 1

    def added() -> None:
        model.blocks[0].attn.b_O += 1

    views = (bias[:4], bias.view(8, 8), bias.data, bias.detach(), bias.chunk(2)[0], next(iter(bias)), bias.unbind()[0])
    edits = (
        out,
        item,
        added,
        lambda: bias.add_(1),
        lambda: bias.copy_(torch.ones(64)),
        *(view.zero_ for view in views),
    )
    for edit in edits:
        with pytest.raises(RuntimeError, match="bias"):
            edit()
    with torch.no_grad():
        computed = (
            bias + 1,
            torch.stack([bias, bias]),
            torch.ones(64).add_(bias),
            torch.cat((bias, bias)),
            bias.clone(),
        )
    assert all(type(tensor) is Tensor for tensor in computed) and not bias.any()
    assert torch.reshape(input=bias, shape=(8, 8)).shape == (8, 8)


# ---------------------------------------------------------------- moves


@pytest.mark.parametrize("move", ["to", "method", "keyword"])
def test_cfg_follows_the_dtype(pair: Pair, move: str) -> None:
    model = pair.model
    _ = {
        "to": lambda: model.to(torch.bfloat16),
        "method": model.bfloat16,
        "keyword": lambda: model.to(dtype=torch.bfloat16),
    }[move]()
    assert model.cfg.dtype is torch.bfloat16 and model.blocks[0].attn.W_Q.dtype is torch.bfloat16
    batch = hf_batch(ONE_IMAGE)
    assert model.generate(model.inputs_from_hf(batch), 2).shape[1] == batch["input_ids"].shape[1] + 2


def test_a_cast_keeps_tied_embeddings_tied() -> None:
    model = Pair(tied=True).model.to(torch.float64)
    assert model.embed.weight is model.unembed.weight
    assert "lm_head.weight" not in model.to_hf_state_dict()


def test_directions_of_tokens_are_columns_of_the_unembedding() -> None:
    model = tiny_model()
    assert torch.equal(model.tokens_to_residual_directions(7), model.W_U[:, 7])
    assert torch.equal(model.tokens_to_residual_directions(torch.tensor([[7, 8]])), model.W_U.T[torch.tensor([[7, 8]])])
