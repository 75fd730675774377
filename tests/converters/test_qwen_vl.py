"""Later Qwen-VL families: what `transformers` writes and the published layouts are read, and written bit for bit."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen2_5_vl
import tiny_qwen3_vl
import torch
import transformers
from safetensors.torch import load_file

from hooked_vlm import HookedVLM
from hooked_vlm.config import VLMConfig
from hooked_vlm.converters import converter_for
from hooked_vlm.converters.known_models import KNOWN_MODELS
from hooked_vlm.errors import CheckpointError
from hooked_vlm.vision_config import VisionConfig

TINY: dict[str, Any] = {"qwen2.5-vl": tiny_qwen2_5_vl, "qwen3-vl": tiny_qwen3_vl}
CLASSES: dict[str, Any] = {
    "qwen2.5-vl": transformers.Qwen2_5_VLForConditionalGeneration,
    "qwen3-vl": transformers.Qwen3VLForConditionalGeneration,
}
PUBLISHED = {"qwen2.5-vl": "Qwen/Qwen2.5-VL-7B-Instruct", "qwen3-vl": "Qwen/Qwen3-VL-8B-Instruct"}


@pytest.fixture(params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def saved(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A tiny model, and the folder that transformers saved it in."""
    hf = TINY[name].tiny_hf(request.param)
    hf.save_pretrained(tmp_path / "theirs")
    return hf, tmp_path / "theirs"


def test_a_folder_of_transformers_is_read_and_written_bit_for_bit(saved: tuple[Any, Path], tmp_path: Path) -> None:
    hf, folder = saved
    model = HookedVLM.from_pretrained(folder, device="cpu")
    in_memory = HookedVLM.from_hf(hf)
    ours = in_memory.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "ours")
    theirs, again = load_file(folder / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert len(theirs) == len(again)
    back = HookedVLM.from_pretrained(tmp_path / "ours", device="cpu")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in back.state_dict().items())
    assert back.cfg.with_(model_name="") == model.cfg.with_(model_name="")


def test_transformers_reads_what_is_written(name: str, saved: tuple[Any, Path], tmp_path: Path) -> None:
    hf, folder = saved
    HookedVLM.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "ours")
    again, info = CLASSES[name].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in hf.state_dict().items())
    named = ("hidden_size", "depth", "num_heads", "intermediate_size", "patch_size")
    for key in (*named, "window_size", "fullatt_block_indexes", "tokens_per_second", "deepstack_visual_indexes"):
        vision = again.config.vision_config
        assert getattr(vision, key, None) == getattr(hf.config.vision_config, key, None), key


def test_the_state_dict_of_transformers_comes_back(name: str, saved: tuple[Any, Path]) -> None:
    hf, _ = saved
    model = HookedVLM.from_hf(hf)
    theirs = hf.state_dict()
    back = model.to_hf_state_dict("in_memory")
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in theirs)


def test_configurations_written_by_transformers_mean_the_published_ones(name: str) -> None:
    published = KNOWN_MODELS[PUBLISHED[name]].config
    family = converter_for(published)
    kwargs = family.config_kwargs(published)
    VLMConfig(**{**kwargs, "vision": VisionConfig(**kwargs["vision"])})
    resaved = CLASSES[name].config_class(**deepcopy(published)).to_dict()
    assert "rope_scaling" not in resaved["text_config"]
    again = family.config_kwargs(json.loads(json.dumps(resaved)))
    assert again == kwargs
    assert family.config_kwargs(family.published_config(resaved)) == kwargs


def test_the_published_names_are_those_of_a_saved_file(name: str, saved: tuple[Any, Path]) -> None:
    _, folder = saved
    names = set(load_file(folder / "model.safetensors"))
    model = HookedVLM.from_pretrained(folder, device="cpu")
    short = {one.replace("model.visual.", "visual.").replace("model.language_model.", "model.") for one in names}
    ours = set(model.to_hf_state_dict("published"))
    assert short == {one.replace("model.visual.", "visual.").replace("model.language_model.", "model.") for one in ours}
    assert ("visual.patch_embed.proj.weight" in ours) == (name == "qwen2.5-vl"), "as published"


@pytest.mark.parametrize(
    ("name", "section", "field", "value"),
    [
        ("qwen2.5-vl", "vision_config", "fullatt_block_indexes", [3, 99]),
        ("qwen2.5-vl", "vision_config", "window_size", 20),
        ("qwen2.5-vl", "vision_config", "out_hidden_size", 1280),
        ("qwen2.5-vl", None, "use_sliding_window", True),
        ("qwen3-vl", "vision_config", "deepstack_visual_indexes", [16, 8]),
        ("qwen3-vl", "vision_config", "deepstack_visual_indexes", [8, 27]),
        ("qwen3-vl", "vision_config", "num_position_embeddings", 2000),
        ("qwen3-vl", "vision_config", "hidden_act", "quick_gelu"),
        ("qwen3-vl", "vision_config", "out_hidden_size", 2048),
        ("qwen3-vl", "text_config", "attention_bias", True),
        ("qwen3-vl", "text_config", "use_sliding_window", True),
        ("qwen3-vl", "text_config", "rope_scaling", {"mrope_section": [24, 20, 20], "mrope_interleaved": False}),
        ("qwen3-vl", "text_config", "rope_scaling", {"mrope_section": [4, 30, 30]}),
    ],
)
def test_what_is_not_supported_is_refused_by_its_field(name: str, section: str | None, field: str, value: Any) -> None:
    config = deepcopy(KNOWN_MODELS[PUBLISHED[name]].config)
    (config if section is None else config[section])[field] = value
    named = next(iter(set(value) - {"mrope_section"}), "mrope_section") if isinstance(value, dict) else field
    with pytest.raises(CheckpointError, match=named):
        converter_for(config).config_kwargs(config)


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"Qwen3VLMoe.*mixture of experts.*dense size"):
        converter_for({"architectures": ["Qwen3VLMoeForConditionalGeneration"]})
