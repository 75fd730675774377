"""Reading a folder: memory-mapped, and every way of being broken is one clear error."""

import gc
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hooked_vlm.converters import open_tensors, qwen2_vl, read_config, read_json
from hooked_vlm.errors import CheckpointError


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_tensors_are_those_of_the_file(untied: Any) -> None:
    opened = open_tensors(untied.folder)
    assert opened.keys() == untied.published.keys()
    assert all(torch.equal(opened[name], tensor) for name, tensor in untied.published.items())


def test_shards_together_equal_the_single_file(untied: Any, sharded: Path) -> None:
    opened = open_tensors(str(sharded))
    assert opened.keys() == untied.published.keys()
    assert all(torch.equal(opened[name], tensor) for name, tensor in untied.published.items())


def test_an_edit_in_place_stays_in_memory(folder: Path) -> None:
    file = folder / "model.safetensors"
    before = digest(file)
    opened = open_tensors(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    untouched = opened["model.norm.weight"].clone()
    opened[name].zero_()
    opened[name][0, 0] = 7
    assert opened[name].sum() == 7
    assert torch.equal(opened["model.norm.weight"], untouched)
    assert digest(file) == before
    assert open_tensors(folder)[name].abs().sum() > 7, "a second mapping sees the file, not the edit"


def test_the_tensors_survive_the_folder(folder: Path) -> None:
    opened = open_tensors(folder)
    (folder / "model.safetensors").unlink()
    assert all(tensor.isfinite().all() for tensor in opened.values())


def test_saving_over_the_open_checkpoint_keeps_both(folder: Path) -> None:
    """Writing in place would cut the mapping short (a bus error); safetensors writes aside and renames."""
    opened = open_tensors(folder)
    opened["model.norm.weight"].fill_(3)
    save_file(opened, folder / "model.safetensors", metadata={"format": "pt"})
    again = open_tensors(folder)
    assert all(torch.equal(again[name], tensor) for name, tensor in opened.items())


def test_opening_and_converting_reads_almost_nothing(tied: Any, tmp_path: Path) -> None:
    """200 MB of weights; a copy of any part of them would show."""
    config = json.loads(json.dumps(tied.config))
    config["text_config"] |= {"vocab_size": 3_200_000}
    tensors = {name: tensor.bfloat16() for name, tensor in tied.published.items()}
    tensors["model.embed_tokens.weight"] = torch.zeros(3_200_000, 32, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    gc.collect()
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 200e6
    process = psutil.Process()
    before = process.memory_info().rss
    ours = qwen2_vl.from_hf(open_tensors(tmp_path), config)
    theirs = qwen2_vl.to_hf(ours, config)
    growth = process.memory_info().rss - before
    assert growth < 0.1 * size, f"{growth / 1e6:.0f} MB"
    assert theirs["model.embed_tokens.weight"].data_ptr() == ours["embed.weight"].data_ptr()


# ---------------------------------------------------------------- what is refused


def test_no_such_folder(tmp_path: Path) -> None:
    for read in (read_config, open_tensors):
        with pytest.raises(CheckpointError, match="nowhere"):
            read(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\bfile\b"):
        read_config(folder / "config.json")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[" * 200_000, b'{"a": 1} trailing'],
    ids=["empty", "cut", "not UTF-8", "bottomless", "trailing"],
)
def test_invalid_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json.*JSON"):
        read_config(tmp_path)


def test_json_that_is_not_an_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match=r"JSON.*list"):
        read_config(tmp_path)


def test_read_json_returns_the_default_only_for_an_absent_file(tmp_path: Path) -> None:
    assert read_json(tmp_path, "generation_config.json", {"a": 1}) == {"a": 1}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert read_json(tmp_path, "generation_config.json", {}) == {"eos_token_id": 3}
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.json"):
        read_json(tmp_path, "folder.json", {})


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_refused_and_never_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Bomb()}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"pickle.*{name}"):
        open_tensors(tmp_path)
    (tmp_path / name).rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        open_tensors(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_no_tensors_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_tensors(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        open_tensors(tmp_path)


def test_a_git_lfs_pointer_is_called_one(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_tensors(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        open_tensors(folder)


def test_what_is_not_a_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")  # opening it would wait for a writer for ever
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_tensors(tmp_path)


def edit_index(folder: Path, **weight_map: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "/etc/evil.safetensors",
        "sub/evil.safetensors",
        "sub\\evil.safetensors",
        "C:evil.safetensors",
        "..",
        "",
        "evil.bin",
        "evil\x00.safetensors",
        7,
        None,
    ],
)
def test_an_index_cannot_name_files_elsewhere(sharded: Path, name: Any) -> None:
    save_file({"model.norm.weight": torch.zeros(32)}, sharded.parent / "evil.safetensors")
    edit_index(sharded, **{"model.norm.weight": name})
    with pytest.raises(CheckpointError, match=rf"model\.norm\.weight.*{re.escape(repr(name))}"):
        open_tensors(sharded)


def test_links_out_of_the_folder_are_followed(untied: Any, sharded: Path, tmp_path: Path) -> None:
    """The Hugging Face cache is made of them."""
    snapshot, blobs = tmp_path / "snapshots" / "0", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert read_config(snapshot) == untied.config
    assert open_tensors(snapshot).keys() == untied.published.keys()


def test_a_missing_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        open_tensors(sharded)


def test_an_index_that_names_a_tensor_no_file_has(untied: Any, sharded: Path) -> None:
    """A tensor that the model needs is missing; any other cannot change a number."""
    notes: list[str] = []
    edit_index(sharded, extra=sorted(sharded.glob("*.safetensors"))[0].name)
    opened = open_tensors(sharded, notes)
    assert opened.keys() == untied.published.keys() and "extra" in notes[0]
    needed = "model.norm.weight"
    shard = next(path for path in sharded.glob("*.safetensors") if needed in load_file(path))
    save_file(
        {name: tensor for name, tensor in load_file(shard).items() if name != needed} | {"x": torch.ones(1)}, shard
    )
    with pytest.raises(CheckpointError, match=rf"missing: {needed}.*index"):
        qwen2_vl.from_hf(open_tensors(sharded, notes), untied.config, notes)


def test_an_index_that_names_the_wrong_shard(untied: Any, sharded: Path) -> None:
    shards, notes = sorted(sharded.glob("*.safetensors")), []
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name, file in index.items() if file == shards[0].name)
    edit_index(sharded, **{name: shards[1].name})
    opened = open_tensors(sharded, notes)
    assert opened.keys() == untied.published.keys() and torch.equal(opened[name], untied.published[name])
    assert len(notes) == 1 and name in notes[0]


@pytest.mark.parametrize("change", ["none", "value", "dtype", "shape", "not a number"])
def test_a_tensor_in_two_shards(untied: Any, sharded: Path, change: str) -> None:
    shards, notes = sorted(sharded.glob("*.safetensors")), []
    first, second = (dict(load_file(shard)) for shard in shards[:2])
    name = next(iter(second))
    if change == "not a number":  # equal bits, though no NaN equals itself
        second[name] = torch.full_like(second[name], float("nan"))
        save_file(second, shards[1])
    other = {"value": second[name] + 1, "dtype": second[name].half(), "shape": second[name][None]}
    save_file({**first, name: other.get(change, second[name].clone())}, shards[0])
    if change in other:
        with pytest.raises(CheckpointError, match=r"model-00001.*model-00002.*differ"):
            open_tensors(sharded, notes)
    else:
        assert open_tensors(sharded, notes).keys() == untied.published.keys()
        assert len(notes) == 1 and name in notes[0]


ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "lora.bin",
            "pytorch_lora_weights.safetensors", "non_lora_trainables.bin")  # fmt: skip


@pytest.mark.parametrize("file", ADAPTERS)
def test_an_adapter_beside_the_weights(folder: Path, file: str) -> None:
    (folder / file).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"adapter.*{file}.*merge_and_unload"):
        open_tensors(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_weight_map(tmp_path: Path, index: dict[str, Any]) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map"):
        open_tensors(tmp_path)


@given(where=st.floats(0, 1), noise=st.binary(min_size=1, max_size=16))
@example(where=0.0, noise=b"\xff" * 8)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_gives_an_error_or_well_formed_tensors(
    untied: Any, tmp_path: Path, where: float, noise: bytes
) -> None:
    """Bytes of the header overwritten: never another exception, never a crash on reading what was opened."""
    content = bytearray((untied.folder / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    start = int(where * (header - 1))
    content[start : start + len(noise)] = noise
    file = tmp_path / "model.safetensors"
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    try:
        ours = qwen2_vl.from_hf(open_tensors(tmp_path), untied.config)
    except CheckpointError:
        return
    assert all(tensor.sum().dtype.is_floating_point for tensor in ours.values())
