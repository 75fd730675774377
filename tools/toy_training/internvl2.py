"""The toy InternVL2 (an ordinary one, very small), kept in the published checkpoint layout.

Its decoder is a Qwen2, as InternVL2-1B's. Tiles are 128 pixels wide: the pages of the tasks are one tile of 8 x 8
tokens, wide ones are two and a thumbnail.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from hooked_vlm import HookedVLM
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.tiles import IMAGENET_MEAN, IMAGENET_STD, TileProcessor
from tools.toy_training.family import HFModel, ToyFamily, normal_vision_weights, write_checkpoint
from tools.toy_training.tokenizer import END_OF_TEXT, IM_END, IM_START, build_tokenizer

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT)
TILE_SIZE, PATCH_SIZE, MERGE_SIZE, MAX_TILES = 128, 8, 2, 4
PROCESSOR = TileProcessor(TILE_SIZE, PATCH_SIZE, MERGE_SIZE, max_tiles=MAX_TILES)

TEMPLATE, SYSTEM_MESSAGE = "Hermes-2", ""  # InternVL2-1B's; the toy never learned a system message

# transformers' names and the published ones, part by part
VISION_NAMES = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    ("encoder.layer.", "encoder.layers."),
    ("attention.projection_layer", "attn.proj"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("lambda_1", "ls1"),
    ("lambda_2", "ls2"),
)
PROJECTOR_NAMES = (("layer_norm", "0"), ("linear_1", "1"), ("linear_2", "3"))


def text_config(**overrides: int) -> dict:
    """The decoder's settings, which the two layouts share; those of toy-qwen2-vl's decoder, with plain RoPE."""
    tokenizer = build_tokenizer(SPECIAL_TOKENS)
    return {
        "bos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "eos_token_id": tokenizer.token_to_id(IM_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 352,
        "max_position_embeddings": 1024,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
        "vocab_size": tokenizer.get_vocab_size(),
        **overrides,
    }


VISION_CONFIG: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_size": 96,
    "image_size": TILE_SIZE,
    "intermediate_size": 384,
    "layer_norm_eps": 1e-06,
    "norm_type": "layer_norm",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": PATCH_SIZE,
}


def config_dict(**overrides: int) -> dict:
    """``config.json`` in the published, flat form."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 1 / MERGE_SIZE,
        "dynamic_image_size": True,
        "force_image_size": TILE_SIZE,
        "llm_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **text_config(**overrides)},
        "max_dynamic_patch": MAX_TILES,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": SYSTEM_MESSAGE,
        "template": TEMPLATE,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "qk_normalization": False,
            "qkv_bias": True,
            **VISION_CONFIG,
        },
    }


def circular_positions(side: int, width: int) -> Float[Tensor, "patch width"]:
    """Sines and cosines of a patch's row and column, of wavelengths from 4 patches to 4 sides."""
    wavelengths = torch.logspace(0, 1, width // 4, base=side) * 4
    angles = 2 * torch.pi * torch.arange(side)[:, None] / wavelengths
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)


class InternVL2(ToyFamily):
    name = "toy-internvl2"
    special_tokens = SPECIAL_TOKENS
    prompt_start = f"{IM_START}system\n{SYSTEM_MESSAGE}{IM_END}"
    turn_separator = ""

    def image_text(self, n_tokens: int) -> str:
        return f"{IMAGE_START}{IMAGE_CONTEXT * n_tokens}{IMAGE_END}\n"

    def build(self, **overrides: int) -> HFModel:
        text = text_config(**overrides)
        config = InternVLConfig(
            text_config={
                "model_type": "qwen2",
                **{key: value for key, value in text.items() if key != "rope_theta"},
                "rope_parameters": {"rope_type": "default", "rope_theta": text["rope_theta"]},
            },
            vision_config={
                **VISION_CONFIG,
                "attention_bias": True,
                "use_qk_norm": False,
                "image_size": [TILE_SIZE, TILE_SIZE],
                "patch_size": [PATCH_SIZE, PATCH_SIZE],
                "layer_scale_init_value": 1.0,
            },
            image_token_id=self.tokenizer.get_vocab()[IMAGE_CONTEXT],
            image_seq_length=PROCESSOR.tokens_per_tile,
            downsample_ratio=1 / MERGE_SIZE,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
        config._attn_implementation = "sdpa"
        model: HFModel = InternVLForConditionalGeneration(config)
        tower = model.model.vision_tower
        depth = VISION_CONFIG["num_hidden_layers"]
        normal_vision_weights(tower, depth, ("projection_layer.weight", "fc2.weight"))
        normal_vision_weights(model.model.multi_modal_projector, depth, ())
        with torch.no_grad():
            side = TILE_SIZE // PATCH_SIZE
            tower.embeddings.position_embeddings[0, 1:] = circular_positions(side, VISION_CONFIG["hidden_size"])
        return model

    def grid(self, height: int, width: int) -> ImageLayout:
        return PROCESSOR.layout((width, height))

    def pixel_values(self, images: UInt8[Tensor, "image height width 3"]) -> Float[Tensor, "tile 3 side side"]:
        return PROCESSOR([Image.fromarray(image) for image in images.cpu().numpy()])[0].to(images.device)

    def positions(self, length: int, grid: ImageLayout | None) -> Int[Tensor, "1 pos"]:
        return torch.arange(length)[None]

    def image_features(
        self, model: HFModel, pixel_values: Float[Tensor, "tile 3 side side"], grid: ImageLayout
    ) -> Float[Tensor, "image token d_model"]:
        features = model.model.get_image_features(pixel_values=pixel_values).pooler_output
        return features.unflatten(0, (-1, grid.n_tiles)).flatten(1, 2)

    def save(self, model: HFModel, folder: Path, **overrides: int) -> None:
        """The published layout: ``vision_model.*``, ``mlp1.*`` and ``language_model.*`` names."""
        config = config_dict(**overrides)
        generation = {key: config["llm_config"][key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        preprocessor = {
            "crop_size": TILE_SIZE,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD,
            "resample": 3,
            "size": TILE_SIZE,
        }
        files = {
            "config.json": config,
            "generation_config.json": {**generation, "do_sample": False},
            "preprocessor_config.json": preprocessor,
        }
        write_checkpoint(folder, published_tensors(model), files, SPECIAL_TOKENS)

    def load(self, folder: Path) -> HFModel:
        """`transformers` reads its own layout only, so the checkpoint is written in it first."""
        with tempfile.TemporaryDirectory() as converted:
            HookedVLM.from_pretrained(folder).save_pretrained(converted, layout="hf")
            return InternVLForConditionalGeneration.from_pretrained(converted)


def published_tensors(model: HFModel) -> dict[str, Tensor]:
    """The weights under the published names; q, k and v of the vision tower are one tensor there."""
    state = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in model.state_dict().items()}
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part, _, short = name.removeprefix("model.").partition(".")
        if part == "language_model":
            published[f"language_model.model.{short}"] = tensor.contiguous()
        elif part == "multi_modal_projector":
            published[f"mlp1.{_renamed(short, PROJECTOR_NAMES)}"] = tensor.contiguous()
        elif part == "vision_tower" and ".q_proj." in short:
            fused = _renamed(short, VISION_NAMES).replace("attention.q_proj", "attn.qkv")
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            published[f"vision_model.{fused}"] = torch.cat(parts)
        elif part == "vision_tower" and not any(f".{letter}_proj." in short for letter in "kv"):
            published[f"vision_model.{_renamed(short, VISION_NAMES)}"] = tensor.contiguous()
        # lm_head is tied to the embeddings
    return published


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for theirs, published in pairs:
        name = name.replace(theirs, published)
    return name


def start_from_qwen2_vl(model: HFModel, other: HFModel) -> None:
    """Gives the decoder the weights of a toy-qwen2-vl's; ``<img>`` and the like take those of their counterparts.

    The two decoders differ in the positions of image tokens only.
    """
    state = other.model.language_model.state_dict()
    state["embed_tokens.weight"] = state["embed_tokens.weight"][: model.config.text_config.vocab_size]
    model.model.language_model.load_state_dict(state)
