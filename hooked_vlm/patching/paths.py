"""Path patching: what one head tells another directly (Wang et al. 2022, arXiv 2211.00593)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import Head, Intervention
from hooked_vlm.interventions.base import Hooks, first_position, position_table, positions_mask
from hooked_vlm.interventions.heads import check_heads
from hooked_vlm.nn.components import project_head
from hooked_vlm.nn.hooks import silent_hook_points
from hooked_vlm.patching.cells import in_range
from hooked_vlm.patching.exact import Metrics, checked, encoded_sides, swept, warn_of_bad_numbers
from hooked_vlm.patching.pairs import Direction, Pair, aligned
from hooked_vlm.patching.places import Rows, positions_at
from hooked_vlm.patching.result import PatchingResult

Reads = Literal["q", "k", "v"]


@dataclass(frozen=True, eq=False)
class PatchPath(Intervention):
    """A head reads the residual stream with one other head's output as it was in another run.

    The receiver's queries (keys, values) are made again from its stream, in which the sender's output alone is
    replaced: neither heads nor MLPs between the two carry the change. The rest of the receiver, and all others,
    see what they saw.

    Args:
        sender: (layer, head).
        receiver: (layer, head) of a later layer; a key-value head where it `reads` "k" or "v".
        stream: the receiver layer's `resid_pre` in the run that is edited.
        change: the sender's `z` in the other run, minus that in this one.
        positions: of the receiver's tensor; all by default.
    """

    sender: Head
    receiver: Head
    reads: Reads
    stream: Float[Tensor, "batch pos d_model"]
    change: Float[Tensor, "batch pos d_head"]
    positions: Rows | None = None

    position_aware: ClassVar[bool] = True

    def first_layer(self, model: Any, inputs: VLMInputs) -> int:
        return self.receiver[0]

    def first_position(self, model: Any, inputs: VLMInputs) -> int:
        return first_position(position_table(self.positions, inputs))

    def hooks(self, model: Any, inputs: VLMInputs) -> Hooks:
        inputs = model.as_inputs(inputs)
        layer, head = self.receiver
        table = position_table(self.positions, inputs).to(inputs.device)
        block, sender = model.blocks[layer], model.blocks[self.sender[0]].attn
        linear = getattr(block.attn, f"{self.reads}_proj")

        def put(x: Tensor, hook: Any) -> Tensor:
            first = hook.ctx["first_position"]
            here = slice(first, first + x.shape[1])
            written = sender.head_result(self.change[:, here], self.sender[1]).to(self.stream.device)
            stream = (self.stream[:, here] + written).to(x.device)
            stream = stream.repeat(len(x) // len(stream), 1, 1)
            with silent_hook_points():
                made = project_head(linear, block.ln1(stream), x.shape[2], head)
            chosen = positions_mask(table, first, made.shape[1], len(x))[..., None].to(x.device)
            edited = x.clone()
            edited[:, : made.shape[1], head] = torch.where(chosen, made, x[:, : made.shape[1], head])
            return edited

        return [(f"blocks.{layer}.attn.hook_{self.reads}", put)]

    def __str__(self) -> str:
        (a, b), (c, d) = self.sender, self.receiver
        return f"PatchPath {a}.{b} to {self.reads} of {c}.{d}"


@torch.no_grad()
def patch_paths(
    model: Any,
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
    """The metric with one head's message to another taken from the other run: senders x receivers.

    A sender that is not in an earlier layer than the receiver says nothing to it: its effect is 0.

    Args:
        receivers: (layer, head); of keys and values, (layer, key-value head).
        reads: what the receiver makes of its stream: "q", "k" or "v".
        where: one place, of the receiver's tensor (for keys and values, where the message is read from).

    Raises:
        InputError: see `patch`; or heads that do not exist.
    """
    pairs, metrics = checked(pairs, metric)
    if reads not in ("q", "k", "v"):
        raise InputError(f'reads must be "q", "k" or "v", got {reads!r}')
    check_heads(model, senders)
    n_heads = model.cfg.n_heads if reads == "q" else model.cfg.n_key_value_heads
    for layer, head in receivers:
        in_range([layer], model.cfg.n_layers, "layer")
        in_range([head], n_heads, "head" if reads == "q" else "key-value head")
    if not senders or not receivers:
        raise InputError(f"a path needs senders and receivers: {len(senders)} and {len(receivers)} came")
    edges = [(i, j) for i, s in enumerate(senders) for j, r in enumerate(receivers) if s[0] < r[0]]
    values, base_values, source_values = [], [], []
    for pair, own in zip(tqdm(pairs, disable=not progress, desc="patching", unit="pair"), metrics, strict=True):
        base, source = encoded_sides(model, pair, direction)
        matches = pair.matches(direction)
        positions = positions_at(pair, where, direction, matches)
        streams = {f"blocks.{layer}.hook_resid_pre" for layer, _ in receivers}
        zs = {f"blocks.{layer}.attn.hook_z" for layer, _ in senders}
        _, here = model.run_with_cache(base, names_filter=sorted(streams | zs), logits_at="last")
        _, there = model.run_with_cache(source, names_filter=sorted(zs), logits_at="last")
        change = {name: aligned(there[name], matches) - here[name] for name in zs}
        interventions = [
            PatchPath(
                senders[i],
                receivers[j],
                reads,
                here[f"blocks.{receivers[j][0]}.hook_resid_pre"],
                change[f"blocks.{senders[i][0]}.attn.hook_z"][:, :, senders[i][1]],
                positions,
            )
            for i, j in edges
        ]
        found, baseline = swept(model, base, interventions, own, logits_at=logits_at, max_runs=max_runs)
        grid = np.tile(baseline, (len(senders), len(receivers), 1))
        for (i, j), value in zip(edges, found, strict=True):
            grid[i, j] = value
        values.append(grid)
        base_values.append(baseline)
        source_values.append(swept(model, source, [], own, logits_at=logits_at)[1])
    result = PatchingResult(
        f"paths to {reads}",
        {"sender": tuple(map(_said, senders)), "receiver": tuple(map(_said, receivers))},
        np.concatenate(values, axis=2),
        np.concatenate(base_values),
        np.concatenate(source_values),
        direction,
        seed,
    )
    warn_of_bad_numbers(result)
    return result


def _said(head: Head) -> str:
    return f"{head[0]}.{head[1]}"
