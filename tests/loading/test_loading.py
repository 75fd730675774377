"""Checkpoint folders, `transformers` models and back, bit for bit."""

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import STOP
from tiny_qwen2_vl import PADDED, hf_batch, inputs, reading_model, tiny_hf, tiny_model
from torch import Tensor

from hooked_vlm import HookedVLM
from hooked_vlm.converters import KNOWN_MODELS, converter_for
from hooked_vlm.errors import CheckpointError
from hooked_vlm.loading.settings import model_config


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=["single-file", "sharded"])
def saved_by_transformers(request: pytest.FixtureRequest, tied: bool, tmp_path: Path) -> Path:
    """In the nested form of release 5."""
    folder = tmp_path / "theirs"
    size = "50GB" if request.param == "single-file" else "200KB"
    tiny_hf(tied).save_pretrained(folder, max_shard_size=size)
    return folder


def test_a_folder_written_by_transformers_gives_the_reference_back(saved_by_transformers: Path, tied: bool) -> None:
    model = HookedVLM.from_pretrained(saved_by_transformers)
    equal(model.state_dict(), tiny_model(tied).state_dict())
    assert model.cfg.with_(model_name="") == tiny_model(tied).cfg.with_(model_name="")
    batch = inputs(PADDED, tied=tied)
    real = batch.attention_mask.bool()
    assert torch.equal(model(model.inputs_from_hf(hf_batch(PADDED)))[real], tiny_model(tied)(batch)[real])


@pytest.mark.parametrize("names", ["published", "in_memory"])
def test_hf_tensors_come_back_bit_for_bit(tied: bool, names: str) -> None:
    theirs = dict(tiny_hf(tied).state_dict())
    if names == "published":
        theirs = {
            name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
            for name, tensor in theirs.items()
            if not (tied and name == "lm_head.weight")
        }
    equal(tiny_model(tied).to_hf_state_dict(names), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_folder_loads_in_transformers_and_here_bit_for_bit(
    tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    hf = deepcopy(tiny_hf(tied)).to(dtype)
    model, folder = HookedVLM.from_hf(hf), tmp_path / "ours"
    model.save_pretrained(folder)
    loaded: Any = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    theirs, report = loaded
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    equal(dict(theirs.state_dict()), dict(hf.state_dict()))
    assert theirs.generation_config.eos_token_id in (STOP, [STOP])
    again = HookedVLM.from_pretrained(folder)
    equal(again.state_dict(), model.state_dict())
    assert again.cfg.with_(model_name="") == model.cfg.with_(model_name="")
    assert again.image_processor == model.image_processor


def test_a_loaded_folder_saves_again_without_change(tmp_path: Path, tied: bool) -> None:
    """Loaded tensors are views into one mapped file, which must not pass for shared ones."""
    tiny_model(tied).save_pretrained(tmp_path / "first")
    HookedVLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    files = {path.name for path in (tmp_path / "first").iterdir()}
    assert files == {path.name for path in (tmp_path / "second").iterdir()}
    equal(load_file(tmp_path / "second/model.safetensors"), load_file(tmp_path / "first/model.safetensors"))
    for name in files - {"model.safetensors"}:
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()


def test_edits_are_saved(tmp_path: Path) -> None:
    model: Any = HookedVLM.from_hf(deepcopy(tiny_hf()))
    with torch.no_grad():
        model.blocks[1].attn.W_O[2] = 0
        model.vision.blocks[0].attn.W_K[1] *= 2
    model.save_pretrained(tmp_path / "edited")
    again: Any = HookedVLM.from_pretrained(tmp_path / "edited")
    assert not again.blocks[1].attn.W_O[2].any() and again.blocks[1].attn.W_O[1].any()
    assert torch.equal(again.vision.blocks[0].attn.W_K, model.vision.blocks[0].attn.W_K)


def test_tokenizer_and_image_processor_are_saved_along(tmp_path: Path) -> None:
    model = reading_model()
    model.save_pretrained(tmp_path / "ours")
    again = HookedVLM.from_pretrained(tmp_path / "ours")
    assert again.image_processor == model.image_processor
    messages = [{"role": "user", "content": "What is the value of a"}]
    assert torch.equal(again.to_inputs(messages).tokens, model.to_inputs(messages).tokens)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert theirs.apply_chat_template(messages, tokenize=False) == model.tokenizer.apply_chat_template(
        messages, tokenize=False
    )


def test_stop_and_padding_tokens_of_the_generation_config_survive(tmp_path: Path) -> None:
    """Published folders name the padding token only there."""
    tiny_model().save_pretrained(tmp_path / "first")
    config = json.loads((tmp_path / "first/config.json").read_text())
    del config["pad_token_id"]
    (tmp_path / "first/config.json").write_text(json.dumps(config))
    (tmp_path / "first/generation_config.json").write_text('{"eos_token_id": [7, 8], "pad_token_id": 9}')
    first = HookedVLM.from_pretrained(tmp_path / "first")
    assert first.cfg.eos_token_ids == (7, 8) and first.cfg.pad_token_id == 9
    first.save_pretrained(tmp_path / "second")
    again = HookedVLM.from_pretrained(tmp_path / "second")
    assert again.cfg.eos_token_ids == (7, 8) and again.cfg.pad_token_id == 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_dtype_can_be_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model(True).save_pretrained(tmp_path / "ours")
    model = HookedVLM.from_pretrained(tmp_path / "ours", dtype=dtype)
    equal(model.state_dict(), {name: tensor.to(dtype) for name, tensor in tiny_model(True).state_dict().items()})
    assert model.cfg.dtype is dtype and model.embed.weight is model.unembed.weight
    model.save_pretrained(tmp_path / "cast")
    assert HookedVLM.from_pretrained(tmp_path / "cast").cfg.dtype is dtype


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc")
def test_loading_maps_the_file_and_copies_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    tiny_model().save_pretrained(folder)
    model: Any = HookedVLM.from_pretrained(folder, device="cpu")
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(folder) in line
    ]
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < stop for start, stop in mapped), name
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.blocks[0].attn.W_O.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_saving_never_overwrites_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="empty"):
        tiny_model().save_pretrained(tmp_path / "full")

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hooked_vlm.loading.saving.save_torch_state_dict", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        tiny_model().save_pretrained(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("name", ["no-such-folder", "./no/such", "a/b/c"])
def test_a_name_that_is_no_folder_says_what_there_is(name: str) -> None:
    with pytest.raises(CheckpointError, match="owner/model"):
        HookedVLM.from_pretrained(name)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(device: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{device}'"):
        HookedVLM.from_pretrained("no-such-folder", device=device)


def test_an_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MixtralForCausalLM"]}')
    with pytest.raises(CheckpointError, match="Qwen2VLForConditionalGeneration"):
        HookedVLM.from_pretrained(tmp_path)


def _sizes() -> list[Any]:
    """All published sizes: the first of every architecture, and with --full the others."""
    first = {known.config["architectures"][0]: name for name, known in reversed(KNOWN_MODELS.items())}
    return [pytest.param(n, marks=() if n in first.values() else pytest.mark.full) for n in KNOWN_MODELS]


@pytest.mark.parametrize("name", _sizes())
@pytest.mark.repeats_shapes
def test_published_sizes_have_the_published_number_of_parameters(name: str) -> None:
    known = KNOWN_MODELS[name]
    cfg = model_config(converter_for(known.config), known.config, {})
    with torch.device("meta"):
        model = HookedVLM(cfg)
    assert sum(parameter.numel() for parameter in model.parameters()) == known.n_params
