"""Activation patching on the sweep engine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.metrics import Metric
from hooked_vlm.patching.cells import Cells, What
from hooked_vlm.patching.experiment import Metrics, Values, encoded_sides, over_batches, pair_list, swept
from hooked_vlm.patching.pairs import Direction, Pair, aligned
from hooked_vlm.patching.places import Tower, Where
from hooked_vlm.patching.result import PatchingResult

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@torch.no_grad()
def patch(
    model: "HookedVLM",
    pairs: Pair | Sequence[Pair],
    what: What,
    metric: Metrics,
    *,
    where: Where,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tower: Tower = "language",
    direction: Direction = "denoising",
    logits_at: Literal["last", "all"] = "last",
    max_runs: int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> PatchingResult:
    """Measure the metric with one activation at a time taken from the other run: layers x (heads x) places.

        pair = Pair(clean, corrupt, {"value": Region(box)})
        patch(model, pair, "resid_pre", logit_difference(right, wrong), where=("value", "question", "final"))
        patch(model, pair, "z", metric, where="final").heatmap()
        patch(model, pair, "resid_post", metric, where="value", tower="vision")

    The numbers are those of a loop over `run_with_hooks`, at the cost of few forward passes (docs/sweeps.md).

    Args:
        pairs: every row of every pair is an example.
        metric: as for `sweep`, one number for each row; a list gives each pair its own.
        where: names of places (`hooked_vlm.patching.places.Where`).
        heads: of z, q and pattern, query heads; of k and v, key-value heads. All by default.
        direction: "denoising" puts clean activations into the corrupt run, "noising" corrupt ones into the clean run.
        logits_at: "all" gives the metric [batch, pos, d_vocab], as `hooked_vlm.metrics.answered` asks for.
        seed: of the bootstrap and the permutations.

    Raises:
        InputError: an activation, layer, head or place that does not exist, or positions that do not correspond.
    """
    pairs = pair_list(pairs)
    cells = Cells.of(model, pairs, what, where, tower, direction, layers, heads)

    def run(pair: Pair, metric: Metric) -> Values:
        base, source = encoded_sides(model, pair, direction, tower)
        interventions = cells.interventions(pair, source_activations(model, source, pair, cells))
        values, baseline = swept(model, base, interventions, metric, logits_at, max_runs)
        return values, baseline, swept(model, source, [], metric, logits_at)[1]

    return over_batches(pairs, metric, run, cells.title, cells.axes, direction, seed, progress)


def source_activations(
    model: "HookedVLM", source: VLMInputs, pair: Pair, cells: Cells
) -> dict[str, Float[Tensor, "..."]]:
    """Activations to patch in, under the names of hook points, with the positions of the inputs that are edited."""
    _, cache = model.run_with_cache(source, names_filter=cells.names, logits_at="last")
    activations = {name: cache[name] for name in cells.names}
    if pair.by == "columns" or cells.tower == "vision":
        return activations
    if cells.what == "pattern":
        raise InputError(
            'a pattern has queries and keys of one run: patch it between inputs with the same columns (by="columns")'
        )
    matches = pair.matches(cells.direction)
    return {name: aligned(x, matches) for name, x in activations.items()}
