"""Interventions on edges of attention."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import Positions, Tower, first_position, position_table, positions_mask
from hooked_vlm.interventions.heads import Edit, Head, HeadIntervention, HeadSelection, tower_shape
from hooked_vlm.nn.hooks import HookPoint

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True)
class BlockAttention(HeadIntervention):
    """Heads cannot attend from `query` positions to `key` positions ("attention knock-out").

    Scores of the blocked edges are minus infinity, so the remaining keys share all attention; a query whose keys
    are all blocked attends to nothing. An edge from a position to itself is blocked like any other. In the vision tower
    these are patches, and edges those within a picture.
    """

    query: Positions = None
    key: Positions = None
    tower: Tower = "language"

    attention: ClassVar[Literal["edited", "recomputed", ""]] = "edited"

    @classmethod
    def in_layers(
        cls,
        model: "HookedVLM",
        layers: range | tuple[int, ...],
        query: Positions = None,
        key: Positions = None,
        tower: Tower = "language",
    ) -> "BlockAttention":
        """For all heads of some layers."""
        return cls(all_heads(model, layers, tower), query, key, tower)

    def first_position(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        if self.tower == "vision":
            return super().first_position(model, inputs)
        query, key = position_table(self.query, inputs), position_table(self.key, inputs)
        return max(first_position(query), first_position(key))

    def edits(self, model: "HookedVLM", inputs: VLMInputs, layer: int) -> list[tuple[str, Edit]]:
        query, key = self.selected(self.query, inputs), self.selected(self.key, inputs)
        empty: list[Tensor] = []  # queries with no key left; from the scores to the pattern of the same pass

        def block(scores: Tensor, hook: HookPoint, chosen: HeadSelection) -> Tensor:
            rows, _, n, n_keys = scores.shape
            edges = (
                positions_mask(query, n_keys - n, n, rows)[:, :, None] & positions_mask(key, 0, n_keys, rows)[:, None]
            )
            edges = edges.to(scores.device)
            blocked = scores.masked_fill(edges[:, None] & chosen.mask[:, :, None, None], -torch.inf)
            empty.append(blocked.isneginf().all(-1, keepdim=True))
            return blocked

        def nothing_left(pattern: Tensor, hook: HookPoint, chosen: HeadSelection) -> Tensor:
            return pattern.masked_fill(empty.pop(), 0.0)  # the softmax of a row of minus infinities is not a number

        return [("hook_attn_scores", block), ("hook_pattern", nothing_left)]


def all_heads(
    model: "HookedVLM", layers: range | tuple[int, ...] | None = None, tower: Tower = "language"
) -> tuple[Head, ...]:
    """Every head of some layers, or of all layers that run."""
    n_layers, n_heads, _ = tower_shape(model, tower)
    chosen = range(n_layers) if layers is None else layers
    return tuple((layer, head) for layer in chosen for head in range(n_heads))
