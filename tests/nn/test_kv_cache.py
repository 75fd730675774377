"""Keys and values of earlier positions, against a literal `cat` of all that came."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hooked_vlm.nn.kv_cache import EarlierKeys, KVCache, SharedPrefix

LAYERS, BATCH, HEADS, D_HEAD = 2, 3, 2, 4
CPU = torch.device("cpu")


def empty(capacity: int) -> KVCache:
    return KVCache(LAYERS, BATCH, capacity, HEADS, D_HEAD, CPU, torch.float32)


def entries(n: int, rows: int = BATCH) -> Tensor:
    return torch.randn(rows, n, HEADS, D_HEAD)


def filled(n: int) -> tuple[KVCache, Tensor, Tensor]:
    """A cache of `n` positions with the keys and values of its layer 0."""
    cache, k, v = empty(n), entries(n), entries(n)
    for layer in range(LAYERS):
        cache.extend(layer, k + layer, v + layer)
    cache.advance(n, n)
    return cache, k, v


@given(capacity=st.integers(1, 6), steps=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_a_cache_returns_all_that_came_however_often_it_grows(capacity: int, steps: list[int]) -> None:
    cache = empty(capacity)
    came = [[(entries(n), entries(n)) for _ in range(LAYERS)] for n in steps]
    for i, n in enumerate(steps):
        for layer in range(LAYERS):
            keys, values = cache.extend(layer, *came[i][layer])
            for got, which in ((keys, 0), (values, 1)):
                assert torch.equal(got, torch.cat([step[layer][which] for step in came[: i + 1]], dim=1))
        cache.advance(n, n)
    assert (cache.length, cache.n_passes, cache.batch) == (sum(steps), len(steps), BATCH)


def test_buffers_stay_where_they_are_while_positions_fit_and_double_where_they_do_not() -> None:
    cache = empty(4)
    home = cache.keys[0].data_ptr()
    for n, capacity in ((3, 4), (1, 4), (1, 8)):
        cache.extend(0, entries(n), entries(n))
        cache.advance(n, n)
        assert cache.keys[0].shape[1] == capacity
        assert (cache.keys[0].data_ptr() == home) == (capacity == 4)


def test_a_pass_that_fails_half_way_leaves_the_cache_as_it_was() -> None:
    cache, k, _ = filled(3)
    cache.extend(0, entries(2), entries(2))  # and never `advance`
    new = entries(1)
    keys, _ = cache.extend(0, new, new)
    assert torch.equal(keys, torch.cat((k, new), dim=1))


def test_gradients_reach_every_step() -> None:
    cache, steps = empty(1), [entries(1).requires_grad_() for _ in range(3)]
    keys = torch.empty(0)
    for step in steps:
        keys, _ = cache.extend(0, step, step)
        cache.advance(1, 1)
    for got in torch.autograd.grad(keys.sum(), steps):
        assert torch.equal(got, torch.ones_like(got))


def test_padding_is_remembered_and_real_until_the_first() -> None:
    cache, first = empty(8), torch.tensor([[True, True], [False, True], [False, False]])
    assert cache.valid_with(2, None) is None
    cache.advance(2, 2)
    both = torch.cat((torch.ones(BATCH, 2, dtype=torch.bool), first), dim=1)
    assert torch.equal(cache.valid_with(2, first), both)  # pyright: ignore[reportArgumentType]
    cache.advance(2, 2)
    after = torch.cat((both, torch.ones(BATCH, 1, dtype=torch.bool)), dim=1)
    assert torch.equal(cache.valid_with(1, None), after)  # pyright: ignore[reportArgumentType]


def test_rotary_positions_go_on_by_row() -> None:
    cache = empty(8)
    cache.advance(4, torch.tensor([2, 3, 4]))
    cache.advance(1, 1)
    assert cache.next_position is not None and cache.next_position.tolist() == [3, 4, 5]


@pytest.mark.parametrize("runs", [1, 3])
def test_a_shared_prefix_stands_before_every_run_and_is_not_written_to(runs: int) -> None:
    cache, k, v = filled(4)
    before = [x.clone() for x in (*cache.keys, *cache.values)]
    prefix = SharedPrefix(cache, 3)
    assert isinstance(prefix, EarlierKeys) and isinstance(cache, EarlierKeys)
    own = entries(2, rows=runs * BATCH)
    for layer in range(LAYERS):
        for got, shared in zip(prefix.extend(layer, own, own), (k, v), strict=True):
            expected = [torch.cat((shared[:, :3] + layer, run), dim=1) for run in own.split(BATCH)]
            assert torch.equal(got, torch.cat(expected))
    assert all(map(torch.equal, before, (*cache.keys, *cache.values)))
