"""Rows without their padding, for any lengths and starts, against a literal loop over rows."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hooked_vlm.nn.packing import Packing

CPU = torch.device("cpu")


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """(lengths, starts, width) of rows that fit their width."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    width = max(lengths) + draw(st.integers(0, 3))
    return lengths, [draw(st.integers(0, width - n)) for n in lengths], width


def rows_of(layout: Any) -> tuple[Packing, Tensor, list[Tensor]]:
    """A packing, numbered entries of its padded rows (zero where padding is), and each row's own ones."""
    lengths, starts, width = layout
    rows = [1.0 + torch.arange(n * 2).view(n, 2) + 100 * row for row, n in enumerate(lengths)]
    padded = torch.zeros(len(lengths), width, 2)
    for row, (start, own) in enumerate(zip(starts, rows, strict=True)):
        padded[row, start : start + len(own)] = own
    return Packing.of(lengths, CPU, starts, width), padded, rows


@given(layouts())
def test_packed_positions_are_those_of_the_rows_one_after_the_other(layout: Any) -> None:
    packing, padded, rows = rows_of(layout)
    assert torch.equal(packing.pack(padded), torch.cat(rows))


@given(layouts())
def test_padding_what_was_packed_gives_it_back(layout: Any) -> None:
    packing, padded, _ = rows_of(layout)
    assert torch.equal(packing.pad(packing.pack(padded)), padded)


def test_rows_without_padding_are_views() -> None:
    packing, x = Packing.of([4, 4], CPU), torch.randn(2, 4, 3)
    assert packing.slots is None
    assert packing.pack(x).data_ptr() == x.data_ptr() == packing.pad(packing.pack(x)).data_ptr()


@given(layouts())
def test_every_position_is_in_one_group_and_comes_back_to_its_place(layout: Any) -> None:
    packing, padded, _ = rows_of(layout)
    packed, out = packing.pack(padded), torch.full((sum(layout[0]), 2), torch.nan)
    for group in packing.groups:
        out = group.put(out, group.take(packed))
    assert torch.equal(out, packed)
    assert sum(group.n_rows for group in packing.groups) == len(layout[0])


@given(layouts())
def test_rows_of_a_group_are_of_similar_length(layout: Any) -> None:
    for group in rows_of(layout)[0].groups:
        mask = group.mask(causal=False).key_valid
        shortest = group.longest if mask is None else int(mask.sum(1).min())
        assert shortest >= 0.8 * group.longest


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_attention_by_groups_is_that_of_each_row_alone(causal: bool, lengths: list[int], seed: int) -> None:
    x = torch.tensor(np.random.default_rng(seed).normal(size=(sum(lengths), 4)))

    def attend(rows: Tensor, mask: Tensor) -> Tensor:
        scores = (rows @ rows.mT).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ rows

    out = torch.full_like(x, torch.nan)
    for group in Packing.of(lengths, CPU).groups:
        seen = group.mask(causal).dense(group.longest, group.longest, CPU)[:, 0]
        out = group.put(out, attend(group.take(x), seen))
    alone = [torch.ones(n, n, dtype=torch.bool) for n in lengths]
    expected = [attend(row, m.tril() if causal else m) for row, m in zip(x.split(lengths), alone, strict=True)]
    torch.testing.assert_close(out, torch.cat(expected))
