"""LLaVA-1.5, LLaVA-NeXT (1.6) and LLaVA-OneVision: `config.json` to our configuration, and Hugging Face tensors to ours
and back.

One module for the repositories of `transformers`' own classes (`llava-hf/*`); what differs between families is a
`Variant`. `hooked_vlm.converters.composed` has the spellings of names of tensors.

Defaults are those of the configuration classes in transformers 5.23.0.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from hooked_vlm.converters import composed
from hooked_vlm.converters.clip_towers import TOWERS, tower_kwargs, tower_table
from hooked_vlm.converters.composed import TEXT, to_ours, to_theirs
from hooked_vlm.converters.dialects import LLAMA, Dialect
from hooked_vlm.converters.fields import Fields, refuse_quantised
from hooked_vlm.converters.language_models import decoder_kwargs
from hooked_vlm.converters.llava_variants import DIALECTS, LLAMA_STYLES, UNSTATED, VARIANTS, Variant
from hooked_vlm.converters.renaming import Rename, affine

ARCHITECTURES = tuple(family.architecture for family in VARIANTS)
MODEL_TYPES = tuple(family.model_type for family in VARIANTS)
MOST_PIXELS = 2**15
"""Of a side of a pinpoint."""
dtype, published_config = composed.dtype, composed.published_config

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
    vision = Fields({**stated, **({} if stated else UNSTATED[kind])}, where="vision_config")
    strategy = TOWERS[kind]["strategy"]
    root.one_of("projector_hidden_act", ("gelu",), default="gelu")
    root.one_of("vision_feature_select_strategy", (strategy,), default=strategy)
    tower = tower_kwargs(vision, kind, text_width)
    return {
        **tower,
        "post_norm": False,
        "unread_norm": True,
        "n_layers_used": _layers_used(root, family.feature_layer, tower["n_layers"]),
        "processor": family.processor,
        "projector": ("linear", "activation", "linear"),
        "d_projector": text_width,
        "projector_bias": root.flag("multimodal_projector_bias", True),
        "line_break": family.line_break,
        "pinpoints": _pinpoints(root, family, tower["tile_size"]),
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


# ---------------------------------------------------------------- tensors


def from_hf(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], notes: list[str] | None = None
) -> dict[str, Tensor]:
    """Our tensors from a checkpoint's (or from the state dict of a transformers model), as views.

    `notes` gains what was left out because it cannot change a number.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or contradict `tie_word_embeddings`.
    """
    cfg, dialect = config_kwargs(config), _language_model(config)[0]
    return to_ours(tensors, _table(cfg, dialect), cfg, dialect, notes)


def to_hf(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    names: Literal["published", "in_memory"] = "published",
) -> dict[str, Tensor]:
    """The inverse of `from_hf`; see `hooked_vlm.converters.composed.to_theirs`.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or `unembed.weight` is no longer tied.
        ValueError: `names` is neither of the two.
    """
    cfg, dialect = config_kwargs(config), _language_model(config)[0]
    return to_theirs(tensors, _table(cfg, dialect), cfg, names)


def _table(cfg: Mapping[str, Any], dialect: Dialect) -> list[Rename]:
    """Every tensor of a model with these settings, by its published name."""
    tower = tower_table(cfg["vision"], last_norm="vision.unread_norm")
    return [*dialect.table(cfg, prefix=TEXT), *tower, *_projector(cfg["vision"])]


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
