"""The loop that all patching experiments share: examples, runs, values, and one result at the end."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import Intervention
from hooked_vlm.metrics import Metric
from hooked_vlm.patching.pairs import Direction, Pair
from hooked_vlm.patching.places import Tower
from hooked_vlm.patching.result import Label, PatchingResult
from hooked_vlm.sweeps.run import sweep, with_features

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Metrics = Metric | Sequence[Metric]
"""A function of logits for all pairs, or one for each."""
Batch = TypeVar("Batch")
Values = tuple[Float[np.ndarray, "cell example"], Float[np.ndarray, "example"], Float[np.ndarray, "example"] | None]
"""The metric of every cell, of the run without an edit, and of the run the patches come from."""


def over_batches(
    batches: Sequence[Batch],
    metric: Metrics,
    run: Callable[[Batch, Metric], Values],
    what: str,
    axes: dict[str, tuple[Label, ...]],
    direction: Direction | None,
    seed: int,
    progress: bool,
) -> PatchingResult:
    """Concatenate `run(batch, metric)` over the batches; warn of metrics that are not numbers.

    Raises:
        InputError: not one metric for all batches or one for each.
    """
    metrics = one_for_each(metric, len(batches), "metrics")
    steps = zip(tqdm(batches, disable=not progress, desc=what, unit="batch"), metrics, strict=True)
    values, base, source = zip(*(run(batch, own) for batch, own in steps), strict=True)
    shaped = np.concatenate(values, axis=1).reshape(*map(len, axes.values()), -1)
    sources = None if direction is None else np.concatenate(source)
    result = PatchingResult(what, axes, shaped, np.concatenate(base), sources, direction, seed)
    _warn_of_bad_numbers(result)
    return result


def pair_list(pairs: Pair | Sequence[Pair]) -> list[Pair]:
    """One pair or several, as a list.

    Raises:
        InputError: there are none.
    """
    if not isinstance(pairs, Pair) and not pairs:
        raise InputError("there is no pair to patch")
    return [pairs] if isinstance(pairs, Pair) else list(pairs)


def one_for_each(given: Any, n: int, kind: str) -> list[Any]:
    """A list of `n` entries, from one for all or one for each."""
    entries = list(given) if isinstance(given, Sequence) else [given] * n
    if len(entries) != n:
        raise InputError(f"{len(entries)} {kind} came for {n} pairs or inputs: give one for all, or one for each")
    return entries


@torch.no_grad()
def encoded_sides(
    model: "HookedVLM", pair: Pair, direction: Direction, tower: Tower = "language"
) -> tuple[VLMInputs, VLMInputs]:
    """`pair.sides`, their images encoded once for all runs unless these change the vision tower."""
    base, source = pair.sides(direction)
    return (base, source) if tower == "vision" else (with_features(model, base), with_features(model, source))


def swept(
    model: "HookedVLM",
    inputs: VLMInputs,
    interventions: Sequence[Intervention],
    metric: Metric,
    logits_at: Literal["last", "all"],
    max_runs: int | None = None,
) -> tuple[Float[np.ndarray, "run example"], Float[np.ndarray, "example"]]:
    """Values and baseline of a sweep as float64 arrays."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are not finite numbers")  # the experiment warns once, at its end
        result = sweep(model, inputs, interventions, metric, logits_at=logits_at, max_runs=max_runs)
    return result.values.double().numpy(), result.baseline.double().numpy()


def _warn_of_bad_numbers(result: PatchingResult) -> None:
    """Name the examples whose metric is not a number."""
    bad = ~result.counted
    if bad.any():
        examples = np.flatnonzero(bad.reshape(-1, result.n_examples).any(0))
        shown = ", ".join(map(str, examples[:8])) + (", ..." if len(examples) > 8 else "")
        warnings.warn(
            f"{int(bad.sum())} of {bad.size} effects are not numbers (NaN), of the examples {shown}; they are kept as "
            "such and left out of means (result.not_numbers() lists them)",
            stacklevel=4,
        )
