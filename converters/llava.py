"""LLaVA-1.5, LLaVA-NeXT (1.6) and LLaVA-OneVision: `config.json` to our configuration, and Hugging Face tensors to ours
and back.

One module for the repositories of `transformers`' own classes (`llava-hf/*`); what differs between families is a
`Variant`. Names of tensors come in three spellings, and any of them is read:

- published: `vision_tower.vision_model.*`, `language_model.model.*`, `language_model.lm_head.weight`;
- saved by transformers 5: the same without `vision_model`;
- in memory: `model.vision_tower.*`, `model.language_model.*`, `lm_head.weight`, `model.image_newline`.

Defaults are those of the configuration classes in transformers 5.23.0.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hooked_vlm.converters.fields import Fields, refuse_quantised, stated_dtype, stored_in
from hooked_vlm.converters.language_models import LLAMA, MOST_LAYERS, Dialect, decoder_kwargs
from hooked_vlm.converters.llava_variants import (
    DIALECTS,
    LLAMA_STYLES,
    TOWERS,
    UNSTATED,
    VARIANTS,
    Variant,
)
from hooked_vlm.converters.renaming import Rename, affine, tied_to_ours, tied_to_theirs

ARCHITECTURES = tuple(family.architecture for family in VARIANTS)
MODEL_TYPES = tuple(family.model_type for family in VARIANTS)
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
MOST_PIXELS = 2**15
"""Of a side of a pinpoint."""

# ---------------------------------------------------------------- configuration


def config_kwargs(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `VLMConfig`; `"vision"` holds those for `VisionConfig`.

    Raises:
        CheckpointError: a field is missing, absurd, contradicts another or asks for something not supported.
    """
    root, family = Fields(hf_config), _family(hf_config)
    refuse_quantised(root)
    dialect, style, _ = _language_model(hf_config)
    text = decoder_kwargs(_text(hf_config), dialect, where="text_config")
    stated = root.token_id("image_token_id", default=family.image_token_id)
    image_token_id = root.token_id("image_token_index", default=stated)
    return {
        **text,
        # written at the root or in text_config; either one ties
        "tie_word_embeddings": text["tie_word_embeddings"] or root.flag("tie_word_embeddings", False),
        "image_token_id": image_token_id,
        "video_token_id": _video_token(root, family),
        "pad_token_id": root.token_id("pad_token_id", default=text["pad_token_id"]),
        "prompt_style": _llama_style(image_token_id) if dialect is LLAMA else style,
        "vision": _vision_kwargs(root, family, text["d_model"]),
        "original_architecture": family.architecture,
    }


def _llama_style(image_token_id: int | None) -> str:
    return next(style for first, style in LLAMA_STYLES if (image_token_id or 0) >= first)


def _video_token(root: Fields, family: Variant) -> int | None:
    if family.video_token_id is None:
        return None
    return root.token_id("video_token_index", default=root.token_id("video_token_id", default=family.video_token_id))


def _family(hf_config: Mapping[str, Any]) -> Variant:
    stated = hf_config.get("architectures") or []
    named = stated if isinstance(stated, list) else [stated]
    return next(
        family
        for family in VARIANTS
        if family.architecture in named or (not named and hf_config.get("model_type") == family.model_type)
    )


def _language_model(hf_config: Mapping[str, Any]) -> tuple[Dialect, str, dict[str, Any]]:
    section, family = Fields(Fields(hf_config).section("text_config"), where="text_config"), _family(hf_config)
    kind = section.one_of("model_type", tuple(DIALECTS), default=family.text)
    dialect, style, defaults = DIALECTS[kind]
    return dialect, family.styles.get(kind, style), defaults


def _text(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the language model, with its class's defaults; a null counts where it means something."""
    _, _, defaults = _language_model(hf_config)
    stated = Fields(hf_config).section("text_config")
    meant = ("sliding_window", "num_key_value_heads")
    return defaults | {name: value for name, value in stated.items() if value is not None or name in meant}


def _vision_kwargs(root: Fields, family: Variant, text_width: int) -> dict[str, Any]:
    stated = root.section("vision_config")
    kind = Fields(stated, where="vision_config").one_of("model_type", tuple(TOWERS), default=family.tower)
    tower, unstated = TOWERS[kind], {} if stated else UNSTATED[kind]
    vision = Fields({**stated, **unstated}, where="vision_config")
    _refuse_unsupported_vision(root, vision, tower["strategy"])
    width, n_heads = vision.size("hidden_size", default=768), vision.size("num_attention_heads", default=12)
    n_layers = vision.size("num_hidden_layers", default=12, most=MOST_LAYERS)
    image_size, patch_size = vision.size("image_size", default=224), vision.size("patch_size", tower["patch_size"])
    act_fn = vision.one_of("hidden_act", tuple(ACTIVATIONS), default=tower["hidden_act"])
    return {
        "n_layers": n_layers,
        "d_model": width,
        "n_heads": n_heads,
        "d_head": vision.divided("hidden_size", "num_attention_heads", width, n_heads),
        "d_mlp": vision.size("intermediate_size", default=3072),
        "d_out": text_width,
        "act_fn": ACTIVATIONS[act_fn],
        "gated_mlp": False,
        "normalization_type": "LN",
        "eps": vision.number("layer_norm_eps", default=tower["layer_norm_eps"]),
        "pre_norm": tower["pre_norm"],
        "post_norm": False,
        "unread_norm": True,
        "rope_theta": None,
        "window": None,
        "full_layers": (),
        "n_layers_used": _layers_used(root, family.feature_layer, n_layers),
        "patch_size": patch_size,
        "temporal_patch_size": 1,
        "in_channels": vision.size("num_channels", default=3),
        "patch_bias": tower["patch_bias"],
        "patch_order": "raster",
        "class_token": tower["class_token"],
        "n_positions": (image_size // patch_size) ** 2,
        "position_fit": "table",
        "tile_size": image_size,
        "processor": family.processor,
        "projector": ("linear", "activation", "linear"),
        "merge_size": 1,
        "d_projector": text_width,
        "projector_bias": root.flag("multimodal_projector_bias", True),
        "line_break": family.line_break,
        "pinpoints": _pinpoints(root, family, image_size),
        "max_grid": _max_grid(root, family),
    }


def _pinpoints(root: Fields, family: Variant, tile_size: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of the grids of tiles that a picture may be fitted into."""
    if not family.pinpoints:
        return ()
    stated = root.get("image_grid_pinpoints", [list(own) for own in family.pinpoints])
    pairs = isinstance(stated, list | tuple) and all(isinstance(own, list | tuple) and len(own) == 2 for own in stated)
    if not pairs or not stated or not all(_is_multiple(side, tile_size) for own in stated for side in own):
        expected = f"a list of [height, width] in pixels, multiples of the vision tower's image_size {tile_size}"
        raise root.error("image_grid_pinpoints", expected, stated)
    return tuple((int(high), int(wide)) for high, wide in stated)


def _is_multiple(side: Any, tile_size: int) -> bool:
    return isinstance(side, int) and not isinstance(side, bool) and 0 < side < MOST_PIXELS and side % tile_size == 0


def _max_grid(root: Fields, family: Variant) -> int | None:
    """How many tiles' worth of tokens a stitched grid may have before it is resampled."""
    if family.max_grid is None:
        return None
    stated = root.get("vision_aspect_ratio", f"anyres_max_{family.max_grid}")
    number = str(stated).removeprefix("anyres_max_")
    if not isinstance(stated, str) or number == stated or not number.isascii() or not number.isdigit() or number == "0":
        expected = "'anyres_max_9' or with another number (others are not supported)"
        raise root.error("vision_aspect_ratio", expected, stated)
    return int(number)


def _refuse_unsupported_vision(root: Fields, vision: Fields, strategy: str) -> None:
    root.one_of("projector_hidden_act", ("gelu",), default="gelu")
    root.one_of("vision_feature_select_strategy", (strategy,), default=strategy)
    if vision.flag("vision_use_head", False):
        raise vision.error("vision_use_head", "false (a head that pools the patches is not supported)", True)


def _layers_used(root: Fields, default: int, n_layers: int) -> int | None:
    """Blocks before the hidden state that the projector reads: -1 is the last block's output."""
    layer = root.get("vision_feature_layer", default)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int) or isinstance(layer, bool) or not -n_layers <= layer <= n_layers or layer == 0:
        expected = f"a whole number from {-n_layers} to {n_layers}, not 0 (several layers are not supported)"
        raise root.error("vision_feature_layer", expected, layer)
    used = layer if layer > 0 else n_layers + 1 + layer
    return None if used == n_layers else used


def dtype(hf_config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype stated in the configuration, or None (then the tensors' own is used).

    Raises:
        CheckpointError: it names no floating-point dtype.
    """
    return stated_dtype(hf_config, "text_config")


def published_config(hf_config: Mapping[str, Any], stored_as: torch.dtype | None = None) -> dict[str, Any]:
    """The same configuration without references to remote code; `stored_as` replaces the stated dtype.

    Raises:
        CheckpointError: it names no floating-point dtype.
    """
    return stored_in(hf_config, dtype(hf_config) if stored_as is None else stored_as)


# ---------------------------------------------------------------- tensors

PREFIX = "language_model."
TOWER = "vision_tower.vision_model."


def from_hf(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], notes: list[str] | None = None
) -> dict[str, Tensor]:
    """Our tensors from a checkpoint's (or from the state dict of a transformers model), as views.

    `notes` gains what was left out because it cannot change a number.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or contradict `tie_word_embeddings`.
    """
    cfg, dialect = config_kwargs(config), _language_model(config)[0]
    names = (PREFIX + dialect.embed, PREFIX + dialect.head)
    return tied_to_ours(tensors, _table(cfg, dialect), cfg, names, _published_name, notes)


def to_hf(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    names: Literal["published", "in_memory"] = "published",
) -> dict[str, Tensor]:
    """The inverse of `from_hf`, bit for bit and in the same dtypes.

    `names="published"` is for files: a tied output matrix is left out. `names="in_memory"` is the state dict
    of a transformers 5 model: a tied output matrix appears under both names, as one object.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or `unembed.weight` is no longer tied.
        ValueError: `names` is neither of the two.
    """
    if names not in ("published", "in_memory"):
        raise ValueError(f"names must be 'published' or 'in_memory', got {names!r}")
    cfg, dialect = config_kwargs(config), _language_model(config)[0]
    in_memory = names == "in_memory"
    theirs = tied_to_theirs(tensors, _table(cfg, dialect), cfg, _in_memory_name if in_memory else str)
    if in_memory and cfg["tie_word_embeddings"]:
        theirs["lm_head.weight"] = theirs["model.language_model.embed_tokens.weight"]
    return theirs


def _table(cfg: Mapping[str, Any], dialect: Dialect) -> list[Rename]:
    """Every tensor of a model with these settings, by its published name."""
    return [*dialect.table(cfg, prefix=PREFIX), *tower_table(cfg["vision"], TOWER), *_projector(cfg["vision"])]


def tower_table(cfg: Mapping[str, Any], prefix: str) -> list[Rename]:
    """Every tensor of a tower in CLIP's and SigLIP's names, by `prefix` and its published name."""
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
    last = "vision.unread_norm" if cfg["unread_norm"] else "vision.ln_post"
    return table + affine(f"{prefix}post_layernorm", (last,), (width,))


def _projector(cfg: Mapping[str, Any]) -> list[Rename]:
    width, parts = cfg["d_out"], 2 if cfg["projector_bias"] else 1
    theirs = "multi_modal_projector.linear"
    table = [
        *affine(f"{theirs}_1", ("projector.in_proj",), (width, cfg["d_model"]))[:parts],
        *affine(f"{theirs}_2", ("projector.out_proj",), (width, width))[:parts],
    ]
    if cfg["line_break"]:
        table.append(Rename("image_newline", ("projector.line_break",), (width,)))
    return table


def _published_name(name: str) -> str:
    """The published name of a tensor, given that name, its name in memory or in a file of transformers 5."""
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith(TOWER):
        return TOWER + name.removeprefix("vision_tower.")
    return name


def _in_memory_name(name: str) -> str:
    """The name in transformers 5's memory of a tensor, given its published name."""
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace(TOWER, "vision_tower.")
