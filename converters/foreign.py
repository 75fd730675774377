"""Tensors that a model has no place for: which cannot change a number, and why the others are there."""

import re
from collections.abc import Callable, Collection, Iterable

from hooked_vlm.converters.checkpoint import listed

NEEDLESS: dict[str, re.Pattern[str]] = {
    "a value head": re.compile(r"^(v_head|value_head|critic_head|reward_head|rm_head|score)\."),
    "an old buffer": re.compile(
        r"(^|\.)(original_inv_freq|inv_freq|_?(cos|sin)_cached|position_ids|masked_bias|attn\.causal_mask)$"
    ),
}
"""Tensors that no logit depends on: heads beside the language model's, and buffers that follow from config.json."""

ADAPTER = re.compile(
    r"(^|\.)(lora_\w+|base_layer|modules_to_save|original_module|ia3_l|hada_\w+|lokr_\w+|b?oft_\w+|vera_lambda_\w|"
    r"prompt_encoder|prompt_embeddings|prefix_encoder)(\.|$)"
)
PACKED: dict[str, re.Pattern[str]] = {
    "GPTQ or AWQ": re.compile(r"\.(qweight|qzeros|scales|g_idx)$"),
    "bitsandbytes": re.compile(
        r"\.((weight\.)?(nested_)?(absmax|quant_map)|SCB|weight_format|weight\.quant_state\.bitsandbytes__\w+)$"
    ),
    "compressed-tensors": re.compile(r"\.weight_(packed|shape|zero_point|g_idx|global_scale)$"),
    "FP8": re.compile(r"\.(weight_scale(_inv)?|(input|output|activation|k|v)_scale)$"),
    "AQLM": re.compile(r"\.(codes|codebooks)$"),
    "HQQ": re.compile(r"\.(W_q|meta)$"),
    "quanto": re.compile(r"\.weight\._(data|scale|shift)$|\.(input|output)_scale$"),
}
"""What each format of quantised weights leaves in a file, beside or in place of a matrix."""

WRAPPERS = {
    "module.": "torch's DistributedDataParallel: save `model.module`",
    "_orig_mod.": "torch.compile: save `model._orig_mod`",
    "base_model.model.": "peft: save `model.merge_and_unload()`",
    "_fsdp_wrapped_module.": "torch's FSDP: save its full state dict",
    "_checkpoint_wrapped_module.": "torch's checkpoint_wrapper: save the model without it",
    "pretrained_model.": "TRL: save `model.pretrained_model`",
}
"""Where a wrapper's part of a name comes from, and how to save without it."""


def needless(name: str) -> str | None:
    """The kind of a tensor that cannot change a number; None for any other."""
    return next((kind for kind, pattern in NEEDLESS.items() if pattern.search(name)), None)


def reasons(unexpected: Iterable[str], expected: Collection[str], rename: Callable[[str], str] = str) -> list[str]:
    """Explain unexpected tensors of a checkpoint: adapters, quantised weights, names that a wrapper made.

    Args:
        unexpected: their names in the checkpoint.
        expected: the names of the tensors that the model needs, to which `rename` brings a checkpoint's names.
    """
    unexpected = list(unexpected)
    found = []
    if adapters := [name for name in unexpected if ADAPTER.search(name)]:
        found.append(
            f"they hold an adapter ({listed(adapters, most=2)}): merge it into its base model "
            "(peft: merge_and_unload()) and save that"
        )
    kinds = {kind: [n for n in unexpected if pattern.search(n)] for kind, pattern in PACKED.items()}
    found += [
        f"weights are quantised ({kind}: {listed(names, most=2)}), which is not supported: load the unquantised "
        "checkpoint, with quantize= to round it here"
        for kind, names in kinds.items()
        if names
    ]
    wrapped = {part for name in unexpected for part in _wrappers(name, expected, rename)}
    found += [
        f"names have {part!r} in them ({WRAPPERS.get(part, 'a part of another model: save the model inside it')})"
        for part in sorted(wrapped)
    ]
    return found


def _wrappers(name: str, expected: Collection[str], rename: Callable[[str], str]) -> list[str]:
    """The parts of a name without which the model would know it; none if it is unknown without them, too."""
    parts = [part for part in WRAPPERS if f".{part}" in f".{name}"]
    bare = f".{name}"
    for part in parts:
        bare = bare.replace(f".{part}", ".")
    bare = bare.removeprefix(".")
    if rename(bare) in expected:
        return parts
    starts = [0, *(match.end() for match in re.finditer(r"\.", bare))]
    start = next((at for at in starts[1:] if rename(bare[at:]) in expected), None)
    return [] if start is None else [*parts, bare[:start]]
