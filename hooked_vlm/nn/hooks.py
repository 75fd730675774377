"""Hook points, the pass they belong to, and the names they go by.

A hook point stands at its tensor: `q = self.hook_q(...)`. The current `ForwardPass`
(`hooked_vlm.nn.forward_pass`) decides how a hook sees that tensor, rows with their padding, and holds the context that
the hook finds in `hook.ctx`.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformer_lens import hook_points

from hooked_vlm.errors import HookError

if TYPE_CHECKING:
    from hooked_vlm.nn.forward_pass import ForwardPass

QUADRATIC = ("hook_attn_scores", "hook_pattern")
"""Suffixes of the hook points whose tensor has a [pos, pos] plane, and whose presence picks the kernel."""

CONTEXT = ("inputs", "own_inputs", "positions", "first_position", "step", "attention")
"""What a hook may find in `hook.ctx` while it is called (docs/hooks.md)."""

HookName = str | Callable[[str], bool]


# ---------------------------------------------------------------- the current pass

_CURRENT: "ContextVar[ForwardPass | None]" = ContextVar("forward pass", default=None)
_SILENT: ContextVar[bool] = ContextVar("hook points are silent", default=False)


def current_pass() -> "ForwardPass":
    """The pass that is being run.

    Raises:
        RuntimeError: none is: attention needs a mask and rotary positions.
    """
    here = _CURRENT.get()
    if here is None:
        raise RuntimeError(
            "attention runs within a forward pass, which says who sees whom: call the model (start_at_layer=, resid= "
            "and stop_at_layer= choose its layers; for gradient checkpointing see hooked_vlm.nn.hooks.bound_to_pass)"
        )
    return here


@contextmanager
def running(here: "ForwardPass") -> Iterator["ForwardPass"]:
    """Make `here` the current pass."""
    token = _CURRENT.set(here)
    try:
        yield here
    finally:
        _CURRENT.reset(token)


def bound_to_pass(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as a function that runs in the pass that is current now, whenever it is called.

    For gradient checkpointing, which calls a block again in the backward pass:

        forward = block.forward
        block.forward = lambda resid: checkpoint(bound_to_pass(forward), resid, use_reentrant=False)

    Hooks act in that second call, too; nothing is recorded in it.
    """
    here = current_pass()

    def bound(*args: Any, **kwargs: Any) -> Any:
        with running(here if _CURRENT.get() is here else replace(here, recorder=None)):
            return fn(*args, **kwargs)

    return bound


@contextmanager
def silent_hook_points() -> Iterator[None]:
    """Let hook points pass their tensors on unseen: for a norm or an MLP used outside of the forward pass."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)


# ---------------------------------------------------------------- hook points

# hooks on all modules of the process, as nn.Module.__call__ asks for them
_GLOBAL_FORWARD_HOOKS = torch_module._global_forward_hooks
_GLOBAL_FORWARD_PRE_HOOKS = torch_module._global_forward_pre_hooks
_GLOBAL_BACKWARD_HOOKS = torch_module._global_backward_hooks
_GLOBAL_BACKWARD_PRE_HOOKS = torch_module._global_backward_pre_hooks


class HookPoint(hook_points.HookPoint):
    """TransformerLens' hook point, called in every pass; hooks on it see `[batch, pos, ...]` with padding.

    Args:
        packs: whether its tensor comes without padding, [position, ...], in a pass that packs rows.
        shared: whether its tensor is also that of another point: hooks then get a copy, so that an edit in place stays
            theirs.
    """

    def __init__(self, packs: bool = True, shared: bool = False) -> None:
        super().__init__()
        self.packs, self.shared = packs, shared

    def tell(self, attention: Any) -> None:
        """Have the next call's hooks find what their tensor was made from, as `hook.ctx["attention"]`."""
        self.__dict__["_attention"] = attention  # nn.Module's own way takes as long as the rest of the call

    def __call__(self, x: Tensor) -> Tensor:
        # called several hundred times in a pass, nearly always to return at once: tests in line, cheapest first
        here = _CURRENT.get()
        if (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or _GLOBAL_FORWARD_HOOKS
            or _GLOBAL_FORWARD_PRE_HOOKS
            or _GLOBAL_BACKWARD_HOOKS
            or _GLOBAL_BACKWARD_PRE_HOOKS
            or "forward" in self.__dict__
        ):
            return x if _SILENT.get() else self._call_hooks(x, here)
        if here is not None and here.recorder is not None and here.recorder.records(self.name) and not _SILENT.get():
            here.recorder(self.name, here.pad(x) if self.packs else x)
        return x

    def _call_hooks(self, x: Tensor, here: "ForwardPass | None") -> Tensor:
        if here is None:
            return checked(self, x, super().__call__(x))
        seen = here.pad(x) if self.packs else x
        if self.shared and seen is x:
            seen = x.clone()
        ctx = self.ctx
        outer = {name: ctx[name] for name in CONTEXT if name in ctx} if ctx else {}  # if a hook here called the model
        ctx.update(here.context_at(seen.device, seen.shape[1 if self.packs else -2]))
        if "_attention" in self.__dict__:
            ctx["attention"] = self.__dict__.pop("_attention")
        token = _CURRENT.set(None)  # a hook may call parts of the model, which are then outside of this pass
        try:
            out = checked(self, seen, super().__call__(seen))
        finally:
            _CURRENT.reset(token)
            for name in CONTEXT:
                ctx.pop(name, None)
            if outer:
                ctx.update(outer)
        if here.recorder is not None and here.recorder.records(self.name):
            here.recorder(self.name, out)
        return here.pack(out) if self.packs else out

    def layer(self) -> int:
        """The number in `blocks.3...` or `vision.blocks.3...`."""
        parts = str(self.name).split(".")
        if "blocks" not in parts:
            raise HookError(f"{self.name!r} does not belong to a layer")
        return int(parts[parts.index("blocks") + 1])


def checked(point: hook_points.HookPoint, seen: Tensor, out: Any) -> Tensor:
    """Check the tensor that hooks on a point return.

    Raises:
        HookError: something else than a tensor of its shape and dtype.
    """
    if out is seen:
        return out
    if not isinstance(out, Tensor):
        raise HookError(f"a hook on {point.name!r} must return a tensor or None, got {type(out).__name__}")
    if out.shape != seen.shape or out.dtype != seen.dtype:
        raise HookError(
            f"a hook on {point.name!r} was given {_described(seen)} and returned {_described(out)}: return the "
            "same shape and dtype, or None to leave the tensor as it is"
        )
    return out


def _described(x: Tensor) -> str:
    return f"{list(x.shape)} of {str(x.dtype).removeprefix('torch.')}"


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, those set through plain PyTorch and backward hooks included."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def listens(point: nn.Module) -> bool:
    """Whether scores or a pattern are wanted: by a hook, by a cache that names them, or by another module that stands
    in the hook point's place."""
    if not isinstance(point, HookPoint) or is_hooked(point):
        return True
    here = _CURRENT.get()
    return here is not None and here.recorder is not None and here.recorder.names_point(point.name)


def has_context(point: nn.Module) -> bool:
    """Whether hooks may read the point's context, `hook.ctx`."""
    return isinstance(point, HookPoint) and is_hooked(point)


# ---------------------------------------------------------------- modules that users hook or replace

_OURS = (nn.Linear, nn.Embedding, nn.ModuleList)
"""PyTorch's classes that a model is built of."""
_OWN_HOOKS: set[Callable] = set()


def own_hook(fn: Callable) -> Callable:
    """Mark a plain hook that the library sets for its own use, which does not count as a user's."""
    _OWN_HOOKS.add(fn)
    return fn


def is_own(module: nn.Module) -> bool:
    """Whether a module is of a class that a model is built of, and not an adapter, an SAE or the like."""
    return type(module) in _OURS or type(module).__module__.startswith("hooked_vlm.")


def is_touched(module: nn.Module) -> bool:
    """Whether a module has hooks, or a `forward` put in its own's place, other than those of placement."""
    if any(fn not in _OWN_HOOKS for fn in module._forward_pre_hooks.values()):
        return True
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return "forward" in module.__dict__ and not _is_dispatched(module)


def _is_dispatched(module: Any) -> bool:
    """Whether `accelerate` put its `forward`, and nothing else, in place of the module's own."""
    moves = getattr(getattr(module.forward, "func", None), "__module__", "").startswith("accelerate.")
    return moves and getattr(module._old_forward, "__func__", None) is type(module).forward


def hooks_everywhere() -> bool:
    """Whether there are hooks on all modules of the process (`register_module_forward_hook`)."""
    return bool(
        _GLOBAL_FORWARD_HOOKS or _GLOBAL_FORWARD_PRE_HOOKS or _GLOBAL_BACKWARD_HOOKS or _GLOBAL_BACKWARD_PRE_HOOKS
    )


def hooked_module(model: nn.Module) -> str:
    """The name of a module with hooks of any kind, hook points included; empty if there is none."""
    if hooks_everywhere():
        return "every module of the process"
    for name, module, _ in _modules(model):
        if is_hooked(module) if isinstance(module, HookPoint) else is_touched(module):
            return name or type(module).__name__
    return ""


def foreign_module(model: nn.Module) -> str:
    """Name of the first foreign module in a model: an adapter, or a module in a hook point's place; empty if there is
    none."""
    return next((name for name, module, is_point in _modules(model) if _is_foreign(name, module, is_point)), "")


def shows_modules(model: nn.Module) -> bool:
    """Whether a user hooks modules that are no hook points, or put in modules of their own: such a pass keeps every
    tensor `[batch, pos, ...]`, as users expect it."""
    return hooks_everywhere() or any(
        _is_foreign(name, module, is_point) or (not isinstance(module, HookPoint) and is_touched(module))
        for name, module, is_point in _modules(model)
    )


def _is_foreign(name: str, module: nn.Module, is_point: bool) -> bool:
    if isinstance(module, HookPoint):
        return False
    return is_point or (bool(name) and not is_own(module))  # the model itself may be of a class of the user's


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Names and modules, and whether each has a hook point's name."""
    stack: list[tuple[str, nn.Module, bool]] = [("", model, False)]
    while stack:
        name, module, is_point = stack.pop()
        yield name, module, is_point
        above = f"{name}." if name else ""
        parts = module._modules.items()
        stack += [(above + own, part, own.startswith("hook_")) for own, part in parts if part is not None]


# ---------------------------------------------------------------- names

_BLOCK_ALIAS = re.compile(r"((?:vision\.)?blocks\.\d+)\.(hook_(?:[qkv]_input|[qk]_normed|attn_in))")


def canonical(name: str, known: Mapping[str, Any]) -> str:
    """The hook point that a name of TransformerLens' `get_act_name` means: `blocks.3.hook_q_input` is
    `blocks.3.attn.hook_q_input`, and likewise for k, v, `hook_q_normed`, `hook_k_normed` and `hook_attn_in`."""
    if name in known:
        return name
    alias = _BLOCK_ALIAS.fullmatch(name)
    own = f"{alias[1]}.attn.{alias[2]}" if alias else name
    return own if own in known else name


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


def deepstack_points(n: int) -> list[str]:
    """Names of the hook points where image features enter behind the first `n` blocks (DeepStack)."""
    return [f"blocks.{block}.hook_deepstack" for block in range(n)]
