"""What tiny models of every family share: sizes, random weights, and batches as a Hugging Face processor pads them."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

STOP, PAD = 3, 0
LANGUAGE_MODEL: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": STOP,
    "pad_token_id": PAD,
}
"""Three layers, four query and two key-value heads of width 16."""


def reference(model_class: Any, config: Any) -> Any:
    """A model of `transformers` with random weights, its attention written out."""
    model = model_class._from_config(config, attn_implementation="eager").eval()
    randomise(model)
    model.generation_config.eos_token_id = STOP
    model.generation_config.pad_token_id = PAD
    return model


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter away from its special initial value: norm weights not 1, biases not 0, lively attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = (parameter.ndim == 1 and "norm" in name) or "ln" in name
            if parameter.ndim == 1:
                parameter.copy_(1.0 + 0.3 * noise if is_norm and name.endswith("weight") else 0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def in_dtype(hf: Any, dtype: torch.dtype) -> Any:
    """The reference in another dtype as `from_pretrained(dtype=...)` makes it: weights rounded, rotary frequencies not
    (`hf.to(dtype)` rounds them too, which turns far positions by another angle)."""
    low = deepcopy(hf).to(dtype)
    for name, frequencies in hf.named_buffers():
        of, _, own = name.rpartition(".")
        setattr(low.get_submodule(of), own, frequencies.clone())
    return low


def spelled(rows: list[list[Any]], placeholders: Callable[[Any], list[int]]) -> dict[str, torch.Tensor]:
    """Token ids and attention mask, padded on the left, of rows of token ids and of what stands for pictures."""
    ids = [
        [token for item in row for token in ([item] if isinstance(item, int) else placeholders(item))] for row in rows
    ]
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(r)) + r for r in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids]),
    }
