"""LLaVA's checkpoints in every spelling of their names, there and back bit for bit; defaults that files leave out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_anyres
import tiny_llava
import torch
from families import KINDS
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from hooked_vlm import CheckpointError, HookedVLM
from hooked_vlm.converters import KNOWN_MODELS, converter_for, llava
from hooked_vlm.converters.clip_towers import TOWERS
from hooked_vlm.converters.llava_variants import DIALECTS, INSTEAD

NAMES = ("llava", "llava-next", "llava-onevision", "llava-onevision, tied")


def published(name: str) -> str:
    """The name in the published files of a tensor in memory."""
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head", "language_model.lm_head", name)
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)


def written(hf: Any, folder: Path, spelling: str) -> Path:
    """A checkpoint folder: as published, as transformers saves it today, or with the names in memory."""
    if spelling == "saved":
        hf.save_pretrained(folder)
        return folder
    rename = published if spelling == "published" else str
    folder.mkdir()
    state = {name: t for name, t in hf.state_dict().items() if name not in hf.all_tied_weights_keys}
    save_file({rename(name): t.contiguous() for name, t in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf.config.to_dict() | {"architectures": [type(hf).__name__]}))
    return folder


@pytest.mark.parametrize("spelling", ["published", "saved", "in memory"])
@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_of_names_gives_the_references_numbers(name: str, spelling: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    model = HookedVLM.from_pretrained(written(kind.hf(), tmp_path / "hf", spelling))
    batch = kind.batch(kind.cases["one-image"])
    with torch.no_grad():
        ours, theirs = model(model.inputs_from_hf(batch)), kind.hf()(**kind.for_hf(batch)).logits
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_saving_is_bit_exact_and_transformers_loads_it(name: str, tmp_path: Path) -> None:
    hf: Any = KINDS[name].hf()
    folder = written(hf, tmp_path / "hf", "published")
    HookedVLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again, info = type(hf).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in hf.state_dict().items())
    assert HookedVLM.from_pretrained(tmp_path / "again").image_processor == HookedVLM.from_hf(hf).image_processor


@pytest.mark.parametrize("name", NAMES)
def test_names_in_memory_are_those_of_the_reference(name: str) -> None:
    hf: Any = KINDS[name].hf()
    state = HookedVLM.from_hf(hf).to_hf_state_dict("in_memory")
    assert state.keys() == hf.state_dict().keys()
    assert all(torch.equal(t, state[name]) for name, t in hf.state_dict().items())


def test_buffers_of_old_files_are_left_out_with_a_note(tmp_path: Path) -> None:
    folder = written(KINDS["llava"].hf(), tmp_path / "hf", "published")
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="position_ids"):
        HookedVLM.from_pretrained(folder)


# ---------------------------------------------------------------- configurations

TEXT_FIELDS = {
    "hidden_size": "d_model", "intermediate_size": "d_mlp", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "num_key_value_heads": "n_key_value_heads", "vocab_size": "d_vocab",
    "max_position_embeddings": "n_ctx", "rms_norm_eps": "eps",
}  # fmt: skip
VISION_FIELDS = {
    "hidden_size": "d_model", "intermediate_size": "d_mlp", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "image_size": "tile_size", "patch_size": "patch_size", "layer_norm_eps": "eps",
}  # fmt: skip
OURS = [name for name in KNOWN_MODELS if name.startswith("llava-hf/")]
SILENT = [
    {"architectures": [family.architecture], "text_config": text, "vision_config": vision}
    for family in llava.VARIANTS
    for text in [{}, *({"model_type": kind} for kind in DIALECTS)]
    for vision in [{}, *({"model_type": kind} for kind in TOWERS)]
]


def matches(config: dict[str, Any]) -> None:
    """Every size equals that of transformers' configuration class."""
    ours = converter_for(config).config_kwargs(config)
    family = next(f for f in llava.VARIANTS if f.architecture in config["architectures"])
    bare = {key: value for key, value in config.items() if key != "model_type" and value != {}}
    theirs: Any = AutoConfig.for_model(family.model_type, **bare)
    assert {name: ours[name] for name in TEXT_FIELDS.values()} == {
        name: getattr(theirs.text_config, hf) or ours["n_heads"] for hf, name in TEXT_FIELDS.items()
    }
    assert {name: ours["vision"][name] for name in VISION_FIELDS.values()} == {
        name: getattr(theirs.vision_config, hf) for hf, name in VISION_FIELDS.items()
    }
    assert ours["rope_theta"] == theirs.text_config.rope_parameters["rope_theta"]
    windowed = theirs.text_config.model_type == "mistral"
    assert ours["sliding_window"] == (theirs.text_config.sliding_window if windowed else None)
    assert ours["image_token_id"] == theirs.image_token_index
    assert ours["video_token_id"] == getattr(theirs, "video_token_index", None)
    assert [list(own) for own in ours["vision"]["pinpoints"]] == getattr(theirs, "image_grid_pinpoints", [])
    assert ours["vision"]["max_grid"] == {"llava_onevision": 9}.get(family.model_type)
    assert ours["tie_word_embeddings"] == theirs.tie_word_embeddings


@pytest.mark.parametrize("config", SILENT, ids=str)
def test_what_a_file_leaves_out_has_the_value_of_transformers_class(config: dict[str, Any]) -> None:
    if config["vision_config"] and config["architectures"] != ["LlavaForConditionalGeneration"]:
        config = {**config, "image_grid_pinpoints": [[224, 448]]}  # those that are left out are for larger tiles
    if "siglip" in str(config["vision_config"]):
        config = {**config, "vision_feature_select_strategy": "full"}
        config["vision_config"] = {**config["vision_config"], "vision_use_head": False}
    elif "clip" in str(config["vision_config"]):
        config = {**config, "vision_feature_select_strategy": "default"}
    matches(config)


@pytest.mark.parametrize("name", OURS)
def test_known_configurations_have_the_sizes_that_transformers_reads(name: str) -> None:
    matches(KNOWN_MODELS[name].config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
        ({"vision_feature_layer": 0}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"text_config": {"model_type": "gemma"}}, "model_type"),
        ({"vision_config": {"model_type": "pixtral"}}, "model_type"),
        ({"vision_config": {"vision_use_head": True}}, "vision_use_head"),
        ({"text_config": {"attention_bias": True}}, "attention_bias"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        llava.config_kwargs({"architectures": ["LlavaForConditionalGeneration"], **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[336]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[336, 500]]}, "multiples of the vision tower's image_size 336"),
        ({"image_grid_pinpoints": [[336, -336]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": "336x672"}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[336 * 200, 336]]}, "image_grid_pinpoints"),
    ],
)
def test_pinpoints_that_are_no_tiles_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        llava.config_kwargs({"architectures": ["LlavaNextForConditionalGeneration"], **changes})


@pytest.mark.parametrize("stated", ["anyres", "pad", "anyres_max_0", "anyres_max_", 9, "anyres_max_9x"])
def test_other_ways_of_arranging_onevisions_pictures_are_refused(stated: Any) -> None:
    config = {"architectures": ["LlavaOnevisionForConditionalGeneration"], "vision_aspect_ratio": stated}
    with pytest.raises(CheckpointError, match="vision_aspect_ratio must be 'anyres_max_9'"):
        llava.config_kwargs(config)


def test_files_of_the_original_code_and_relatives_are_refused_with_the_name_to_use() -> None:
    for architecture in INSTEAD:
        with pytest.raises(CheckpointError, match=r"llava-hf/llava-(1\.5-7b|onevision-qwen2-7b-ov)-hf"):
            converter_for({"architectures": [architecture], "model_type": "llava"})


@pytest.mark.parametrize(
    ("text", "image_token", "style"),
    [
        ("mistral", 32000, "mistral"), ("llama", 32000, "vicuna"), ("llama", 64000, "chatml"),
        ("llama", 128256, "llama3"), ("qwen2", 151646, "chatml"),
    ],
)  # fmt: skip
def test_language_models_have_prompts_of_their_own(text: str, image_token: int, style: str) -> None:
    config = {
        "architectures": ["LlavaNextForConditionalGeneration"], "image_token_index": image_token,
        "text_config": {"model_type": text, "vocab_size": image_token + 64},
    }  # fmt: skip
    assert llava.config_kwargs(config)["prompt_style"] == style


@pytest.mark.parametrize("text", DIALECTS)
@pytest.mark.parametrize("siglip", [False, True], ids=["clip", "siglip"])
@pytest.mark.parametrize("name", ["llava", "llava-next"])
@torch.no_grad()
def test_every_language_model_and_tower_has_the_references_logits(name: str, text: str, siglip: bool) -> None:
    hf = tiny_llava.tiny_llava(text, siglip) if name == "llava" else tiny_anyres.tiny_next(text, siglip)
    model: Any = HookedVLM.from_hf(hf)
    batch = KINDS[name].batch(KINDS[name].cases["left-padded"])
    ours, theirs = model(model.inputs_from_hf(batch)), hf(**tiny_llava.for_hf(batch)).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=2e-5, rtol=2e-5)
