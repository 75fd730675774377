"""Idefics3, SmolVLM and SmolVLM2, of images: `config.json` to our configuration, and Hugging Face tensors to ours and
back.

The names of tensors are the same in published files, in memory and in what transformers 5 saves:
`model.vision_model.*`, `model.connector.modality_projection.proj.weight`, `model.text_model.*`, `lm_head.weight`.
Defaults are those of `Idefics3Config` and `SmolVLMConfig` in transformers 5.23.0, which differ in nothing else.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from hooked_vlm.converters import composed
from hooked_vlm.converters.clip_towers import SIGLIP, tower_kwargs, tower_table
from hooked_vlm.converters.dialects import LLAMA
from hooked_vlm.converters.fields import Fields, refuse_quantised
from hooked_vlm.converters.language_models import decoder_kwargs
from hooked_vlm.converters.llava_variants import DIALECTS
from hooked_vlm.converters.renaming import Rename, tied_to_ours, tied_to_theirs

ARCHITECTURES = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
MODEL_TYPES = ("idefics3", "smolvlm")
_, _, LLAMA_DEFAULTS = DIALECTS["llama"]
TOWER_DEFAULTS = {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
"""Where they are not those of SigLIP's class."""
dtype, published_config = composed.dtype, composed.published_config

# ---------------------------------------------------------------- configuration


def config_kwargs(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `VLMConfig`; `"vision"` holds those for `VisionConfig`.

    Raises:
        CheckpointError: a field is missing, absurd, contradicts another or asks for something not supported.
    """
    root = Fields(hf_config)
    refuse_quantised(root)
    text = decoder_kwargs(_text(root), LLAMA, where="text_config")
    return {
        **text,
        "tie_word_embeddings": root.flag("tie_word_embeddings", False),  # the root's alone: text_config's ties nothing
        "image_token_id": root.token_id("image_token_id", default=128257),
        "prompt_style": "idefics3",
        "vision": _vision_kwargs(root, text["d_model"]),
        "original_architecture": _architecture(hf_config),
    }


def _architecture(hf_config: Mapping[str, Any]) -> str:
    stated = hf_config.get("architectures") or []
    named = stated if isinstance(stated, list) else [stated]
    by_type = ARCHITECTURES[hf_config.get("model_type") == "smolvlm"]
    return next((name for name in ARCHITECTURES if name in named), by_type)


def _text(root: Fields) -> dict[str, Any]:
    """The settings of the language model, with its class's defaults."""
    stated = root.section("text_config")
    Fields(stated, where="text_config").one_of("model_type", ("llama",), default="llama")
    silent = {"rms_norm_eps": 1e-5} if root.get("text_config") is None else {}
    return LLAMA_DEFAULTS | silent | {name: value for name, value in stated.items() if value is not None}


def _vision_kwargs(root: Fields, text_width: int) -> dict[str, Any]:
    vision = Fields(root.section("vision_config"), TOWER_DEFAULTS, where="vision_config")
    tower, scale = tower_kwargs(vision, SIGLIP, text_width), root.size("scale_factor", default=2)
    image_size, patch_size = tower["tile_size"], tower["patch_size"]
    n_patches = image_size // patch_size
    if not n_patches or n_patches % scale:
        expected = f"a divisor of the {n_patches} patches (of {patch_size} pixels) on a side of {image_size} pixels"
        raise root.error("scale_factor", expected, scale)
    if (moved := misplaced(n_patches)) is not None:
        expected = f"another size: of its {n_patches} patches a side, rounding in transformers gives patch {moved} the "
        raise vision.error("image_size", f"{expected}position of its neighbour, which is not supported", image_size)
    return {
        **tower,
        "post_norm": True,
        "unread_norm": False,
        "processor": "idefics3",
        "projector": ("merge", "linear"),
        "merge_size": scale,
        "projector_bias": False,
    }


def misplaced(n_patches: int) -> int | None:
    """The first of so many patches on a side of a full square that does not have its own learned position; None: all
    have.

    The reference looks positions up by fractions of the side, in float32 (modeling_idefics3.py,
    `Idefics3VisionEmbeddings`). With the 26, 27 and 32 patches of published towers every patch has its own; with 25,
    say, rounding puts some into the bucket before. Tiles are full squares, so nothing else is needed.
    """
    boundaries = torch.arange(1 / n_patches, 1.0, 1 / n_patches)
    fractions = (torch.arange(n_patches) * (1.0 / torch.tensor(n_patches))).clamp(max=1.0 - 1e-6)
    moved = torch.bucketize(fractions, boundaries, right=True) != torch.arange(n_patches)
    return int(moved.nonzero()[0]) if moved.any() else None


# ---------------------------------------------------------------- tensors

EMBED, HEAD = "model.text_model.embed_tokens.weight", "lm_head.weight"


def from_hf(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], notes: list[str] | None = None
) -> dict[str, Tensor]:
    """Our tensors from a checkpoint's (or from the state dict of a transformers model), as views.

    `notes` gains what was left out because it cannot change a number.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or contradict `tie_word_embeddings`.
    """
    cfg = config_kwargs(config)
    return tied_to_ours(tensors, _table(cfg), cfg, (EMBED, HEAD), notes=notes)


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
    cfg = config_kwargs(config)
    theirs = tied_to_theirs(tensors, _table(cfg), cfg)
    if names == "in_memory" and cfg["tie_word_embeddings"]:
        theirs[HEAD] = theirs[EMBED]
    return theirs


def _table(cfg: Mapping[str, Any]) -> list[Rename]:
    """Every tensor of a model with these settings, by its published name."""
    vision = cfg["vision"]
    wide = vision["d_model"] * vision["merge_size"] ** 2
    projection = "model.connector.modality_projection.proj.weight"
    return [
        *(replace(entry, theirs=_text_name(entry.theirs)) for entry in LLAMA.table(cfg)),
        *tower_table(vision, "vision.ln_post", "model.vision_model."),
        Rename(projection, ("projector.out_proj.weight",), (vision["d_out"], wide)),
    ]


def _text_name(name: str) -> str:
    """The name of a tensor of the language model, given its name in a Llama of its own."""
    return name if name == HEAD else "model.text_model." + name.removeprefix("model.")
