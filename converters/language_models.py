"""The language models of both families as one decoder: their settings, and the names of their tensors.

Text-only checkpoints of these language models are a family, too. The dialects:

- Qwen2 (`Qwen2ForCausalLM`), Llama, Vicuna and Yi included (`LlamaForCausalLM`), and Mistral (`MistralForCausalLM`):
  separate projections;
- Qwen3 (`Qwen3ForCausalLM`): the same, with norms of each head's queries and keys;
- Phi-3 (`Phi3ForCausalLM`): q, k, v fused, and gate and up;
- InternLM2 (`InternLM2ForCausalLM`): q, k, v fused and interleaved, once for each key-value head.

Defaults are those of the classes in transformers 5.23.0, for InternLM2 those of the published code.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hooked_vlm.converters.fields import REQUIRED, Fields, refuse_quantised, stated_dtype, stored_in
from hooked_vlm.converters.renaming import EMBED, UNEMBED, Rename, tied_to_ours, tied_to_theirs
from hooked_vlm.errors import CheckpointError

MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Dialect:
    """An architecture's names for the tensors of a decoder, and its default settings."""

    architecture: str
    model_type: str
    embed: str
    norm: str
    head: str
    block: Callable[[Mapping[str, Any], str, str], list[Rename]]
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    eps: float = 1e-6

    def table(self, cfg: Mapping[str, Any], prefix: str = "") -> list[Rename]:
        """Every tensor of a decoder with these settings, by `prefix` and its published name."""
        d_model, d_vocab = cfg["d_model"], cfg["d_vocab"]
        table = [Rename(prefix + self.embed, (EMBED,), (d_vocab, d_model))]
        for layer in range(cfg["n_layers"]):
            table += self.block(cfg, f"{prefix}model.layers.{layer}", f"blocks.{layer}")
        table.append(Rename(prefix + self.norm, ("ln_final.weight",), (d_model,)))
        if not cfg["tie_word_embeddings"]:
            table.append(Rename(prefix + self.head, (UNEMBED,), (d_vocab, d_model)))
        return table


# ---------------------------------------------------------------- tensors of a block


def llama_block(cfg: Mapping[str, Any], theirs: str, ours: str) -> list[Rename]:
    """A block in Llama's names, which Qwen2 shares (with biases on q, k and v) and Qwen3 (with norms of q and k)."""
    d_model, d_mlp = cfg["d_model"], cfg["d_mlp"]
    d_query, d_key = _widths(cfg)
    shapes: dict[tuple[str, str], tuple[int, ...]] = {
        ("input_layernorm.weight", "ln1.weight"): (d_model,),
        ("self_attn.o_proj.weight", "attn.o_proj.weight"): (d_model, d_query),
        ("post_attention_layernorm.weight", "ln2.weight"): (d_model,),
        ("mlp.gate_proj.weight", "mlp.gate_proj.weight"): (d_mlp, d_model),
        ("mlp.up_proj.weight", "mlp.in_proj.weight"): (d_mlp, d_model),
        ("mlp.down_proj.weight", "mlp.out_proj.weight"): (d_model, d_mlp),
    }
    for part, width in (("q_proj", d_query), ("k_proj", d_key), ("v_proj", d_key)):
        shapes[f"self_attn.{part}.weight", f"attn.{part}.weight"] = (width, d_model)
        if cfg["qkv_bias"]:
            shapes[f"self_attn.{part}.bias", f"attn.{part}.bias"] = (width,)
    for norm in ("q_norm", "k_norm") if cfg["qk_norm"] else ():
        shapes[f"self_attn.{norm}.weight", f"attn.{norm}.weight"] = (cfg["d_head"],)
    return [Rename(f"{theirs}.{hf}", (f"{ours}.{name}",), shape) for (hf, name), shape in shapes.items()]


def phi3_block(cfg: Mapping[str, Any], theirs: str, ours: str) -> list[Rename]:
    """A block in Phi-3's names: [q | k | v] and [gate | up] are fused."""
    d_model, d_mlp = cfg["d_model"], cfg["d_mlp"]
    d_query, d_key = _widths(cfg)
    widths = (d_query, d_key, d_key)
    qkv = tuple(f"{ours}.attn.{part}_proj.weight" for part in "qkv")
    gate_up = (f"{ours}.mlp.gate_proj.weight", f"{ours}.mlp.in_proj.weight")
    return [
        Rename(f"{theirs}.input_layernorm.weight", (f"{ours}.ln1.weight",), (d_model,)),
        Rename(f"{theirs}.self_attn.qkv_proj.weight", qkv, (sum(widths), d_model), parts=widths),
        Rename(f"{theirs}.self_attn.o_proj.weight", (f"{ours}.attn.o_proj.weight",), (d_model, d_query)),
        Rename(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.ln2.weight",), (d_model,)),
        Rename(f"{theirs}.mlp.gate_up_proj.weight", gate_up, (2 * d_mlp, d_model)),
        Rename(f"{theirs}.mlp.down_proj.weight", (f"{ours}.mlp.out_proj.weight",), (d_model, d_mlp)),
    ]


def internlm2_block(cfg: Mapping[str, Any], theirs: str, ours: str) -> list[Rename]:
    """A block in InternLM2's names: `wqkv` has, for each key-value head, its query heads, then its key and value."""
    d_model, d_mlp, d_head, groups = cfg["d_model"], cfg["d_mlp"], cfg["d_head"], cfg["n_key_value_heads"]
    d_query, d_key = _widths(cfg)
    qkv = tuple(f"{ours}.attn.{part}_proj.weight" for part in "qkv")
    parts = (d_query // groups, d_head, d_head)
    return [
        Rename(f"{theirs}.attention_norm.weight", (f"{ours}.ln1.weight",), (d_model,)),
        Rename(f"{theirs}.attention.wqkv.weight", qkv, (d_query + 2 * d_key, d_model), parts=parts, groups=groups),
        Rename(f"{theirs}.attention.wo.weight", (f"{ours}.attn.o_proj.weight",), (d_model, d_query)),
        Rename(f"{theirs}.ffn_norm.weight", (f"{ours}.ln2.weight",), (d_model,)),
        Rename(f"{theirs}.feed_forward.w1.weight", (f"{ours}.mlp.gate_proj.weight",), (d_mlp, d_model)),
        Rename(f"{theirs}.feed_forward.w3.weight", (f"{ours}.mlp.in_proj.weight",), (d_mlp, d_model)),
        Rename(f"{theirs}.feed_forward.w2.weight", (f"{ours}.mlp.out_proj.weight",), (d_model, d_mlp)),
    ]


def _widths(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """Widths of all query heads together, and of all key heads."""
    return cfg["n_heads"] * cfg["d_head"], cfg["n_key_value_heads"] * cfg["d_head"]


LLAMA = Dialect(
    "LlamaForCausalLM",
    "llama",
    embed="model.embed_tokens.weight",
    norm="model.norm.weight",
    head="lm_head.weight",
    block=llama_block,
)
QWEN2 = replace(LLAMA, architecture="Qwen2ForCausalLM", model_type="qwen2", qkv_bias=True)
MISTRAL = replace(LLAMA, architecture="MistralForCausalLM", model_type="mistral")
QWEN3 = replace(LLAMA, architecture="Qwen3ForCausalLM", model_type="qwen3", qk_norm=True)
PHI3 = replace(LLAMA, architecture="Phi3ForCausalLM", model_type="phi3", block=phi3_block, eps=1e-5)
INTERNLM2 = replace(
    LLAMA,
    architecture="InternLM2ForCausalLM",
    model_type="internlm2",
    embed="model.tok_embeddings.weight",
    head="output.weight",
    block=internlm2_block,
)
DIALECTS = (QWEN2, QWEN3, LLAMA, MISTRAL, PHI3, INTERNLM2)
ARCHITECTURES = tuple(d.architecture for d in DIALECTS)
MODEL_TYPES = tuple(d.model_type for d in DIALECTS)


def dialect_of(config: Mapping[str, Any], where: str = "config.json") -> Dialect:
    """The dialect of a configuration, by its `architectures` or, where it has none, its `model_type`.

    Raises:
        CheckpointError: another language model; the supported ones are listed.
    """
    stated = config.get("architectures") or []
    named = stated if isinstance(stated, list) else [stated]
    for dialect in DIALECTS:
        if dialect.architecture in named or (not named and config.get("model_type") == dialect.model_type):
            return dialect
    name = ", ".join(map(str, named)) or f"model_type {config.get('model_type')!r}"
    if "moe" in name.lower() or "GptOss" in name:
        raise CheckpointError(
            f"{where}: {name} is a mixture of experts, which is not supported: use a dense size of the family"
        )
    raise CheckpointError(
        f"{where}: the language model {name} is not supported; supported are {', '.join(ARCHITECTURES)}"
    )


# ---------------------------------------------------------------- configuration


def decoder_kwargs(section: Mapping[str, Any], dialect: Dialect, where: str = "config.json") -> dict[str, Any]:
    """Keyword arguments for `VLMConfig` of the decoder alone.

    Raises:
        CheckpointError: a field is missing, absurd, contradicts another or asks for something not supported.
    """
    text = Fields(section, where=where)
    _refuse_unsupported(text, dialect)
    own = 128 if dialect is QWEN3 else None
    sizes = head_sizes(text, kv_may_be_absent=dialect not in (QWEN2, QWEN3, MISTRAL), d_head=own)
    n_ctx = text.size(
        "max_position_embeddings", default={QWEN2: 32768, QWEN3: 32768, MISTRAL: 131072}.get(dialect, 2048)
    )
    windows = dialect in (PHI3, MISTRAL)
    # Mistral's class has a window by default: none only where the file says null
    silent = 4096 if dialect is MISTRAL and not text.states("sliding_window") else None
    window = text.get("sliding_window", silent) if windows else None
    return {
        "n_layers": text.size("num_hidden_layers", most=MOST_LAYERS),
        **sizes,
        "d_mlp": text.size("intermediate_size"),
        "d_vocab": text.size("vocab_size"),
        "n_ctx": n_ctx,
        **_rope(text, dialect, sizes["d_head"], n_ctx),
        "sliding_window": None if window is None else text.size("sliding_window", default=window),
        "eps": text.number("rms_norm_eps", default=dialect.eps),
        "act_fn": text.one_of("hidden_act", ("silu",), default="silu"),
        "normalization_type": "RMS",
        "gated_mlp": True,
        "qkv_bias": dialect.qkv_bias,
        "qk_norm": dialect.qk_norm,
        "tie_word_embeddings": text.flag("tie_word_embeddings", False),
        "eos_token_ids": text.token_ids("eos_token_id"),
        "pad_token_id": text.token_id("pad_token_id"),
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
    layers = text.get("layer_types", [])
    allowed = {"full_attention"} | ({"sliding_attention"} if dialect in (PHI3, MISTRAL) else set())
    if not isinstance(layers, list | tuple) or any(kind not in allowed for kind in layers):
        raise text.error("layer_types", "'full_attention' for every layer (others are not supported)", layers)


def _rope(text: Fields, dialect: Dialect, d_head: int, n_ctx: int) -> dict[str, Any]:
    """The base of the rotary frequencies and their scaling, if any.

    Both are in `rope_theta` and `rope_scaling` or, since transformers 5, both in `rope_parameters`.
    """
    key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = Fields(text.section(key), where=f"{text.where}: {key}")
    theta = rope.number("rope_theta", default=text.number("rope_theta", default=dialect.rope_theta))
    for fields in (rope, text):
        if fields.number("partial_rotary_factor", default=1.0) != 1.0:
            raise fields.error("partial_rotary_factor", "1", fields.get("partial_rotary_factor"))
    return {"rope_theta": theta, "rope_scaling": _scaling(rope, text, d_head, n_ctx)}


def _scaling(rope: Fields, text: Fields, d_head: int, n_ctx: int) -> dict[str, Any] | None:
    """Keyword arguments for `RopeScaling`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return None
    if kind == "linear":
        return {"kind": "linear", "factor": rope.number("factor")}
    if kind == "dynamic":
        # as in transformers, which ignores `original_max_position_embeddings` here
        return {"kind": "dynamic", "factor": rope.number("factor"), "n_ctx_trained": n_ctx}
    if kind not in ("longrope", "su"):
        raise rope.error("type", "'default', 'linear', 'dynamic' or 'longrope' (others are not supported)", kind)
    stated = text.get("original_max_position_embeddings", n_ctx)
    trained = rope.size("original_max_position_embeddings", default=stated)
    growth = rope.number("factor", default=n_ctx / trained)
    attention = math.sqrt(1 + math.log(growth) / math.log(trained)) if growth > 1 else 1.0
    return {
        "kind": "longrope",
        "n_ctx_trained": trained,
        "short_factor": _factors(rope, "short_factor", d_head // 2),
        "long_factor": _factors(rope, "long_factor", d_head // 2),
        "attention_factor": rope.number("attention_factor", default=attention),
    }


def _factors(rope: Fields, name: str, n: int) -> tuple[float, ...]:
    values = rope.get(name)
    numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) and v > 0 for v in values)
    if not numbers or len(values) != n:
        raise rope.error(name, f"{n} positive numbers, one for each frequency", values)
    return tuple(float(v) for v in values)


def decoder_config(cfg: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """The `config.json` section of a decoder in a dialect, as transformers 4 and 5 read it."""
    scaling = cfg["rope_scaling"]
    rope: dict[str, Any] | None = None
    if scaling is not None:
        names = {
            "linear": ("factor",),
            "dynamic": ("factor",),
            "longrope": ("short_factor", "long_factor", "attention_factor"),
        }[scaling["kind"]]
        values = {name: list(v) if isinstance(v := scaling[name], tuple) else v for name in names}
        rope = {"type": scaling["kind"], **values}
        if scaling["kind"] == "longrope":
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
    return {**decoder_kwargs(hf_config, dialect), "vision": None, "original_architecture": dialect.architecture}


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
