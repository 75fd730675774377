"""A dictionary computes its formulas, in the units of the stream, with gradients; what does not fit is refused."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from families import tiny_model
from planted import ACTIVATIONS, RESID, decoded_by_hand, encoded_by_hand, planted_dictionary, random_dictionary
from torch import Tensor

from hooked_vlm.errors import FeatureError, HookError
from hooked_vlm.features import Dictionary
from hooked_vlm.features.dictionary import width_at

D, N = 12, 24
OUT = "blocks.1.hook_mlp_out"


def streams(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)) + 0.3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_autoencoder_is_its_formulas(activation: str) -> None:
    x = streams(2, 3)
    for subtracts, normalisation in product((False, True), ("none", "layer_norm", "constant_norm_rescale")):
        own = random_dictionary(D, activation=activation, apply_b_dec_to_input=subtracts, normalisation=normalisation)
        features = own.encode(x)
        out = own.decode(features, x)
        assert features.shape == (2, 3, N) and out.shape == (2, 3, D)
        assert 0 < int((features > 0).sum()) < features.numel()
        for row, position in product(range(2), range(3)):
            here = x[row, position]
            torch.testing.assert_close(features[row, position], encoded_by_hand(own, here), atol=1e-5, rtol=1e-5)
            by_hand = decoded_by_hand(own, features[row, position], here)
            torch.testing.assert_close(out[row, position], by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_writes_another_width(activation: str, skip: bool) -> None:
    W_skip = torch.randn(7, D, generator=torch.Generator().manual_seed(8)) if skip else None
    own = random_dictionary(D, activation=activation, d_out=7, out_hook_name=OUT, W_skip=W_skip)
    x = streams(4)
    out = own.decode(own.encode(x), x)
    for row in range(4):
        by_hand = decoded_by_hand(own, encoded_by_hand(own, x[row]), x[row])
        torch.testing.assert_close(out[row], by_hand, atol=1e-5, rtol=1e-5)


def test_planted_directions_are_recovered() -> None:
    own = planted_dictionary(D, 6)
    planted = torch.tensor([[0.0, 2.0, 0.0, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 3.0]])
    x = planted @ own.W_dec
    torch.testing.assert_close(own.encode(x), planted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own.decode(own.encode(x)), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
def test_gradients_reach_the_stream_and_the_features(activation: str, normalisation: str) -> None:
    own = random_dictionary(D, activation=activation, normalisation=normalisation).to(torch.float64)
    x = streams(2).double().requires_grad_()

    def reconstruct(x: Tensor) -> Tensor:
        return own.decode(own.encode(x), x)

    assert torch.autograd.gradcheck(reconstruct, (x,))
    features = own.encode(x.detach()).requires_grad_()
    (gradient,) = torch.autograd.grad(own.decode(features, x.detach()).sum(), features)
    assert gradient.shape == features.shape and bool((gradient != 0).all())


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
def test_a_vector_of_zeros_stays_finite(normalisation: str) -> None:
    own = random_dictionary(D, normalisation=normalisation)
    x = torch.zeros(2, D, requires_grad=True)
    own.decode(own.encode(x), x).sum().backward()
    assert x.grad is not None and bool(torch.isfinite(own.decode(own.encode(x), x)).all())


def test_a_scale_goes_into_the_weights() -> None:
    own, x = random_dictionary(D, apply_b_dec_to_input=True), streams(5)
    folded = own.rescaled(2.5)
    torch.testing.assert_close(folded.encode(x), own.encode(2.5 * x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded.decode(folded.encode(x)), own.decode(own.encode(2.5 * x)) / 2.5)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(FeatureError, match="positive"):
            own.rescaled(scale)
    with pytest.raises(FeatureError, match="layer_norm"):
        replace(own, normalisation="layer_norm").rescaled(2.0)


def test_it_computes_in_its_own_dtype_and_moves() -> None:
    own = random_dictionary(D).to(torch.float64)
    assert own.encode(streams(2).bfloat16()).dtype == torch.float64
    assert own.to("cpu", torch.bfloat16).decode(torch.ones(N)).dtype == torch.bfloat16
    with pytest.raises(FeatureError, match="not finite"):
        replace(own, b_dec=own.b_dec + 1e30).to(torch.float16)


def test_a_normalised_dictionary_asks_for_its_input() -> None:
    own = random_dictionary(D, normalisation="layer_norm")
    with pytest.raises(FeatureError, match=r"layer_norm.*decode\(features, x\)"):
        own.decode(own.encode(streams(2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"b_enc": torch.zeros(3)}, r"b_enc is \[3\].*\[24\]"),
        ({"W_dec": torch.zeros(5, D)}, r"W_dec is \[5, 12\].*\[24, 12\]"),
        ({"W_enc": torch.zeros(D)}, "W_enc is"),
        ({"b_dec": torch.full((D,), float("nan"))}, "b_dec has numbers that are not finite"),
        ({"b_dec": torch.zeros(D, dtype=torch.float64)}, "one dtype"),
        ({"W_dec": torch.zeros(N, 5), "b_dec": torch.zeros(5)}, "writes what it reads"),
        ({"activation": "topk"}, "needs k"),
        ({"activation": "topk", "k": 0}, "between 1 and"),
        ({"k": 3}, "has no k"),
        ({"threshold": torch.zeros(N)}, "has no threshold"),
        ({"activation": "tanh"}, "activation is one of"),
        ({"normalisation": "batch"}, "normalisation is one of"),
        ({"hook_name": ""}, "hook_name"),
        ({"W_skip": torch.zeros(D, D)}, "skip path"),
        ({"out_hook_name": OUT, "apply_b_dec_to_input": True}, "b_dec of a transcoder"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FeatureError, match=message):  # annotations, executed in tests, would be first to refuse some
        init = getattr(Dictionary.__init__, "__wrapped__", Dictionary.__init__)
        init(object.__new__(Dictionary), **{**vars(random_dictionary(D)), **fields})


def test_it_fits_a_model_or_says_why_not() -> None:
    model = tiny_model("qwen3-vl")
    cfg = model.cfg
    for name, width in {
        RESID: cfg.d_model, "blocks.0.attn.hook_z": cfg.n_heads * cfg.d_head, "blocks.0.mlp.hook_post": cfg.d_mlp,
        "hook_image_features": cfg.d_model, "vision.blocks.0.hook_resid_post": cfg.vision.d_model,
        "blocks.0.attn.hook_v": cfg.n_key_value_heads * cfg.d_head,
    }.items():  # fmt: skip
        assert width_at(model, name) == width
        random_dictionary(width, hook_name=name).check_fits(model)
    with pytest.raises(FeatureError, match=f"reads 3 numbers.*has {cfg.d_model}"):
        random_dictionary(3).check_fits(model)
    with pytest.raises(FeatureError, match="writes 5"):
        random_dictionary(cfg.d_model, d_out=5, out_hook_name=OUT).check_fits(model)
    with pytest.raises(HookError, match="no hook point"):
        random_dictionary(3, hook_name="blocks.99.hook_resid_post").check_fits(model)
    with pytest.raises(FeatureError, match="pairs of positions"):
        random_dictionary(3, hook_name="blocks.0.attn.hook_pattern").check_fits(model)


def test_transcoder_defaults_to_where_it_reads() -> None:
    own = random_dictionary(D)
    assert isinstance(own, Dictionary) and own.out_hook_name == RESID and not own.is_transcoder
