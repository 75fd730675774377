"""Small random Qwen3-VL models, made on the spot and shared by the tests; inputs are those of Qwen2-VL's."""

from functools import lru_cache
from typing import Any

import tiny_qwen2_vl
import torch
import transformers
from tiny import reference, spelled
from tiny_qwen2_vl import IMAGE, VIDEO, VISION_END, VISION_START

SIDE = 4
"""Of the table of learned positions, in patches."""
TIMES = (20, 21, 22, 23, 24, 25, 26)
"""Tokens that stand for the time of each temporal patch."""


def tiny_config(tied: bool = False, **text: Any) -> "transformers.Qwen3VLConfig":
    """A vision tower of three layers, whose first and second enter the language model behind its blocks 0 and 1."""
    fields = tiny_qwen2_vl.shared_fields(tied, text)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    fields["text_config"] |= {"head_dim": 16, "rope_parameters": rope}
    return transformers.Qwen3VLConfig(
        **fields,
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "num_position_embeddings": SIDE**2,
            "deepstack_visual_indexes": [0, 1],
        },
    )


@lru_cache(maxsize=4)
def tiny_hf(tied: bool = False) -> Any:
    """The reference. Shared: tests must not change its weights."""
    return reference(transformers.Qwen3VLForConditionalGeneration, tiny_config(tied))


def hf_batch(rows: list[list[Any]], seed: int = 0) -> dict[str, torch.Tensor]:
    """As `tiny_qwen2_vl.hf_batch`, with a run of placeholders behind a token for the time of each temporal patch."""
    batch = tiny_qwen2_vl.hf_batch(rows, seed)

    def placeholders(item: tuple[str, tuple[int, int, int]]) -> list[int]:
        kind, (t, h, w) = item
        token = IMAGE if kind == "image" else VIDEO
        runs = [[VISION_START, *[token] * (h * w // 4), VISION_END] for _ in range(t)]
        return runs[0] if kind == "image" else [n for at, run in enumerate(runs) for n in (TIMES[at], *run)]

    batch |= spelled(rows, placeholders)
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int() + 2 * (batch["input_ids"] == VIDEO).int()
    return batch


def for_hf(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the reference takes of a batch: its own positions are the published ones."""
    return batch


CASES = {
    **tiny_qwen2_vl.CASES,
    "as the table": [[5, ("image", (1, 4, 4)), 7, ("image", (1, 14, 22)), 8]],
}

# Qwen3-VL's template as far as a prompt without tools goes (public copies agree): no system turn of its own
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for item in message.content %}"
    "{%- if item.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif item.type == 'video' %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- else %}{{- item.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@lru_cache(maxsize=1)
def reading_model() -> Any:
    """One with a tokenizer. Shared."""
    return tiny_qwen2_vl.reading(transformers.Qwen3VLForConditionalGeneration, tiny_config, TEMPLATE)
