"""Language models of every family as one decoder: their settings; text-only checkpoints are a family, too.

`hooked_vlm.converters.dialects` has the names of their tensors. Defaults are those of the classes in transformers
5.23.0, for InternLM2 those of the published code.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hooked_vlm.converters.dialects import (
    DIALECTS,
    GEMMAS,
    INTERNLM2,
    LLAMA,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    Dialect,
    dialect_of,
)
from hooked_vlm.converters.fields import REQUIRED, Fields, refuse_quantised, stated_dtype, stored_in
from hooked_vlm.converters.gemma_text import gemma_kwargs
from hooked_vlm.converters.renaming import tied_to_ours, tied_to_theirs
from hooked_vlm.converters.rope import rope_kwargs

ARCHITECTURES = tuple(dialect.architecture for dialect in DIALECTS)
MODEL_TYPES = tuple(dialect.model_type for dialect in DIALECTS)
MOST_LAYERS = 10_000

# ---------------------------------------------------------------- configuration


def decoder_kwargs(section: Mapping[str, Any], dialect: Dialect, where: str = "config.json") -> dict[str, Any]:
    """Keyword arguments for `VLMConfig` of the decoder alone.

    Raises:
        CheckpointError: a field is missing, absurd, contradicts another or asks for something not supported.
    """
    text = Fields(section, dialect.defaults, where=where)
    _refuse_unsupported(text, dialect)
    own = 128 if dialect is QWEN3 else None
    sizes = head_sizes(text, kv_may_be_absent=dialect not in (QWEN2, QWEN3, MISTRAL), d_head=own)
    n_ctx = text.size(
        "max_position_embeddings", default={QWEN2: 32768, QWEN3: 32768, MISTRAL: 131072}.get(dialect, 2048)
    )
    sizes |= {"n_layers": text.size("num_hidden_layers", most=MOST_LAYERS), "n_ctx": n_ctx}
    return {
        **sizes,
        "d_mlp": text.size("intermediate_size"),
        "d_vocab": text.size("vocab_size"),
        **(gemma_kwargs if dialect in GEMMAS else _plain_kwargs)(text, dialect, sizes),
        "eps": text.number("rms_norm_eps", default=dialect.eps),
        "normalization_type": "RMS",
        "gated_mlp": True,
        "qkv_bias": dialect.qkv_bias,
        "qk_norm": dialect.qk_norm,
        "tie_word_embeddings": text.flag("tie_word_embeddings", False),
        "eos_token_ids": text.token_ids("eos_token_id"),
        "pad_token_id": text.token_id("pad_token_id"),
    }


def _plain_kwargs(text: Fields, dialect: Dialect, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Rotary positions and windows, alike in all layers, and SiLU."""
    windows = dialect in (PHI3, MISTRAL)
    # Mistral's class has a window by default: none only where the file says null
    silent = 4096 if dialect is MISTRAL and not text.states("sliding_window") else None
    window = text.get("sliding_window", silent) if windows else None
    return {
        **rope_kwargs(text, dialect.rope_theta, sizes["d_head"], sizes["n_ctx"]),
        "sliding_window": None if window is None else text.size("sliding_window", default=window),
        "act_fn": text.one_of("hidden_act", ("silu",), default="silu"),
    }


def head_sizes(text: Fields, kv_may_be_absent: bool, d_head: int | None = None) -> dict[str, int]:
    """Widths of the residual stream and of a head, and numbers of heads.

    With `kv_may_be_absent`, an absent number of key-value heads means as many as query heads (a null always does).
    An absent width of a head means `d_head`, or the stream's width shared out.

    Raises:
        CheckpointError: sizes that do not divide each other.
    """
    d_model, n_heads = text.size("hidden_size"), text.size("num_attention_heads")
    as_many = kv_may_be_absent or text.states("num_key_value_heads")
    n_key_value_heads = text.size("num_key_value_heads", default=n_heads if as_many else REQUIRED)
    text.divided("num_attention_heads", "num_key_value_heads", n_heads, n_key_value_heads)
    if d_head is not None or text.get("head_dim") is not None:
        d_head = text.size("head_dim", default=d_head)
    else:
        d_head = text.divided("hidden_size", "num_attention_heads", d_model, n_heads)
    if d_head % 2:
        raise text.error("hidden_size", "an even multiple of num_attention_heads (rotary positions)", d_model)
    return {"d_model": d_model, "n_heads": n_heads, "n_key_value_heads": n_key_value_heads, "d_head": d_head}


def _refuse_unsupported(text: Fields, dialect: Dialect) -> None:
    refuse_quantised(text)
    if dialect in (QWEN2, QWEN3) and text.flag("use_sliding_window", False):
        raise text.error("use_sliding_window", "false (not supported for Qwen2 and Qwen3)", True)
    # InternLM2's class default is true, but every published checkpoint sets false
    biases = {LLAMA: ("attention_bias", "mlp_bias"), QWEN3: ("attention_bias",), INTERNLM2: ("bias",)}
    for name in biases.get(dialect, ()):
        if text.flag(name, default=dialect is INTERNLM2):
            raise text.error(name, "false (biases are not supported in this language model)", True)
    if dialect in GEMMAS:
        return
    layers = text.get("layer_types", [])
    allowed = {"full_attention"} | ({"sliding_attention"} if dialect in (PHI3, MISTRAL) else set())
    if not isinstance(layers, list | tuple) or any(kind not in allowed for kind in layers):
        raise text.error("layer_types", "'full_attention' for every layer (others are not supported)", layers)


def decoder_config(cfg: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """The `config.json` section of a decoder in a dialect, as transformers 4 and 5 read it."""
    scaling = cfg["rope_scaling"]
    rope: dict[str, Any] | None = None
    if scaling is not None:
        names = {
            "linear": ("factor",),
            "dynamic": ("factor",),
            "longrope": ("short_factor", "long_factor", "attention_factor"),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        }[scaling["kind"]]
        values = {name: list(v) if isinstance(v := scaling[name], tuple) else v for name in names}
        rope = {"type": scaling["kind"], **values}
        if scaling["kind"] in ("longrope", "llama3"):
            rope["original_max_position_embeddings"] = scaling["n_ctx_trained"]
    eos = list(cfg["eos_token_ids"])
    config = {
        "architectures": [dialect.architecture],
        "model_type": dialect.model_type,
        "hidden_act": cfg["act_fn"],
        "hidden_size": cfg["d_model"],
        "intermediate_size": cfg["d_mlp"],
        "max_position_embeddings": cfg["n_ctx"],
        "num_attention_heads": cfg["n_heads"],
        "num_hidden_layers": cfg["n_layers"],
        "num_key_value_heads": cfg["n_key_value_heads"],
        "head_dim": cfg["d_head"],
        "rms_norm_eps": cfg["eps"],
        "rope_theta": cfg["rope_theta"],
        "rope_scaling": rope,
        "tie_word_embeddings": cfg["tie_word_embeddings"],
        "vocab_size": cfg["d_vocab"],
        "eos_token_id": (eos[0] if len(eos) == 1 else eos) if eos else None,
        "pad_token_id": cfg["pad_token_id"],
    }
    if dialect in (PHI3, MISTRAL):
        config["sliding_window"] = cfg["sliding_window"]
        if scaling is not None and dialect is PHI3:
            config["original_max_position_embeddings"] = scaling["n_ctx_trained"]
    if dialect is INTERNLM2:
        config["bias"] = False
    return config


# ---------------------------------------------------------------- text-only checkpoints


def config_kwargs(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `VLMConfig`; `"vision"` is None.

    Raises:
        CheckpointError: see `decoder_kwargs`.
    """
    dialect = dialect_of(hf_config)
    return {
        **decoder_kwargs(hf_config, dialect),
        "prompt_style": "gemma" if dialect in GEMMAS else "chatml",
        "vision": None,
        "original_architecture": dialect.architecture,
    }


def dtype(hf_config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype stated in the configuration, or None (then the tensors' own is used)."""
    return stated_dtype(hf_config)


def published_config(hf_config: Mapping[str, Any], stored_as: torch.dtype | None = None) -> dict[str, Any]:
    """The same configuration without references to remote code; `stored_as` replaces the stated dtype."""
    return stored_in(hf_config, dtype(hf_config) if stored_as is None else stored_as)


def from_hf(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], notes: list[str] | None = None
) -> dict[str, Tensor]:
    """Our tensors from a checkpoint's; see `hooked_vlm.converters.qwen2_vl.from_hf`.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or contradict `tie_word_embeddings`.
    """
    dialect, cfg = dialect_of(config), config_kwargs(config)
    return tied_to_ours(tensors, dialect.table(cfg), cfg, (dialect.embed, dialect.head), notes=notes)


def to_hf(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    names: Literal["published", "in_memory"] = "published",
) -> dict[str, Tensor]:
    """The inverse of `from_hf`, bit for bit; both kinds of names are the same here.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or `unembed.weight` is no longer tied.
    """
    dialect, cfg = dialect_of(config), config_kwargs(config)
    theirs = tied_to_theirs(tensors, dialect.table(cfg), cfg)
    if cfg["tie_word_embeddings"] and names == "in_memory":
        theirs[dialect.head] = theirs[dialect.embed]
    return theirs
