"""Values as bytes: how wrong they may be, and how much room they take."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hooked_vlm import InputError
from hooked_vlm.viewer.quantisation import BUDGET, STEPS, decoded, pack, quantise

numbers = st.floats(-1e3, 1e3, width=32) | st.just(float("nan"))


@given(arrays(np.float32, (2, 3, 5), elements=numbers), st.sampled_from(STEPS))
def test_each_value_is_off_by_half_a_scale_at_most(values: np.ndarray, steps: int) -> None:
    made = quantise(values, steps)
    assert np.array_equal(np.isnan(made.values), np.isnan(values))
    largest = np.nan_to_num(np.abs(values)).max(-1)
    signed = np.nanmin(values, initial=0.0) < 0
    bound = largest / (steps // 2 if signed else steps) / 2
    assert (np.nan_to_num(np.abs(made.values - values)) <= bound[..., None] * (1 + 1e-4) + 1e-30).all()
    np.testing.assert_allclose(np.nan_to_num(np.abs(made.values)).max(-1), largest, rtol=1e-5, atol=1e-30)


def test_codes_computed_by_hand() -> None:
    made = quantise(np.array([[0.0, 1.0, 2.6, 254.0], [0.0, 0.0, 0.0, 0.0]], np.float32))
    assert made.codes.tolist() == [[0, 1, 3, 254], [0, 0, 0, 0]] and made.scales.tolist() == [1, 0] and made.zero == 0
    made = quantise(np.array([[-127.0, 0.0, 63.6, np.nan]], np.float32))
    assert made.codes.tolist() == [[0, 127, 191, 255]] and made.zero == 127
    with pytest.raises(InputError, match="NaN"):
        quantise(np.array([[np.inf]], np.float32))


def test_a_row_comes_back_with_its_shares() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 7)).astype(np.float32)
    shares = np.random.default_rng(1).random((2, 3, 4)).astype(np.float32)
    packed = pack(values, shares)
    for row, text in enumerate(packed.rows):
        found, elsewhere = decoded(text, (3, 4, 7), packed.zero)
        assert np.array_equal(elsewhere, shares[row])
        assert (np.abs(found - values[row]) <= packed.error * np.abs(values[row]).max(-1, keepdims=True) * 1.0001).all()


def test_what_does_not_compress_is_coarser_and_says_so() -> None:
    values = np.random.default_rng(0).random((2, 4, 4, 256), np.float32)
    fine = pack(values)
    assert fine.error == 0.5 / 254
    size = sum(map(len, fine.rows))
    coarse = pack(values, budget=int(0.8 * size))
    assert sum(map(len, coarse.rows)) <= 0.8 * size and coarse.error > fine.error
    for row, text in enumerate(coarse.rows):
        found, _ = decoded(text, (4, 4, 256), coarse.zero)
        assert (np.abs(found - values[row]) <= coarse.error * values[row].max(-1, keepdims=True) * 1.0001).all()
    with pytest.raises(InputError, match="MB"):
        pack(values, budget=size // 10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "noise"])
def test_a_large_model_fits_into_a_page(kind: str) -> None:
    """28 x 28 heads, 1,024 image tokens, 32 answer tokens."""
    random, shape = np.random.default_rng(0), (32, 28, 28, 1024)
    values = random.random(shape, np.float32)
    if kind == "attention":  # softmax of normal scores: broader than most heads of real models
        scores = random.standard_normal(shape, np.float32)
        values = np.exp(2 * scores)
        values /= values.sum(-1, keepdims=True)
    packed = pack(values, values.sum(-1))
    assert sum(map(len, packed.rows)) <= BUDGET < 15e6
    print(f"{kind}: {sum(map(len, packed.rows)) / 1e6:.1f} MB, error {packed.error:.3%}")
