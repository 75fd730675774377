"""The vision towers of CLIP and SigLIP as LLaVA, Gemma 3, PaliGemma and Idefics3 read them: settings, and names of
tensors.

Defaults are those of `CLIPVisionConfig` and `SiglipVisionConfig` in transformers 5.23.0.
"""

from collections.abc import Mapping
from typing import Any

from hooked_vlm.converters.fields import Fields
from hooked_vlm.converters.language_models import MOST_LAYERS
from hooked_vlm.converters.renaming import Rename, affine

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
SIGLIP = "siglip_vision_model"
TOWERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "class_token": True, "pre_norm": True, "patch_bias": False, "strategy": "default",
    },
    SIGLIP: {
        "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        "class_token": False, "pre_norm": False, "patch_bias": True, "strategy": "full",
    },
}  # fmt: skip
"""Default settings of a vision tower, and what its class fixes: its parts, and which of its tokens are read."""
PREFIX = "vision_tower.vision_model."


def tower_kwargs(vision: Fields, kind: str, d_out: int) -> dict[str, Any]:
    """Arguments of `VisionConfig` for a tower of a kind in `TOWERS`, whose pictures are squares of one size.

    Which blocks run and whether the last norm is read is left to the family.

    Raises:
        CheckpointError: a field is absurd or asks for something not supported.
    """
    if vision.flag("vision_use_head", False):
        raise vision.error("vision_use_head", "false (a head that pools the patches is not supported)", True)
    tower = TOWERS[kind]
    width, n_heads = vision.size("hidden_size", default=768), vision.size("num_attention_heads", default=12)
    image_size, patch_size = vision.size("image_size", default=224), vision.size("patch_size", tower["patch_size"])
    act_fn = vision.one_of("hidden_act", tuple(ACTIVATIONS), default=tower["hidden_act"])
    return {
        "n_layers": vision.size("num_hidden_layers", default=12, most=MOST_LAYERS),
        "d_model": width,
        "n_heads": n_heads,
        "d_head": vision.divided("hidden_size", "num_attention_heads", width, n_heads),
        "d_mlp": vision.size("intermediate_size", default=3072),
        "d_out": d_out,
        "act_fn": ACTIVATIONS[act_fn],
        "gated_mlp": False,
        "normalization_type": "LN",
        "eps": vision.number("layer_norm_eps", default=tower["layer_norm_eps"]),
        "pre_norm": tower["pre_norm"],
        "rope_theta": None,
        "window": None,
        "full_layers": (),
        "patch_size": patch_size,
        "temporal_patch_size": 1,
        "in_channels": vision.size("num_channels", default=3),
        "patch_bias": tower["patch_bias"],
        "patch_order": "raster",
        "class_token": tower["class_token"],
        "n_positions": (image_size // patch_size) ** 2,
        "position_fit": "table",
        "tile_size": image_size,
        "merge_size": 1,
    }


def tower_table(cfg: Mapping[str, Any], last_norm: str, prefix: str = PREFIX) -> list[Rename]:
    """Every tensor of a tower by `prefix` and its published name; `last_norm` is our name of the norm behind the last
    block."""
    width, d_mlp, side = cfg["d_model"], cfg["d_mlp"], cfg["patch_size"]
    n_tokens, channels = cfg["class_token"] + cfg["n_positions"], cfg["in_channels"]
    theirs, ours = f"{prefix}embeddings", "vision.tile_embed"
    table = [
        Rename(f"{theirs}.position_embedding.weight", (f"{ours}.positions",), (n_tokens, width), lead=1),
        Rename(
            f"{theirs}.patch_embedding.weight",
            ("vision.patch_embed.proj.weight",),
            (width, channels, side, side),
            flat=True,
        ),
    ]
    if cfg["class_token"]:
        table.append(Rename(f"{theirs}.class_embedding", (f"{ours}.class_token",), (width,), lead=2))
    if cfg["patch_bias"]:
        table.append(Rename(f"{theirs}.patch_embedding.bias", ("vision.patch_embed.proj.bias",), (width,)))
    if cfg["pre_norm"]:
        table += affine(f"{prefix}pre_layrnorm", ("vision.ln_pre",), (width,))
    for layer in range(cfg["n_layers"]):
        theirs, ours = f"{prefix}encoder.layers.{layer}", f"vision.blocks.{layer}"
        for name, part in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj")):
            table += affine(f"{theirs}.self_attn.{name}", (f"{ours}.attn.{part}",), (width, width))
        table += affine(f"{theirs}.layer_norm1", (f"{ours}.ln1",), (width,))
        table += affine(f"{theirs}.layer_norm2", (f"{ours}.ln2",), (width,))
        table += affine(f"{theirs}.mlp.fc1", (f"{ours}.mlp.in_proj",), (d_mlp, width))
        table += affine(f"{theirs}.mlp.fc2", (f"{ours}.mlp.out_proj",), (width, d_mlp))
    return table + affine(f"{prefix}post_layernorm", (last_norm,), (width,))
