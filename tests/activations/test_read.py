"""Stored activations come back by row, in any order; what is damaged is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streams import stream
from torch.utils.data import DataLoader

from hooked_vlm import HookedVLM, InputError
from hooked_vlm.activations import Activations
from hooked_vlm.errors import ActivationsError

NAME = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Activations:
    model = HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")
    acts = stream(model, tmp_path_factory.mktemp("acts") / "acts", names_filter=NAME, shard_bytes=2**17)
    assert len(acts.shards) > 2
    return acts


def test_rows_come_in_the_order_asked_for(acts: Activations) -> None:
    rows = acts[NAME]
    whole = rows[:]
    assert whole.shape == rows.shape and len(acts.index) == len(rows)
    numbers = np.random.default_rng(0).integers(-len(rows), len(rows), 300)
    assert torch.equal(rows[numbers], whole[numbers])
    assert torch.equal(rows[torch.from_numpy(numbers)], whole[numbers])
    mask = numbers[0] % 2 == np.arange(len(rows)) % 2
    assert torch.equal(rows[mask], whole[mask])
    assert torch.equal(rows[-7], whole[-7])
    assert torch.equal(rows[5:90:7], whole[5:90:7])
    assert rows[[]].shape == (0, 192)
    question = acts.index.query("group == 'question'").index
    assert torch.equal(rows[question], whole[question.to_numpy().copy()])


@pytest.mark.parametrize("rows", [10**6, [0, -(10**6)], np.zeros(3, dtype=bool), [0.5], np.zeros((2, 2), dtype=int)])
def test_rows_that_do_not_exist_are_refused(rows: Any, acts: Activations) -> None:
    with pytest.raises(InputError, match="row"):
        acts[NAME][rows]


def test_batches_give_every_row_once(acts: Activations) -> None:
    rows = acts[NAME]
    whole = rows[:]
    for seed in (None, 3):
        batches = list(rows.batches(100, seed=seed))
        order = np.concatenate([batch.rows for batch in batches])
        assert (order.tolist() == list(range(len(rows)))) == (seed is None)
        assert sorted(order) == list(range(len(rows)))
        assert torch.equal(torch.cat([batch.values for batch in batches]), whole[order])
    again = np.concatenate([batch.rows for batch in rows.batches(100, seed=3)])
    assert again.tolist() == order.tolist()
    mask = (acts.index["group"] == "image").to_numpy()
    assert sum(len(batch.values) for batch in rows.batches(64, rows=mask, seed=0)) == mask.sum()


def test_it_is_a_dataset(acts: Activations) -> None:
    loader: DataLoader[Any] = DataLoader(acts[NAME], batch_size=100)
    assert torch.equal(torch.cat(list(loader)), acts[NAME][:])


def test_columns_can_be_chosen_and_a_name_that_was_not_kept_is_refused(acts: Activations) -> None:
    assert list(acts.table("tokens", ["group", "x0"]).columns) == ["group", "x0"]
    with pytest.raises(KeyError, match="hook_resid_post"):
        acts["blocks.1.hook_resid_pos"]


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
@pytest.mark.parametrize("content", [b"", b"nonsense" * 100, "half", None])
def test_a_damaged_file_is_named(suffix: str, content: Any, acts: Activations) -> None:
    file = acts.shards[1].path.with_suffix(suffix)
    whole = file.read_bytes()
    try:
        if content is None:
            file.unlink()
        else:
            file.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
        with pytest.raises(ActivationsError) as found:
            Activations(acts.folder)
        shard = acts.shards[2 if (suffix, content) == (".parquet", None) else 1]  # the one behind the gap
        assert shard.path.name in str(found.value) and "\n" not in str(found.value)
    finally:
        file.write_bytes(whole)
    assert len(Activations(acts.folder).shards) == len(acts.shards)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 7}', "\x00"])
def test_a_damaged_manifest_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "activations.json").write_text(content)
    with pytest.raises(ActivationsError, match=r"activations\.json"):
        Activations(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ActivationsError, match=r"activations\.json"):
        Activations(tmp_path)
