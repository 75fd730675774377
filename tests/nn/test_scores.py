"""Soft-capped attention against its literal formula in float64: values, gradients, parts, hooks, rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_vlm.nn import scores
from hooked_vlm.nn.attention import attend, fused_attention
from hooked_vlm.nn.hooks import HookPoint
from hooked_vlm.nn.masks import AttentionMask
from hooked_vlm.nn.scores import Scoring, attention_scores, masked_scores, written_out_attention

DIVISOR, CAP = 3.0, 2.0
SCORING = Scoring(DIVISOR, CAP)
EXACT = torch.float64


def made(seed: int, dtype: torch.dtype = EXACT, n_queries: int = 7, n_keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of six heads; keys and values of two. Scores beyond the cap."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, n_queries, 6, 4), (2, n_keys, 2, 4), (2, n_keys, 2, 4)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=EXACT) for shape in shapes)
    return (3 * q).to(dtype), k.to(dtype), v.to(dtype)


def literal(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores [batch, head, query, key] and z, one head and one query at a time."""
    all_scores, z = q.new_zeros(len(q), q.shape[2], q.shape[1], k.shape[1]), []
    for row in range(len(q)):
        for head in range(q.shape[2]):
            for query in range(q.shape[1]):
                group = head // (q.shape[2] // k.shape[2])
                own = CAP * torch.tanh((k[row, :, group] @ q[row, query, head]) / DIVISOR / CAP)
                all_scores[row, head, query] = own.detach()
                if seen is not None:
                    own = torch.where(seen.expand(len(q), 1, q.shape[1], -1)[row, 0, query], own, -torch.inf)
                z.append(own.softmax(-1) @ v[row, :, group])
    return all_scores, torch.stack(z).view(len(q), q.shape[2], q.shape[1], -1).transpose(1, 2)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


SOME = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(1)) > 0.4
SOME = SOME | torch.eye(7, dtype=torch.bool)
CASES: dict[str, tuple[Tensor | None, bool]] = {
    "all": (None, False),
    "causal": (None, True),
    "written out": (SOME, False),
    "keys": (SOME[:, :, :1], False),
}


@pytest.mark.parametrize("at_once", [2**24, 200, 1])
@pytest.mark.parametrize("case", CASES)
def test_z_is_the_formula_for_any_number_of_queries_at_a_time(
    case: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "AT_ONCE", at_once)
    (mask, causal), (q, k, v) = CASES[case], made(0)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()[None, None] if causal else mask
    close(written_out_attention(q, k, v, mask, causal, SCORING, CAP), literal(q, k, v, seen)[1])


def test_scores_are_the_formula_and_the_cap_holds() -> None:
    q, k, v = made(1, n_queries=5)
    ours = attention_scores(q, k, SCORING)
    close(ours, literal(q, k, v, None)[0])
    assert 0.9 * CAP < ours.abs().max() < CAP


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula(case: str) -> None:
    (mask, causal), (q, k, v) = CASES[case], made(2)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    seen = torch.ones(7, 7, dtype=torch.bool).tril()[None, None] if causal else mask
    weights = torch.randn(2, 7, 6, 4, dtype=EXACT)
    ours = torch.autograd.grad((written_out_attention(q, k, v, mask, causal, SCORING, CAP) * weights).sum(), inputs)
    theirs = torch.autograd.grad((literal(q, k, v, seen)[1] * weights).sum(), inputs)
    for own, other in zip(ours, theirs, strict=True):
        close(own, other)
    by_hand = torch.autograd.grad((attention_scores(q, k, SCORING) ** 2).sum(), (q, k))
    plain = CAP * torch.tanh(torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(3, dim=2)) / DIVISOR / CAP)
    for own, other in zip(by_hand, torch.autograd.grad((plain**2).sum(), (q, k)), strict=True):
        close(own, other)


def test_a_hook_on_scores_and_pattern_sees_the_formula_and_changes_nothing() -> None:
    (q, k, v), seen = made(3), {}
    mask = AttentionMask(causal=True)
    points: Any = HookPoint(), HookPoint()
    for name, point in zip(("scores", "pattern"), points, strict=True):
        point.add_hook(lambda x, hook, name=name: seen.__setitem__(name, x.clone()))
    lower = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    all_scores, z = literal(q, k, v, lower)
    hooked = attend(q, k, v, mask, points[0], points[1], SCORING)
    close(hooked, z)
    close(seen["scores"], all_scores.masked_fill(~lower, -torch.inf))
    close(seen["pattern"], seen["scores"].softmax(-1))
    close(fused_attention(q, k, v, mask, SCORING), hooked)
    close(seen["scores"], masked_scores(q, k, mask, SCORING))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_the_exact_numbers_as_operations_one_by_one(dtype: torch.dtype) -> None:
    q, k, v = made(4, dtype, n_queries=64, n_keys=64)
    exact = written_out_attention(q.double(), k.double(), v.double(), None, True, SCORING, CAP)
    ours = written_out_attention(q, k, v, None, True, SCORING, CAP)
    heads = [x.repeat_interleave(3, dim=2).transpose(1, 2) for x in (k, v)]
    by_one = torch.tanh(q.transpose(1, 2) @ heads[0].mT * (1 / DIVISOR) / CAP) * CAP
    hidden = ~torch.ones(64, 64, dtype=torch.bool).tril()
    one_by_one = by_one.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(dtype) @ heads[1]
    errors = [float((z.double() - exact).pow(2).mean().sqrt()) for z in (ours, one_by_one.transpose(1, 2))]
    assert errors[0] <= 1.02 * errors[1], errors


def test_products_beyond_float16_are_scaled_before_they_are_rounded() -> None:
    q, k, _ = made(5, torch.float16)
    large = attention_scores(q * 300, k * 300, Scoring(1e5, CAP))
    exact = attention_scores(q.double() * 300, k.double() * 300, Scoring(1e5, CAP))
    assert large.isfinite().all()
    torch.testing.assert_close(large.double(), exact, atol=5e-3, rtol=0)
