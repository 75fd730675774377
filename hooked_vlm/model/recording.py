"""`run_with_cache`: a pass, and the activations it made."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities import Slice, SliceInput

from hooked_vlm.errors import HookError, InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.model.cache import VLMCache
from hooked_vlm.nn.attention import AttentionCall, attention_pattern
from hooked_vlm.nn.forward_pass import Recorder, inputs_mask
from hooked_vlm.nn.hooks import (
    QUADRATIC,
    HookName,
    HookPoint,
    canonical,
    is_hooked,
    is_quadratic,
    is_vision,
    shows_modules,
)
from hooked_vlm.nn.vision import image_pass

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Hooks = list[tuple[HookName, Callable]]


def run_with_cache(
    model: "HookedVLM",
    input: VLMInputs | Int[Tensor, "batch pos"] | str | Sequence[str],
    *args: Any,
    names_filter: HookName | Sequence[str] | None = None,
    pos_slice: Slice | SliceInput = None,
    device: torch.device | str | None = None,
    remove_batch_dim: bool = False,
    incl_bwd: bool = False,
    reset_hooks_end: bool = True,
    clear_contexts: bool = False,
    **kwargs: Any,
) -> tuple[Any, VLMCache]:
    """Run `forward` and keep its activations.

    Args:
        names_filter: a hook name, a list of them or a predicate. None stores everything but the
            [pos, pos] tensors, which `cache["pattern", layer]` derives; name them to store them.
        pos_slice: positions of the text side to store (image-side tensors are kept whole). Of scores and patterns
            that `names_filter` names, only these rows are computed: `names_filter="blocks.3.attn.hook_pattern",
            pos_slice=-1` is where the last token looks, without a [pos, pos] tensor.
        device: where to store; by default the device that computes, or the inputs' if the model is spread over devices.
        remove_batch_dim: drop the text side's batch axis; needs a batch of one.
        incl_bwd: also run backward from the output (use return_type="loss") and store gradients
            under "<name>_grad".
        reset_hooks_end: False leaves hooks that store the activations of later passes, too.

    Raises:
        HookError: a name that matches nothing, or a hook point that is switched off.
        InputError: `remove_batch_dim` with more than one row, or `pos_slice` outside of the inputs.
    """
    inputs = model.as_inputs(input)
    if remove_batch_dim and len(inputs) != 1:
        raise InputError(f"remove_batch_dim needs a batch of one row, this one has {len(inputs)}")
    cut = _checked_slice(pos_slice, inputs, kwargs)
    names = _names_to_store(model, names_filter, inputs, kwargs)
    if device is None and model.device_map:
        device = model.cfg.device
    watched = shows_modules(model)
    recording = Recording(cut, device, remove_batch_dim, partial(runs_explicitly, model), incl_bwd, copies=watched)
    recorder, fwd, bwd = _hooks(model, recording, names, inputs, kwargs, later=not reset_hooks_end)
    with model.hooks(fwd, bwd, reset_hooks_end, clear_contexts):
        out = model(inputs, *args, recorder=recorder, **kwargs)
        if incl_bwd:
            out.backward()
    cache = _cache(model, recording, inputs, kwargs)
    cache.exchanged = cache.vision.exchanged = exchanged_patterns(model) if watched else frozenset()
    if not reset_hooks_end:
        recording.put = cache.follow
    return out, cache


def _checked_slice(pos_slice: Slice | SliceInput, inputs: VLMInputs, run: Mapping[str, Any]) -> Slice:
    """Return `pos_slice` as a slice of these inputs' positions; `run`: the keyword arguments of `forward`."""
    cut = Slice.unwrap(pos_slice)
    indices = {"int": [cut.slice], "array": cut.slice}.get(cut.mode, [])
    if any(not -inputs.shape[1] <= int(index) < inputs.shape[1] for index in indices):
        raise InputError(f"pos_slice={pos_slice} lies outside of the {inputs.shape[1]} positions of these inputs")
    if cut.mode != "identity" and run.get("logits_at") == "last":
        raise InputError('pos_slice does not go with logits_at="last", where ln_final has one position only')
    return cut


def _names_to_store(
    model: "HookedVLM", names_filter: HookName | Sequence[str] | None, inputs: VLMInputs, run: Mapping[str, Any]
) -> list[str] | None:
    """Return the names that a cache asks for; None for all that fire."""
    if names_filter is None:
        return None
    if callable(names_filter):  # a filter means: of those that fire
        model.check_reachable([names_filter], inputs, run)
        return [n for n in model.hook_dict if names_filter(n) and not model.why_silent(n, inputs, run)]
    several = isinstance(names_filter, Iterable) and not isinstance(names_filter, str)
    names: list[Any] = list(names_filter) if several else [names_filter]
    model.check_reachable(names, inputs, run)
    return [canonical(name, model.hook_dict) for name in names]


def _hooks(
    model: "HookedVLM",
    recording: "Recording",
    names: list[str] | None,
    inputs: VLMInputs,
    run: Mapping[str, Any],
    later: bool,
) -> tuple[Recorder | None, Hooks, Hooks]:
    """Return what fills a recording: the pass' own recorder, and hooks forward and backward where that is not enough.

    Args:
        later: record with hooks alone, which act in later passes, too.
    """
    recorder, fwd = recording.recorder(names)
    others = [n for n, point in model.hook_dict.items() if not isinstance(point, HookPoint)]  # within an SAE, say
    fwd += [(n, recording.save) for n in others if recorder.records(n) and not model.why_silent(n, inputs, run)]
    if not (recording.incl_bwd or later):
        return recorder, fwd, []
    wanted = default_filter(model) if names is None else names.__contains__
    firing = [n for n in model.hook_dict if wanted(n) and not model.why_silent(n, inputs, run)]
    bwd: Hooks = []
    if recording.incl_bwd:
        bwd += [(name, partial(recording.save, suffix="_grad")) for name in firing]
    if not later:
        return recorder, fwd, bwd
    fwd += [(name, recording.save) for name in firing if recorder.records(name) and name not in others]
    return None, fwd, bwd


def _cache(model: "HookedVLM", recording: "Recording", inputs: VLMInputs, run: Mapping[str, Any]) -> VLMCache:
    why_not = ""
    if run.get("past_kv_cache") is not None:
        why_not = "the run continued a key-value cache, whose keys are not in this cache"
    elif recording.positions.mode != "identity":
        why_not = "pos_slice cut the keys"
    mask = inputs_mask(model.cfg, inputs, None)
    vision_mask = None
    if inputs.has_visuals and model.cfg.vision is not None:
        vision_mask = image_pass(model, inputs.grids, inputs.device).patches.mask
    return VLMCache(recording.store, model, not recording.remove_batch_dim, mask, vision_mask, why_not, inputs)


def runs_explicitly(model: "HookedVLM", name: str) -> bool:
    """Whether the layer of a hook point for scores or patterns computes them for a hook, or for another module in such
    a point's place.

    An edit may have changed them then: what is derived from queries and keys would be wrong.
    """
    layer = name.rsplit(".", 1)[0]
    points = [model.hook_dict.get(f"{layer}.{suffix}") for suffix in QUADRATIC]
    return any(point is None or is_hooked(point) for point in points)


def default_filter(model: "HookedVLM") -> Callable[[str], bool]:
    """Every hook point but the [pos, pos] ones of layers that run the fused kernel."""
    return lambda name: not is_quadratic(name) or runs_explicitly(model, name)


def exchanged_patterns(model: "HookedVLM") -> frozenset[str]:
    """The attention modules, by name, in which another module stands in the place of scores or pattern."""
    suffixes = tuple(f".{suffix}" for suffix in QUADRATIC)
    found = (n for n, m in model.named_modules() if n.endswith(suffixes) and not isinstance(m, HookPoint))
    return frozenset(name.rsplit(".", 1)[0] for name in found)


class Recording:
    """Store of activations by hook name, and the functions that fill it.

    Args:
        positions: which positions of the text side are kept.
        explicit: whether a layer makes all of its scores and patterns anyway, asked by the name of such a point.
        incl_bwd: whether gradients are stored, too.
        copies: whether copies are stored, because foreign modules may write into what they are given.
    """

    def __init__(
        self,
        positions: Slice,
        device: torch.device | str | None,
        remove_batch_dim: bool,
        explicit: Callable[[str], bool],
        incl_bwd: bool = False,
        copies: bool = False,
    ) -> None:
        self.store: dict[str, Tensor] = {}
        self.put: Callable[[str, Tensor], None] = self.store.__setitem__
        self.positions, self.device, self.remove_batch_dim = positions, device, remove_batch_dim
        self.explicit, self.incl_bwd, self.copies = explicit, incl_bwd, copies

    def recorder(self, names: Sequence[str] | None) -> tuple[Recorder, Hooks]:
        """Return the recorder of `names` (None: all that fire), and hooks for scores and patterns that are computed for
        some rows alone: those cut to some positions, unless the layer computes all of them anyway."""
        if names is None:
            return Recorder(self.record), []
        rows = {name for name in names if self._by_rows(name)}
        hooks: Hooks = [
            (f"{name.rsplit('.', 1)[0]}.hook_z", partial(self._save_rows, name=name)) for name in sorted(rows)
        ]
        return Recorder(self.record, frozenset(names) - rows), hooks

    def record(self, name: str, tensor: Tensor) -> None:
        """`keep` for a pass, in which a hook point fires once (the first norm thrice, where heads have own inputs).

        Raises:
            HookError: it fired before.
        """
        if name in self.store and ".ln1." not in name:
            raise HookError(
                f"{name!r} fired twice in the pass that is cached: a hook calls parts of the model. Call them under "
                "hooked_vlm.nn.hooks.silent_hook_points(), or leave their names out of names_filter"
            )
        self.keep(name, tensor.clone() if self.copies else tensor)

    def keep(self, name: str, tensor: Tensor, suffix: str = "") -> None:
        """Store what passed the hook point `name`."""
        text = not is_vision(name)
        if text and self.positions.mode != "identity":
            # a copy: a view would keep the whole tensor in memory
            tensor = self.positions.apply(tensor, dim=position_axis(name)).clone()
        if text and self.remove_batch_dim:
            tensor = tensor[0]
        self.put(name + suffix, tensor if self.device is None else tensor.to(self.device))

    def save(self, tensor: Tensor, hook: Any, suffix: str = "") -> None:
        """`keep` as a hook."""
        self.keep(str(hook.name), tensor.detach(), suffix)

    def _by_rows(self, name: str) -> bool:
        cut = is_quadratic(name) and not is_vision(name) and self.positions.mode != "identity"
        return cut and not self.incl_bwd and not self.explicit(name)

    def _save_rows(self, z: Tensor, hook: Any, name: str) -> None:
        rows = _rows(hook.ctx["attention"], self.positions, name).detach()
        rows = rows[0] if self.remove_batch_dim else rows
        self.put(name, rows if self.device is None else rows.to(self.device))


def _rows(call: AttentionCall, positions: Slice, name: str) -> Float[Tensor, "batch head *row key"]:
    """The rows of scores or pattern at `positions`; without a row axis where that is one number."""
    n = call.q.shape[1]
    index = positions.apply(torch.arange(n, device=call.q.device), dim=0)
    rows = call.scores(index.reshape(1, -1))
    if name.endswith("hook_pattern"):
        valid = call.mask.query_valid(n)
        rows = attention_pattern(rows, None if valid is None else valid[:, index.reshape(-1)])
    return rows if index.ndim else rows[:, :, 0]


def position_axis(name: str) -> int:
    """The axis of a text hook point's tensor (batch axis first) that runs over (query) positions."""
    return -2 if is_quadratic(name) else 1
