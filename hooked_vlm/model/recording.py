"""`run_with_cache`: a pass, and the activations it made."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.errors import HookError, InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.model.cache import Derivation, VLMCache
from hooked_vlm.model.cut import Cut, LastOfRows, PositionSlice, Spans, check_cut, cut_of, cut_of_step, spans_of
from hooked_vlm.model.hooking import switched_off
from hooked_vlm.nn.attention import AttentionCall
from hooked_vlm.nn.block import scoring_of
from hooked_vlm.nn.forward_pass import Recorder, inputs_masks
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
from hooked_vlm.nn.scores import attention_pattern
from hooked_vlm.nn.vision import image_pass

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Hooks = list[tuple[HookName, Callable]]


def run_with_cache(
    model: "HookedVLM",
    input: VLMInputs | Int[Tensor, "batch pos"] | str | Sequence[str],
    *args: Any,
    names_filter: HookName | Sequence[str] | None = None,
    pos_slice: PositionSlice = None,
    device: torch.device | str | None = None,
    remove_batch_dim: bool = False,
    incl_bwd: bool = False,
    reset_hooks_end: bool = True,
    clear_contexts: bool = False,
    return_cache_object: bool = True,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Run `forward` and keep its activations.

    Args:
        names_filter: a hook name, a list of them or a predicate. None stores everything but the
            [pos, pos] tensors, which `cache["pattern", layer]` derives; name them to store them.
        pos_slice: positions of the text side to store (image-side tensors are kept whole). Of scores and patterns
            that `names_filter` names, only these rows are computed: `names_filter="blocks.3.attn.hook_pattern",
            pos_slice="last"` is where each row's last token looks, without a [pos, pos] tensor. "last" and single
            positions keep an axis of one position.
        device: where to store; by default the device that computes, or the inputs' if the model is spread over devices.
        remove_batch_dim: drop the text side's batch axis; needs a batch of one.
        incl_bwd: also run backward from the output (use return_type="loss") and store gradients
            under "<name>_grad".
        return_cache_object: False returns a dictionary of the stored tensors in place of a `VLMCache`.
        reset_hooks_end: False leaves hooks that store the activations of later passes, too.

    Raises:
        HookError: a name that matches nothing, or a hook point that is switched off.
        InputError: `remove_batch_dim` with more than one row, or `pos_slice` outside of the inputs or on padding.
    """
    inputs = model.as_inputs(input)
    if remove_batch_dim and len(inputs) != 1:
        raise InputError(f"remove_batch_dim needs a batch of one row, this one has {len(inputs)}")
    if pos_slice is not None and kwargs.get("logits_at") == "last":
        raise InputError('pos_slice does not go with logits_at="last", where ln_final has one position only')
    names = names_to_store(model, names_filter, inputs, kwargs)
    if device is None and model.device_map:
        device = model.cfg.device
    watched = shows_modules(model)
    explicit = partial(runs_explicitly, model)
    recording = Recording(pos_slice, inputs, device, remove_batch_dim, explicit, incl_bwd, copies=watched)
    recorder, fwd, bwd = _hooks(model, recording, names, inputs, kwargs, later=not reset_hooks_end)
    past = kwargs.get("past_kv_cache")
    continues = past is not None and past.length > 0
    with model.hooks(fwd, bwd, reset_hooks_end, clear_contexts):
        out = model(inputs, *args, recorder=recorder, **kwargs)
        if incl_bwd:
            out.backward()
    cache = _cache(model, recording, inputs, continues, exchanged_patterns(model) if watched else frozenset())
    if not reset_hooks_end:
        follow = partial(_follow, cache, recording)
        recording.put = follow if return_cache_object else recording.store.__setitem__
    return out, cache if return_cache_object else recording.store


def _follow(cache: VLMCache, recording: "Recording", name: str, tensor: Tensor) -> None:
    cache.follow(name, tensor, recording.inputs)


def get_caching_hooks(
    model: "HookedVLM",
    names_filter: HookName | Sequence[str] | None = None,
    incl_bwd: bool = False,
    device: torch.device | str | None = None,
    remove_batch_dim: bool = False,
    cache: dict[str, Tensor] | None = None,
    pos_slice: PositionSlice = None,
) -> tuple[dict[str, Tensor], Hooks, Hooks]:
    """Make hooks that store the activations of every pass they are set for, the latest in place of earlier ones.

    Arguments are those of `run_with_cache`. Nothing is derived: name scores and patterns to have them.

    Args:
        cache: dictionary to fill; a new one by default.

    Returns:
        The dictionary, and the hooks forward and backward for `model.hooks`, `run_with_hooks` or `generate`.

    Raises:
        HookError: an unknown or switched-off name, or a filter that matches nothing.
    """
    recording = Recording(pos_slice, None, device, remove_batch_dim, partial(runs_explicitly, model), incl_bwd)
    recording.store = {} if cache is None else cache
    recording.put = recording.store.__setitem__
    if names_filter is None or callable(names_filter):
        wanted = default_filter(model) if names_filter is None else names_filter
        firing = frozenset(n for n in model.hook_dict if wanted(n) and not switched_off(model, n))
        model.points_of(wanted)
        names: list[HookName] = [firing.__contains__]  # a filter means: of those that fire in a run
    else:
        names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        for name in names:
            model.points_of(name)
    fwd: Hooks = [(name, recording.save) for name in names]
    return recording.store, fwd, [(name, partial(recording.save, suffix="_grad")) for name in names if incl_bwd]


def add_caching_hooks(model: "HookedVLM", *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Set the hooks of `get_caching_hooks` until `model.reset_hooks()`, and return the dictionary they fill."""
    cache, fwd, bwd = get_caching_hooks(model, *args, **kwargs)
    for name, fn in fwd:
        model.add_hook(name, fn, "fwd")
    for name, fn in bwd:
        model.add_hook(name, fn, "bwd")
    return cache


def names_to_store(
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


def _cache(
    model: "HookedVLM", recording: "Recording", inputs: VLMInputs, continues: bool, exchanged: frozenset[str]
) -> VLMCache:
    why_not, tower = "", model.cfg.vision
    if continues:
        why_not = "the run continued a key-value cache, whose keys are not in this cache"
    elif recording.pos_slice is not None:
        why_not = "pos_slice cut the keys"
    masks, kinds = inputs_masks(model.cfg, inputs, None), model.cfg.layer_kind_of
    text = Derivation(
        model.cfg.n_layers,
        masks,
        why_not,
        normed=model.cfg.qk_norm,
        exchanged=exchanged,
        kind_of=kinds,
        scoring=scoring_of(model.cfg),
    )
    vision = Derivation(0, exchanged=exchanged)
    if tower is not None:
        masks = image_pass(model, inputs.grids, inputs.device).patches.masks if inputs.has_visuals else ()
        normed = any(name.startswith("vision.") and name.endswith("hook_q_normed") for name in model.hook_dict)
        rotary, kinds = tower.rope_theta is not None, tower.layer_kind_of
        vision = replace(vision, n_layers=tower.n_layers, masks=masks, rotary=rotary, normed=normed, kind_of=kinds)
    cut = recording.pos_slice is not None
    return VLMCache(recording.store, model, not recording.remove_batch_dim, text, vision, inputs, cut)


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
        pos_slice: which positions of the text side are kept.
        inputs: those of the pass; hooks of later passes learn theirs from `hook.ctx`.
        explicit: whether a layer makes all of its scores and patterns anyway, asked by the name of such a point.
        incl_bwd: whether gradients are stored, too.
        copies: whether copies are stored, because foreign modules may write into what they are given.
    """

    def __init__(
        self,
        pos_slice: PositionSlice,
        inputs: VLMInputs | None,
        device: torch.device | str | None,
        remove_batch_dim: bool,
        explicit: Callable[[str], bool],
        incl_bwd: bool = False,
        copies: bool = False,
    ) -> None:
        self.store: dict[str, Tensor] = {}
        self.put: Callable[[str, Tensor], None] = self.store.__setitem__
        check_cut(pos_slice)
        self.pos_slice, self.inputs = pos_slice, inputs
        self._cut = None
        if pos_slice is not None and inputs is not None:
            self._cut = cut_of(pos_slice, spans_of(inputs), inputs.shape[1])
        self._seen: dict[int, Spans | None] = {} if inputs is None else {inputs.shape[1]: spans_of(inputs)}
        """Where tokens lay in forward passes of each width; None where they lay differently."""
        self.device, self.remove_batch_dim = device, remove_batch_dim
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

    def keep(self, name: str, tensor: Tensor, suffix: str = "", cut: Cut | None = None) -> None:
        """Store what passed the hook point `name`.

        Raises:
            InputError: the batch axis is to go, but there are several rows.
        """
        text, cut = not is_vision(name), self._cut if cut is None else cut
        if text and cut is not None:
            # a copy: a view would keep the whole tensor in memory
            tensor = cut.apply(tensor, dim=position_axis(name)).clone()
        if text and self.remove_batch_dim:
            if len(tensor) != 1:
                raise InputError(f"remove_batch_dim needs a batch of one row, this one has {len(tensor)}")
            tensor = tensor[0]
        self.put(name + suffix, tensor if self.device is None else tensor.to(self.device))

    def save(self, tensor: Tensor, hook: Any, suffix: str = "") -> None:
        """`keep` as a hook."""
        name = str(hook.name)
        self.inputs = hook.ctx.get("own_inputs", self.inputs)
        self.keep(name, tensor.detach(), suffix, self._cut_now(hook, name, tensor))

    def _by_rows(self, name: str) -> bool:
        cut = is_quadratic(name) and not is_vision(name) and self.pos_slice is not None
        return cut and not self.incl_bwd and not self.explicit(name)

    def _save_rows(self, z: Tensor, hook: Any, name: str) -> None:
        cut = self._cut_now(hook, "z", z)
        assert cut is not None
        rows = _rows(hook.ctx["attention"], cut, name).detach()
        rows = rows[0] if self.remove_batch_dim else rows
        self.put(name, rows if self.device is None else rows.to(self.device))

    def _cut_now(self, hook: Any, name: str, tensor: Tensor) -> Cut | None:
        """The slice of the pass that a hook is called in, which may be a later one.

        Raises:
            InputError: positions that the pass does not have, or a gradient that may be of one of several passes.
        """
        if self.pos_slice is None or is_vision(name):
            return None
        width, own = tensor.shape[position_axis(name)], hook.ctx.get("own_inputs")
        if own is None and "step" in hook.ctx:
            return cut_of_step(self.pos_slice)
        if own is not None:
            spans = spans_of(own)
            self._seen[width] = spans if self._seen.get(width, spans) == spans else None
            return cut_of(self.pos_slice, spans, width)
        spans = self._seen.get(width)  # a backward pass has no context
        if spans is None:
            raise InputError(
                "gradients with pos_slice need one forward pass before them, under the forward hook, which learns "
                "where padding lies"
            )
        return cut_of(self.pos_slice, spans, width)


def _rows(call: AttentionCall, cut: Cut, name: str) -> Float[Tensor, "batch head *row key"]:
    """The rows of scores or pattern at some positions; without a row axis where that is one number."""
    n, device = call.q.shape[1], call.q.device
    chosen = torch.tensor(cut.last)[:, None] if isinstance(cut, LastOfRows) else cut.apply(torch.arange(n))
    index = chosen.to(device).reshape(len(chosen) if chosen.ndim == 2 else 1, -1)  # [#batch, row]
    rows = call.scores(index)
    if name.endswith("hook_pattern"):
        valid = call.mask.query_valid(n)
        rows = attention_pattern(rows, None if valid is None else valid.gather(1, index.expand(len(valid), -1)))
    return rows if chosen.ndim else rows[:, :, 0]


def position_axis(name: str) -> int:
    """The axis of a text hook point's tensor (batch axis first) that runs over (query) positions."""
    return -2 if is_quadratic(name) else 1
