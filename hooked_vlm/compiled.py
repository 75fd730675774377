"""`torch.compile` for blocks without hooks: the same function, its small steps fused."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from hooked_vlm.attention import AttentionRun
from hooked_vlm.token_layout import InputError


@cache
def compiled_block() -> Callable[..., Tensor]:
    """A block of the decoder as a compiled function of the block and its inputs; the layers share its code."""

    def run(block: Callable[..., Tensor], *inputs: object) -> Tensor:
        return block(*inputs)

    return torch.compile(run)


def compilable(run: AttentionRun) -> bool:
    """Whether passes like this one have one shape to compile for: neither a growing cache nor packed rows."""
    return run.past is None and not run.packs


def check_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        InputError: torch.compile does not work here.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever is missing says so in a class of its own
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"torch.compile does not work here ({reason}): leave use_compile off") from error
