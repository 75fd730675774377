"""Attribution patching: all patches estimated from one backward pass (Nanda 2023; Syed et al., arXiv 2310.10348)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.metrics import Metric
from hooked_vlm.nn.hooks import HookPoint
from hooked_vlm.patching.cells import Cells, What
from hooked_vlm.patching.exact import source_activations
from hooked_vlm.patching.experiment import Metrics, Values, encoded_sides, over_batches, pair_list, swept
from hooked_vlm.patching.pairs import Direction, Pair
from hooked_vlm.patching.places import Rows, Tower, Where
from hooked_vlm.patching.result import Agreement, PatchingResult
from hooked_vlm.sweeps.run import measure

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


def attribute(
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
    check: int = 32,
    progress: bool = False,
    seed: int = 0,
) -> PatchingResult:
    """Estimate what `patch` measures: the gradient of the metric at an activation, times its change.

    One forward and one backward pass of each pair give all cells. The estimate is the first term of the effect's Taylor
    series, good for small changes; `result.agreement` says how good it is for the changes at hand.

    Args:
        check: number of cells, drawn at random, to patch for real as well; the correlation of estimated and real
            effects is kept as `result.agreement`. 0 for no check.
        seed: also draws these cells.

    Raises:
        InputError: see `patch`.
    """
    if check < 0:
        raise InputError(f"check, the number of cells to patch for real, must not be negative, got {check}")
    pairs = pair_list(pairs)
    cells = Cells.of(model, pairs, what, where, tower, direction, layers, heads)
    drawn = np.random.default_rng([seed, 1]).permutation(len(list(cells)))[:check]
    real = []

    def run(pair: Pair, metric: Metric) -> Values:
        base, source = encoded_sides(model, pair, direction, tower)
        with torch.no_grad():
            patches = source_activations(model, source, pair, cells)
            source_values = swept(model, source, [], metric, logits_at)[1]
        baseline, slopes = _slopes(model, base, cells, patches, metric, logits_at)
        if len(drawn):
            interventions = cells.interventions(pair, patches)
            real.append(swept(model, base, [interventions[i] for i in drawn], metric, logits_at)[0] - baseline)
        return baseline + _effects(cells, pair, slopes), baseline, source_values

    result = over_batches(pairs, metric, run, cells.title, cells.axes, direction, seed, progress)
    if not len(drawn):
        return replace(result, estimated=True)
    estimated = result.effects.reshape(-1, result.n_examples)[drawn]
    return replace(result, estimated=True, agreement=agreement_of(estimated, np.concatenate(real, axis=1)))


def agreement_of(estimated: Float[np.ndarray, "*cells"], real: Float[np.ndarray, "*cells"]) -> Agreement:
    """Correlations of estimated and real effects. Effects that are NaN are left out; the correlations are NaN where
    either side is constant."""
    known = ~(np.isnan(estimated) | np.isnan(real))
    a, b = estimated[known], real[known]
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Agreement(np.nan, np.nan, len(a))
    correlations: Any = (stats.pearsonr(a, b), stats.spearmanr(a, b))
    pearson, spearman = (float(correlation.statistic) for correlation in correlations)
    return Agreement(pearson, spearman, len(a))


def _slopes(
    model: "HookedVLM",
    inputs: VLMInputs,
    cells: Cells,
    patches: dict[str, Tensor],
    metric: Metric,
    logits_at: Literal["last", "all"],
) -> tuple[Float[np.ndarray, "example"], dict[str, Tensor]]:
    """The metric of each example, and gradient times change under the name of each hook point."""
    activations: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()  # frozen weights give activations without gradients
        activations[str(hook.name)] = x
        return x

    with torch.enable_grad():
        logits = model.run_with_hooks(inputs, fwd_hooks=[(name, keep) for name in cells.names], logits_at=logits_at)
        values = measure(metric, logits, logits_at)
        if not values.requires_grad:
            raise InputError("the metric has no gradient: attribution patching needs one, patch(...) does not")
        gradients = torch.autograd.grad(values.sum(), [activations[name] for name in cells.names])
    exact = torch.promote_types(logits.dtype, torch.float32)  # thousands of terms are summed
    slopes = {
        name: gradient.to(exact) * (patches[name].to(gradient.device, exact) - activations[name].detach().to(exact))
        for name, gradient in zip(cells.names, gradients, strict=True)
    }
    return values.detach().double().cpu().numpy(), slopes


def _effects(cells: Cells, pair: Pair, slopes: dict[str, Tensor]) -> Float[np.ndarray, "cell example"]:
    """Sum over the positions (and entries) of every cell."""
    reduced = {name: _per_head_and_position(x, cells) for name, x in slopes.items()}
    examples = _examples(pair, cells)
    masks = {place: _mask(rows, next(iter(reduced.values())).shape[1]) for place, rows in cells.positions(pair).items()}
    effects = []
    for layer, head, place in cells:
        entries = reduced[cells.name(layer)][..., head or 0]  # [row or image, position or patch]
        by_row = (entries * masks[place].to(entries)).sum(1).double()
        effects.append(torch.zeros(len(pair)).double().index_add(0, examples, by_row.cpu()).numpy())
    return np.stack(effects)


def _per_head_and_position(x: Tensor, cells: Cells) -> Float[Tensor, "row position head"]:
    if cells.what == "pattern":
        return x.sum(-1).transpose(1, 2)
    return x.sum(-1) if x.ndim == 4 else x.sum(-1, keepdim=True)


def _mask(rows: Rows, width: int) -> Bool[Tensor, "row position"]:
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, positions in enumerate(rows):
        mask[row, list(positions)] = True
    return mask


def _examples(pair: Pair, cells: Cells) -> Tensor:
    """The example of each row of an activation."""
    if cells.tower == "language":
        return torch.arange(len(pair))
    visuals = pair.clean.in_feature_order
    return torch.tensor([v.row for v in visuals for _ in range(v.grid[0])])
