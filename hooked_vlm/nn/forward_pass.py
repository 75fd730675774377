"""`ForwardPass`: attention mask, rotary positions, earlier keys, hook context and padding of one pass.

Made once for each pass over inputs or step of generation, and current for as long as it runs (`hooks.running`):
attention asks it for mask and rotation, hook points for how a tensor is shown to a hook.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.hooks import shows_modules
from hooked_vlm.nn.kv_cache import EarlierKeys, KVCache
from hooked_vlm.nn.masks import AttentionMask
from hooked_vlm.nn.packing import Group, Packing, Windows
from hooked_vlm.nn.rotary import Rotation, Rotations, text_rotation

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True, eq=False)
class Recorder:
    """Recorder of a pass: calls `keep` with the name and the tensor of each hook point as it fires."""

    keep: Callable[[str, Tensor], None]
    names: Collection[str] | None = None
    """None: of all that fire."""

    def records(self, name: str | None) -> bool:
        """Whether a hook point is recorded when it fires."""
        return self.names is None or name in self.names

    def __call__(self, name: str | None, x: Tensor) -> None:
        """Keep what passed a hook point."""
        self.keep(str(name), x.detach())

    def names_point(self, name: str | None) -> bool:
        """Whether a hook point is recorded by its name, so that it fires although no hook listens there."""
        return self.names is not None and name in self.names

    def touches(self, prefix: str) -> bool:
        """Whether any hook point whose name begins with `prefix` may be recorded."""
        return self.names is None or any(name.startswith(prefix) for name in self.names)


@dataclass(frozen=True, eq=False)
class DeepStack:
    """Image features that enter the stream behind its first blocks (DeepStack, arXiv 2406.04334)."""

    features: Float[Tensor, "token block d_model"]
    slots: Int[Tensor, "token"]
    """Index of the image tokens into the flattened [batch * pos] positions."""
    shape: torch.Size
    """Rows and positions."""
    first: int = 0
    """First position of the pass."""
    n_runs: int = 1
    """Number of runs of these rows in the pass, one after the other."""

    def added(self, block: int, like: Tensor) -> Float[Tensor, "batch pos d_model"]:
        """What a block adds: its features at image tokens, zeros elsewhere; with `like`'s dtype and device."""
        features = self.features[:, block].to(like)
        rows, width = self.shape
        flat = features.new_zeros(rows * width, features.shape[-1]).index_copy(0, self.slots.to(like.device), features)
        here = flat.unflatten(0, (rows, width))[:, self.first :]
        return here if self.n_runs == 1 else here.repeat(self.n_runs, 1, 1)


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """One pass through a tower: what its layers and hook points need to know beside their tensors."""

    cfg: VLMConfig
    """The model's, for the switches of optional hook points."""
    device: torch.device
    masks: tuple[AttentionMask, ...]
    """One for each kind of layers."""
    rotations: Rotations | None = None
    """None where positions are not rotary."""
    past: EarlierKeys | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    """Context of hooks, `hook.ctx` while they are called: `own_inputs` of the pass, `inputs` that its key-value cache
    begins with (its own where there is none), `positions`, the first of them as a plain number (`first_position`), and
    `step` of a key-value cache."""
    packing: Packing | None = None
    """How rows without their padding lie one after the other; None where tensors are [batch, pos, ...]."""
    recorder: Recorder | None = None
    n_out: int | None = None
    """Number of last positions whose queries are computed; None: all."""
    kind_of: tuple[int, ...] = ()
    """The kind of each layer; empty where all are alike."""
    windows: tuple[Windows | None, ...] = ()
    """Of each kind of layers, the windows that the blocks of its mask are; empty where no kind has any."""
    deepstack: DeepStack | None = None
    """Image features that enter behind the first blocks, if there are any."""
    _elsewhere: "dict[torch.device, ForwardPass]" = field(init=False, repr=False, default_factory=dict)

    def on(self, device: torch.device) -> "ForwardPass":
        """Return this pass for layers on another device (cached). Earlier keys are on their layers' devices already."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = replace(
                self,
                device=device,
                masks=tuple(mask.to(device) for mask in self.masks),
                rotations=None if self.rotations is None else self.rotations.then(lambda rotate: rotate.to(device)),
                packing=None if self.packing is None else self.packing.to(device),
                windows=tuple(None if own is None else own.to(device) for own in self.windows),
                context={name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.context.items()},
            )
        return self._elsewhere[device]

    def _kind(self, layer: int) -> int:
        return self.kind_of[layer] if self.kind_of else 0

    def mask_of(self, layer: int) -> AttentionMask:
        """Who sees whom in a layer."""
        return self.masks[self._kind(layer)]

    def rotate_of(self, layer: int) -> Rotation | None:
        """The rotation of a layer's keys, and of its queries if all are computed; None if positions are not rotary."""
        return None if self.rotations is None else self.rotations[self._kind(layer)]

    def groups_of(self, layer: int) -> tuple[Group, ...] | None:
        """Positions that attend together in a layer's fused kernel; None where whole (padded) rows do."""
        windows = self.windows[self._kind(layer)] if self.windows else None
        if windows is not None:
            return windows.groups
        if self.packing is None or self.past is not None:
            return None
        width = self.packing.width
        return self.packing.groups if self.mask_of(layer).is_simple(width, width) else None

    def pack(self, padded: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "..."]:
        """Drop padding: the form that layers compute on."""
        return padded if self.packing is None else self.packing.to(padded.device).pack(padded)

    def pad(self, x: Float[Tensor, "..."]) -> Float[Tensor, "batch pos *rest"]:
        """Restore padding as zeros: the form that hooks see."""
        return x if self.packing is None else self.packing.to(x.device).pad(x)

    def wanted(self, x: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "batch query *rest"]:
        """The positions whose queries are wanted."""
        return x if self.n_out is None else x[:, -self.n_out :]

    def context_at(self, device: torch.device, n: int) -> Mapping[str, Any]:
        """The hook context of a tensor that holds the last `n` positions."""
        context = self.on(device).context
        positions = context.get("positions")
        if positions is None or len(positions) == n:
            return context
        first = context["first_position"] + len(positions) - n
        return {**context, "positions": positions[-n:], "first_position": first}

    def without_positions(self) -> "ForwardPass":
        """Return this pass for tensors without text positions, or with rows at different ones."""
        kept = {name: value for name, value in self.context.items() if name in ("inputs", "own_inputs", "step")}
        return replace(self, context=kept)


def text_pass(
    model: "HookedVLM",
    inputs: VLMInputs,
    past: KVCache | None = None,
    dtype: torch.dtype | None = None,
    recorder: Recorder | None = None,
) -> ForwardPass:
    """A pass through the decoder over `inputs`, which continue what is in the cache if there is one.

    Rows of different lengths run without their padding, unless earlier keys are in front of them, heads have inputs of
    their own, or someone looks at modules between the hook points.
    """
    cfg = model.cfg
    n, n_past = inputs.shape[1], 0 if past is None else past.length
    context: dict[str, Any] = {"inputs": inputs if past is None else past.begin(inputs), "own_inputs": inputs}
    context["positions"] = torch.arange(n_past, n_past + n, device=inputs.device)
    context["first_position"] = n_past
    if past is not None:
        context["step"] = past.n_passes
    masks = inputs_masks(cfg, inputs, past)
    rotations = inputs_rotations(cfg, inputs, cfg.dtype if dtype is None else dtype, past)
    packing = None
    lengths = [stop - first for first, stop in zip(inputs.first, inputs.stop, strict=True)]
    own_inputs = cfg.use_split_qkv_input or cfg.use_attn_in
    if not n_past and min(lengths) != n and not own_inputs and not shows_modules(model):
        packing = Packing.of(lengths, inputs.device, inputs.first, n)
        rotations = rotations.then(lambda rotate: rotate.changed(packing.pack))
    kind_of = cfg.layer_kind_of
    return ForwardPass(cfg, inputs.device, masks, rotations, past, context, packing, recorder, kind_of=kind_of)


def step_pass(cfg: VLMConfig, past: KVCache) -> ForwardPass:
    """A pass over one more token in every row, made from the key-value cache alone, on the device."""
    if past.frozen:
        raise InputError("a frozen cache takes no token: unfreeze it, or continue a copy, past_kv_cache.repeat(1)")
    assert past.next_position is not None
    position_ids = past.next_position[None, :, None].expand(3, -1, -1)
    masks = _of_kinds(cfg, AttentionMask(True, past.valid_with(1, None)))
    here = torch.full((1,), past.length, device=position_ids.device)
    context = {"inputs": past.inputs, "positions": here, "first_position": past.length, "step": past.n_passes}
    rotations = _rotations(cfg, position_ids, past.next_position + 1, cfg.dtype)
    return ForwardPass(cfg, past.device, masks, rotations, past, context, kind_of=cfg.layer_kind_of)


def last_of_rows(
    stream: Float[Tensor, "*dims d_model"], here: ForwardPass, inputs: VLMInputs, first: int = 0
) -> tuple[Float[Tensor, "rows 1 d_model"], ForwardPass]:
    """Each row's last real position, and the pass that goes on with it.

    `stream` begins at the position `first`; its rows may be those of several runs over `inputs`.
    """
    together = min(inputs.stop) == inputs.shape[1]
    if here.packing is not None:
        ends = torch.tensor(here.packing.lengths).cumsum(0).to(stream.device, non_blocking=True) - 1
        last = stream[ends][:, None]
    elif together:
        last = stream[:, -1:]
    else:
        index = torch.tensor(inputs.stop, device=stream.device) - 1 - first
        rows = torch.arange(len(stream), device=stream.device)
        last = stream[rows, index.repeat(len(stream) // len(inputs))][:, None]
    unpacked = replace(here, packing=None, rotations=None)
    return last, unpacked if together else unpacked.without_positions()


def are_finite(logits: Float[Tensor, "*dims d_vocab"]) -> bool:
    """Whether the largest logit everywhere is a finite number."""
    return bool(torch.isfinite(logits.amax(-1)).all())


def inputs_masks(cfg: VLMConfig, inputs: VLMInputs, past: KVCache | None) -> tuple[AttentionMask, ...]:
    """Who sees whom among `inputs` and what is in the cache, in each kind of layers."""
    padded = min(inputs.stop) != inputs.shape[1] or max(inputs.first) != 0
    valid = inputs.attention_mask.bool() if padded else None
    if past is not None:
        valid = past.valid_with(inputs.shape[1], valid)
    n_past = 0 if past is None else past.length
    spans = block_spans(cfg, inputs)
    if spans == _rows(inputs) and not n_past:
        return _of_kinds(cfg, AttentionMask(False, valid))  # each row is one block: no mask is written out
    padding = None
    if max(inputs.first) != 0 and not n_past:
        padding = torch.tensor(inputs.first, device=inputs.device)
    blocks = None
    if spans:
        blocks = torch.full((len(inputs), n_past + inputs.shape[1]), -1)
        for number, (row, start, stop) in enumerate(spans):
            blocks[row, n_past + start : n_past + stop] = number
        blocks = blocks.to(inputs.device)
    return _of_kinds(cfg, AttentionMask(True, valid, padding, blocks=blocks))


def _of_kinds(cfg: VLMConfig, mask: AttentionMask) -> tuple[AttentionMask, ...]:
    """A mask with the window of each kind of layers."""
    cuts = cfg.window_cuts_blocks
    if not mask.causal and not cuts:
        return (mask,) * len(cfg.kinds)
    return tuple(replace(mask, window=kind.window, window_cuts_blocks=cuts) for kind in cfg.kinds)


def block_spans(cfg: VLMConfig, inputs: VLMInputs) -> list[tuple[int, int, int]]:
    """(row, first position, one past the last) of the tokens that see each other both ways."""
    if cfg.bidirectional == "image":
        return [(visual.row, *run) for visual in inputs.visuals for run in visual.runs]
    if cfg.bidirectional == "prompt":
        prompts = zip(_rows(inputs), inputs.n_generated, strict=True)
        return [(row, first, stop - n) for (row, first, stop), n in prompts if stop - n > first]
    return []


def _rows(inputs: VLMInputs) -> list[tuple[int, int, int]]:
    """(row, first position, one past the last) of each row."""
    return list(zip(range(len(inputs)), inputs.first, inputs.stop, strict=True))


def inputs_rotations(cfg: VLMConfig, inputs: VLMInputs, dtype: torch.dtype, past: KVCache | None = None) -> Rotations:
    """The rotations of the inputs' queries and keys, counted on from what is in the cache."""
    position_ids, lengths = inputs.position_ids, inputs.next_position
    if past is not None and past.next_position is not None:
        position_ids = position_ids + past.next_position[:, None]
        lengths = lengths + past.next_position
    return _rotations(cfg, position_ids, lengths, dtype)


def _rotations(
    cfg: VLMConfig, position_ids: Int[Tensor, "3 batch pos"], lengths: Int[Tensor, "batch"], dtype: torch.dtype
) -> Rotations:
    def of_kind(number: int) -> Rotation:
        kind = cfg.kinds[number]
        axes, theta, scaling = cfg.mrope_section, kind.rope_theta, kind.rope_scaling
        return text_rotation(
            position_ids, cfg.d_head, theta, axes, dtype, scaling, lengths, interleaved=cfg.mrope_interleaved
        )

    return Rotations(of_kind)


def check_context(cfg: VLMConfig, inputs: VLMInputs, n_past: int) -> None:
    """Refuse more tokens than the context holds, `n_past` in a key-value cache included.

    Raises:
        InputError: names the number of tokens and the context.
    """
    longest = max(b - a for a, b in zip(inputs.first, inputs.stop, strict=True)) + n_past
    if longest > cfg.n_ctx and longest > cfg.n_ctx_limit:  # a scaling of positions may stretch n_ctx
        bound = inputs.spec.layouts.bounds[-1:] if inputs.spec.layouts is not None else ()
        lower = "".join(f", or lower {name} in model.to_inputs(..., {name}=)" for name in bound)
        raise InputError(f"{longest} tokens do not fit the context of {cfg.n_ctx_limit}: shorten the prompt{lower}")


def layer_range(cfg: VLMConfig, start_at_layer: int | None, stop_at_layer: int | None) -> tuple[int, int]:
    """Return the first layer to run and one past the last; negative numbers count from the end.

    Raises:
        InputError: a layer out of range.
    """
    n = cfg.n_layers
    for name, layer, top in (
        ("start_at_layer", start_at_layer, n - 1),
        ("stop_at_layer", stop_at_layer, n),
    ):
        if layer is not None and not -n <= layer <= top:
            raise InputError(f"{name}={layer} is out of range: the model has layers 0 to {n - 1}")
    first = (start_at_layer or 0) % n
    last = n if stop_at_layer is None else stop_at_layer if stop_at_layer >= 0 else stop_at_layer + n
    return first, last


def check_call(
    cfg: VLMConfig,
    inputs: VLMInputs,
    first: int,
    last: int,
    resid: Tensor | None,
    past: KVCache | None,
    logits_at: str,
) -> None:
    """Refuse arguments of `forward` that do not fit the inputs or each other.

    Raises:
        InputError: names the argument.
    """
    if logits_at not in ("all", "last"):
        raise InputError(f'logits_at must be "all" or "last", got {logits_at!r}')
    if first and resid is None:
        raise InputError(f"start_at_layer={first} needs resid, what enters that block")
    if past is not None and (first, last) != (0, cfg.n_layers):
        raise InputError("a key-value cache holds all layers: it does not go with start_at_layer or stop_at_layer")
    if past is not None and past.batch != len(inputs):
        raise InputError(f"the key-value cache has {past.batch} rows, the inputs {len(inputs)}")
    opener = inputs.spec.vision_start_token_id if inputs.spec.mrope else None
    if past is not None and past.length and opener is not None:
        cut = [v for v in inputs.visuals if v.start == inputs.first[v.row]]
        if cut:
            raise InputError(
                f"these inputs continue others with the {cut[0].kind} of row {cut[0].row}, behind the token that opens "
                "it: begin them with that token"
            )
    if past is not None and past.length and cfg.bidirectional == "prompt" and block_spans(cfg, inputs):
        raise InputError(
            "the tokens of a prompt see each other both ways, so a prompt behind others in a key-value cache would be "
            "cut: run it in one pass, and give what follows it as VLMInputs whose n_generated counts all of its tokens"
        )
    check_context(cfg, inputs, 0 if past is None else past.length)
    if resid is not None and resid.shape != (*inputs.shape, cfg.d_model):
        expected = (*inputs.shape, cfg.d_model)
        raise InputError(f"resid must be [batch, pos, d_model] = {expected}, got {tuple(resid.shape)}")
