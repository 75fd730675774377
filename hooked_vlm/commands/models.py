"""`hooked-vlm models`: the known checkpoints, what they need in memory, and how many GPUs hold them."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from hooked_vlm.analysis.text_tables import size, text_table
from hooked_vlm.commands.config import ModelsConfig
from hooked_vlm.converters import KNOWN_MODELS
from hooked_vlm.errors import InputError
from hooked_vlm.loading.folders import bundled_models
from hooked_vlm.model.hook_shapes import TYPICAL_PICTURE, prompt_with_picture
from hooked_vlm.model.memory import MemoryPlan, memory_plan, n_gpus
from hooked_vlm.model.vlm import HookedVLM

GPU_SIZES = (24, 40, 80, 141)
"""Gigabytes, 1e9 bytes each."""


@dataclass(frozen=True)
class ModelRow:
    """One model; sizes in bytes."""

    name: str
    n_params: int
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    vision_layers: int
    vision_heads: int
    weights_bfloat16: int
    weights_float32: int
    kv_cache_per_1000_tokens: int
    """In the dtype of the plan."""
    image_tokens: int
    """Tokens of a 1024 x 768 picture."""
    n_tokens: int
    """Tokens of the planned prompt."""
    dtype: str
    plan: MemoryPlan
    needed: int
    gpus: dict[str, int | None]
    """By their size in gigabytes; None: a layer with what a pass needs does not fit into one."""
    known: str
    """How its values are known."""


def model_row(name: str, config: ModelsConfig) -> ModelRow:
    """Describe one model.

    Raises:
        CheckpointError: there is no such model.
        InputError: no tokens.
    """
    if config.tokens < 1:
        raise InputError(f"--tokens must be at least 1, got {config.tokens}")
    model = HookedVLM.without_weights(name)
    cfg, vision, processor = model.cfg, model.cfg.vision, model.image_processor
    dtype: torch.dtype = getattr(torch, config.dtype)
    prompt = prompt_with_picture(model, min(config.tokens, cfg.n_ctx_limit))
    plan = memory_plan(model, prompt, dtype)
    n_params = sum(parameter.numel() for parameter in model.parameters())
    parts = (config.full_cache, config.gradients)
    return ModelRow(
        name=name,
        n_params=n_params,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_key_value_heads=cfg.n_key_value_heads,
        vision_layers=vision.n_layers_run if vision else 0,
        vision_heads=vision.n_heads if vision else 0,
        weights_bfloat16=2 * n_params,
        weights_float32=4 * n_params,
        kv_cache_per_1000_tokens=1000 * plan.kv_cache // prompt.n_tokens,
        image_tokens=processor.n_tokens(TYPICAL_PICTURE) if processor else 0,
        n_tokens=prompt.n_tokens,
        dtype=config.dtype,
        plan=plan,
        needed=plan.total(*parts),
        gpus={str(size): n_gpus(model, prompt, dtype, size * 10**9, *parts) for size in GPU_SIZES},
        known=_known(name),
    )


def answer(config: ModelsConfig) -> tuple[str, list[dict[str, Any]]]:
    """Return the output of `hooked-vlm models` as text, and as data with sizes in bytes."""
    names = [config.model] if config.model else [*bundled_models(), *KNOWN_MODELS]
    rows = [model_row(name, config) for name in names]
    data = [asdict(row) for row in rows]
    if config.model:
        return _details(rows[0], config), data
    return text_table(IN_TERMINAL, [_cells_in_terminal(row) for row in rows]) + "\n\n" + _legend_in_terminal(
        config
    ), data


HEADER = (
    "model", "parameters", "language", "vision", "bf16", "fp32", "KV/1k", "image", "prompt", "needed",
    *(f"{size} GB" for size in GPU_SIZES),
)  # fmt: skip

"""Columns of the table in the docs."""
IN_TERMINAL = ("model", "size", "text", "needed", "GPUs")
"""Columns that fit a terminal."""


def cells(row: ModelRow) -> list[str]:
    """A line of the table in the docs."""
    return [
        row.name,
        _billions(row.n_params),
        f"{row.n_layers} x {row.n_heads}",
        f"{row.vision_layers} x {row.vision_heads}",
        size(row.weights_bfloat16),
        size(row.weights_float32),
        size(row.kv_cache_per_1000_tokens),
        f"{row.image_tokens:,}",
        f"{row.n_tokens:,}",
        size(row.needed),
        *("-" if n is None else str(n) for n in row.gpus.values()),
    ]


def _cells_in_terminal(row: ModelRow) -> list[str]:
    gpus = "/".join("-" if n is None else str(n) for n in row.gpus.values())
    sizes = (_billions(row.n_params), f"{row.n_layers} x {row.n_heads}", size(row.needed))
    return [row.name, *(own.replace(" ", "") for own in sizes), gpus]  # 80 columns


def _legend_in_terminal(config: ModelsConfig) -> str:
    return "\n".join(
        (
            "size: parameters. text: layers x heads of the language model.",
            f"needed: weights, key-value cache, activations of one pass{_stored(config)},",
            f"  in {config.dtype}, for a prompt of up to {config.tokens:,} tokens with one picture.",
            f"GPUs: how many of {'/'.join(map(str, GPU_SIZES))} GB hold it (-: none does). GB are 1e9 bytes.",
            "hooked-vlm models MODEL tells more of one; --json has every number of all.",
        )
    )


def _stored(config: ModelsConfig) -> str:
    extra = ", all activations and all gradients" if config.gradients else ", all activations (run_with_cache)"
    return extra if config.full_cache or config.gradients else ""


def legend(config: ModelsConfig) -> str:
    """Explain the columns of the docs."""
    return "\n".join(
        (
            "language, vision: layers x heads. bf16, fp32: the weights. KV/1k: key-value cache of 1,000 tokens.",
            "image: tokens of a picture of 1024 x 768. prompt: its length in tokens, such a picture included.",
            f"needed: weights, key-value cache, activations of one pass{_stored(config)}, in {config.dtype}.",
            "Last columns: how many GPUs of that size hold it (-: none does). GB are 1e9 bytes.",
        )
    )


def _details(row: ModelRow, config: ModelsConfig) -> str:
    plan, picture = row.plan, " x ".join(map(str, TYPICAL_PICTURE))
    gpus = [f"{n or 'no number'} of {gb} GB" for gb, n in row.gpus.items()]
    lines = [
        ("parameters", f"{row.n_params:,}"),
        ("language model", f"{row.n_layers} layers, {row.n_heads} heads, {row.n_key_value_heads} key-value heads"),
        ("vision tower", f"{row.vision_layers} layers, {row.vision_heads} heads" if row.vision_layers else "none"),
        ("weights", f"{size(row.weights_bfloat16)} in bfloat16, {size(row.weights_float32)} in float32"),
        ("image tokens", f"{row.image_tokens:,} for a picture of {picture}"),
        ("", f"one prompt of {row.n_tokens:,} tokens with such a picture, in {row.dtype}:"),
        ("key-value cache", f"{size(plan.kv_cache)} ({size(row.kv_cache_per_1000_tokens)} for 1,000 tokens)"),
        ("activations", f"{size(plan.activations)}, the most that is alive at one time in a pass"),
        ("full cache", f"{size(plan.full_cache)}, what run_with_cache stores by default"),
        ("gradients", f"{size(plan.gradients)}, of the weights and of the full cache"),
        ("needed", f"{size(row.needed)} for {_asked(config)}"),
        ("GPUs", ", ".join(gpus)),
        ("known by", row.known),
    ]
    return "\n".join([row.name, *(f"  {name:<16} {text}" for name, text in lines)])


def _asked(config: ModelsConfig) -> str:
    parts = ["weights", "key-value cache", "activations"]
    parts += ["full cache"] if config.full_cache or config.gradients else []
    return ", ".join(parts + (["gradients"] if config.gradients else []))


def _known(name: str) -> str:
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name].certainty
    return "bundled with the library" if name in bundled_models() else "its own config.json"


def _billions(n: int) -> str:
    return f"{n / 1e9:.1f} B" if n >= 1e8 else f"{n / 1e6:.1f} M"
