"""Path patching: the effect of one head on others, or on the logits, that no head between carries (Wang et al. 2022,
arXiv 2211.00593)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import Compose, Head, Intervention
from hooked_vlm.interventions.base import Hooks, first_position, in_range, made_for, position_table, positions_mask
from hooked_vlm.interventions.heads import check_heads
from hooked_vlm.metrics import Metric
from hooked_vlm.nn.components import project_head
from hooked_vlm.nn.hooks import HookPoint, silent_hook_points
from hooked_vlm.patching.experiment import Metrics, Values, encoded_sides, over_batches, pair_list, swept
from hooked_vlm.patching.pairs import Direction, Pair, aligned
from hooked_vlm.patching.places import Rows, positions_at
from hooked_vlm.patching.result import Label, PatchingResult

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Reads = Literal["q", "k", "v"]
End = Head | Literal["logits"]
Receiver = End | tuple[Head, ...]
"""One head, the logits, or several heads that all read the changed stream in one run."""
MLPs = Literal["frozen", "follow"]


@dataclass(frozen=True, eq=False)
class PatchPath(Intervention):
    """One head, or the unembedding, reads the residual stream with another head's output taken from another run.

    The receiver's queries (keys, values) are recomputed from its stream, in which the sender's output alone is
    replaced; no head between the two carries the change, and MLPs do if their streams are given (`mids`). The rest of
    the receiver, and all other heads, read the stream unchanged.

    Args:
        sender: (layer, head).
        receiver: (layer, head) of a later layer, a key-value head where it `reads` "k" or "v"; or "logits".
        reads: the receiver's tensor that is recomputed; None for the logits.
        stream: the receiver layer's `resid_pre`, or the last layer's `resid_post`, in the run that is edited.
        change: the sender's `z` in the other run, minus that in this one.
        positions: where the receiver's tensor is replaced; all by default.
        mids: `resid_mid` of the run that is edited, by layer, from the sender's layer up to the receiver's: the MLPs
            of these layers are recomputed on the changed stream, one after the other, as in Wang et al. Without it all
            MLPs stay as they are.
        post_scale: the denominator of a norm behind the sender's attention, in the run that is edited
            (`ln1_post.hook_scale`): it stays, so that the changes of several heads sum. MLPs that follow are recomputed
            with their norms.
    """

    sender: Head
    receiver: End
    reads: Reads | None
    stream: Float[Tensor, "batch pos d_model"]
    change: Float[Tensor, "batch pos d_head"]
    positions: Rows | None = None
    mids: Mapping[int, Float[Tensor, "batch pos d_model"]] | None = None
    post_scale: Float[Tensor, "batch pos 1"] | None = None

    position_aware: ClassVar[bool] = True

    def first_layer(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        return model.cfg.n_layers - 1 if self.receiver == "logits" else self.receiver[0]

    def first_position(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        return first_position(position_table(self.positions, inputs))

    def hooks(self, model: "HookedVLM", inputs: VLMInputs) -> Hooks:
        inputs = model.as_inputs(inputs)
        if model.cfg.use_normalization_before_and_after and self.post_scale is None:
            raise InputError(
                f"a norm stands behind the attention of layer {self.sender[0]}: give post_scale, its "
                "ln1_post.hook_scale in the run that is edited"
            )
        table = position_table(self.positions, inputs).to(inputs.device)
        if self.receiver == "logits":
            name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
            return made_for(inputs, [(name, partial(self._to_stream, model, table))])
        name = f"blocks.{self.receiver[0]}.attn.hook_{self.reads}"
        return made_for(inputs, [(name, partial(self._to_head, model, table))])

    def _to_stream(self, model: "HookedVLM", table: Tensor, x: Tensor, hook: HookPoint) -> Tensor:
        """The stream as the unembedding reads it."""
        changed = self._changed(model, hook.ctx["first_position"], x)
        n = changed.shape[1]
        chosen = positions_mask(table, hook.ctx["first_position"], n, len(x))[..., None].to(x.device)
        return torch.cat((torch.where(chosen, changed, x[:, :n]), x[:, n:]), dim=1)

    def _to_head(self, model: "HookedVLM", table: Tensor, x: Tensor, hook: HookPoint) -> Tensor:
        """The receiver's queries (keys, values)."""
        assert self.receiver != "logits"
        layer, head = self.receiver
        block = model.blocks[layer]
        changed = self._changed(model, hook.ctx["first_position"], x)
        with silent_hook_points():
            linear = getattr(block.attn, f"{self.reads}_proj")
            recomputed = project_head(linear, block.ln1(changed), x.shape[2], head)
        n = recomputed.shape[1]
        chosen = positions_mask(table, hook.ctx["first_position"], n, len(x))[..., None].to(x.device)
        edited = x.clone()
        edited[:, :n, head] = torch.where(chosen, recomputed, x[:, :n, head])
        return edited

    def _changed(self, model: "HookedVLM", first: int, x: Tensor) -> Float[Tensor, "rows query d_model"]:
        """The receiver's stream with the change, at the positions of a hook's tensor, for all its rows."""
        span = slice(first, first + x.shape[1])
        layer, head = self.sender
        change = model.blocks[layer].attn.head_result(self.change[:, span], head)
        if self.post_scale is not None:
            change = model.blocks[layer].ln1_post.frozen(change, self.post_scale[:, span])
        for layer in sorted(self.mids or ()):
            block, mid = model.blocks[layer], self.mids[layer][:, span]  # pyright: ignore[reportOptionalSubscript]
            with silent_hook_points():
                before, after = (block.mlp_output(stream) for stream in (mid, mid + change.to(mid.device)))
            change = change + (after - before).to(change.device)
        stream = (self.stream[:, span] + change.to(self.stream.device)).to(x.device)
        return stream.repeat(len(x) // len(stream), 1, 1)

    def __str__(self) -> str:
        (a, b), to = self.sender, self.receiver
        return f"PatchPath {a}.{b} to " + ("logits" if to == "logits" else f"{self.reads} of {to[0]}.{to[1]}")


@torch.no_grad()
def patch_paths(
    model: "HookedVLM",
    pairs: Pair | Sequence[Pair],
    senders: Sequence[Head],
    receivers: Sequence[Receiver],
    reads: Reads | None,
    metric: Metrics,
    *,
    mlps: MLPs = "frozen",
    where: str | int = "all",
    direction: Direction = "denoising",
    logits_at: Literal["last", "all"] = "last",
    max_runs: int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> PatchingResult:
    """Measure the metric with the path from one head to another taken from the other run: senders x receivers.

        patch_paths(model, pair, heads, [(2, 1), ((2, 0), (2, 1)), "logits"], "q", metric, mlps="follow")

    A sender that is not in an earlier layer than the receiver has no path to it: its effect is 0.

    Args:
        receivers: each a (layer, head), of keys and values (layer, key-value head); several of them, which are changed
            in one run; or "logits", the sender's effect that no other head carries.
        reads: the receivers' tensor that is recomputed: "q", "k" or "v"; None if all receivers are "logits".
        mlps: "follow" recomputes the MLPs between sender and receiver on the changed stream, so that paths through
            them count (Wang et al.); "frozen" keeps them, so that only the direct path does.
        where: one place of the receiver's tensor (for keys and values, the positions that it attends to).

    Raises:
        InputError: see `patch`; or heads that do not exist.
    """
    pairs = pair_list(pairs)
    _check(model, senders, receivers, reads, mlps)
    n_layers = model.cfg.n_layers
    edges: list[tuple[Head, Receiver]] = [(sender, receiver) for sender in senders for receiver in receivers]
    zs = {f"blocks.{layer}.attn.hook_z" for layer, _ in senders}
    reached: set[End] = {end for receiver in receivers for end in _ends(receiver)}
    streams = {_stream(end, n_layers) for end in reached}
    last = max(n_layers if end == "logits" else end[0] for end in reached)
    between = range(min(layer for layer, _ in senders), last) if mlps == "follow" else range(0)
    kept = {f"blocks.{layer}.hook_resid_mid" for layer in between}
    if post_norms := model.cfg.use_normalization_before_and_after:
        kept |= {f"blocks.{layer}.ln1_post.hook_scale" for layer, _ in senders}

    def run(pair: Pair, metric: Metric) -> Values:
        base, source = encoded_sides(model, pair, direction)
        matches = pair.matches(direction)
        positions = positions_at(pair, where, direction, matches)
        _, edited = model.run_with_cache(base, names_filter=sorted(zs | streams | kept), return_type=None)
        _, other = model.run_with_cache(source, names_filter=sorted(zs), return_type=None)
        change = {(i, h): aligned(other["z", i][:, :, h], matches) - edited["z", i][:, :, h] for i, h in senders}

        def path(sender: Head, end: End) -> PatchPath:
            stop = n_layers if end == "logits" else end[0]
            mids = {i: edited["resid_mid", i] for i in range(sender[0], stop)} if mlps == "follow" else None
            own = None if end == "logits" else reads
            scale = edited["scale", sender[0], "ln1_post"] if post_norms else None
            return PatchPath(sender, end, own, edited[_stream(end, n_layers)], change[sender], positions, mids, scale)

        paths = {}
        for sender, receiver in edges:
            if parts := [path(sender, end) for end in _ends(receiver) if end == "logits" or sender[0] < end[0]]:
                paths[sender, receiver] = parts[0] if len(parts) == 1 else Compose(tuple(parts))
        values, baseline = swept(model, base, list(paths.values()), metric, logits_at, max_runs)
        found = dict(zip(paths, values, strict=True))
        grid = np.stack([found.get(edge, baseline) for edge in edges])
        return grid, baseline, swept(model, source, [], metric, logits_at)[1]

    axes: dict[str, tuple[Label, ...]] = {
        "sender": tuple(f"{i}.{h}" for i, h in senders),
        "receiver": tuple(_label(receiver) for receiver in receivers),
    }
    return over_batches(pairs, metric, run, f"paths to {reads or 'logits'}", axes, direction, seed, progress)


def _ends(receiver: Receiver) -> list[End]:
    """The heads of a receiver, or the logits."""
    if receiver == "logits":
        return ["logits"]
    return list(receiver) if isinstance(receiver[0], tuple) else [receiver]  # pyright: ignore[reportReturnType]


def _stream(end: End, n_layers: int) -> str:
    """Name of the stream that a receiver reads."""
    return f"blocks.{n_layers - 1}.hook_resid_post" if end == "logits" else f"blocks.{end[0]}.hook_resid_pre"


def _label(receiver: Receiver) -> str:
    return "+".join("logits" if end == "logits" else f"{end[0]}.{end[1]}" for end in _ends(receiver))


def _check(
    model: "HookedVLM", senders: Sequence[Head], receivers: Sequence[Receiver], reads: Reads | None, mlps: MLPs
) -> None:
    """Refuse paths that the model does not have.

    Raises:
        InputError: says what was expected.
    """
    if not senders or not receivers or () in receivers:
        raise InputError(f"a path needs senders and receivers: {len(senders)} and {len(receivers)} came")
    if mlps not in ("frozen", "follow"):
        raise InputError(f'mlps must be "frozen" or "follow", got {mlps!r}')
    heads = [end for receiver in receivers for end in _ends(receiver) if end != "logits"]
    if reads not in ("q", "k", "v") and (heads or reads is not None):
        raise InputError(f'reads must be "q", "k" or "v" (None if all receivers are "logits"), got {reads!r}')
    check_heads(model, senders)
    n_heads = model.cfg.n_heads if reads == "q" else model.cfg.n_key_value_heads
    for layer, head in heads:
        in_range([layer], model.cfg.n_layers, "layer")
        in_range([head], n_heads, "head" if reads == "q" else "key-value head")
