"""Attribution patching: all patches estimated from one backward pass (Nanda 2023; Syed et al., arXiv 2310.10348)."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.errors import InputError
from hooked_vlm.metrics import Metric
from hooked_vlm.patching.cells import Cells, What
from hooked_vlm.patching.exact import Metrics, checked, encoded_sides, source_activations, swept, warn_of_bad_numbers
from hooked_vlm.patching.pairs import Direction, Pair
from hooked_vlm.patching.places import Rows, Tower, Where
from hooked_vlm.patching.result import Agreement, PatchingResult
from hooked_vlm.sweeps.single import measure


def attribute(
    model: Any,
    pairs: Pair | Sequence[Pair],
    what: What,
    metric: Metrics,
    *,
    where: Where,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tower: Tower = "text",
    direction: Direction = "denoising",
    logits_at: Literal["last", "all"] = "last",
    check: int = 32,
    progress: bool = False,
    seed: int = 0,
) -> PatchingResult:
    """What `patch` measures, estimated: the gradient of the metric at an activation, times the change of it.

    One forward and one backward pass of each pair give all cells. It is the first term of the effect's Taylor series:
    good for small changes, and as good as `result.agreement` says for these.

    Args:
        check: so many cells, drawn at random, are patched for real as well, and the correlation of estimated and real
            effects is kept as `result.agreement`. 0 for no check.
        seed: also of the cells drawn.

    Raises:
        InputError: see `patch`.
    """
    if check < 0:
        raise InputError(f"check, the number of cells to patch for real, must not be negative, got {check}")
    pairs, metrics = checked(pairs, metric)
    cells = Cells.of(model, pairs, what, where, tower, direction, layers, heads)
    drawn = np.random.default_rng([seed, 1]).permutation(len(list(cells)))[:check]
    values, base_values, source_values, real = [], [], [], []
    for pair, own in zip(tqdm(pairs, disable=not progress, desc="attributing", unit="pair"), metrics, strict=True):
        base, source = encoded_sides(model, pair, direction, tower)
        with torch.no_grad():
            there = source_activations(model, source, pair, cells)
            source_values.append(swept(model, source, [], own, logits_at=logits_at)[1])
        baseline, slopes = _slopes(model, base, cells, there, own, logits_at)
        values.append(baseline + _effects(cells, pair, slopes))
        base_values.append(baseline)
        if len(drawn):
            interventions = cells.interventions(pair, there)
            chosen = [interventions[i] for i in drawn]
            real.append(swept(model, base, chosen, own, logits_at=logits_at)[0] - baseline)
    estimates = np.concatenate(values, axis=1)
    agreement = None
    if len(drawn):
        agreement = agreement_of(estimates[drawn] - np.concatenate(base_values), np.concatenate(real, axis=1))
    result = PatchingResult(
        what if tower == "text" else f"{what} of the vision tower",
        cells.axes,
        estimates.reshape(*map(len, cells.axes.values()), -1),
        np.concatenate(base_values),
        np.concatenate(source_values),
        direction,
        seed,
        estimated=True,
        agreement=agreement,
    )
    warn_of_bad_numbers(result)
    return result


def agreement_of(estimated: Float[np.ndarray, "*cells"], real: Float[np.ndarray, "*cells"]) -> Agreement:
    """Correlations of estimated and real effects; those that are not numbers are left out, and the correlations are
    not numbers where either side is constant."""
    known = ~(np.isnan(estimated) | np.isnan(real))
    a, b = estimated[known], real[known]
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Agreement(np.nan, np.nan, len(a))
    correlations: Any = (stats.pearsonr(a, b), stats.spearmanr(a, b))
    pearson, spearman = (float(found.statistic) for found in correlations)
    return Agreement(pearson, spearman, len(a))


def _slopes(
    model: Any, inputs: Any, cells: Cells, there: dict[str, Tensor], metric: Metric, logits_at: Literal["last", "all"]
) -> tuple[Float[np.ndarray, "example"], dict[str, Tensor]]:
    """The metric, and under each hook point's name gradient times change."""
    here: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()  # weights may not ask for gradients
        here[str(hook.name)] = x
        return x

    with torch.enable_grad():
        logits = model.run_with_hooks(inputs, fwd_hooks=[(name, keep) for name in cells.names], logits_at=logits_at)
        found = measure(metric, logits, logits_at)
        if not found.requires_grad:
            raise InputError("the metric has no gradient: attribution patching needs one, patch(...) does not")
        gradients = torch.autograd.grad(found.sum(), [here[name] for name in cells.names])
    exact = torch.promote_types(logits.dtype, torch.float32)  # thousands of terms are summed
    slopes = {
        name: gradient.to(exact) * (there[name].to(gradient.device, exact) - here[name].detach().to(exact))
        for name, gradient in zip(cells.names, gradients, strict=True)
    }
    return found.detach().double().cpu().numpy(), slopes


def _effects(cells: Cells, pair: Pair, slopes: dict[str, Tensor]) -> Float[np.ndarray, "cell example"]:
    """Sums over the positions (and entries) of every cell."""
    reduced = {name: _per_head_and_position(x, cells) for name, x in slopes.items()}
    examples = _examples(pair, cells)
    masks = {place: _mask(rows, next(iter(reduced.values())).shape[1]) for place, rows in cells.positions(pair).items()}
    found = []
    for layer, head, place in cells:
        entries = reduced[cells.name(layer)][..., head or 0]  # [row or image, position or patch]
        by_row = (entries * masks[place].to(entries)).sum(1).double()
        found.append(torch.zeros(len(pair)).double().index_add(0, examples, by_row.cpu()).numpy())
    return np.stack(found)


def _per_head_and_position(x: Tensor, cells: Cells) -> Float[Tensor, "row position head"]:
    if cells.what == "pattern":
        return x.sum(-1).transpose(1, 2)
    return x.sum(-1) if x.ndim == 4 else x.sum(-1, keepdim=True)


def _mask(rows: Rows, width: int) -> Bool[Tensor, "row position"]:
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, own in enumerate(rows):
        mask[row, list(own)] = True
    return mask


def _examples(pair: Pair, cells: Cells) -> Tensor:
    """The example that each row of an activation belongs to."""
    if cells.tower == "text":
        return torch.arange(len(pair))
    visuals = pair.clean.in_feature_order
    return torch.tensor([v.row for v in visuals for _ in range(v.grid[0])])
