"""PaliGemma and PaliGemma 2: `config.json` to our configuration, and Hugging Face tensors to ours and back.

They differ in the language model, Gemma or Gemma 2. `hooked_vlm.converters.composed` has the spellings of names of
tensors. Defaults are those of `PaliGemmaConfig` in transformers 5.23.0.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from hooked_vlm.converters import composed
from hooked_vlm.converters.clip_towers import SIGLIP, tower_kwargs, tower_table
from hooked_vlm.converters.composed import TEXT, to_ours, to_theirs
from hooked_vlm.converters.dialects import GEMMA, GEMMA2, Dialect
from hooked_vlm.converters.fields import Fields, refuse_quantised
from hooked_vlm.converters.language_models import decoder_kwargs
from hooked_vlm.converters.renaming import Rename, affine

ARCHITECTURES, MODEL_TYPES = ("PaliGemmaForConditionalGeneration",), ("paligemma",)
dtype, published_config = composed.dtype, composed.published_config
DIALECTS = {dialect.model_type: dialect for dialect in (GEMMA, GEMMA2)}
UNSTATED = {
    "text_config": {
        "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
        "num_key_value_heads": 1, "vocab_size": 257152,
    },
    "vision_config": {
        "hidden_size": 1152, "intermediate_size": 4096, "num_hidden_layers": 27, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 224,
    },
}  # fmt: skip
"""The language model and the tower of a configuration without any."""


def config_kwargs(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `VLMConfig`; `"vision"` holds those for `VisionConfig`.

    Raises:
        CheckpointError: a field is missing, absurd, contradicts another or asks for something not supported.
    """
    root = Fields(hf_config)
    refuse_quantised(root)
    # tokens of the prompt see each other both ways whatever the language model's file says
    section = {**_section(root, "text_config"), "use_bidirectional_attention": None}
    text = decoder_kwargs(section, _dialect(hf_config), where="text_config")
    if (width := root.size("projection_dim", default=text["d_model"])) != text["d_model"]:
        raise root.error("projection_dim", f"the language model's hidden_size {text['d_model']}", width)
    image_token_id = root.token_id("image_token_id", default=256000)
    return {
        **text,
        "bidirectional": "prompt",
        "window_cuts_blocks": False,
        "tie_word_embeddings": root.flag("tie_word_embeddings", True),
        "image_token_id": root.token_id("image_token_index", default=image_token_id),
        "eos_token_ids": root.token_ids("eos_token_id", default=text["eos_token_ids"]),
        "pad_token_id": root.token_id("pad_token_id", default=text["pad_token_id"]),
        "prompt_style": "paligemma",
        "vision": _vision_kwargs(root, text["d_model"]),
        "original_architecture": ARCHITECTURES[0],
    }


def _section(root: Fields, name: str) -> Mapping[str, Any]:
    return root.section(name) if root.get(name) is not None else UNSTATED[name]


def _dialect(hf_config: Mapping[str, Any]) -> Dialect:
    text = Fields(Fields(hf_config).section("text_config"), where="text_config")
    return DIALECTS[text.one_of("model_type", tuple(DIALECTS), default=GEMMA.model_type)]


def _vision_kwargs(root: Fields, text_width: int) -> dict[str, Any]:
    vision = Fields(_section(root, "vision_config"), where="vision_config")
    tower = tower_kwargs(vision, vision.one_of("model_type", (SIGLIP,), default=SIGLIP), text_width)
    return {**tower, "post_norm": True, "processor": "stretched", "projector": ("linear",), "projector_bias": True}


def from_hf(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], notes: list[str] | None = None
) -> dict[str, Tensor]:
    """Our tensors from a checkpoint's (or from the state dict of a transformers model), as views.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or contradict `tie_word_embeddings`.
    """
    cfg, dialect = config_kwargs(config), _dialect(config)
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
    cfg = config_kwargs(config)
    return to_theirs(tensors, _table(cfg, _dialect(config)), cfg, names)


def _table(cfg: Mapping[str, Any], dialect: Dialect) -> list[Rename]:
    """Every tensor of a model with these settings, by its published name."""
    vision = cfg["vision"]
    return [
        *dialect.table(cfg, prefix=TEXT),
        *tower_table(vision, last_norm="vision.ln_post"),
        *affine("multi_modal_projector.linear", ("projector.out_proj",), (vision["d_out"], vision["d_model"])),
    ]
