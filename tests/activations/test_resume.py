"""An interrupted stream goes on and ends with the bytes of one that was not; nobody ever reads half of anything."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streams import contents, samples, stream

from hooked_vlm import HookedVLM, InputError, cli
from hooked_vlm.activations import Activations, Sample, shards, stream_activations
from hooked_vlm.errors import OutputError

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"names_filter": "blocks.0.hook_resid_post", "shard_bytes": 2**17}


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")


@pytest.fixture(scope="module")
def whole(model: HookedVLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted stream writes."""
    folder = tmp_path_factory.mktemp("whole") / "acts"
    assert len(stream(model, folder, **SMALL).shards) > 2
    return contents(folder)


def test_stopped_at_any_write_it_goes_on_to_the_same_bytes(
    model: HookedVLM, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is stopped once: half of it is written, and left there as a killed process leaves it."""
    stops = []

    def stopped(path: Path, save: Callable[[Path], Any]) -> None:
        if str(path) not in stops:
            stops.append(str(path))
            save(tmp_path / "aside")
            half = (tmp_path / "aside").read_bytes()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.0123abcd.part").write_bytes(half[: len(half) // 2])
            (path.parent / ".tmpAbCdEf").write_bytes(half) if path.suffix == ".safetensors" else None
            raise KeyboardInterrupt
        place(path, save)

    place, folder = shards.atomic_write, tmp_path / "acts"
    monkeypatch.setattr(shards, "atomic_write", stopped)
    seen = []
    for _ in range(len(whole) + 1):
        try:
            stream(model, folder, **SMALL)
            break
        except KeyboardInterrupt:
            if (folder / "activations.json").exists():
                acts = Activations(folder)
                assert not acts.finished
                assert len(acts[SMALL["names_filter"]][:]) == len(acts.index)
                seen.append(acts.n_samples)
    assert len(stops) == len(whole)
    assert seen == sorted(seen) and seen[0] == 0
    assert contents(folder) == whole


def test_a_damaged_shard_is_made_again_alone(model: HookedVLM, whole: dict[str, bytes], tmp_path: Path) -> None:
    acts = stream(model, tmp_path / "acts", **SMALL)
    acts.shards[1].data.write_bytes(b"nonsense")
    kept = acts.shards[0].data.stat().st_mtime_ns
    assert len(stream(model, tmp_path / "acts", **SMALL).shards) == len(acts.shards)
    assert contents(tmp_path / "acts") == whole
    assert acts.shards[0].data.stat().st_mtime_ns == kept


def test_more_samples_are_added_and_fewer_or_others_refused(model: HookedVLM, tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    first = stream(model, folder, n=2, **SMALL)
    rows = first.index
    more = stream(model, folder, n=4, **SMALL)
    assert (first.n_samples, more.n_samples) == (2, 4)
    assert more.index.head(len(rows)).equals(rows)
    with pytest.raises(InputError, match=r"\b2 samples|number \d"):
        stream(model, folder, n=2, **SMALL)
    asked = list(samples(4))
    asked[0] = Sample(asked[0].id, "Something else?", asked[0].images, asked[0].boxes)
    with pytest.raises(InputError, match="number 0"):
        stream_activations(model, asked, folder=folder, tokens_per_batch=700, **SMALL)
    assert Activations(folder).n_samples == 4


@pytest.mark.parametrize("change", [{"tokens": "text"}, {"names_filter": "hook_embed"}, {"tokens_per_batch": 1}])
def test_changed_settings_never_meet_old_shards(change: dict[str, Any], model: HookedVLM, tmp_path: Path) -> None:
    stream(model, tmp_path / "acts", n=1, **SMALL)
    before = contents(tmp_path / "acts")
    (word,) = change
    with pytest.raises(InputError, match=rf"\b{'names' if word == 'names_filter' else word}\b"):
        stream(model, tmp_path / "acts", n=1, **{**SMALL, **change})
    assert contents(tmp_path / "acts") == before


def test_a_folder_with_other_files_is_left_alone(model: HookedVLM, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"activations\.json"):
        stream(model, tmp_path, **SMALL)
    assert list(contents(tmp_path)) == ["thesis.tex"]


def test_a_full_disk_is_one_sentence_and_the_stream_goes_on(
    model: HookedVLM, whole: dict[str, bytes], tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(len(content) for name, content in whole.items() if name.endswith(".safetensors"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, limits[1]))  # no file may grow as large as one of them
    try:
        with pytest.raises(OutputError, match="safetensors") as full:
            stream(model, tmp_path / "acts", **SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(full.value)
    stream(model, tmp_path / "acts", **SMALL)
    assert contents(tmp_path / "acts") == whole


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "tests" / "streams.py"), "toy-qwen2-vl"]
    count = "40"
    subprocess.run([*script, str(tmp_path / "whole"), count], check=True)
    folder, chance = tmp_path / "acts", random.Random(0)
    for _ in range(5):
        there = n_shards(folder)
        running = subprocess.Popen([*script, str(folder), count])
        while (
            running.poll() is None and n_shards(folder) == there
        ):  # until it has gone on by a shard, and a moment more
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        assert running.poll() is None, "it was through before it was killed"
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        acts = Activations(folder)
        assert all(len(acts[name][:]) == len(acts[name]) for name in acts.names)
    subprocess.run([*script, str(folder), count], check=True)
    assert contents(folder) == contents(tmp_path / "whole")


def n_shards(folder: Path) -> int:
    return len(list(folder.glob("shards/*.safetensors")))


@pytest.mark.slow
def test_a_gigabyte_takes_little_memory(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "activations.py"
    run = [sys.executable, str(script), "--measure", str(tmp_path), str(10**9)]
    found = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert found["bytes"] >= 10**9
    assert found["extra_bytes"] < 200 * 10**6


def test_the_command_reads_lines_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for sample in samples(2):
        for number, image in enumerate(sample.images):
            image.save(tmp_path / f"{sample.id} {number}.png")
        boxes = [{"name": box.name, "box": box.box, "image": box.image} for box in sample.boxes]
        images = [f"{sample.id} {number}.png" for number in range(len(sample.images))]
        lines.append({"id": sample.id, "prompt": sample.prompt, "images": images, "boxes": boxes})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "acts"
    command = ["hooked-vlm", "cache", "--data", str(tmp_path / "data.jsonl"), "--out", str(out), "--quiet"]
    command += ["--names", "blocks.1.hook_resid_post", "vision.*.hook_z", "--tokens", "final", "evidence"]
    monkeypatch.setattr(sys, "argv", command)
    for _ in range(2):
        cli.main()
        assert "2 samples, 4 hook points" in capsys.readouterr().out
    index: Any = Activations(out).index
    assert index["final"].sum() == 2 and (index["evidence"].map(len) > 0).sum() == len(index) - 2
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('\n{"id": "page 0", "prompt": "again"}')
    with pytest.raises(SystemExit, match=r"line 3.*'page 0'") as stopped:
        cli.main()
    assert "\n" not in str(stopped.value)


def test_settings_of_a_picture_in_a_message_are_part_of_the_samples_digest() -> None:
    def sample(**settings: int) -> Sample:
        part = {"type": "image", "image": np.zeros((64, 64, 3), np.uint8), **settings}
        return Sample("a", [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])

    digests = [sample(**given).digest() for given in ({}, {"max_pixels": 4096}, {"max_pixels": 2048})]
    assert len(set(digests)) == 3
    assert digests[0] == sample().digest()
