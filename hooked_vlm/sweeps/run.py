"""The runs of a sweep: the plain one, and batches that begin where they diverge from it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import EMBEDDING, Hooks, Intervention
from hooked_vlm.interventions.heads import HeadIntervention, layer_hooks
from hooked_vlm.nn.forward_pass import ForwardPass, inputs_mask, inputs_rotation, last_of_rows
from hooked_vlm.nn.hooks import HookPoint, checked, running
from hooked_vlm.nn.kv_cache import KVCache, SharedPrefix
from hooked_vlm.nn.masks import AttentionMask
from hooked_vlm.nn.rotary import Rotation
from hooked_vlm.sweeps.plan import Batch, SweepPlan

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True, eq=False)
class PlainRun:
    """The run without any intervention, with the tensors that other runs reuse."""

    inputs: VLMInputs
    logits: Float[Tensor, "batch out d_vocab"]
    streams: dict[int, Float[Tensor, "batch pos d_model"]]
    """Inputs of layers, of `EMBEDDING` (block 0 before `hook_embed`) and of the final norm (number of layers)."""
    cache: KVCache
    mask: AttentionMask
    rotate: Rotation

    @classmethod
    def of(cls, model: "HookedVLM", inputs: VLMInputs, plan: SweepPlan, logits_at: str) -> "PlainRun":
        streams: dict[int, Tensor] = {}
        n_layers = model.cfg.n_layers
        wanted = {layer for batch in plan.batches for layer in batch.layers}

        def keep(layer: int) -> Callable[[Tensor, Any], None]:
            return lambda x, hook: streams.__setitem__(layer, x.detach())

        def name(layer: int) -> str:
            if layer == EMBEDDING:
                return "hook_embed"
            last = layer == n_layers
            return f"blocks.{n_layers - 1}.hook_resid_post" if last else f"blocks.{layer}.hook_resid_pre"

        cache = model.new_kv_cache(len(inputs), inputs.shape[1])
        with model.hooks(fwd_hooks=[(name(layer), keep(layer)) for layer in sorted(wanted)]):
            logits = model(inputs, past_kv_cache=cache, logits_at=logits_at)
        rotate = inputs_rotation(model.cfg, inputs, model.cfg.dtype)
        return cls(inputs, logits, streams, cache, inputs_mask(model.cfg, inputs, None), rotate)

    def pass_over(self, model: "HookedVLM", first: int, n: int) -> ForwardPass:
        """A pass of `n` runs over the positions from `first` on."""
        mask, n_positions = self.mask, self.inputs.shape[1]
        valid = None if mask.key_valid is None else mask.key_valid.repeat(n, 1)
        padding = None if mask.uncached_left_padding is None or first else mask.uncached_left_padding.repeat(n)
        positions = torch.arange(first, n_positions, device=self.inputs.device)
        return ForwardPass(
            model.cfg,
            self.inputs.device,
            AttentionMask(True, valid, padding, mask.window),
            self.rotate.positions(slice(first, None)).repeat(n),
            SharedPrefix(self.cache, first) if first else None,
            {"positions": positions, "first_position": first},
        )


def batch_logits(
    model: "HookedVLM", plain: PlainRun, batch: Batch, runs: Sequence[Intervention], plan: SweepPlan, logits_at: str
) -> Float[Tensor, "run batch out d_vocab"]:
    """Logits of a batch's `runs`, of each row's last position or of those the batch computes."""
    first, n_layers, n_rows = batch.first_position, model.cfg.n_layers, len(plain.inputs)
    n_out = 1 if plan.narrow_end else None
    stream = plain.logits.new_empty(0, plain.inputs.shape[1] - first, model.cfg.d_model)
    n_runs = 0
    here = plain.pass_over(model, first, 1)
    joining = sorted(set(batch.layers) - {n_layers})
    with model.hooks(fwd_hooks=batch_hooks(model, plain.inputs, runs)):
        for layer, until in pairwise([*joining, n_layers]):
            n = batch.layers.count(layer)
            shared, n_runs = plain.streams[layer][:, first:], n_runs + n
            stream = torch.cat((stream.to(shared.device), shared.repeat(n, 1, 1)))
            here = plain.pass_over(model, first, n_runs)
            if layer == EMBEDDING:
                with running(here):
                    stream = model.hook_embed(stream)  # [run and row, pos, d_model]
            stream = model.run_layers(stream, here, max(layer, 0), until, n_out)
        if n := batch.layers.count(n_layers):
            shared = plain.streams[n_layers][:, first:]
            if len(stream):  # behind a last block that may have computed the last position only
                shared = shared[:, -stream.shape[1] :]
            stream, n_runs = torch.cat((stream.to(shared.device), shared.repeat(n, 1, 1))), n_runs + n
            here = plain.pass_over(model, first, n_runs)
        stream = stream.to(plain.inputs.device)
        if logits_at == "last" and plan.find_positions:
            stream, here = last_of_rows(stream, here, plain.inputs, first)
        with running(here):
            normalized = model.ln_final(stream)
        if logits_at == "last" and not plan.find_positions:  # hooks on the final norm saw all of it
            normalized, _ = last_of_rows(normalized, here, plain.inputs, first)
        logits = model.unembed(normalized)
    return logits.unflatten(0, (len(batch.runs), n_rows))


Edits = list[tuple[int, int, Callable]]
"""(first run, one past the last, hook)."""


def batch_hooks(model: "HookedVLM", inputs: VLMInputs, runs: Sequence[Intervention]) -> Hooks:
    """One hook for each point that any of the runs touches; each run's edits see its own rows only.

    Interventions on heads that can be edited together (`HeadIntervention.kind`) become one edit with a mask.
    """
    edits: dict[str, Edits] = defaultdict(list)
    kinds: dict[tuple, dict[int, HeadIntervention]] = defaultdict(dict)
    for i, run in enumerate(runs):
        if isinstance(run, HeadIntervention):
            kinds[run.kind][i] = run
        else:
            for name, fn in run.hooks(model, inputs):
                edits[name].append((i, i + 1, fn))
    for members in kinds.values():
        heads = torch.zeros(len(runs), model.cfg.n_layers, model.cfg.n_heads, dtype=torch.bool)
        for i, run in members.items():
            if run.heads:
                layers, numbers = zip(*run.heads, strict=True)
                heads[i, list(layers), list(numbers)] = True
        any_member = next(iter(members.values()))
        for layer in heads.any(-1).any(0).nonzero()[:, 0].tolist():
            touched = heads[:, layer].any(-1).nonzero()[:, 0]
            lo, hi = int(touched[0]), int(touched[-1]) + 1
            own = tuple(members.get(i, any_member) for i in range(lo, hi))  # the mask leaves other runs' rows alone
            for name, fn in layer_hooks(own, model, inputs, layer, heads[lo:hi, layer]):
                edits[name].append((lo, hi, fn))
    return [(name, on_own_rows(own, len(inputs))) for name, own in edits.items()]


def on_own_rows(edits: Edits, n_rows: int) -> Callable[[Tensor, Any], Tensor]:
    """A hook for a batch of runs with `n_rows` rows each."""

    def apply(x: Tensor, hook: HookPoint) -> Tensor:
        call = hook.ctx.get("attention")
        for lo, hi, fn in edits:
            rows = slice(lo * n_rows, hi * n_rows)
            if call is not None:
                hook.ctx["attention"] = call.rows(rows.start, rows.stop)
            own = x[rows]
            edited = fn(own, hook)
            if edited is not None:
                x[rows] = checked(hook, own, edited)
        return x

    return apply
