"""What a pass through the decoder is told: mask, rotary positions, earlier keys, the positions its hooks see.

Made once per pass. A step of generation makes it from the key-value cache alone, on the device.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.attention import AttentionRun
from hooked_vlm.config import VLMConfig
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.kv_cache import KVCache
from hooked_vlm.masks import AttentionMask
from hooked_vlm.packing import PackedRun
from hooked_vlm.rotary import Rotation, text_rotation


def inputs_run(cfg: VLMConfig, inputs: VLMInputs, past: KVCache | None, dtype: torch.dtype) -> AttentionRun:
    """A pass over `inputs`, which continue what is in the cache if there is one."""
    n, n_past = inputs.shape[1], 0 if past is None else past.length
    told: dict[str, Any] = {"positions": torch.arange(n_past, n_past + n, device=inputs.device)}
    told["first_position"] = n_past
    if past is not None:
        told["step"] = past.n_passes
    rotate, mask = inputs_rotation(cfg, inputs, dtype, past), inputs_mask(cfg, inputs, past)
    lengths = [stop - first for first, stop in zip(inputs.first, inputs.stop, strict=True)]
    if n_past or min(lengths) == n or cfg.use_split_qkv_input:
        return AttentionRun(mask, rotate, past, cfg.use_attn_result, told)
    run = PackedRun(lengths, mask, inputs.device, None, past, cfg.use_attn_result, told, inputs.first, n)
    run.rotate = Rotation(run.pack(rotate.cos), run.pack(rotate.sin))
    return run


def step_run(cfg: VLMConfig, past: KVCache, dtype: torch.dtype) -> AttentionRun:
    """A pass over one more token in every row."""
    assert past.next_position is not None
    position_ids = past.next_position[None, :, None].expand(3, -1, -1)
    mask = AttentionMask(causal=True, key_valid=past.valid_with(1, None), window=cfg.sliding_window)
    here = torch.full((1,), past.length, device=position_ids.device)
    told = {"positions": here, "first_position": past.length, "step": past.n_passes}
    rotate = _rotation(cfg, position_ids, past.next_position + 1, dtype)
    return AttentionRun(mask, rotate, past, cfg.use_attn_result, told)


def last_of_rows(
    stream: Float[Tensor, "*dims d_model"], run: AttentionRun, inputs: VLMInputs, first: int = 0
) -> tuple[Float[Tensor, "rows 1 d_model"], AttentionRun]:
    """Each row's last real position, and the run that goes on with it.

    `stream` begins at the position `first`; its rows may be those of several runs over `inputs`.
    """
    together = min(inputs.stop) == inputs.shape[1]
    if isinstance(run, PackedRun):
        ends = torch.tensor(run.lengths).cumsum(0).to(stream.device, non_blocking=True) - 1
        last = stream[ends][:, None]
        run = AttentionRun(run.mask, None, run.past, run.use_attn_result, run.told)
    elif together:
        last = stream[:, -1:]
    else:
        index = torch.tensor(inputs.stop, device=stream.device) - 1 - first
        rows = torch.arange(len(stream), device=stream.device)
        last = stream[rows, index.repeat(len(stream) // len(inputs))][:, None]
    return last, run.last(1) if together else run.without_positions()


def inputs_mask(cfg: VLMConfig, inputs: VLMInputs, past: KVCache | None) -> AttentionMask:
    """Who sees whom among `inputs` and what is in the cache."""
    padded = min(inputs.stop) != inputs.shape[1] or max(inputs.first) != 0
    valid = inputs.attention_mask.bool() if padded else None
    if past is not None and past.length:
        return AttentionMask(True, past.valid_with(inputs.shape[1], valid), window=cfg.sliding_window)
    if past is not None:
        valid = past.valid_with(inputs.shape[1], valid)
    padding = torch.tensor(inputs.first, device=inputs.device) if max(inputs.first) != 0 else None
    return AttentionMask(True, valid, padding, cfg.sliding_window)


def inputs_rotation(cfg: VLMConfig, inputs: VLMInputs, dtype: torch.dtype, past: KVCache | None = None) -> Rotation:
    """The rotation of the inputs' queries and keys, counted on from what is in the cache."""
    position_ids, lengths = inputs.position_ids, inputs.next_position
    if past is not None and past.next_position is not None:
        position_ids = position_ids + past.next_position[:, None]
        lengths = lengths + past.next_position
    return _rotation(cfg, position_ids, lengths, dtype)


def _rotation(
    cfg: VLMConfig, position_ids: Int[Tensor, "3 batch pos"], lengths: Int[Tensor, "batch"], dtype: torch.dtype
) -> Rotation:
    return text_rotation(position_ids, cfg.d_head, cfg.rope_theta, cfg.mrope_section, dtype, cfg.rope_scaling, lengths)
