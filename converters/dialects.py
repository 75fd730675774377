"""Language models by the names of their tensors.

- Qwen2 (`Qwen2ForCausalLM`), Llama, Vicuna and Yi included (`LlamaForCausalLM`), and Mistral (`MistralForCausalLM`):
  separate projections;
- Qwen3 (`Qwen3ForCausalLM`): the same, with norms of each head's queries and keys;
- Phi-3 (`Phi3ForCausalLM`): q, k, v fused, and gate and up;
- InternLM2 (`InternLM2ForCausalLM`): q, k, v fused and interleaved, once for each key-value head;
- Gemma (`GemmaForCausalLM`): Llama's; Gemma 2 (`Gemma2ForCausalLM`): with norms of what attention and MLP write, too;
  Gemma 3 (`Gemma3ForCausalLM`): the same, with norms of each head's queries and keys.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hooked_vlm.converters.renaming import EMBED, UNEMBED, Rename
from hooked_vlm.errors import CheckpointError


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
    defaults: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Settings that a file may leave out, with the values of transformers' class."""

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


def gemma2_block(cfg: Mapping[str, Any], theirs: str, ours: str) -> list[Rename]:
    """A block in Gemma 2's names: Llama's, with two norms more, the second of which bears Llama's name of `ln2`."""
    norms = {
        f"{theirs}.post_attention_layernorm.weight": f"{ours}.ln1_post.weight",
        f"{theirs}.pre_feedforward_layernorm.weight": f"{ours}.ln2.weight",
        f"{theirs}.post_feedforward_layernorm.weight": f"{ours}.ln2_post.weight",
    }
    shared = [entry for entry in llama_block(cfg, theirs, ours) if entry.theirs not in norms]
    return [*shared, *(Rename(hf, (name,), (cfg["d_model"],)) for hf, name in norms.items())]


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
_GEMMA: dict[str, Any] = {
    "head_dim": 256, "max_position_embeddings": 8192, "eos_token_id": 1, "pad_token_id": 0,
    "tie_word_embeddings": True, "vocab_size": 256000,
}  # fmt: skip
_GEMMA2: dict[str, Any] = _GEMMA | {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
GEMMA = replace(
    LLAMA,
    architecture="GemmaForCausalLM",
    model_type="gemma",
    defaults=_GEMMA | {
        "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
)  # fmt: skip
GEMMA2 = replace(
    LLAMA,
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    block=gemma2_block,
    defaults=_GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
)
GEMMA3 = replace(
    LLAMA,
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    block=gemma2_block,
    qk_norm=True,
    rope_theta=1e6,
    defaults=_GEMMA2 | {"max_position_embeddings": 131072, "vocab_size": 262208},
)
GEMMAS = (GEMMA, GEMMA2, GEMMA3)
PLAIN = (QWEN2, QWEN3, LLAMA, MISTRAL, PHI3, INTERNLM2)
"""Dialects whose layers are alike."""
DIALECTS = (*PLAIN, *GEMMAS)


def dialect_of(config: Mapping[str, Any], where: str = "config.json", among: tuple[Dialect, ...] = DIALECTS) -> Dialect:
    """The dialect of a configuration, by its `architectures` or, where it has none, its `model_type`.

    Raises:
        CheckpointError: another language model; the supported ones are listed.
    """
    stated = config.get("architectures") or []
    named = stated if isinstance(stated, list) else [stated]
    for dialect in among:
        if dialect.architecture in named or (not named and config.get("model_type") == dialect.model_type):
            return dialect
    name = ", ".join(map(str, named)) or f"model_type {config.get('model_type')!r}"
    if "moe" in name.lower() or "GptOss" in name:
        raise CheckpointError(
            f"{where}: {name} is a mixture of experts, which is not supported: use a dense size of the family"
        )
    raise CheckpointError(
        f"{where}: the language model {name} is not supported; supported are {', '.join(d.architecture for d in among)}"
    )
