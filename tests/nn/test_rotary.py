"""Rotations against a literal complex one and against `transformers`."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLRotaryEmbedding,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
)

from hooked_vlm.config import RopeScaling
from hooked_vlm.nn.rotary import Rotation, frequencies, patch_rotation, scaled_frequencies, text_rotation

THETA, D_HEAD = 1e4, 16
SECTIONS = (2, 3, 3)
TEXT, EXACT = torch.float32, torch.float64


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Entry i and entry i + half of every head as one complex number, times exp(i angle)."""
    real, imaginary = x.chunk(2, dim=-1)
    z = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    return torch.cat((z.real, z.imag), dim=-1)


def positions_of(seed: int, n: int = 9, axes: int = 3) -> Tensor:
    return torch.randint(0, 300, (axes, 2, n), generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 999), st.sampled_from([4, 16, 64]))
def test_a_rotation_turns_pairs_as_complex_numbers(seed: int, d_head: int) -> None:
    torch.manual_seed(seed)
    angles, x = 10 * torch.randn(2, 5, d_head // 2), torch.randn(2, 5, 3, d_head)
    close(Rotation.by(angles)(x), turned(x, angles))


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_the_inverse_undoes_it_and_lengths_are_kept(factor: float) -> None:
    rotation, x = Rotation.by(torch.randn(2, 5, 8), factor), torch.randn(2, 5, 3, D_HEAD)
    close(rotation.inverse()(rotation(x)), x)
    close(rotation(x).norm(dim=-1), factor * x.norm(dim=-1))


@given(st.integers(0, 999), st.integers(-50, 50))
def test_scores_depend_on_the_distance_alone(seed: int, shift: int) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, D_HEAD, dtype=EXACT)

    def score(at_q: int, at_k: int) -> float:
        def rotate(x: Tensor, at: int) -> Tensor:
            return text_rotation(torch.tensor([[[at]]]), D_HEAD, THETA, None, EXACT)(x)

        return float((rotate(q, at_q) * rotate(k, at_k)).sum())

    assert score(60, 100) == pytest.approx(score(60 + shift, 100 + shift), abs=1e-4)


@given(st.integers(0, 999))
def test_frequencies_of_m_rope_are_shared_out_between_the_axes(seed: int) -> None:
    ids, x = positions_of(seed), torch.randn(2, 9, 4, D_HEAD)
    axis = [a for a, n in enumerate(SECTIONS) for _ in range(n)]
    angles = torch.stack([ids[a] * THETA ** (-2 * i / D_HEAD) for i, a in enumerate(axis)], dim=-1)
    torch.testing.assert_close(
        text_rotation(ids, D_HEAD, THETA, SECTIONS, TEXT)(x), turned(x, angles), atol=1e-3, rtol=0
    )


@given(st.integers(0, 999))
def test_m_rope_is_that_of_transformers(seed: int) -> None:
    ids, x = positions_of(seed), torch.randn(2, 9, 4, D_HEAD)
    rope = {"rope_type": "default", "rope_theta": THETA, "mrope_section": list(SECTIONS)}
    config = transformers.Qwen2VLConfig(
        text_config={"hidden_size": 64, "num_attention_heads": 4, "rope_parameters": rope}
    )
    cos, sin = Qwen2VLRotaryEmbedding(config.text_config)(x, ids)  # pyright: ignore[reportArgumentType]
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    close(text_rotation(ids, D_HEAD, THETA, SECTIONS, TEXT)(x), theirs)


@given(st.integers(0, 999))
def test_three_equal_axes_turn_as_one(seed: int) -> None:
    ids, x = positions_of(seed, axes=1), torch.randn(2, 9, 4, D_HEAD)
    together = text_rotation(ids.expand(3, -1, -1), D_HEAD, THETA, SECTIONS, TEXT)
    assert torch.equal(together(x), text_rotation(ids, D_HEAD, THETA, None, TEXT)(x))


def test_patches_turn_by_row_and_column_as_in_transformers() -> None:
    at, x = torch.tensor([[row, column] for row in range(4) for column in range(6)]), torch.randn(24, 2, D_HEAD)
    angles = (at[..., None] * frequencies(D_HEAD // 2, THETA, at.device)).flatten(-2)
    ours = patch_rotation(at, D_HEAD, THETA)(x)
    close(ours, turned(x, angles))
    both = torch.cat((angles, angles), dim=-1)
    theirs, _ = apply_rotary_pos_emb_vision(x, x, both.cos(), both.sin())
    close(ours, theirs)


def test_parts_of_a_rotation_are_rotations_of_the_parts() -> None:
    rotation, x = Rotation.by(torch.randn(2, 5, 8)), torch.randn(2, 5, 3, D_HEAD)
    whole = rotation(x)
    assert torch.equal(rotation.last(2)(x[:, -2:]), whole[:, -2:])
    assert torch.equal(rotation.positions(slice(1, 4))(x[:, 1:4]), whole[:, 1:4])
    assert torch.equal(rotation.rows(1)(x[1:]), whole[1:])
    assert torch.equal(rotation.repeat(2)(torch.cat((x, x))), torch.cat((whole, whole)))


def test_low_precision_is_rotated_in_the_wider_of_the_two_dtypes() -> None:
    rotation, x = Rotation.by(torch.randn(2, 5, 8)), torch.randn(2, 5, 3, D_HEAD).bfloat16()
    assert torch.equal(rotation(x), rotation(x.float()).bfloat16())


@pytest.mark.parametrize("length", [1, 32, 33, 100])
def test_scaled_frequencies_follow_their_formulas(length: int) -> None:
    lengths, plain = torch.tensor([length]), frequencies(D_HEAD, THETA, torch.device("cpu"))
    linear = RopeScaling("linear", factor=4.0, n_ctx_trained=32)
    close(scaled_frequencies(D_HEAD, THETA, linear, lengths)[0, 0], plain / 4)
    dynamic = RopeScaling("dynamic", factor=2.0, n_ctx_trained=32)
    base = THETA * max(1.0, 2 * length / 32 - 1) ** (D_HEAD / (D_HEAD - 2))
    close(scaled_frequencies(D_HEAD, THETA, dynamic, lengths)[0, 0], frequencies(D_HEAD, base, torch.device("cpu")))


@pytest.mark.parametrize(
    ("factor", "low", "high", "trained"), [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (3.0, 0.5, 9.0, 100)]
)
@pytest.mark.parametrize("length", [1, 100_000])
def test_frequencies_of_llama_3_1_are_those_of_transformers(
    factor: float, low: float, high: float, trained: int, length: int
) -> None:
    scaling = RopeScaling("llama3", factor, trained, low_freq_factor=low, high_freq_factor=high)
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": trained,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=rope
    )  # pyright: ignore
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    ours = scaled_frequencies(128, 5e5, scaling, torch.tensor([length]))[0, 0]
    assert torch.equal(ours, theirs) and attention_factor == scaling.attention_factor
    plain = frequencies(128, 5e5, torch.device("cpu"))
    stay, divided = ours == plain, ours == plain / factor
    assert stay.any() and divided.any() and not (stay | divided).all()
