"""The attention mask as a rule, against one written out query by query and key by key."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hooked_vlm.nn.attention import attend
from hooked_vlm.nn.hooks import HookPoint
from hooked_vlm.nn.masks import AttentionMask

CPU = torch.device("cpu")
WINDOWS = st.none() | st.integers(1, 9)


@st.composite
def valid_keys(draw: st.DrawFn) -> Tensor | None:
    """[batch, key]: a run of real keys in each row, padding at either end; or None, no padding."""
    if draw(st.booleans()):
        return None
    n_keys, n_rows = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    valid = torch.zeros(n_rows, n_keys, dtype=torch.bool)
    for row in valid:
        first = draw(st.integers(0, n_keys - 1))
        row[first : draw(st.integers(first + 1, n_keys))] = True
    return valid


@st.composite
def masks(draw: st.DrawFn) -> tuple[AttentionMask, int]:
    """A mask of any kind, and its number of keys."""
    valid, causal, window = draw(valid_keys()), draw(st.booleans()), draw(WINDOWS)
    n_rows, n_keys = (2, 7) if valid is None else valid.shape
    blocks = None
    if draw(st.booleans()):
        numbers = st.lists(st.integers(-1, 2), min_size=n_keys, max_size=n_keys)
        blocks = torch.tensor([draw(numbers) for _ in range(n_rows)])
    return AttentionMask(causal, valid, window=window, blocks=blocks, window_cuts_blocks=draw(st.booleans())), n_keys


def literal(mask: AttentionMask, row: int, query: int, key: int) -> bool:
    """Whether a query may see a key."""
    if mask.key_valid is not None and not mask.key_valid[row, key]:
        return False
    together = mask.blocks is not None and bool(mask.blocks[row, key] == mask.blocks[row, query] >= 0)
    near = mask.window is None or key > query - mask.window
    if mask.causal and not mask.window_cuts_blocks:
        return (key <= query and near) or together
    if mask.causal:
        return (key <= query or together) and near
    inside = mask.blocks is None or together
    return inside and (near or (together and not mask.window_cuts_blocks))


@given(masks(), st.data())
def test_a_dense_mask_is_the_rule_and_padding_sees_itself(
    mask_and_keys: tuple[AttentionMask, int], data: st.DataObject
) -> None:
    mask, n_keys = mask_and_keys
    n_queries = data.draw(st.integers(1, n_keys))
    dense = mask.dense(n_queries, n_keys, CPU)
    for row in range(len(dense)):
        for at, query in enumerate(range(n_keys - n_queries, n_keys)):
            itself = range(query, query + 1) if mask.key_valid is not None else range(0)
            expected = [literal(mask, row, query, key) or key in itself for key in range(n_keys)]
            assert dense[row, 0, at].tolist() == expected


@given(masks(), st.data())
def test_chosen_queries_have_the_rows_of_the_dense_mask(
    mask_and_keys: tuple[AttentionMask, int], data: st.DataObject
) -> None:
    mask, n_keys = mask_and_keys
    chosen = torch.tensor([data.draw(st.lists(st.integers(0, n_keys - 1), min_size=1, max_size=4))])
    assert torch.equal(mask.visible(chosen, n_keys), mask.dense(n_keys, n_keys, CPU)[:, :, chosen[0]])


@given(masks(), st.data())
def test_a_simple_mask_needs_neither_window_nor_blocks(
    mask_and_keys: tuple[AttentionMask, int], data: st.DataObject
) -> None:
    mask, n_keys = mask_and_keys
    n_queries = data.draw(st.integers(1, n_keys))
    if mask.is_simple(n_queries, n_keys):
        plain = AttentionMask(mask.causal, mask.key_valid)
        seen = (mask.dense(n_queries, n_keys, CPU), plain.dense(n_queries, n_keys, CPU))
        assert torch.equal(*torch.broadcast_tensors(*seen))


@given(masks(), st.data())
def test_the_fused_kernel_sees_what_the_explicit_one_sees(
    mask_and_keys: tuple[AttentionMask, int], data: st.DataObject
) -> None:
    mask, n_keys = mask_and_keys
    if not mask.causal and mask.blocks is not None:  # only where every real key is in a block, as in a tower
        mask = AttentionMask(False, mask.key_valid, blocks=mask.blocks.clamp(min=0))
    n_queries = data.draw(st.integers(1, n_keys))
    if mask.key_valid is not None and n_queries == n_keys:
        mask = replace(mask, uncached_left_padding=mask.key_valid.int().argmax(1))
    n_rows = 2 if mask.key_valid is None else len(mask.key_valid)
    q, k, v = (torch.randn(n_rows, n, heads, 8) for n, heads in ((n_queries, 4), (n_keys, 2), (n_keys, 2)))
    listening = HookPoint()
    listening.add_hook(lambda tensor, hook: None)
    explicit = attend(q, k, v, mask, HookPoint(), listening)
    torch.testing.assert_close(attend(q, k, v, mask, HookPoint(), HookPoint()), explicit, atol=1e-5, rtol=1e-5)


@given(masks())
def test_rows_and_runs_of_a_mask_are_those_of_its_dense_form(mask_and_keys: tuple[AttentionMask, int]) -> None:
    mask, n_keys = mask_and_keys
    dense = mask.dense(n_keys, n_keys, CPU)
    if len(dense) > 1:
        assert torch.equal(mask.rows(1, 2).dense(n_keys, n_keys, CPU), dense[1:2])
        assert torch.equal(mask.repeat(2).dense(n_keys, n_keys, CPU), dense.repeat(2, 1, 1, 1))
    assert torch.equal(mask.to(CPU).dense(n_keys, n_keys, CPU), dense)


@pytest.mark.parametrize(("window", "limits"), [(None, False), (4, True), (5, False), (9, False)])
def test_a_window_limits_what_is_longer(window: int | None, limits: bool) -> None:
    mask = AttentionMask(True, window=window)
    assert mask.limits(5) == limits
    assert torch.equal(mask.dense(5, 5, CPU), AttentionMask(True).dense(5, 5, CPU)) != limits


def test_padding_queries_are_the_last_keys() -> None:
    valid = torch.tensor([[False, True, True], [True, True, False]])
    assert AttentionMask(True).query_valid(2) is None
    queries = AttentionMask(True, valid).query_valid(2)
    assert queries is not None and torch.equal(queries, valid[:, 1:])
