"""Interventions that replace attention patterns, with memory linear in the length."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import Positions, Tower, positions_mask
from hooked_vlm.interventions.heads import Edit, HeadIntervention, HeadSelection
from hooked_vlm.nn.attention import AttentionCall
from hooked_vlm.nn.hooks import HookPoint

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

QUERIES_AT_ONCE = 256
"""Number of queries whose pattern is held in memory at a time."""


@dataclass(frozen=True)
class EditedPattern(HeadIntervention):
    """Recompute z of some heads from an edited pattern, a few queries at a time.

    Patterns that are cached in the same run are those before the edit.
    """

    attention: ClassVar[Literal["edited", "recomputed", ""]] = "recomputed"

    @abstractmethod
    def edit_pattern(
        self,
        pattern: Float[Tensor, "batch head row key"],
        call: AttentionCall,
        queries: Int[Tensor, "1 row"],
        inputs: VLMInputs,
    ) -> Float[Tensor, "batch head row key"]:
        """Return the new pattern of some queries (indices into the query axis of `call`) of the chosen heads."""

    def pattern(
        self, call: AttentionCall, queries: Int[Tensor, "1 row"], heads: Sequence[int]
    ) -> Float[Tensor, "batch head row key"]:
        """The pattern to edit."""
        return call.pattern(queries, heads)

    def edits(self, model: "HookedVLM", inputs: VLMInputs, layer: int) -> list[tuple[str, Edit]]:
        table = self.selected(self.edited_positions, inputs)

        def edit(z: Tensor, hook: HookPoint, chosen: HeadSelection) -> Tensor:
            call: AttentionCall = hook.ctx["attention"]
            here = positions_mask(table, call.n_past, z.shape[1], len(z)).to(z.device)
            selected = here.any(0).nonzero()[:, 0]
            edited, heads = z.clone(), list(chosen.heads)
            for queries in selected.split(QUERIES_AT_ONCE):
                pattern = self.edit_pattern(self.pattern(call, queries[None], heads), call, queries[None], inputs)
                new = call.z_under(pattern, heads)
                old = z[:, queries][:, :, heads]
                change = here[:, queries, None] & chosen.mask[:, None, heads]
                edited[:, queries[:, None], torch.tensor(heads, device=z.device)] = torch.where(
                    change[..., None], new, old
                )
            return edited

        return [("hook_z", edit)]


@dataclass(frozen=True)
class RedistributeSink(EditedPattern):
    """Attention to the sink is scaled by `beta` and the difference redistributed over the other keys, in proportion.

    a_sink' = beta a_sink; a_j' = a_j (1 - beta a_sink) / (1 - a_sink). (arXiv 2505.15865, section on sink tokens.)
    The sink is each row's first token, or the `sink`-th.

    Args:
        causal: False lets the heads attend to every position of the pass, later ones too. The paper's code does this
            with the prompt of Qwen2-VL, by accident (papers 1.15); with a mask over the prompt set aside, a pass over
            prompt and reply is not what generation computes.
        alone: what a query does that attends to nothing else: "keep" its attention, or "spread" the difference
            equally over all other positions of the pass, later ones too (the paper's code).
    """

    beta: float
    sink: int = 0
    causal: bool = True
    alone: str = "keep"

    def edits(self, model: "HookedVLM", inputs: VLMInputs, layer: int) -> list[tuple[str, Edit]]:
        if not 0 <= self.beta <= 1:
            raise InputError(f"beta, the share of its attention that the sink keeps, is between 0 and 1: {self.beta}")
        spans = zip(inputs.first, inputs.stop, strict=True)
        if any(not first <= first + self.sink < stop for first, stop in spans):
            raise InputError(f"sink={self.sink}: a row has no such token")
        if self.alone not in ("keep", "spread"):
            raise InputError(f'alone must be "keep" or "spread", got {self.alone!r}')
        return super().edits(model, inputs, layer)

    def pattern(self, call: AttentionCall, queries: Tensor, heads: Sequence[int]) -> Tensor:
        if self.causal:
            return call.pattern(queries, heads)
        one_block = torch.zeros(len(call.k), call.k.shape[1], dtype=torch.long, device=call.k.device)
        return replace(call, mask=replace(call.mask, causal=True, blocks=one_block)).pattern(queries, heads)

    def edit_pattern(self, pattern: Tensor, call: AttentionCall, queries: Tensor, inputs: VLMInputs) -> Tensor:
        sinks = torch.tensor(inputs.first, device=pattern.device) + self.sink
        rows, n_heads, n, _ = pattern.shape
        index = sinks.repeat(rows // len(sinks))[:, None, None, None].expand(-1, n_heads, n, 1)
        on_sink = pattern.gather(-1, index)
        rest = pattern.sum(-1, keepdim=True) - on_sink
        scaled = pattern * torch.where(rest > 1e-9, 1 + (1 - self.beta) * on_sink / rest.clamp(min=1e-9), 1.0)
        kept = torch.where(rest > 1e-9, self.beta * on_sink, on_sink)
        if self.alone == "spread":
            others = _real_keys(call, rows).scatter(-1, index[:, :1, :1], False)
            share = (1 - self.beta) * on_sink * others / others.sum(-1, keepdim=True).clamp(min=1)
            scaled = torch.where(rest > 1e-9, scaled, pattern + share)
            kept = self.beta * on_sink
        return scaled.scatter(-1, index, kept)


def _real_keys(call: AttentionCall, rows: int) -> Bool[Tensor, "rows 1 1 key"]:
    """Keys that are not padding."""
    valid = call.mask.key_valid
    if valid is None:
        valid = torch.ones(rows, call.k.shape[1], dtype=torch.bool, device=call.k.device)
    return valid[:, None, None]


@dataclass(frozen=True)
class UniformAttention(EditedPattern):
    """Heads attend equally to every key that a query sees, as if all scores were zero; in the vision tower to all
    patches of their picture, or of their window in blocks that have windows.

    Wu et al. (arXiv 2404.15574) switch off retrieval heads this way; `positions="generated"` limits it to generation.
    """

    positions: Positions = None
    tower: Tower = "language"

    def edit_pattern(self, pattern: Tensor, call: AttentionCall, queries: Tensor, inputs: VLMInputs) -> Tensor:
        seen = call.visible(queries).expand(len(pattern), pattern.shape[1], -1, -1).to(pattern.dtype)
        return seen / seen.sum(-1, keepdim=True)
