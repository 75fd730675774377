"""Rotary positions of a language model, as `config.json` states them before and since transformers 5."""

import math
from typing import Any

from hooked_vlm.converters.fields import Fields


def rope_kwargs(text: Fields, default_theta: float, d_head: int, n_ctx: int) -> dict[str, Any]:
    """The base of the rotary frequencies and their scaling, if any.

    Both are in `rope_theta` and `rope_scaling` or, since transformers 5, both in `rope_parameters`.
    """
    key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = Fields(text.section(key), where=f"{text.where}: {key}")
    return rope_of(rope, text, text.number("rope_theta", default=default_theta), d_head, n_ctx)


def rope_of(rope: Fields, text: Fields, default_theta: float, d_head: int, n_ctx: int) -> dict[str, Any]:
    """The same from a section of its own, `rope`; `text` is the language model's."""
    theta = rope.number("rope_theta", default=default_theta)
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
    if kind == "llama3":
        return _by_wavelength(rope, text, n_ctx)
    if kind not in ("longrope", "su"):
        known = "'default', 'linear', 'dynamic', 'longrope' or 'llama3' (others are not supported)"
        raise rope.error("type", known, kind)
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


def _by_wavelength(rope: Fields, text: Fields, n_ctx: int) -> dict[str, Any]:
    """Llama 3.1's; the trained length beside the section counts before the one in it, as in transformers."""
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.error("high_freq_factor", f"more than low_freq_factor, {low}", high)
    stated = rope.get("original_max_position_embeddings", n_ctx)
    return {
        "kind": "llama3",
        "factor": rope.number("factor"),
        "n_ctx_trained": text.size("original_max_position_embeddings", default=stated),
        "low_freq_factor": low,
        "high_freq_factor": high,
    }


def _factors(rope: Fields, name: str, n: int) -> tuple[float, ...]:
    values = rope.get(name)
    numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) and v > 0 for v in values)
    if not numbers or len(values) != n:
        raise rope.error(name, f"{n} positive numbers, one for each frequency", values)
    return tuple(float(v) for v in values)
