"""Small random InternVL models: `transformers`' own, and the same weights in the published layout."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from tiny import LANGUAGE_MODEL, reference, spelled

from hooked_vlm import HookedVLM

IMAGE, IMAGE_START, IMAGE_END = 193, 191, 192

SMALL_VIT = {"norm_type": "layer_norm", "attention_bias": True, "use_qk_norm": False}
LARGE_VIT = {"norm_type": "rms_norm", "attention_bias": False, "use_qk_norm": True}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.2],
    "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0],
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}

# name: (text configuration on top of LANGUAGE_MODEL, vision tower, model type of transformers' text model)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "qwen2": ({"rope_parameters": PLAIN}, SMALL_VIT, "qwen2"),
    "qwen3": ({"rope_parameters": PLAIN, "head_dim": 16}, SMALL_VIT, "qwen3"),
    "llama": ({"rope_parameters": {**PLAIN, "rope_theta": 5e5}}, LARGE_VIT, "llama"),
    "llama-dynamic": ({"rope_parameters": DYNAMIC}, SMALL_VIT, "llama"),
    "phi3": (
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32, "num_key_value_heads": 4},
        SMALL_VIT,
        "phi3",
    ),
}


def tiny_config(kind: str, **changes: Any) -> "transformers.InternVLConfig":
    """A vision tower of two layers, tiles of 32 pixels, patches of 4: 16 tokens to a tile."""
    text, vision, model_type = KINDS[kind]
    return transformers.InternVLConfig(
        text_config={"model_type": model_type, **LANGUAGE_MODEL, "max_position_embeddings": 128, **text},
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": [32, 32],
            "patch_size": [4, 4],
            "layer_norm_eps": 1e-6,
            **vision,
        },
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
        **changes,
    )


@lru_cache(maxsize=8)
def tiny_hf(kind: str) -> Any:
    """The reference. Shared: tests must not change its weights."""
    return reference(transformers.InternVLForConditionalGeneration, tiny_config(kind))


@lru_cache(maxsize=8)
def tiny_model(kind: str) -> Any:
    """Ours, on the same storage. Shared: tests must not change its weights and must leave no hooks."""
    return HookedVLM.from_hf(tiny_hf(kind))


def hf_batch(rows: list[list[Any]], seed: int = 0, tile_size: int = 32) -> dict[str, torch.Tensor]:
    """A batch as a Hugging Face processor returns it, padded on the left, with `num_tiles` besides.

    A row is a list of token ids and of ("image", number of tiles).
    """
    generator = torch.Generator().manual_seed(seed)
    num_tiles: list[int] = []

    def placeholders(item: tuple[str, int]) -> list[int]:
        num_tiles.append(item[1])
        return [IMAGE_START, *[IMAGE] * ((tile_size // 8) ** 2 * item[1]), IMAGE_END]

    batch = spelled(rows, placeholders)
    if num_tiles:
        batch["num_tiles"] = torch.tensor(num_tiles)
        batch["pixel_values"] = torch.randn(sum(num_tiles), 3, tile_size, tile_size, generator=generator)
    return batch


def for_hf(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the reference takes of a batch: positions count real tokens only."""
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**{k: v for k, v in batch.items() if k != "num_tiles"}, "position_ids": positions}


CASES: dict[str, list[list[Any]]] = {
    "one-image": [[5, 6, ("image", 1), 7, 8, 9, 10]],
    "images-of-two-sizes": [[5, ("image", 3), 7, ("image", 1), 8, 9]],
    "text": [[5, 6, 7, 8, 9, 10, 11]],
    "left-padded": [[5, ("image", 2), 7, 8], [11, 12, 13], [("image", 1), ("image", 1), 9]],
}


# ---------------------------------------------------------------- as published

ORIGINAL_TEXT = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
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


ADDED = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


def train_tokenizer(folder: Path, **settings_: Any) -> sentencepiece.SentencePieceProcessor:
    """A byte-pair model with byte fallback, as InternLM2's, and the files around it."""
    text = folder / "text.txt"
    words = "what is the value of this image a word user assistant two three leading space lines text inside"
    text.write_text(
        "\n".join([words, "你好 世界 what is this", "assistant user 12345 0.5", "falls back to bytes"] * 30)
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        minloglevel=2,
        **settings_,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    added = {str(len(processor) + i): {"content": t, "special": True} for i, t in enumerate(ADDED)}
    config = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return processor
