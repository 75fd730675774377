"""Path patching: the direct effect of one head on another (Wang et al. 2022, arXiv 2211.00593)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import Head, Intervention
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


@dataclass(frozen=True, eq=False)
class PatchPath(Intervention):
    """One head reads the residual stream with another head's output taken from another run.

    The receiver's queries (keys, values) are recomputed from its stream, in which the sender's output alone is
    replaced: neither heads nor MLPs between the two carry the change. The rest of the receiver, and all other heads,
    read the stream unchanged.

    Args:
        sender: (layer, head).
        receiver: (layer, head) of a later layer; a key-value head where it `reads` "k" or "v".
        stream: the receiver layer's `resid_pre` in the run that is edited.
        change: the sender's `z` in the other run, minus that in this one.
        positions: where the receiver's tensor is replaced; all by default.
    """

    sender: Head
    receiver: Head
    reads: Reads
    stream: Float[Tensor, "batch pos d_model"]
    change: Float[Tensor, "batch pos d_head"]
    positions: Rows | None = None

    position_aware: ClassVar[bool] = True

    def first_layer(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        return self.receiver[0]

    def first_position(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        return first_position(position_table(self.positions, inputs))

    def hooks(self, model: "HookedVLM", inputs: VLMInputs) -> Hooks:
        inputs = model.as_inputs(inputs)
        layer, head = self.receiver
        table = position_table(self.positions, inputs).to(inputs.device)
        block, sender = model.blocks[layer], model.blocks[self.sender[0]].attn
        linear = getattr(block.attn, f"{self.reads}_proj")

        def put(x: Tensor, hook: HookPoint) -> Tensor:
            first = hook.ctx["first_position"]
            span = slice(first, first + x.shape[1])
            written = sender.head_result(self.change[:, span], self.sender[1]).to(self.stream.device)
            stream = (self.stream[:, span] + written).to(x.device)
            stream = stream.repeat(len(x) // len(stream), 1, 1)
            with silent_hook_points():
                recomputed = project_head(linear, block.ln1(stream), x.shape[2], head)
            n = recomputed.shape[1]
            chosen = positions_mask(table, first, n, len(x))[..., None].to(x.device)
            edited = x.clone()
            edited[:, :n, head] = torch.where(chosen, recomputed, x[:, :n, head])
            return edited

        return made_for(inputs, [(f"blocks.{layer}.attn.hook_{self.reads}", put)])

    def __str__(self) -> str:
        (a, b), (c, d) = self.sender, self.receiver
        return f"PatchPath {a}.{b} to {self.reads} of {c}.{d}"


@torch.no_grad()
def patch_paths(
    model: "HookedVLM",
    pairs: Pair | Sequence[Pair],
    senders: Sequence[Head],
    receivers: Sequence[Head],
    reads: Reads,
    metric: Metrics,
    *,
    where: str | int = "all",
    direction: Direction = "denoising",
    logits_at: Literal["last", "all"] = "last",
    max_runs: int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> PatchingResult:
    """Measure the metric with the path from one head to another taken from the other run: senders x receivers.

    A sender that is not in an earlier layer than the receiver has no path to it: its effect is 0.

    Args:
        receivers: (layer, head); of keys and values, (layer, key-value head).
        reads: the receiver's tensor that is recomputed: "q", "k" or "v".
        where: one place of the receiver's tensor (for keys and values, the positions that it attends to).

    Raises:
        InputError: see `patch`; or heads that do not exist.
    """
    pairs = pair_list(pairs)
    if reads not in ("q", "k", "v"):
        raise InputError(f'reads must be "q", "k" or "v", got {reads!r}')
    check_heads(model, senders)
    n_heads = model.cfg.n_heads if reads == "q" else model.cfg.n_key_value_heads
    for layer, head in receivers:
        in_range([layer], model.cfg.n_layers, "layer")
        in_range([head], n_heads, "head" if reads == "q" else "key-value head")
    if not senders or not receivers:
        raise InputError(f"a path needs senders and receivers: {len(senders)} and {len(receivers)} came")
    edges = [(sender, receiver) for sender in senders for receiver in receivers]
    connected = [(sender, receiver) for sender, receiver in edges if sender[0] < receiver[0]]
    zs = {f"blocks.{layer}.attn.hook_z" for layer, _ in senders}
    streams = {f"blocks.{layer}.hook_resid_pre" for layer, _ in receivers}

    def run(pair: Pair, metric: Metric) -> Values:
        base, source = encoded_sides(model, pair, direction)
        matches = pair.matches(direction)
        positions = positions_at(pair, where, direction, matches)
        _, edited = model.run_with_cache(base, names_filter=sorted(zs | streams), logits_at="last")
        _, other = model.run_with_cache(source, names_filter=sorted(zs), logits_at="last")
        change = {(i, h): aligned(other["z", i][:, :, h], matches) - edited["z", i][:, :, h] for i, h in senders}
        paths = [PatchPath(a, b, reads, edited["resid_pre", b[0]], change[a], positions) for a, b in connected]
        values, baseline = swept(model, base, paths, metric, logits_at, max_runs)
        found = dict(zip(connected, values, strict=True))
        grid = np.stack([found.get(edge, baseline) for edge in edges])
        return grid, baseline, swept(model, source, [], metric, logits_at)[1]

    ends = {"sender": senders, "receiver": receivers}
    axes: dict[str, tuple[Label, ...]] = {end: tuple(f"{i}.{h}" for i, h in heads) for end, heads in ends.items()}
    return over_batches(pairs, metric, run, f"paths to {reads}", axes, direction, seed, progress)
