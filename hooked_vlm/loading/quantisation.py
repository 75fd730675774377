"""Weights in 8 or 4 bits, through `torchao`: the matrices of both towers' blocks and of the projector.

Activations, norms, biases, embeddings and the unembedding keep the model's dtype, so that hooks see what they see
otherwise. A weight is rounded to the nearest of 256 (or 16) values, spread evenly
over the range of its row (or group). `W_Q` and
the like read as the numbers the steps stand for, and refuse edits.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from hooked_vlm.errors import CheckpointError
from hooked_vlm.nn.weight_access import is_quantised

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

QUANTISED = ("blocks.", "vision.blocks.", "projector.")

Bits = Literal["int8", "int4"]


def quantize_weights(model: "HookedVLM", how: Bits | Any) -> None:
    """Round a model's matrices, one after the other, and put it on `model.cfg.device`.

    Args:
        how: "int8", one scale a row; "int4", one scale for 128 weights (on CUDA in bfloat16 only); or any of
            torchao's weight-only configurations.

    Raises:
        CheckpointError: torchao is missing, has no kernel for this device and dtype, or passes over a matrix whose
            width its groups do not divide.
    """
    device, dtype = model.cfg.device, model.cfg.dtype
    if how == "int4" and (device.type != "cuda" or dtype is not torch.bfloat16):
        raise CheckpointError(
            f"4-bit weights need a CUDA device and dtype=torch.bfloat16, got {device} and {dtype}: torchao has no "
            'kernel for packed 4-bit weights elsewhere (quantize="int8" works everywhere)'
        )
    quantize_, config = _torchao(how)
    chosen = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith(QUANTISED)}
    try:
        quantize_(model, config, lambda module, name: name in chosen, device=device)
    except (ImportError, AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"torchao cannot quantise to {how} on {device} in {dtype} ({reason})") from error
    if left := [name for name, module in chosen.items() if not is_quantised(module.weight)]:
        width = chosen[left[0]].in_features
        raise CheckpointError(f"torchao passed over {left[0]}: {how} does not fit matrices {width} wide")
    model.to(device)
    model.cfg = model.cfg.with_(quantize=how if isinstance(how, str) else type(how).__name__)


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Silence what torchao logs when it is imported: kernels of other machines, deprecations inside torch."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _torchao(how: Bits | Any) -> tuple[Any, Any]:
    """torchao's function, and its configuration for `how`."""
    try:
        with quiet_torchao():
            from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
            from torchao.quantization.quantize_.workflows.int4.int4_packing_format import Int4PackingFormat
    except ImportError as error:
        raise CheckpointError("quantised weights need torchao: pip install 'hooked-vlm[quantize]'") from error
    if how == "int8":
        return quantize_, Int8WeightOnlyConfig(set_inductor_config=False)
    if how == "int4":
        return quantize_, Int4WeightOnlyConfig(int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)
    if isinstance(how, str):
        raise CheckpointError(f'quantize must be "int8", "int4" or a torchao configuration, got {how!r}')
    return quantize_, how
