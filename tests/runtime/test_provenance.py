"""What results record of themselves."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.model import weight_processing
from hooked_vlm.model.fingerprints import _words, provenance, weights_hash
from hooked_vlm.runtime import provenance as provenance_module
from hooked_vlm.runtime.provenance import code_hash
from hooked_vlm.vision_config import VisionConfig


def test_the_record_names_model_code_and_kernel() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    record = provenance(model)
    assert (record["model"], record["dtype"], record["device"]) == ("toy-qwen2-vl", "float32", "cpu")
    assert record["weights"] == weights_hash(model) and record["code"] == code_hash()
    assert "fused" in record["attention"] and {"torch", "hooked-vlm", "python"} <= set(record["versions"])


@torch.no_grad()
def test_the_weights_hash_sees_one_changed_bit_and_every_exchange() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    weight, norm = model.blocks[1].mlp.W_in, model.ln_final.weight
    before, saved, saved_norm = weights_hash(model), weight.clone(), norm.clone()
    n = weight.numel()
    seen = {before}
    for exchange in (weight.flip(0), weight.flip(1), weight.roll(1, 0), weight.flatten().roll(n // 2).view_as(weight)):
        weight.copy_(exchange)
        seen.add(weights_hash(model))
        weight.copy_(saved)
    weight[3, 5], weight[3, 9] = saved[3, 9], saved[3, 5]
    seen.add(weights_hash(model))
    weight.copy_(saved)
    norm.copy_(norm.flip(0))
    seen.add(weights_hash(model))
    norm.copy_(saved_norm)
    model.embed.weight[5, 7] = torch.nextafter(model.embed.weight[5, 7], torch.tensor(torch.inf))
    seen.add(weights_hash(model))
    assert len(seen) == 8
    model.embed.weight[5, 7] = torch.nextafter(model.embed.weight[5, 7], torch.tensor(-torch.inf))
    assert weights_hash(model) == before


def test_the_weights_hash_sees_the_configuration_but_not_where_the_model_is() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    before = weights_hash(model)
    model.cfg = model.cfg.with_(model_name="elsewhere", device=torch.device("meta"))
    assert weights_hash(model) == before
    model.cfg = model.cfg.with_(rope_theta=2 * model.cfg.rope_theta)
    assert weights_hash(model) != before


def test_the_weights_hash_sees_every_value_of_a_vision_tower() -> None:
    model = HookedVLM.from_pretrained("toy-internvl2")
    vision = model.cfg.vision
    assert vision is not None
    blocks = {"patch_order": "blocks", "tile_size": None, "position_fit": "bilinear"}
    others: dict[str, Any] = {
        "n_layers_used": 1,
        "positions_per_second": 2.0,
        "window": {"window": 2, **blocks},
        "full_layers": {"window": 2, "full_layers": (0,), **blocks},
        "deepstack_layers": (0,),
        "pinpoints": ((2 * (vision.tile_size or 0), vision.tile_size or 0),),
        "max_grid": 9,
        "patch_size": 4,
        "patch_order": {"patch_order": "blocks", "tile_size": None},
        "tile_size": 2 * (vision.tile_size or 0),
        "n_positions": 4,
        "rope_theta": {"rope_theta": 1.0, "patch_order": "blocks", "tile_size": None, "class_token": False},
        "temporal_patch_size": {"temporal_patch_size": 2, "patch_order": "blocks", "tile_size": None},
        "position_fit": "bilinear",
        "projector": ("norm", "merge", "linear", "activation", "linear"),
        "merge_size": 1,
        "pool_size": {"pool_size": 2, "merge_size": 1, "projector": ("pool", "linear", "activation", "linear")},
        "projector_norm_type": "RMS",
    }

    def changed(name: str) -> VisionConfig:
        value = getattr(vision, name)
        by_kind = {bool: lambda: not value, int: lambda: value + 1, float: lambda: 2 * value, str: lambda: value + "2"}
        other = others[name] if name in others else by_kind[type(value)]()
        return replace(vision, **(other if isinstance(other, dict) else {name: other}))

    hashes = [weights_hash(model)]
    for name in (field.name for field in fields(VisionConfig)):
        model.cfg = model.cfg.with_(vision=changed(name))
        hashes.append(weights_hash(model))
    assert len(set(hashes)) == len(fields(VisionConfig)) + 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_weights_hash_sees_a_change_anywhere_in_tensors_of_any_size(dtype: torch.dtype) -> None:
    assert _words(torch.zeros(0, 4, dtype=dtype)).numel() == 0
    for shape in ((3,), (1,), (5, 3), (2, 7), (4, 4), (3, 2, 5)):
        words = _words(torch.zeros(shape, dtype=dtype))
        assert not words.any()
        seen = set()
        for at in range(torch.zeros(shape).numel()):
            changed = torch.zeros(shape, dtype=dtype)
            changed.view(-1)[at] = 1.0
            seen.add(str(_words(changed).tolist()))
        assert len(seen) == torch.zeros(shape).numel()


@torch.no_grad()
def test_the_weights_hash_sees_exchanges_of_rows_with_equal_sums_and_odd_storage() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    weight = model.blocks[0].attn.q_proj.weight
    weight.copy_(torch.eye(*weight.shape))
    before = weight.clone()
    seen = [weights_hash(model)]
    weight[[0, 2]] = before[[2, 0]]
    seen.append(weights_hash(model))
    weight.copy_(before[:, torch.randperm(before.shape[1])])
    seen.append(weights_hash(model))
    assert len(set(seen)) == 3
    weight.copy_(before)
    odd = torch.empty(weight.numel() + 1)[1:].view_as(weight).copy_(before)
    model.blocks[0].attn.q_proj.weight = torch.nn.Parameter(odd)  # a view that begins in the middle of a word
    assert weights_hash(model) == seen[0]


@torch.no_grad()
def test_the_weights_hash_is_of_the_weights_as_they_are_now() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    seen = [weights_hash(model)]
    model.blocks[2].attn.W_O[1] *= 2
    seen.append(weights_hash(model))
    weight_processing.fold_ln(model)
    seen.append(weights_hash(model))
    model.blocks[0].attn.o_proj.weight.data[0, 0] += 1  # behind autograd's back
    seen.append(weights_hash(model))
    assert len(set(seen)) == 4


def test_everything_that_decides_results_is_in_the_identity() -> None:
    def of(change: Callable[[Any], None]) -> dict[str, str]:
        model = HookedVLM.from_pretrained("toy-qwen2-vl")
        change(model)
        return model.identity()

    def bounded(model: Any) -> None:
        model.image_processor = model.image_processor.bounded(None, 4096)

    def template(model: Any) -> None:
        model.tokenizer.chat_template += " "

    def token(model: Any) -> None:
        model.tokenizer.add_tokens(["<new>"])

    def settings(model: Any) -> None:
        model.generation_config = {"repetition_penalty": 1.05}

    def used(model: Any) -> None:
        model.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
        model.generate("What is this?", 2)

    same = of(lambda model: None)
    assert of(used) == same and of(lambda model: model.cfg.with_(model_name="x")) == same
    for change, name in ((bounded, "settings"), (settings, "settings"), (template, "tokenizer"), (token, "tokenizer")):
        found = of(change)
        assert {key for key in same if same[key] != found[key]} == {name}, change.__name__


def test_the_code_hash_is_of_every_file_once_wherever_it_lies(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "whole" / "part").mkdir(parents=True)
    (tmp_path / "whole" / "a.py").write_text("a = 1\n")
    (tmp_path / "whole" / "part" / "b.py").write_text("b = 2\n")
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "b.py").write_text("b = 2\n")

    def hashed(folder_of_part: str) -> str:
        folders = {"whole": tmp_path / "whole", "whole.part": tmp_path / folder_of_part}
        monkeypatch.setattr(provenance_module, "OWN", tuple(folders))
        monkeypatch.setattr(provenance_module, "_folder", folders.__getitem__)
        return code_hash.__wrapped__()

    installed = hashed("whole/part")
    assert hashed("apart") == installed  # as in a checkout, where the part lies beside the whole
    (tmp_path / "apart" / "b.py").write_text("b = 3\n")
    assert hashed("apart") != installed
