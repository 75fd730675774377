"""The attention mask as a rule, against one written out query by query and key by key."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

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


def literal(mask: AttentionMask, row: int, query: int, key: int) -> bool:
    """Whether a query may see a key."""
    if mask.causal and key > query:
        return False
    if mask.window is not None and key <= query - mask.window:
        return False
    return mask.key_valid is None or bool(mask.key_valid[row, key])


@given(valid_keys(), st.booleans(), WINDOWS, st.data())
def test_a_dense_mask_is_the_rule_and_padding_sees_itself(
    valid: Tensor | None, causal: bool, window: int | None, data: st.DataObject
) -> None:
    n_keys = 7 if valid is None else valid.shape[1]
    n_queries = data.draw(st.integers(1, n_keys))
    mask = AttentionMask(causal, valid, window=window)
    dense = mask.dense(n_queries, n_keys, CPU)
    for row in range(len(dense)):
        for at, query in enumerate(range(n_keys - n_queries, n_keys)):
            expected = [literal(mask, row, query, key) or (valid is not None and key == query) for key in range(n_keys)]
            assert dense[row, 0, at].tolist() == expected
    assert dense.any(-1).all()  # no softmax over nothing


@given(valid_keys(), WINDOWS, st.data())
def test_chosen_queries_have_the_rows_of_the_dense_mask(
    valid: Tensor | None, window: int | None, data: st.DataObject
) -> None:
    n_keys = 7 if valid is None else valid.shape[1]
    chosen = torch.tensor([data.draw(st.lists(st.integers(0, n_keys - 1), min_size=1, max_size=4))])
    mask = AttentionMask(True, valid, window=window)
    assert torch.equal(mask.visible(chosen, n_keys), mask.dense(n_keys, n_keys, CPU)[:, :, chosen[0]])


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
