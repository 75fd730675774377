"""InternVL2 (and 2.5, 3, 3.5): both checkpoint layouts to our configuration and tensors, and back.

- "original": `InternVLChatModel`, as published with remote code (which is never looked at): `vision_model.*`,
  `mlp1.*`, `language_model.*` in the language model's own spelling;
- "hf": `InternVLForConditionalGeneration`, the `-hf` repositories of `transformers`' own class: `vision_tower.*`,
  `multi_modal_projector.*`, `language_model.model.*`, `language_model.lm_head.*`, or that class's names in memory
  (`model.vision_tower.*`, ...).

`norm_type`, `qk_normalization` and `qkv_bias` tell the two vision towers apart; `model_type` is "intern_vit_6b" for
the small one, too. Defaults are those of the published configuration classes and of
`InternVLConfig` in transformers 5.23.0.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hooked_vlm.converters.dialects import INTERNLM2, LLAMA, PLAIN, QWEN3, Dialect, dialect_of
from hooked_vlm.converters.fields import Fields, refuse_quantised, stated_dtype, stored_in
from hooked_vlm.converters.internvl_vision import hf_vision, original_vision
from hooked_vlm.converters.language_models import MOST_LAYERS, decoder_config, decoder_kwargs
from hooked_vlm.converters.renaming import Rename, tied_to_ours, tied_to_theirs
from hooked_vlm.errors import CheckpointError

ORIGINAL, HF = "InternVLChatModel", "InternVLForConditionalGeneration"
ARCHITECTURES = (ORIGINAL, HF)
MODEL_TYPES = ("internvl_chat", "internvl")
Layout = Literal["original", "hf"]
LAYOUTS = ("original", "hf")

# The vocabulary of every published size ends in <IMG_CONTEXT>, <quad>, </quad>, <ref>, </ref>, <box>, </box>; but that
# of 3.5 (Qwen3) is padded, and only the tokenizer knows the id.
IMAGE_TOKEN_FROM_END = 7

FLASH = ("vit_router", "flash_relative_threshold", "flash_absolute_threshold", "router_config")
"""Fields of -Flash variants (from memory: not seen in a file)."""

# ---------------------------------------------------------------- configuration


def layout_of(hf_config: Mapping[str, Any]) -> Layout:
    """The layout of a configuration."""
    stated = hf_config.get("architectures") or []
    named = stated if isinstance(stated, list) else [stated]
    return "hf" if HF in named or (not named and hf_config.get("model_type") == "internvl") else "original"


def config_kwargs(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `VLMConfig`; `"vision"` holds those for `VisionConfig`.

    Raises:
        CheckpointError: a field is missing, absurd, contradicts another or asks for something not supported.
    """
    root = Fields(hf_config)
    refuse_quantised(root)
    name = _text_section(hf_config)
    section, dialect = root.section(name), _dialect(hf_config)
    _refuse_flash(root)
    text = decoder_kwargs(section, dialect, where=name)
    # transformers' class reads it at the root first
    tied = text["tie_word_embeddings"]
    if layout_of(hf_config) == "hf":
        tied = root.flag("tie_word_embeddings", tied)
    last = None if dialect is QWEN3 else text["d_vocab"] - IMAGE_TOKEN_FROM_END
    stated = root.token_id("image_token_id", default=last)
    return {
        **text,
        "tie_word_embeddings": tied,
        "image_token_id": root.token_id("img_context_token_id", default=stated),
        "prompt_style": "internvl",
        "chat_template": root.text("template"),
        "system_message": root.text("system_message"),
        "vision": _vision_kwargs(hf_config, text["d_model"]),
        "original_architecture": ORIGINAL if layout_of(hf_config) == "original" else HF,
    }


def _refuse_flash(root: Fields) -> None:
    """Refuse InternVL3.5-Flash, whose router gives some tiles fewer tokens.

    Raises:
        CheckpointError: names the field that says so.
    """
    for name in FLASH:
        if root.states(name):
            raise CheckpointError(
                f"config.json has {name}, as InternVL3.5-Flash, whose router compresses some tiles: this is not "
                "supported; use the checkpoint of the same size without -Flash"
            )


def _text_section(hf_config: Mapping[str, Any]) -> str:
    return "llm_config" if layout_of(hf_config) == "original" else "text_config"


def _dialect(hf_config: Mapping[str, Any]) -> Dialect:
    name = _text_section(hf_config)
    dialect = dialect_of(Fields(hf_config).section(name), where=name, among=PLAIN)
    if layout_of(hf_config) == "hf" and dialect is INTERNLM2:
        raise CheckpointError("text_config: transformers has no InternLM2; its weights are written as Llama's there")
    return dialect


def _vision_kwargs(hf_config: Mapping[str, Any], text_width: int) -> dict[str, Any]:
    root, layout = Fields(hf_config), layout_of(hf_config)
    vision = Fields(root.section("vision_config"), where="vision_config")
    original = layout == "original"
    width = vision.size("hidden_size", default=3200 if original else 1024)
    n_heads = vision.size("num_attention_heads", default=25 if original else 16)
    n_layers = vision.size("num_hidden_layers", default=48 if original else 24, most=MOST_LAYERS)
    patch_size = vision.size("patch_size", default=14)
    image_size = vision.size("image_size", default=224 if original else 448)
    tile_size = root.size("force_image_size", default=image_size) if original else image_size
    merge_size = _merge_size(root)
    for name, size in (("image_size", image_size), ("force_image_size", tile_size)):
        if size % (patch_size * merge_size):
            expected = f"a multiple of patch_size / downsample_ratio = {patch_size * merge_size}"
            raise (vision if name == "image_size" else root).error(name, expected, size)
    norm = vision.one_of("norm_type", ("layer_norm", "rms_norm"), default="rms_norm" if original else "layer_norm")
    dynamic = root.flag("dynamic_image_size", False) if original else True
    _refuse_unsupported_vision(vision, root, original)
    return {
        "n_layers": n_layers,
        "d_model": width,
        "n_heads": n_heads,
        "d_head": vision.divided("hidden_size", "num_attention_heads", width, n_heads),
        "d_mlp": vision.size("intermediate_size", default=12800 if original else 4096),
        "d_out": text_width,
        "act_fn": vision.one_of("hidden_act", ("gelu",), default="gelu"),
        "gated_mlp": False,
        "normalization_type": "LN" if norm == "layer_norm" else "RMS",
        "eps": vision.number("layer_norm_eps", default=1e-6),
        "qkv_bias": vision.flag("qkv_bias" if original else "attention_bias", False),
        "qk_norm": vision.flag("qk_normalization" if original else "use_qk_norm", original),
        "layer_scale": True,
        "pre_norm": False,
        "post_norm": False,
        "rope_theta": None,
        "window": None,
        "full_layers": (),
        "patch_bias": True,
        "patch_order": "raster",
        "class_token": True,
        "n_positions": (image_size // patch_size) ** 2,
        "position_fit": "bicubic",
        "tile_size": tile_size,
        "processor": "tiles",
        "n_layers_used": _layers_used(root, "select_layer" if original else "vision_feature_layer", n_layers),
        "patch_size": patch_size,
        "temporal_patch_size": 1,
        "in_channels": vision.size("num_channels", default=3),
        "projector": ("merge", "norm", "linear", "activation", "linear"),
        "merge_size": merge_size,
        "transposed_tokens": original and root.one_of("ps_version", ("v1", "v2"), default="v1") == "v1",
        "d_projector": text_width,
        "projector_norm_type": "LN",
        "projector_eps": 1e-5,  # not in the configuration: torch.nn.LayerNorm's default in both classes
        "projector_bias": True,
        "min_tiles": (root.size("min_dynamic_patch", default=1) if original else 1) if dynamic else 1,
        "max_tiles": (root.size("max_dynamic_patch", default=6) if original else 12) if dynamic else 1,
        "thumbnail": root.flag("use_thumbnail", False) if original else True,
    }


def _refuse_unsupported_vision(vision: Fields, root: Fields, original: bool) -> None:
    if not original:
        for name, expected in (("use_mask_token", False), ("use_absolute_position_embeddings", True)):
            if vision.flag(name, expected) is not expected:
                raise vision.error(name, f"{str(expected).lower()} (not supported otherwise)", not expected)
        if not vision.flag("use_mean_pooling", True):
            raise vision.error("use_mean_pooling", "true (a norm after the tower is not supported)", False)
        root.one_of("projector_hidden_act", ("gelu",), default="gelu")
        root.one_of("vision_feature_select_strategy", ("default",), default="default")


def _merge_size(root: Fields) -> int:
    """Number of patches along the side of a token."""
    ratio = root.number("downsample_ratio", default=0.5)
    merge = round(1 / ratio)
    if merge < 1 or abs(merge * ratio - 1) > 1e-6:
        raise root.error("downsample_ratio", "1 / n for a whole n", ratio)
    return merge


def _layers_used(root: Fields, name: str, n_layers: int) -> int | None:
    """Blocks before the hidden state that the projector reads: -1 is the last block's output, 0 the embedding."""
    layer = root.get(name, -1)
    if not isinstance(layer, int) or isinstance(layer, bool) or not -n_layers <= layer <= n_layers or layer == 0:
        raise root.error(name, f"a whole number from {-n_layers} to {n_layers}, not 0", layer)
    used = layer if layer > 0 else n_layers + 1 + layer
    return None if used == n_layers else used


def dtype(hf_config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype stated in the configuration, or None (then the tensors' own is used).

    Raises:
        CheckpointError: it names no floating-point dtype.
    """
    return stated_dtype(hf_config, _text_section(hf_config))


def published_config(
    hf_config: Mapping[str, Any],
    stored_as: torch.dtype | None = None,
    layout: Layout | None = None,
    image_token_id: int | None = None,
) -> dict[str, Any]:
    """The configuration in a layout (its own by default), without references to remote code.

    `stored_as` and `image_token_id` replace its dtype and the id of its image placeholder.

    Raises:
        CheckpointError: as `config_kwargs`; or the layout cannot express this configuration.
    """
    layout = layout_of(hf_config) if layout is None else layout
    cfg = config_kwargs(hf_config)
    if image_token_id not in (None, cfg["image_token_id"]):
        hf_config = {key: value for key, value in hf_config.items() if key != "img_context_token_id"}
        hf_config["image_token_id"] = image_token_id
        cfg["image_token_id"] = image_token_id
    if layout == layout_of(hf_config):
        config = dict(hf_config)
    elif layout == "hf":
        config = _hf_config(cfg, _dialect(hf_config))
    else:
        config = _original_config(cfg, _dialect(hf_config))
    return stored_in(config, dtype(hf_config) if stored_as is None else stored_as)


def _hf_config(cfg: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    vision = cfg["vision"]
    if vision["transposed_tokens"]:
        raise CheckpointError('transformers\' InternVL has no pixel shuffle "v1": keep layout="original"')
    if vision["max_tiles"] > 1 and not vision["thumbnail"]:
        raise CheckpointError('transformers\' InternVL always adds a thumbnail: keep layout="original"')
    side = round(vision["n_positions"] ** 0.5) * vision["patch_size"]
    return {
        "architectures": [HF],
        "model_type": "internvl",
        **({} if cfg["image_token_id"] is None else {"image_token_id": cfg["image_token_id"]}),
        "image_seq_length": (vision["tile_size"] // vision["patch_size"] // vision["merge_size"]) ** 2,
        "downsample_ratio": 1 / vision["merge_size"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": _feature_layer(vision),
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": cfg["tie_word_embeddings"],
        "text_config": decoder_config(cfg, LLAMA if dialect is INTERNLM2 else dialect),
        "vision_config": {
            "architectures": ["InternVLVisionModel"],
            "model_type": "internvl_vision",
            **_shared_vision_fields(vision),
            "attention_bias": vision["qkv_bias"],
            "image_size": [side, side],
            "patch_size": [vision["patch_size"]] * 2,
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": True,
            "use_qk_norm": vision["qk_norm"],
        },
    }


def _original_config(cfg: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    vision = cfg["vision"]
    side = round(vision["n_positions"] ** 0.5) * vision["patch_size"]
    return {
        "architectures": [ORIGINAL],
        "model_type": "internvl_chat",
        "downsample_ratio": 1 / vision["merge_size"],
        "dynamic_image_size": vision["max_tiles"] > 1,
        "force_image_size": vision["tile_size"],
        **({} if cfg["image_token_id"] is None else {"image_token_id": cfg["image_token_id"]}),
        "llm_config": {**decoder_config(cfg, dialect), "tie_word_embeddings": cfg["tie_word_embeddings"]},
        "max_dynamic_patch": vision["max_tiles"],
        "min_dynamic_patch": vision["min_tiles"],
        "ps_version": "v2",
        "select_layer": _feature_layer(vision),
        "template": cfg["chat_template"],
        "use_thumbnail": vision["thumbnail"],
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            **_shared_vision_fields(vision),
            "image_size": side,
            "patch_size": vision["patch_size"],
            "qk_normalization": vision["qk_norm"],
            "qkv_bias": vision["qkv_bias"],
        },
    }


def _shared_vision_fields(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `vision_config` that both layouts name alike."""
    return {
        "hidden_act": vision["act_fn"],
        "hidden_size": vision["d_model"],
        "intermediate_size": vision["d_mlp"],
        "layer_norm_eps": vision["eps"],
        "norm_type": "layer_norm" if vision["normalization_type"] == "LN" else "rms_norm",
        "num_attention_heads": vision["n_heads"],
        "num_channels": vision["in_channels"],
        "num_hidden_layers": vision["n_layers"],
    }


def _feature_layer(vision: Mapping[str, Any]) -> int:
    used = vision["n_layers_used"]
    return -1 if used is None else used - vision["n_layers"] - 1


# ---------------------------------------------------------------- tensors


def from_hf(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], notes: list[str] | None = None
) -> dict[str, Tensor]:
    """Our tensors from a checkpoint's in the configuration's layout (or from a transformers model's state dict).

    `notes` gains what was left out because it cannot change a number.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or contradict `tie_word_embeddings`.
    """
    cfg, layout = config_kwargs(config), layout_of(config)
    dialect = _dialect(config)
    prefix = "language_model."
    names = (prefix + dialect.embed, prefix + dialect.head)
    rename = str if layout == "original" else _hf_name
    return tied_to_ours(tensors, _table(cfg, dialect, layout), cfg, names, rename, notes)


def to_hf(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    names: Literal["published", "original", "hf", "in_memory"] = "published",
) -> dict[str, Tensor]:
    """The inverse of `from_hf`, bit for bit and in the same dtypes.

    `names` is a layout, "published" for the configuration's own, or "in_memory" for the state dict of
    transformers' class, where a tied output matrix appears under both names, as one object.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or `unembed.weight` is no longer tied.
        ValueError: `names` is none of these.
    """
    if names not in ("published", *LAYOUTS, "in_memory"):
        raise ValueError(f"names must be 'published', 'original', 'hf' or 'in_memory', got {names!r}")
    layout: Layout = layout_of(config) if names == "published" else "original" if names == "original" else "hf"
    cfg, dialect = config_kwargs(config), _dialect(config)
    if layout == "hf" and dialect is INTERNLM2:
        dialect = LLAMA
    in_memory = names == "in_memory"
    theirs = tied_to_theirs(tensors, _table(cfg, dialect, layout), cfg, _in_memory_name if in_memory else str)
    if in_memory and cfg["tie_word_embeddings"]:
        theirs["lm_head.weight"] = theirs["model.language_model.embed_tokens.weight"]
    return theirs


def _table(cfg: Mapping[str, Any], dialect: Dialect, layout: Layout) -> list[Rename]:
    """Every tensor of a model with these settings, by its name in the layout's files."""
    vision = original_vision(cfg["vision"]) if layout == "original" else hf_vision(cfg["vision"])
    return [*dialect.table(cfg, prefix="language_model."), *vision]


def _hf_name(name: str) -> str:
    """The name in transformers' files of a tensor, given its name in memory or in files."""
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    return name.removeprefix("model.") if name.startswith(("model.vision_tower.", "model.multi_modal_")) else name


def _in_memory_name(name: str) -> str:
    """The name in memory of a tensor, given its name in transformers' files."""
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name
