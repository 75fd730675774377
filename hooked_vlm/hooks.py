"""Small helpers around TransformerLens' `HookPoint`: is it hooked, which names exist, what was meant."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from transformer_lens import hook_points

QUADRATIC = ("hook_attn_scores", "hook_pattern")
"""Suffixes of the hook points whose tensor has a [pos, pos] plane, and whose presence picks the kernel."""


class HookPoint(hook_points.HookPoint):
    """TransformerLens' hook point; `layer()` also knows the vision tower's names (`vision.blocks.3...`)."""

    def layer(self) -> int:
        parts = str(self.name).split(".")
        if "blocks" not in parts:
            raise HookError(f"{self.name!r} does not belong to a layer")
        return int(parts[parts.index("blocks") + 1])


HookName = str | Callable[[str], bool]


class HookError(ValueError):
    """A hook that cannot act: an unknown name, a filter that matches nothing, a point switched off."""


def is_hooked(point: HookPoint) -> bool:
    """Whether anything listens at `point`, hooks set through plain PyTorch and backward hooks included."""
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks)


def call_told(point: HookPoint, x: Tensor, told: Mapping[str, Any]) -> Tensor:
    """`point(x)`, with `told` in the point's `ctx` for just as long."""
    point.ctx.update(told)
    try:
        return point(x)
    finally:
        for name in told:
            point.ctx.pop(name, None)


def fresh(point: HookPoint, x: Tensor) -> Tensor:
    """`x` itself, or a copy if `point` is hooked.

    Used where one tensor would pass two hook points or outlive the run: a hook may write in place
    (TransformerLens' patching does), and that must not reach what was recorded or shared before.
    """
    return x.clone() if is_hooked(point) else x


def nearest_names(name: str, known: Iterable[str]) -> str:
    """A hint naming the known names closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def is_quadratic(name: str) -> bool:
    """Whether the hook point `name` holds a [pos, pos] tensor."""
    return name.endswith(QUADRATIC)


def is_encoder(name: str) -> bool:
    """Whether the hook point `name` lies in the vision tower or the projector."""
    return name.startswith(("vision.", "projector."))


def is_vision(name: str) -> bool:
    """Whether `name` is a hook point of the image side (tower, projector, the features handed over) or its gradient."""
    return is_encoder(name) or name.startswith("hook_image_features")
