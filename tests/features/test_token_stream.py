"""Batches of stored activations: every token once a pass, any step at once, no token of a held-out sample."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_activations import HOOK, write_activations
from torch import Tensor

from hooked_vlm.activations import Activations
from hooked_vlm.errors import InputError
from hooked_vlm.features.config import TrainingConfig
from hooked_vlm.features.token_stream import Share, TokenStream, open_stream

CONFIG = TrainingConfig(batch=16, held_out=0.25, buffer_megabytes=1)
N = 1000


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Activations:
    """Row i holds i; 100 samples of 10 rows in shards of 7 samples."""
    rows = torch.arange(N, dtype=torch.float32)[:, None].repeat(1, 3)
    return write_activations(tmp_path_factory.mktemp("rows"), rows, per_shard=7)


def numbers(stream: TokenStream, n: int, step: int = 0) -> list[list[int]]:
    return [batch[:, 0].int().tolist() for batch in islice(stream.batches(step), n)]


@pytest.mark.parametrize("group", ["all", "image", "text"])
def test_each_pass_has_every_training_token_once_in_another_order(group: Any, acts: Activations) -> None:
    stream = open_stream(acts, HOOK, replace(CONFIG, group=group))
    held_out = set(stream.held_out.nonzero()[0].tolist())
    wanted = [i for i in range(N) if group == "all" or (i % 2 == 0) == (group == "image")]
    assert len({i // 10 for i in held_out}) == 25 and held_out == {
        i for i in wanted if i // 10 in {j // 10 for j in held_out}
    }
    training = set(wanted) - held_out
    per_pass = len(training) // 16
    first, second = (numbers(stream, per_pass, start) for start in (0, per_pass))
    for one in (first, second):
        seen = [i for batch in one for i in batch]
        assert len(seen) == len(set(seen)) == per_pass * 16 and set(seen) <= training
    assert first != second and sorted(first[0]) != first[0]
    sample = stream.sample(10)[:, 0].int().tolist()
    assert len(set(sample)) == 10 and set(sample) <= held_out


@pytest.mark.parametrize("step", [1, 45, 46, 47, 100])
def test_the_order_from_a_step_on_is_that_of_the_whole(step: int, acts: Activations) -> None:
    stream = open_stream(acts, HOOK, CONFIG)  # 750 tokens: 46 batches a pass
    assert numbers(stream, 20, step) == numbers(stream, 20 + step)[step:]


@pytest.mark.parametrize("of", [2, 4, 8])
def test_processes_share_each_batch(of: int, acts: Activations) -> None:
    whole = numbers(open_stream(acts, HOOK, CONFIG), 60)
    parts = [numbers(open_stream(acts, HOOK, CONFIG, Share(rank, of)), 60) for rank in range(of)]
    for number, batch in enumerate(whole):
        assert [len(part[number]) for part in parts] == [16 // of] * of
        assert sorted(batch) == sorted(i for part in parts for i in part[number])


def test_a_small_buffer_holds_one_shard_at_a_time(acts: Activations) -> None:
    stream = open_stream(acts, HOOK, replace(CONFIG, held_out=0.01))
    object.__setattr__(stream, "d_in", 2**18)  # as if rows were so long that one fills the buffer
    blocks = list(stream._blocks(0))
    assert len(blocks) == len(acts.shards) == 15
    assert all(len({int(i) // 70 for i in block}) == 1 for block in blocks)
    assert [int(b[0]) // 70 for b in blocks] != sorted(int(b[0]) // 70 for b in blocks)


def test_the_seed_decides_samples_and_order(acts: Activations) -> None:
    one, other = (open_stream(acts, HOOK, replace(CONFIG, seed=seed)) for seed in (0, 1))
    assert (one.held_out != other.held_out).any() and numbers(one, 1) != numbers(other, 1)


def test_what_cannot_be_streamed_is_refused(acts: Activations, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not stored"):
        open_stream(acts, "blocks.1.hook_resid_pos", CONFIG)
    with pytest.raises(InputError, match="less than one batch"):
        open_stream(acts, HOOK, replace(CONFIG, batch=2048))
    with pytest.raises(InputError, match="multiple of the 3 processes"):
        open_stream(acts, HOOK, CONFIG, Share(0, 3))
    rows: Tensor = torch.zeros((10, 3))
    with pytest.raises(InputError, match="divided"):
        open_stream(write_activations(tmp_path / "one", rows), HOOK, CONFIG)
    with pytest.raises(InputError, match="unfinished"):
        open_stream(write_activations(tmp_path / "two", rows, finished=False), HOOK, CONFIG)
    rows[7, 1] = float("inf")
    broken = open_stream(write_activations(tmp_path / "three", rows, per_sample=1), HOOK, replace(CONFIG, batch=1))
    with pytest.raises(InputError, match=r"row 7 of blocks\.1"):
        numbers(broken, 9)
        broken.sample(9)
