"""Activation patching on the sweep engine."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import Intervention
from hooked_vlm.metrics import Metric
from hooked_vlm.patching.cells import Cells, What
from hooked_vlm.patching.pairs import Direction, Pair, aligned
from hooked_vlm.patching.places import Tower, Where
from hooked_vlm.patching.result import PatchingResult
from hooked_vlm.sweeps.single import sweep

Metrics = Metric | Sequence[Metric]
"""A function of logits for all pairs, or one for each."""


@torch.no_grad()
def patch(
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
    max_runs: int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> PatchingResult:
    """The metric with one activation at a time taken from the other run: layers x (heads x) places.

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
        InputError: what does not exist or does not correspond.
    """
    pairs, metrics = checked(pairs, metric)
    cells = Cells.of(model, pairs, what, where, tower, direction, layers, heads)
    settings: dict[str, Any] = {"logits_at": logits_at, "max_runs": max_runs}
    values, base_values, source_values = [], [], []
    for pair, own in zip(tqdm(pairs, disable=not progress, desc="patching", unit="pair"), metrics, strict=True):
        base, source = encoded_sides(model, pair, direction, tower)
        interventions = cells.interventions(pair, source_activations(model, source, pair, cells))
        found, baseline = swept(model, base, interventions, own, **settings)
        values.append(found)
        base_values.append(baseline)
        source_values.append(swept(model, source, [], own, logits_at=logits_at)[1])
    result = PatchingResult(
        what if tower == "text" else f"{what} of the vision tower",
        cells.axes,
        np.concatenate(values, axis=1).reshape(*map(len, cells.axes.values()), -1),
        np.concatenate(base_values),
        np.concatenate(source_values),
        direction,
        seed,
    )
    warn_of_bad_numbers(result)
    return result


def checked(pairs: Pair | Sequence[Pair], metric: Metrics) -> tuple[list[Pair], list[Metric]]:
    """Lists of pairs and of a metric for each."""
    pairs = [pairs] if isinstance(pairs, Pair) else list(pairs)
    metrics = list(metric) if isinstance(metric, Sequence) else [metric] * len(pairs)
    if not pairs:
        raise InputError("there is no pair to patch")
    if len(metrics) != len(pairs):
        raise InputError(f"{len(metrics)} metrics came for {len(pairs)} pairs: give one for all, or one for each")
    return pairs, metrics


@torch.no_grad()
def encoded_sides(model: Any, pair: Pair, direction: Direction, tower: Tower = "text") -> tuple[VLMInputs, VLMInputs]:
    """`pair.sides`, their images encoded once for all runs unless these change the vision tower."""
    base, source = pair.sides(direction)
    if tower == "vision":
        return base, source
    base, source = (
        side.with_image_features(model.encode_images(side))
        if side.has_visuals and side.image_features is None
        else side
        for side in (base, source)
    )
    return base, source


def source_activations(model: Any, source: VLMInputs, pair: Pair, cells: Cells) -> dict[str, Float[Tensor, "..."]]:
    """What the patches take, under the names of hook points, with the positions of the inputs that are edited."""
    _, cache = model.run_with_cache(source, names_filter=cells.names, logits_at="last")
    found = {name: cache[name] for name in cells.names}
    if pair.by == "columns" or cells.tower == "vision":
        return found
    if cells.what == "pattern":
        raise InputError(
            'a pattern has queries and keys of one run: patch it between inputs with the same columns (by="columns")'
        )
    matches = pair.matches(cells.direction)
    return {name: aligned(x, matches) for name, x in found.items()}


def swept(
    model: Any, inputs: VLMInputs, interventions: Sequence[Intervention], metric: Metric, **settings: Any
) -> tuple[Float[np.ndarray, "run example"], Float[np.ndarray, "example"]]:
    """A sweep's values and baseline as arrays."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are not numbers")  # said once, at the end
        result = sweep(model, inputs, interventions, metric, **settings)
    return result.values.double().numpy(), result.baseline.double().numpy()


def warn_of_bad_numbers(result: PatchingResult) -> None:
    """Say which examples have a metric that is not a number."""
    bad = ~result.counted
    if bad.any():
        examples = np.flatnonzero(bad.reshape(-1, result.n_examples).any(0))
        shown = ", ".join(map(str, examples[:8])) + (", ..." if len(examples) > 8 else "")
        warnings.warn(
            f"{int(bad.sum())} of {bad.size} effects are not numbers (NaN), of the examples {shown}; they are kept as "
            "such and left out of means (result.not_numbers() lists them)",
            stacklevel=3,
        )
