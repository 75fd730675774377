"""Checkpoints of Gemma 3 and PaliGemma in every spelling of their names, there and back bit for bit; what files leave
out; what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gemma3
import tiny_paligemma
import torch
from families import KINDS
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, Gemma2Config, Gemma3TextConfig, GemmaConfig

from hooked_vlm import CheckpointError, HookedVLM
from hooked_vlm.converters import KNOWN_MODELS, converter_for, gemma3, language_models, paligemma
from hooked_vlm.loading.saving import without_none

MODELS: dict[str, Callable[[], Any]] = {
    "gemma3": tiny_gemma3.tiny_hf,
    "gemma3, untied": lambda: tiny_gemma3.tiny_hf(tied=False),
    "paligemma": tiny_paligemma.tiny_hf,
    "paligemma2": lambda: tiny_paligemma.tiny_hf("gemma2"),
    "paligemma2, untied": lambda: tiny_paligemma.tiny_hf("gemma2", tied=False),
}
VLMS = {"Gemma3ForConditionalGeneration": gemma3, "PaliGemmaForConditionalGeneration": paligemma}


def published(name: str) -> str:
    """The name in the published files of a tensor in memory."""
    name = re.sub(r"^language_model\.", "language_model.model.", name.removeprefix("model."))
    name = re.sub(r"^lm_head", "language_model.lm_head", name)
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)


def of_4_52(name: str) -> str:
    """The name in files that transformers 4.52 to 4.57 saved."""
    return name.replace("model.vision_tower.", "model.vision_tower.vision_model.")


SPELLINGS = {"published": published, "in memory": str, "4.52": of_4_52}


def config_of(hf: Any) -> dict[str, Any]:
    return {"architectures": [type(hf).__name__], **without_none(hf.config.to_dict())}


def state_of(hf: Any) -> dict[str, Tensor]:
    """As files hold it: a tied output matrix is left out."""
    return {name: t for name, t in hf.state_dict().items() if name not in hf.all_tied_weights_keys}


def equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(t, others[name]) for name, t in some.items())


@pytest.mark.parametrize("spelling", [*SPELLINGS, "saved"])
@pytest.mark.parametrize("name", MODELS)
def test_every_spelling_of_names_gives_the_same_tensors(name: str, spelling: str, tmp_path: Path) -> None:
    hf, notes = MODELS[name](), []
    config, converter = config_of(hf), converter_for(config_of(hf))
    if spelling == "saved":
        hf.save_pretrained(tmp_path)
        state, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    else:
        state = {SPELLINGS[spelling](key): t for key, t in state_of(hf).items()}
    ours = converter.from_hf(state, config, notes)
    assert equal(ours, converter.from_hf(hf.state_dict(), config_of(hf))) and not notes
    assert (ours["unembed.weight"] is ours["embed.weight"]) == ("untied" not in name)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_exact_under_either_kind_of_names(name: str) -> None:
    hf = MODELS[name]()
    config, converter = config_of(hf), converter_for(config_of(hf))
    ours = converter.from_hf(hf.state_dict(), config)
    assert equal(converter.to_hf(ours, config, "in_memory"), hf.state_dict())
    files = converter.to_hf(ours, config, "published")
    assert equal(files, {published(key): t for key, t in state_of(hf).items()})
    assert all(t.is_contiguous() for t in files.values())


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_is_written(name: str, tmp_path: Path) -> None:
    hf = MODELS[name]()
    config, converter = config_of(hf), converter_for(config_of(hf))
    files = converter.to_hf(converter.from_hf(hf.state_dict(), config), config)
    save_file(files, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(converter.published_config(config, torch.float32)))
    again, info = type(hf).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert equal(again.state_dict(), hf.state_dict())


@pytest.mark.parametrize("spelling", [*SPELLINGS, "saved"])
@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"])
@torch.no_grad()
def test_folders_give_the_references_numbers(name: str, spelling: str, tmp_path: Path) -> None:
    hf = MODELS[name]()
    if spelling == "saved":
        hf.save_pretrained(tmp_path / "hf")
    else:
        state = {SPELLINGS[spelling](key): t.contiguous() for key, t in state_of(hf).items()}
        (tmp_path / "hf").mkdir()
        save_file(state, tmp_path / "hf" / "model.safetensors")
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config_of(hf)))
    model = HookedVLM.from_pretrained(tmp_path / "hf", device="cpu")
    batch = KINDS[name].batch(KINDS[name].cases["one-image"])
    ours, theirs = model(model.inputs_from_hf(batch)), hf(**KINDS[name].for_hf(batch)).logits
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    model.save_pretrained(tmp_path / "again")
    again = HookedVLM.from_pretrained(tmp_path / "again", device="cpu")
    assert torch.equal(again(again.inputs_from_hf(batch)), ours)
    assert again.image_processor == model.image_processor == HookedVLM.from_hf(hf).image_processor


def test_gemma3s_projection_is_stored_the_other_way_around() -> None:
    hf = tiny_gemma3.tiny_hf()
    ours = gemma3.from_hf(hf.state_dict(), config_of(hf))["projector.out_proj.weight"]
    theirs = hf.state_dict()["model.multi_modal_projector.mm_input_projection_weight"]
    assert torch.equal(ours, theirs.T) and ours.data_ptr() == theirs.data_ptr()  # a view


def test_norms_of_gemma2s_blocks_have_the_names_of_their_places() -> None:
    hf = tiny_paligemma.tiny_hf("gemma2")
    ours, layer = paligemma.from_hf(hf.state_dict(), config_of(hf)), hf.model.language_model.layers[1]
    for name, module in {
        "ln1": layer.input_layernorm,
        "ln1_post": layer.post_attention_layernorm,
        "ln2": layer.pre_feedforward_layernorm,
        "ln2_post": layer.post_feedforward_layernorm,
    }.items():
        assert torch.equal(ours[f"blocks.1.{name}.weight"], module.weight)
    first = tiny_paligemma.tiny_hf()
    ours = paligemma.from_hf(first.state_dict(), config_of(first))
    assert torch.equal(
        ours["blocks.0.ln2.weight"], first.model.language_model.layers[0].post_attention_layernorm.weight
    )


# ---------------------------------------------------------------- configurations

TEXT_FIELDS = {
    "hidden_size": "d_model", "intermediate_size": "d_mlp", "num_hidden_layers": "n_layers", "head_dim": "d_head",
    "num_attention_heads": "n_heads", "num_key_value_heads": "n_key_value_heads", "vocab_size": "d_vocab",
    "max_position_embeddings": "n_ctx", "rms_norm_eps": "eps", "pad_token_id": "pad_token_id",
}  # fmt: skip
VISION_FIELDS = {
    "hidden_size": "d_model", "intermediate_size": "d_mlp", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "image_size": "tile_size", "patch_size": "patch_size", "layer_norm_eps": "eps",
}  # fmt: skip
NO_HEAD = {"vision_config": {"vision_use_head": False}}
SILENT: list[dict[str, Any]] = [
    {"architectures": ["GemmaForCausalLM"]},
    {"architectures": ["Gemma2ForCausalLM"]},
    {"architectures": ["Gemma3ForCausalLM"]},
    {"architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 49},
    {"architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 49, **NO_HEAD},
    {"architectures": ["PaliGemmaForConditionalGeneration"]},
    {"architectures": ["PaliGemmaForConditionalGeneration"], "text_config": {"hidden_size": 2048}, **NO_HEAD},
    {
        "architectures": ["PaliGemmaForConditionalGeneration"], "projection_dim": 2304, **NO_HEAD,
        "text_config": {"model_type": "gemma2"},
    },
]  # fmt: skip
MODEL_TYPES = {
    "GemmaForCausalLM": "gemma", "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3", "PaliGemmaForConditionalGeneration": "paligemma",
}  # fmt: skip


def layers_of(kwargs: dict[str, Any]) -> list[tuple[int | None, float, float]]:
    """Window, base of the frequencies and factor of their scaling, layer by layer."""
    alike = {"window": None, "rope_theta": kwargs["rope_theta"], "rope_scaling": kwargs["rope_scaling"]}
    kinds = kwargs.get("layer_kinds", (alike,))
    every = [kinds[number] for number in kwargs.get("layer_kind_of", (0,) * kwargs["n_layers"])]
    return [(own["window"], own["rope_theta"], (own["rope_scaling"] or {"factor": 1.0})["factor"]) for own in every]


def layers_of_hf(text: Any) -> list[tuple[int | None, float, float]]:
    """The same of transformers' configuration."""
    layers = []
    for kind in getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers:
        rope = text.rope_parameters.get(kind, text.rope_parameters)
        window = text.sliding_window if kind == "sliding_attention" else None
        layers.append((window, rope["rope_theta"], rope.get("factor", 1.0)))
    return layers


def matches(config: dict[str, Any]) -> None:
    """Every setting equals that of transformers' configuration class."""
    ours, (architecture,) = converter_for(config).config_kwargs(config), config["architectures"]
    bare = {key: value for key, value in config.items() if key != "model_type"}
    theirs: Any = AutoConfig.for_model(MODEL_TYPES[architecture], **bare)
    text = theirs.get_text_config()
    assert {name: ours[name] for name in TEXT_FIELDS.values()} == {
        name: getattr(text, hf) for hf, name in TEXT_FIELDS.items()
    }
    assert layers_of(ours) == layers_of_hf(text)
    scalar = getattr(text, "query_pre_attn_scalar", None)
    assert ours.get("attn_scale") == (None if scalar is None else scalar**0.5)
    assert ours["embed_scale"] == text.hidden_size**0.5 and ours["rmsnorm_uses_offset"]
    assert ours.get("attn_scores_soft_cap") == getattr(text, "attn_logit_softcapping", None)
    assert ours.get("output_logits_soft_cap") == getattr(text, "final_logit_softcapping", None)
    assert ours["tie_word_embeddings"] == theirs.tie_word_embeddings
    if architecture in VLMS:
        vision = theirs.vision_config
        assert {name: ours["vision"][name] for name in VISION_FIELDS.values()} == {
            name: getattr(vision, hf) for hf, name in VISION_FIELDS.items()
        }
        assert ours["image_token_id"] == theirs.image_token_index
        assert ours["vision"]["d_out"] == theirs.text_config.hidden_size
        tokens = getattr(theirs, "mm_tokens_per_image", (vision.image_size // vision.patch_size) ** 2)
        assert ours["vision"]["n_positions"] == tokens * ours["vision"].get("pool_size", 1) ** 2


@pytest.mark.parametrize("config", SILENT, ids=str)
def test_what_a_file_leaves_out_has_the_value_of_transformers_class(config: dict[str, Any]) -> None:
    matches(config)


@pytest.mark.parametrize("name", [name for name in KNOWN_MODELS if name.startswith("google/")])
def test_known_configurations_have_the_sizes_that_transformers_reads(name: str) -> None:
    matches(KNOWN_MODELS[name].config)


GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7}
LAYERS = {
    "pattern of 3": {"sliding_window_pattern": 3},
    "named": {"layer_types": ["full_attention", *["sliding_attention"] * 5, "full_attention"]},
    "all full": {"layer_types": ["full_attention"] * 7},
    "all windows": {"layer_types": ["sliding_attention"] * 7, "sliding_window": 512},
    "before 5": {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 4}},
    "since 5": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        }
    },
}


@pytest.mark.parametrize("stated", LAYERS.values(), ids=LAYERS)
def test_layers_have_the_windows_and_frequencies_that_transformers_reads(stated: dict[str, Any]) -> None:
    config = {**GEMMA3, **stated}
    theirs = Gemma3TextConfig(**json.loads(json.dumps({k: v for k, v in config.items() if k != "architectures"})))
    ours = language_models.config_kwargs(config)
    assert layers_of(ours) == layers_of_hf(theirs)
    again = {"architectures": ["Gemma3ForCausalLM"], **without_none(theirs.to_dict())}
    assert layers_of(language_models.config_kwargs(again)) == layers_of(ours)


def test_the_old_name_of_the_kind_of_scaling_is_read() -> None:
    """transformers 5.23 takes {"type": "linear"} for no scaling; what the file says is a scaling."""
    ours = language_models.config_kwargs({**GEMMA3, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert layers_of(ours)[5] == (None, 1e6, 4.0)


def test_the_pattern_that_transformers_saves_is_read() -> None:
    ours = language_models.config_kwargs({**GEMMA3, "_sliding_window_pattern": 2})
    assert ours["layer_kind_of"] == (1, 0, 1, 0, 1, 0, 1)


def test_nulls_take_caps_away_and_gemma3_with_a_tower_has_none() -> None:
    capped = {"architectures": ["Gemma2ForCausalLM"]}
    silent, null = (
        language_models.config_kwargs({**capped, **stated})
        for stated in ({}, {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    )
    assert (silent["attn_scores_soft_cap"], silent["output_logits_soft_cap"]) == (50.0, 30.0)
    assert (null["attn_scores_soft_cap"], null["output_logits_soft_cap"]) == (None, None)
    text = {"final_logit_softcapping": 30.0}
    assert language_models.config_kwargs({**GEMMA3, **text})["output_logits_soft_cap"] == 30.0
    assert gemma3.config_kwargs({"mm_tokens_per_image": 49, "text_config": text})["output_logits_soft_cap"] is None
    in_memory = without_none(Gemma2Config(attn_logit_softcapping=None, final_logit_softcapping=None).to_dict())
    assert language_models.config_kwargs(capped | in_memory)["attn_scores_soft_cap"] is None


def test_gelu_of_the_first_files_means_tanh() -> None:
    config = {"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "hidden_activation": None}
    assert language_models.config_kwargs(config)["act_fn"] == "gelu_tanh"
    assert GemmaConfig(hidden_act="gelu").hidden_act == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    ("architecture", "changes", "says"),
    [
        ("GemmaForCausalLM", {"hidden_act": "silu"}, "hidden_act"),
        ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("GemmaForCausalLM", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("GemmaForCausalLM", {"attention_bias": True}, "attention_bias"),
        ("Gemma2ForCausalLM", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("Gemma2ForCausalLM", {"sliding_window": None}, "sliding_window"),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "EmbeddingGemma"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("Gemma3ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types"),
        ("Gemma3ForCausalLM", {"layer_types": ["chunked_attention"] * 26}, "layer_types"),
        ("Gemma3ForCausalLM", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'linear'"),
        ("Gemma3ForCausalLM", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'linear' or 'default'"),
        ("Gemma3ForCausalLM", {"rope_parameters": {"rope_theta": 1e4}}, "full_attention and sliding_attention"),
        ("Gemma3ForConditionalGeneration", {"text_config": {"model_type": "gemma2"}}, "model_type"),
        ("Gemma3ForConditionalGeneration", {"vision_config": {"model_type": "clip_vision_model"}}, "model_type"),
        ("Gemma3ForConditionalGeneration", {"vision_config": {"vision_use_head": True}}, "vision_use_head"),
        ("Gemma3ForConditionalGeneration", {"mm_tokens_per_image": 50}, "mm_tokens_per_image"),
        ("Gemma3ForConditionalGeneration", {"mm_tokens_per_image": 36}, "the 14 rows of patches"),
        ("PaliGemmaForConditionalGeneration", {"text_config": {"model_type": "gemma3_text"}}, "model_type"),
        ("PaliGemmaForConditionalGeneration", {"projection_dim": 1024}, "projection_dim"),
        ("PaliGemmaForConditionalGeneration", {"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(architecture: str, changes: dict[str, Any], says: str) -> None:
    config = {"architectures": [architecture], **changes}
    with pytest.raises(CheckpointError, match=says):
        converter_for(config).config_kwargs(config)


def test_paligemma_reads_files_that_say_their_text_sees_both_ways() -> None:
    for stated in (True, False, None):
        config = {"text_config": {"hidden_size": 2048, "use_bidirectional_attention": stated}}
        assert paligemma.config_kwargs(config)["bidirectional"] == "prompt"
