"""Streams in parts: shards that are joined, samples that cannot be used, workers on Ray."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from streams import NAMES, contents, samples

from hooked_vlm import HookedVLM, InputError
from hooked_vlm.activations import Activations, Sample, join_activations, stream_activations
from hooked_vlm.activations.join import check_complete
from hooked_vlm.commands.cache import _on_ray, written
from hooked_vlm.commands.config import CacheConfig, MergeConfig
from hooked_vlm.commands.merge import answer as merged
from hooked_vlm.data import Samples
from hooked_vlm.data.sources import Source

NAME = "blocks.*.hook_resid_post"


class Made(Source):
    """Samples that are made when they are asked for."""

    def __len__(self) -> int:
        return 7

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        return (sample for number, sample in enumerate(samples(7)) if start <= number < stop)


@pytest.fixture(scope="module")
def toy() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")


def assert_equal(found: Activations, expected: Activations) -> None:
    pd.testing.assert_frame_equal(found.index, expected.index)
    for name in expected.names:
        torch.testing.assert_close(found[name][:], expected[name][:], rtol=0, atol=0)
    assert found.n_rows == expected.n_rows and found.skipped == expected.skipped and found.finished


def test_parts_joined_are_the_whole(toy: HookedVLM, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tokens_per_batch": 1, "shard_bytes": 2**19}  # batches of one: the same numbers
    whole = stream_activations(toy, Samples(Made(), 0, 7), NAMES, tmp_path / "whole", **settings)
    shards = [Samples(Made(), 0, 7).shard(i, 3) for i in range(3)]
    for i in (1, 2, 0):
        stream_activations(toy, shards[i], NAMES, tmp_path / str(i), **settings)
    found = join_activations([tmp_path / str(i) for i in (2, 0, 1)], tmp_path / "joined")
    assert_equal(found, whole)
    assert len(found.shards) > 3 and found.manifest["range"] == [0, 7]
    before = contents(tmp_path / "joined")
    (tmp_path / "joined" / "shards").joinpath(next(iter(found.shards)).index.name).unlink()
    join_activations([tmp_path / str(i) for i in (0, 1, 2)], tmp_path / "joined")
    assert contents(tmp_path / "joined") == before, "an interrupted call goes on"
    with pytest.raises(InputError, match="samples 2 to 3 are missing"):
        join_activations([tmp_path / "0", tmp_path / "2"], tmp_path / "no")
    with pytest.raises(InputError, match="both hold sample 0"):
        join_activations([tmp_path / "0", tmp_path / "whole"], tmp_path / "no")
    stream_activations(toy, shards[1], "hook_embed", tmp_path / "other", **settings)
    with pytest.raises(InputError, match="another names"):
        join_activations([tmp_path / "0", tmp_path / "other"], tmp_path / "no")
    manifest = tmp_path / "1" / "activations.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"finished": False}))
    with pytest.raises(InputError, match="unfinished"):
        join_activations([tmp_path / "0", tmp_path / "1"], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_streams_with_a_name_in_common_are_not_joined(toy: HookedVLM, tmp_path: Path) -> None:
    for folder, own in (("0", ["a", "b"]), ("1", ["c", "b"])):
        stream_activations(toy, [Sample(name, f"Say {name}.") for name in own], "hook_embed", tmp_path / folder)
    with pytest.raises(InputError, match="both have a sample named 'b'"):
        join_activations([tmp_path / "0", tmp_path / "1"], tmp_path / "no")


def test_merging_needs_every_shard(toy: HookedVLM, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tokens_per_batch": 700, "names_filter": NAME}
    shards = [Samples(Made(), 0, 5).shard(i, 3) for i in range(3)]
    for i, own in enumerate(shards):
        stream_activations(toy, own, folder=tmp_path / str(i), **settings)
    several = [tmp_path / str(i) for i in range(3)]
    check_complete(several[::-1])
    for missing, match in ((several[1:], "samples 0 to 0 are missing"), (several[:2], "samples 3 to 4 are missing")):
        with pytest.raises(InputError, match=match):
            check_complete(missing)
    with pytest.raises(InputError, match="samples 0 to 0 are missing"):
        merged(MergeConfig(tuple(several[1:]), tmp_path / "out"))
    stream_activations(toy, Samples(Made(), 0, 7).shard(6, 7), folder=tmp_path / "other", **settings)
    with pytest.raises(InputError, match="missing"):
        check_complete([*several, tmp_path / "other"])
    assert shards[1].shard(0, 2).divided == (0, 5), "shards of a shard know the first division"


def broken_among(n: int, at: set[int], folder: Path) -> list[Sample]:
    """The samples of a stream, some of which have pictures that cannot be read."""
    (folder / "broken.png").write_bytes(b"no picture")
    return [
        Sample(f"broken {i}", "What?", (folder / ("broken.png" if i % 2 else "missing.png"),)) if i in at else sample
        for i, sample in enumerate(samples(n))
    ]


@pytest.mark.parametrize("at", [{0, 1}, {2}, {5}, {0, 3, 5}], ids=str)
def test_samples_that_cannot_be_used_are_skipped(toy: HookedVLM, at: set[int], tmp_path: Path) -> None:
    several = broken_among(6, at, tmp_path)
    settings: dict[str, Any] = {"names_filter": NAME, "tokens_per_batch": 200, "shard_bytes": 2**18}
    with pytest.raises(InputError, match=r"broken|missing"):
        stream_activations(toy, several, folder=tmp_path / "stops", **settings)
    with pytest.warns(UserWarning, match="skipped"):
        found = stream_activations(toy, several, folder=tmp_path / "skips", on_error="skip", **settings)
    clean = stream_activations(
        toy, [s for i, s in enumerate(several) if i not in at], folder=tmp_path / "clean", **settings
    )
    assert list(found.index["sample"]) == list(clean.index["sample"])
    torch.testing.assert_close(found["blocks.1.hook_resid_post"][:], clean["blocks.1.hook_resid_post"][:])
    assert list(pd.read_csv(tmp_path / "skips" / "skipped.csv")["sample"]) == [f"broken {i}" for i in sorted(at)]
    before = contents(tmp_path / "skips")
    last = sorted((tmp_path / "skips" / "shards").glob("*.parquet"))[-1]
    last.unlink()
    with pytest.warns(UserWarning, match="skipped"):
        stream_activations(toy, several, folder=tmp_path / "skips", on_error="skip", **settings)
    assert contents(tmp_path / "skips") == before, "an interrupted stream ends with the same bytes"


def test_the_last_samples_may_all_be_broken(toy: HookedVLM, tmp_path: Path) -> None:
    several = broken_among(3, {0, 1, 2}, tmp_path)
    with pytest.warns(UserWarning, match="3 samples were skipped"):
        found = stream_activations(toy, several, NAME, tmp_path / "out", on_error="skip")
    assert found.n_samples == 0 and found.finished


def test_pictures_are_dropped_when_they_are_done(toy: HookedVLM, tmp_path: Path) -> None:
    ahead = 0

    def watched() -> Iterator[Sample]:
        nonlocal ahead
        for number, sample in enumerate(samples(6)):
            written = sum(Activations(tmp_path).n_samples for _ in [0] if (tmp_path / "activations.json").exists())
            ahead = max(ahead, number - written)
            yield sample

    stream_activations(toy, watched(), NAME, tmp_path, tokens_per_batch=1, shard_bytes=1)
    assert ahead <= 1, "one sample is read ahead of the shard that is written"


def test_an_interrupted_command_in_parts_refuses_other_settings_and_samples(
    toy: HookedVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hooked_vlm.commands.cache.SAMPLES_PER_TASK", 1)
    (tmp_path / "data").mkdir()
    pictures = [sample.images[0] for sample in samples(7) if sample.images][:2]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "data" / f"{number}.png")
    settings: dict[str, Any] = {"data": tmp_path / "data", "prompt": "What?", "out": tmp_path / "out", "quiet": True}
    config = CacheConfig(names=("blocks.0.hook_resid_post",), **settings)
    with monkeypatch.context() as patch:
        patch.setattr("hooked_vlm.commands.cache.join_activations", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _on_ray(toy, config.samples(), config)
    other = replace(config, names=("blocks.1.hook_resid_post",))
    with pytest.raises(InputError, match="another folder"):
        _on_ray(toy, other.samples(), other)
    pictures[0].save(tmp_path / "data" / "1.png")
    with pytest.raises(InputError, match="another folder"):
        _on_ray(toy, config.samples(), config)
    pictures[1].save(tmp_path / "data" / "1.png")
    assert_equal(
        _on_ray(toy, config.samples(), config),
        written(replace(config, out=tmp_path / "whole", model="toy-qwen2-vl", tokens_per_batch=1)),
    )


@pytest.mark.slow
def test_workers_on_ray_write_the_same_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hooked_vlm.commands.cache.SAMPLES_PER_TASK", 2)
    for number, sample in enumerate(samples(5)):
        if sample.images:
            sample.images[0].save(tmp_path / f"{number}.png")
    settings: dict[str, Any] = {"data": tmp_path, "prompt": "What?", "names": (NAME,), "tokens_per_batch": 1}
    here = written(CacheConfig(out=tmp_path / "here", quiet=True, **settings))
    there = written(CacheConfig(out=tmp_path / "there", quiet=True, ray="local", workers=2, **settings))
    assert_equal(there, here)
    assert not (tmp_path / "there" / ".parts").exists()
