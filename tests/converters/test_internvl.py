"""InternVL's two checkpoint layouts and the four dialects of language models: there and back, bit for bit."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_internvl import CASES, IMAGE, KINDS, for_hf, hf_batch, tiny_config, tiny_hf
from transformers import AutoModelForCausalLM, InternVLForConditionalGeneration

from hooked_vlm import CheckpointError, HookedVLM
from hooked_vlm.converters import converter_for, internvl

ORIGINAL_TEXT = {
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama-dynamic": "InternLM2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


def original_config(kind: str) -> dict[str, Any]:
    """The published spelling of a tiny model: flat, with remote code that must not matter."""
    text, vision = KINDS[kind][0], KINDS[kind][1]
    rope = text["rope_parameters"]
    scaling = {
        "default": None,
        "dynamic": {"type": "dynamic", "factor": 2.0},
        "longrope": {"type": "su", **{k: rope.get(k) for k in ("short_factor", "long_factor")}},
    }[rope["rope_type"]]
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 32,
        "llm_config": {
            "architectures": [ORIGINAL_TEXT[kind]],
            "attn_implementation": "flash_attention_2",
            "bias": False,
            "eos_token_id": 3,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 96,
            "max_position_embeddings": 128,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": text.get("num_key_value_heads", 2),
            "original_max_position_embeddings": text.get("original_max_position_embeddings", 128),
            "pad_token_id": 0,
            "rms_norm_eps": 1e-6,
            "rope_scaling": scaling,
            "rope_theta": rope["rope_theta"],
            "vocab_size": 200,
        },
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "drop_path_rate": 0.1,
            "hidden_act": "gelu",
            "hidden_size": 32,
            "image_size": 32,
            "intermediate_size": 48,
            "layer_norm_eps": 1e-6,
            "model_type": "intern_vit_6b",
            "norm_type": vision["norm_type"],
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_hidden_layers": 2,
            "patch_size": 4,
            "qk_normalization": vision["use_qk_norm"],
            "qkv_bias": vision["attention_bias"],
            "use_flash_attn": True,
        },
    }


def by_hand(kind: str) -> dict[str, torch.Tensor]:
    """The reference's weights under the published names, head by head and part by part."""
    state, config = tiny_hf(kind).state_dict(), original_config(kind)
    out: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("model.vision_tower."):
            short = name.removeprefix("model.vision_tower.")
            short = short.replace("embeddings.cls_token", "embeddings.class_embedding")
            short = short.replace("embeddings.position_embeddings", "embeddings.position_embedding")
            short = short.replace("embeddings.patch_embeddings.projection", "embeddings.patch_embedding")
            short = short.replace("encoder.layer.", "encoder.layers.")
            for part in ("q_norm", "k_norm"):
                short = short.replace(f"attention.{part}", f"attn.{part}")
            short = short.replace("attention.projection_layer", "attn.proj")
            short = short.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
            short = short.replace("lambda_1", "ls1").replace("lambda_2", "ls2")
            if "_proj." in short:
                fused = short.replace("attention.q_proj", "attn.qkv")
                if fused != short:
                    parts = [state[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
                    out["vision_model." + fused] = torch.cat(parts)
                continue
            out["vision_model." + short] = tensor
        elif name.startswith("model.multi_modal_projector."):
            part, kind_of = name.split(".")[2:]
            number = {"layer_norm": 0, "linear_1": 1, "linear_2": 3}[part]
            out[f"mlp1.{number}.{kind_of}"] = tensor
        elif kind != "llama-dynamic":
            short = name.replace("model.language_model.", "model.")
            out["language_model." + short] = tensor
    if kind == "llama-dynamic":
        out |= _internlm2(state, config["llm_config"])
    return out


def _internlm2(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    groups, d_head = config["num_key_value_heads"], 16
    per_group = config["num_attention_heads"] // groups
    theirs = "model.language_model"
    out = {
        "language_model.model.tok_embeddings.weight": state[f"{theirs}.embed_tokens.weight"],
        "language_model.model.norm.weight": state[f"{theirs}.norm.weight"],
        "language_model.output.weight": state["lm_head.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        at, to = f"{theirs}.layers.{layer}", f"language_model.model.layers.{layer}"
        q, k, v = (state[f"{at}.self_attn.{p}_proj.weight"] for p in "qkv")
        rows = []
        for g in range(groups):
            for head in range(g * per_group, (g + 1) * per_group):
                rows.append(q[head * d_head : (head + 1) * d_head])
            rows.append(k[g * d_head : (g + 1) * d_head])
            rows.append(v[g * d_head : (g + 1) * d_head])
        out[f"{to}.attention.wqkv.weight"] = torch.cat(rows)
        out[f"{to}.attention.wo.weight"] = state[f"{at}.self_attn.o_proj.weight"]
        out[f"{to}.attention_norm.weight"] = state[f"{at}.input_layernorm.weight"]
        out[f"{to}.ffn_norm.weight"] = state[f"{at}.post_attention_layernorm.weight"]
        for ours, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            out[f"{to}.feed_forward.{ours}.weight"] = state[f"{at}.mlp.{name}.weight"]
    return out


@pytest.fixture(params=KINDS)
def original(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A checkpoint folder in the published layout."""
    save_file({k: v.contiguous() for k, v in by_hand(request.param).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(original_config(request.param)))
    return request.param, tmp_path


@lru_cache
@torch.no_grad()
def reference(kind: str) -> torch.Tensor:
    return tiny_hf(kind)(**for_hf(hf_batch(CASES["one-tile"]))).logits


@torch.no_grad()
def logits(model: HookedVLM) -> torch.Tensor:
    return model(model.inputs_from_hf(hf_batch(CASES["one-tile"])))


def test_the_published_layout_gives_the_references_numbers(original: tuple[str, Path]) -> None:
    kind, folder = original
    model = HookedVLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model), reference(kind), atol=2e-5, rtol=0)
    assert model.cfg.image_token_id == IMAGE == 200 - 7
    assert model.image_processor is not None and model.image_processor.max_tiles == 6


def test_saving_in_the_published_layout_is_bit_exact(original: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = original
    HookedVLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "auto_map" not in config
    assert config == {k: v for k, v in original_config(kind).items() if k != "auto_map"}


def test_saving_for_transformers_and_loading_it_there(original: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = original
    HookedVLM.from_pretrained(folder).save_pretrained(tmp_path / "hf", layout="hf")
    hf = InternVLForConditionalGeneration.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = hf(**for_hf(hf_batch(CASES["one-tile"]))).logits
    torch.testing.assert_close(theirs, reference(kind), atol=2e-5, rtol=0)
    names = load_file(tmp_path / "hf" / "model.safetensors").keys()
    assert all(n.startswith(("language_model.", "vision_tower.", "multi_modal_projector.")) for n in names)
    again = HookedVLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(again), logits(HookedVLM.from_pretrained(folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_own_layout_there_and_back(kind: str, tmp_path: Path) -> None:
    tiny_hf(kind).save_pretrained(tmp_path / "hf")
    model = HookedVLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(model), reference(kind), atol=2e-5, rtol=0)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model.save_pretrained(tmp_path / "original", layout="original")
    assert torch.equal(logits(HookedVLM.from_pretrained(tmp_path / "original")), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_names_in_memory_are_those_of_transformers(kind: str) -> None:
    hf = tiny_hf(kind)
    ours = HookedVLM.from_hf(hf).to_hf_state_dict("in_memory")
    theirs = hf.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_only_checkpoint_of_the_language_model(kind: str, tmp_path: Path) -> None:
    weights = by_hand(kind)
    prefix = "language_model."
    text = {k.removeprefix(prefix): v.contiguous() for k, v in weights.items() if k.startswith(prefix)}
    save_file(text, tmp_path / "model.safetensors")
    config = original_config(kind)["llm_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, tokens = HookedVLM.from_pretrained(tmp_path), torch.arange(4, 30)[None]
    assert model.cfg.vision is None and model.cfg.image_token_id is None
    with torch.no_grad():
        ours, theirs = model(tokens), tiny_hf(kind)(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    model.save_pretrained(tmp_path / "again")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert after.keys() == text.keys() and all(torch.equal(after[name], text[name]) for name in text)


@pytest.mark.parametrize("tied", [False, True])
def test_a_text_only_checkpoint_that_transformers_wrote(tied: bool, tmp_path: Path) -> None:
    config = tiny_config("qwen2").text_config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config).eval()
    hf.save_pretrained(tmp_path / "qwen2")
    model, tokens = HookedVLM.from_pretrained(tmp_path / "qwen2"), torch.arange(4, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf(input_ids=tokens).logits, atol=2e-5, rtol=0)
    assert model.cfg.tie_word_embeddings is tied


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"llm_config": {"architectures": ["MixtralForCausalLM"]}}, "supported are Qwen2ForCausalLM, LlamaForCausalLM"),
        ({"llm_config": {"bias": True}}, "llm_config: bias must be false"),
        ({"llm_config": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}, "rope_scaling: type must be"),
        ({"llm_config": {"rope_scaling": {"type": "su", "short_factor": [1.0]}}}, "8 positive numbers"),
        ({"llm_config": {"quantization_config": {}}}, "quantized"),
        ({"llm_config": {"hidden_size": None}}, "llm_config: hidden_size is missing"),
        ({"vision_config": {"norm_type": "batch_norm"}}, "vision_config: norm_type must be"),
        ({"vision_config": {"num_attention_heads": 5}}, "vision_config: hidden_size"),
        ({"downsample_ratio": 0.3}, "downsample_ratio must be 1 / n"),
        ({"force_image_size": 30}, "force_image_size must be a multiple of"),
        ({"select_layer": -9}, "select_layer must be a whole number from -2 to 2"),
        ({"ps_version": "v3"}, "ps_version must be"),
    ],
)
def test_a_configuration_that_is_not_supported(changes: dict[str, Any], says: str) -> None:
    config = original_config("llama-dynamic")
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    if config["llm_config"].get("quantization_config") == {}:
        config["llm_config"]["quantization_config"] = {"quant_method": "awq"}
    with pytest.raises(CheckpointError, match=says):
        converter_for(config).config_kwargs(config)


def test_pixel_shuffle_v1_transposes_the_tokens_of_a_tile() -> None:
    config = {**original_config("qwen2"), "ps_version": "v1"}
    v2, v1 = (HookedVLM.from_hf(tiny_hf("qwen2")) for _ in range(2))
    assert v1.cfg.vision is not None
    v1.cfg = v1.cfg.with_(vision=type(v1.cfg.vision)(**internvl.config_kwargs(config)["vision"]))
    with torch.no_grad():
        batch = hf_batch(CASES["one-tile"])
        row_by_row, column_by_column = (m.encode_images(m.inputs_from_hf(batch)).view(4, 4, -1) for m in (v2, v1))
    assert torch.equal(row_by_row, column_by_column.transpose(0, 1))
    with pytest.raises(CheckpointError, match="v1"):
        internvl.published_config(config, layout="hf")
