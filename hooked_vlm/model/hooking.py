"""Temporary hooks, and the checks before they are set: a hook that cannot act is refused."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens import HookedRootModule, hook_points

from hooked_vlm.errors import HookError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.hooks import HookName, canonical, is_encoder, is_vision, nearest_names

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

_SWITCHES = (
    (("hook_result",), "use_attn_result"),
    (("hook_q_input", "hook_k_input", "hook_v_input"), "use_split_qkv_input"),
    (("hook_attn_in",), "use_attn_in"),
    (("hook_mlp_in",), "use_hook_mlp_in"),
)


@contextmanager
def hooks(
    model: "HookedVLM",
    fwd_hooks: Sequence[tuple[HookName, Callable]] = (),
    bwd_hooks: Sequence[tuple[HookName, Callable]] = (),
    reset_hooks_end: bool = True,
    clear_contexts: bool = False,
) -> Iterator["HookedVLM"]:
    """Set hooks for the length of a `with` block, as in TransformerLens; a hook that cannot act is an error.

    Raises:
        HookError: an unknown name (the nearest ones are named), a filter that matches nothing, or a hook
            point that is switched off.
    """
    fwd, bwd = (
        [(points_of(model, name), checked_hook(name, fn)) for name, fn in own] for own in (fwd_hooks, bwd_hooks)
    )
    model.context_level += 1
    level = model.context_level
    try:
        for points, fn in fwd:
            model._hooked_at[level].update(points)
            for point in points:
                point.add_hook(fn, level=level)
        for points, fn in bwd:
            model._hooked_at[level].update(points)
            for point in points:
                point.add_hook(fn, dir="bwd", level=level)
        yield model
    finally:
        if reset_hooks_end:
            # with those that an earlier block of this depth left behind
            for point in model._hooked_at.pop(level, ()):
                point.remove_hooks("both", level=level)
            if clear_contexts:
                model.clear_contexts()
        model.context_level -= 1


def add_hook(model: "HookedVLM", name: HookName, hook: Callable, *args: Any, **kwargs: Any) -> None:
    """Add a hook as in TransformerLens.

    Raises:
        HookError: a hook that cannot act.
    """
    for point in points_of(model, name):
        point.add_hook(checked_hook(name, hook), *args, **kwargs)


def run_with_hooks(
    model: "HookedVLM",
    input: VLMInputs | Int[Tensor, "batch pos"] | str | Sequence[str],
    *args: Any,
    fwd_hooks: Sequence = (),
    bwd_hooks: Sequence = (),
    **kwargs: Any,
) -> Any:
    """Run `forward` with temporary hooks: (name or filter, function(tensor, hook) -> tensor or None).

    Raises:
        HookError: a hook that cannot act, or that this run does not pass (no image to encode, a layer left out).
    """
    inputs = model.as_inputs(input)
    check_reachable(model, [name for name, _ in (*fwd_hooks, *bwd_hooks)], inputs, kwargs)
    pairs = {"fwd_hooks": list(fwd_hooks), "bwd_hooks": list(bwd_hooks)}
    return HookedRootModule.run_with_hooks(model, inputs, *args, **pairs, **kwargs)


def checked_hook(name: HookName, fn: Callable) -> Callable:
    """Return a hook that can be called as hooks are: `fn(tensor, hook=...)`.

    Raises:
        HookError: it cannot.
    """
    if isinstance(fn, nn.Module):
        raise HookError(f"a hook on {name!r} is a function of (tensor, hook), not a module: lambda x, hook: module(x)")
    if not callable(fn):
        raise HookError(f"the hook on {name!r} must be a function of (tensor, hook), got {fn!r}")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a function of C, which takes no hook
        raise HookError(f"a hook is called with a tensor and hook=..., which {fn!r} does not take: wrap it") from None
    try:
        signature.bind(None, hook=None)
    except TypeError:
        raise HookError(
            f"a hook is called with a tensor and hook=..., as in `def zero(z, hook): ...`; the one on {name!r} takes "
            f"{signature}"
        ) from None
    return fn


def check_hook_name(model: "HookedVLM", name: HookName) -> None:
    """Refuse a hook that could not act in any run.

    Raises:
        HookError: no hook point has this name (or none passes this filter), it is switched off, or another module
            stands in its place; neither a name nor a filter.
    """
    points_of(model, name)


def points_of(model: "HookedVLM", name: HookName) -> list[hook_points.HookPoint]:
    """Return the hook points of a name or filter.

    Raises:
        HookError: as `check_hook_name`.
    """
    matches = _matches(model, name)
    reasons = [switched_off(model, n) for n in matches]
    if all(reasons):
        raise HookError(f"{matches[0]!r} {reasons[0]}")
    return [model.hook_dict[n] for n in matches]


def check_reachable(model: "HookedVLM", names: Sequence[HookName], inputs: VLMInputs, run: Mapping[str, Any]) -> None:
    """Refuse hooks that would not act in this run; of a filter, if nothing it matches would.

    Args:
        run: the keyword arguments of `forward`.

    Raises:
        HookError: see `check_hook_name`; or the run does not pass the point.
    """
    for name in names:
        matches = _matches(model, name)
        reasons = [why_silent(model, n, inputs, run) for n in matches]
        if all(reasons):
            raise HookError(f"{matches[0]!r} is hooked but cannot act: {reasons[0]}")


def why_silent(model: "HookedVLM", name: str, inputs: VLMInputs, run: Mapping[str, Any]) -> str:
    """Reason why a hook point would not fire in a run; empty if it fires."""
    if why := switched_off(model, name):
        return f"it {why}"
    if (is_vision(name) or name.endswith("hook_deepstack")) and not inputs.has_visuals:
        return "there is no image in the input"
    if is_encoder(name) and inputs.image_features is not None:
        return "the image features in these inputs were computed before"
    start, stop = run.get("start_at_layer") or 0, run.get("stop_at_layer")
    start = start + model.cfg.n_layers if start < 0 else start
    encodes = is_encoder(name) and start < model.cfg.n_deepstack  # what enters behind the blocks to come
    if run.get("resid") is not None and (is_vision(name) or name == "hook_embed") and not encodes:
        return "the run starts from resid"
    if stop is not None and name.startswith("ln_final"):
        return f"the run stops before layer {stop}"
    if name.startswith("blocks."):
        layer, n = int(name.split(".")[1]), model.cfg.n_layers
        if layer < start:
            return f"the run starts at layer {start}"
        if stop is not None and layer >= (stop + n if stop < 0 else stop):
            return f"the run stops before layer {stop}"
    return ""


def _matches(model: "HookedVLM", name: HookName) -> list[str]:
    """Return the names of the hook points of a name or filter."""
    if isinstance(name, str):
        own = canonical(name, model.hook_dict)
        if own not in model.hook_dict:
            stands = dict(model.named_modules()).get(own)
            why = (
                f" A {type(stands).__name__} stands there."
                if stands is not None
                else nearest_names(name, model.hook_dict)
            )
            raise HookError(f"there is no hook point {name!r}.{why}")
        return [own]
    if not callable(name):
        raise HookError(f"a hook point is given by its name or by a filter of names, got {name!r}")
    matches = [n for n in model.hook_dict if name(n)]
    if not matches:
        raise HookError("this hook filter matches none of the model's hook points (see model.hook_dict)")
    return matches


def switched_off(model: "HookedVLM", name: str) -> str:
    if why := _replaced(model, name):
        return why
    for suffixes, flag in _SWITCHES:
        if name.endswith(suffixes) and not getattr(model.cfg, flag):
            return f"is switched off and would never fire: call model.set_{flag}(True) first"
    if model.cfg.vision is not None and name.startswith("vision.blocks."):
        n_run = model.cfg.vision.n_layers_run
        if int(name.split(".")[2]) >= n_run:
            return f"lies behind the last layer that this checkpoint's projector reads ({n_run - 1})"
    return ""


def _replaced(model: "HookedVLM", name: str) -> str:
    """Reason why a hook point is not part of the model any more; empty if it is."""
    module: nn.Module | None = model
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    point = model.hook_dict[name]
    if module is point or any(part is point for part in model.modules()):  # the second where a block was wrapped
        return ""
    stands = "nothing" if module is None else type(module).__name__
    return f"is not in the model any more ({stands} stands in its place): call model.setup() after such a change"
