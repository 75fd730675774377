"""Gemma's language models: norms that multiply by 1 + weight, scaled embeddings, layers that differ.

Defaults are those of `GemmaConfig`, `Gemma2Config` and `Gemma3TextConfig` in transformers 5.23.0.
"""

from collections.abc import Mapping
from typing import Any

from hooked_vlm.converters.dialects import GEMMA, GEMMA2, GEMMA3, Dialect
from hooked_vlm.converters.fields import Fields
from hooked_vlm.converters.rope import rope_kwargs, rope_of

FULL, WINDOW = "full_attention", "sliding_attention"
LOCAL_THETA = 1e4
"""`rope_local_base_freq` of Gemma 3, the base in its layers with a window."""
TANH = "gelu_pytorch_tanh"


def gemma_kwargs(text: Fields, dialect: Dialect, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Arguments of `VLMConfig` in which Gemma differs from other decoders.

    Args:
        sizes: `n_layers`, `d_model`, `d_head` and `n_ctx`.

    Raises:
        CheckpointError: a field is absurd or asks for something not supported.
    """
    _refuse_unsupported(text, dialect)
    shared = {"act_fn": "gelu_tanh", "rmsnorm_uses_offset": True, "embed_scale": sizes["d_model"] ** 0.5}
    if dialect is GEMMA:
        return {**shared, **rope_kwargs(text, dialect.rope_theta, sizes["d_head"], sizes["n_ctx"])}
    return {
        **shared,
        "use_normalization_before_and_after": True,
        "attn_scale": text.number("query_pre_attn_scalar") ** 0.5,
        "attn_scores_soft_cap": _soft_cap(text, "attn_logit_softcapping"),
        "output_logits_soft_cap": _soft_cap(text, "final_logit_softcapping"),
        **_layers(text, dialect, sizes),
    }


def _refuse_unsupported(text: Fields, dialect: Dialect) -> None:
    if text.flag("use_bidirectional_attention", False):
        expected = "false: text whose tokens see each other both ways (EmbeddingGemma, T5Gemma) is not supported"
        raise text.error("use_bidirectional_attention", expected, True)
    if text.flag("attention_bias", False):
        raise text.error("attention_bias", "false (biases are not supported in this language model)", True)
    text.one_of("hidden_activation", (TANH,), default=TANH)
    if dialect is GEMMA:
        text.one_of("hidden_act", (TANH, "gelu"), default=TANH)  # "gelu" means tanh, in Gemma's first files
    foreign = {
        GEMMA: ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "layer_types"),
        GEMMA3: ("attn_logit_softcapping",),
    }
    for name in foreign.get(dialect, ()):
        if text.get(name) is not None:
            raise text.error(name, f"absent or null, as {dialect.architecture} has no such thing", text.get(name))


def _soft_cap(text: Fields, name: str) -> float | None:
    """A cap, which a null takes away."""
    return None if text.nulled(name) or text.get(name) is None else text.number(name)


def _layers(text: Fields, dialect: Dialect, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The kinds of layers: full attention and windows."""
    kinds, ropes = _layer_types(text, dialect, sizes["n_layers"]), _ropes(text, dialect, sizes)
    if text.nulled("sliding_window"):
        raise text.error("sliding_window", "the number of positions that a layer with a window sees", None)
    window = text.size("sliding_window")
    there = [kind for kind in (FULL, WINDOW) if kind in kinds]
    return {
        "rope_theta": ropes[there[0]]["rope_theta"],
        "rope_scaling": None,
        "layer_kinds": tuple({"window": window if kind == WINDOW else None, **ropes[kind]} for kind in there),
        "layer_kind_of": tuple(there.index(kind) for kind in kinds),
    }


def _layer_types(text: Fields, dialect: Dialect, n_layers: int) -> list[str]:
    stated = text.get("layer_types")
    if stated is None:
        pattern = text.get("_sliding_window_pattern", 6)
        period = 2 if dialect is GEMMA2 else text.size("sliding_window_pattern", default=pattern)
        return [WINDOW if (layer + 1) % period else FULL for layer in range(n_layers)]
    if not isinstance(stated, list | tuple) or len(stated) != n_layers or not set(stated) <= {FULL, WINDOW}:
        raise text.error("layer_types", f"{FULL!r} or {WINDOW!r} for each of {n_layers} layers", stated)
    return list(stated)


def _ropes(text: Fields, dialect: Dialect, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Rotary positions of each kind of layers."""
    d_head, n_ctx = sizes["d_head"], sizes["n_ctx"]
    if dialect is GEMMA2:
        everywhere = rope_kwargs(text, dialect.rope_theta, d_head, n_ctx)
        ropes = {FULL: everywhere, WINDOW: everywhere}
    else:
        nested = Fields(text.section("rope_parameters"), where=f"{text.where}: rope_parameters")
        if not all(isinstance(value, Mapping | None) for value in nested.sources[0].values()):
            raise text.error("rope_parameters", f"an object with {FULL} and {WINDOW}", nested.sources[0])
        full = Fields(text.section("rope_scaling"), nested.section(FULL), where=f"{text.where}: rope_scaling")
        local = Fields(nested.section(WINDOW), where=f"{nested.where}: {WINDOW}")
        theta = text.number("rope_theta", default=dialect.rope_theta)
        local_theta = text.number("rope_local_base_freq", default=LOCAL_THETA)
        ropes = {
            FULL: rope_of(full, text, theta, d_head, n_ctx),
            WINDOW: rope_of(local, text, local_theta, d_head, n_ctx),
        }
    for rope in ropes.values():
        if (scaling := rope["rope_scaling"]) is not None and scaling["kind"] != "linear":
            raise text.error("rope_scaling", "of type 'linear' or 'default' (others are not supported)", scaling)
    return ropes
