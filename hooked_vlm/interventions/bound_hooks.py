"""Hooks that know which inputs they were made for, and refuse to run on others."""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.hooks import HookPoint

Hooks = list[tuple[str, Callable]]


def made_for(inputs: VLMInputs, hooks: Hooks) -> Hooks:
    """Bind hooks to the token layout whose positions they hold.

    They run on inputs with the same layout, and on the same rows with tokens appended (as generation appends them).

    Raises:
        InputError: when one is called in a pass over other inputs.
    """
    known: WeakSet[VLMInputs] = WeakSet((inputs,))

    def bound(name: str, fn: Callable) -> Callable:
        def hook_for_inputs(x: Tensor, hook: HookPoint) -> Any:
            given = hook.ctx.get("inputs")
            if given is not None and given not in known:
                _check(name, inputs, given, continues_cache="step" in hook.ctx)
                known.add(given)
            return fn(x, hook)

        return hook_for_inputs

    return [(name, bound(name, fn)) for name, fn in hooks]


def _check(name: str, own: VLMInputs, given: VLMInputs, continues_cache: bool) -> None:
    if _layout(own) == _layout(given) or _appended(own, given):
        return
    if continues_cache and _appended(given, own):  # what is in the cache is the beginning of the inputs
        return
    raise InputError(
        f"a hook on {name!r} was made for {own} and runs on {given}, whose tokens lie elsewhere: make the hooks for "
        "the inputs of the run, intervention.hooks(model, inputs)"
    )


def _layout(inputs: VLMInputs) -> tuple:
    """The rows, and the positions of their images and groups, whatever the texts and pictures are."""
    groups = {name: [own.tolist() for own in rows] for name, rows in vars(inputs.positions).items()}
    return inputs.shape, inputs.first, inputs.stop, _visuals(inputs), groups


def _visuals(inputs: VLMInputs) -> list[tuple]:
    return [(v.kind, v.row, v.start, v.n_tokens) for v in inputs.visuals]


def _appended(short: VLMInputs, long: VLMInputs) -> bool:
    """Whether `long` is `short` with tokens appended where its columns end."""
    width = short.shape[1]
    if len(short) != len(long) or long.shape[1] < width or short.first != long.first:
        return False
    ends = zip(short.stop, long.stop, strict=True)
    if any(after != before and not (before == width and after > before) for before, after in ends):
        return False
    if _visuals(short) != [visual for visual in _visuals(long) if visual[2] < width]:
        return False
    real = short.attention_mask.bool().cpu()
    return torch.equal(short.tokens.cpu()[real], long.tokens[:, :width].cpu()[real])
