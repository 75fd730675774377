"""From contrast sets to steering vectors: mean difference on one part of the items, separability on another."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.interventions.base import Positions, in_range
from hooked_vlm.model.fingerprints import provenance
from hooked_vlm.runtime.digests import digest
from hooked_vlm.steering.separability import Scores, area, distance, separability_of, unit_means
from hooked_vlm.steering.streams import Item, Streams, mean_streams
from hooked_vlm.steering.vectors import HOOKS, SteeringVectors

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

FIT, CHOOSE, REPORT = "fit", "choose", "report"
"""Parts of the items: one gives the vectors, one the best layer, one the separability that is reported."""
FEWEST = 8
"""Units in each set: four to fit, two to choose, two to report."""

Parts = tuple[list[str], list[str]]
"""The part of every item of the positive and of the negative set."""


def steering_vectors(
    model: "HookedVLM",
    positive: Iterable[Item],
    negative: Iterable[Item],
    *,
    hook: str = "hook_resid_post",
    positions: Positions = "final",
    layers: Sequence[int] | None = None,
    units: tuple[Sequence[str], Sequence[str]] | None = None,
    seed: int = 0,
    max_pixels: int | None = None,
    max_tiles: int | None = None,
    progress: bool = False,
) -> SteeringVectors:
    """Fit a vector for each layer: the mean residual stream of positive items minus that of negative ones.

    Half of the units of each set gives the vectors, a quarter chooses the layer, and a quarter says how well each
    vector separates items it has not seen: projections on the vector, their AUC with a 95% interval, and a one-sided
    test against permuted labels. The vectors of `SteeringVectors` are those that are tested, not fitted again on all.

    Args:
        hook: the default is the stream behind a block, which is the next block's `hook_resid_pre`: what is added there
            is read by everything after.
        positions: where streams are averaged: the last token of the prompt by default, which predicts the answer.
        layers: all by default.
        units: name of the unit that each item belongs to (its picture, the person asked about): items of one unit, in
            either set, come into one part, and are averaged before they are tested. By default every item is a unit,
            and identical items are one.
        seed: of the parts.
        max_pixels, max_tiles: bounds on samples' pictures, as in `model.to_inputs`.
        progress: show a bar for each set.

    Raises:
        InputError: too few units, an item in both sets, an item that cannot be used, hooks left on the model.
        HookError: a hook point that this model does not have.
    """
    if hook not in HOOKS:
        raise InputError(f"steering vectors belong to the residual stream: {', '.join(HOOKS)}, got {hook!r}")
    chosen = in_range(layers, model.cfg.n_layers, "layer")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"a layer is named twice: {', '.join(map(str, chosen))}")
    names = [f"blocks.{layer}.{hook}" for layer in chosen]
    bounds = {"max_pixels": max_pixels, "max_tiles": max_tiles}
    ours, theirs = (
        mean_streams(model, items, names, positions, kind=kind, progress=progress, **bounds)
        for kind, items in (("positive", positive), ("negative", negative))
    )
    if both := set(ours.digests) & set(theirs.digests):
        numbers = [streams.digests.index(min(both)) for streams in (ours, theirs)]
        raise InputError(f"item {numbers[0]} of the positive set is item {numbers[1]} of the negative one: drop both")
    named = _checked_units(units, ours, theirs)
    parts = split_parts(named[0], named[1], seed)
    vectors = mean_difference(ours.means[among(parts[0], FIT)], theirs.means[among(parts[1], FIT)])
    columns = [projections(streams.means, vectors) for streams in (ours, theirs)]

    def scores(part: str) -> list[Scores]:
        marked = [among(own, part).numpy() for own in parts]
        return [unit_means(*each) for each in zip(columns, named, marked, strict=True)]

    (ours_chosen, theirs_chosen), (ours_held, theirs_held) = scores(CHOOSE), scores(REPORT)
    norms = torch.cat((ours.norms[among(parts[0], FIT)], theirs.norms[among(parts[1], FIT)])).mean(0)
    return SteeringVectors(
        hook=hook,
        layers=chosen,
        vectors=vectors,
        stream_norms=norms,
        positions=positions,
        best=chosen[best_column(ours_chosen, theirs_chosen)],
        separability=_with_norms(separability_of(ours_held, theirs_held, chosen), vectors, norms),
        held_out=(_numbers(parts[0]), _numbers(parts[1])),
        provenance={
            **provenance(model),
            "data": {
                kind: {"items": len(streams.digests), "digest": digest(streams.digests)}
                for kind, streams in (("positive", ours), ("negative", theirs))
            },
            "units": [digest(list(unit)) for unit in named],
            "seed": seed,
            **bounds,
        },
    )


def mean_difference(
    positive: Float[Tensor, "ours layer d_model"], negative: Float[Tensor, "theirs layer d_model"]
) -> Float[Tensor, "layer d_model"]:
    """Mean of the positive streams minus mean of the negative ones."""
    return positive.mean(0) - negative.mean(0)


def projections(
    streams: Float[Tensor, "item layer d_model"], vectors: Float[Tensor, "layer d_model"]
) -> Float[np.ndarray, "item layer"]:
    """Component of every stream along its layer's vector, in the stream's own units."""
    directions = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    return torch.einsum("ild,ld->il", streams.double(), directions.double()).numpy()


def split_parts(positive: Sequence[str], negative: Sequence[str], seed: int) -> Parts:
    """Draw the part of every item; units stay whole, and each part has its share of units of each set.

    Args:
        positive, negative: the unit of every item.

    Raises:
        InputError: fewer than `FEWEST` units in a set.
    """
    ours, theirs = set(positive), set(negative)
    for kind, units in (("positive", ours), ("negative", theirs)):
        if len(units) < FEWEST:
            raise InputError(
                f"the {kind} set has {len(units)} units (different items), at least {FEWEST} are needed: half give the "
                "vectors, a quarter chooses the layer, a quarter is held out"
            )
    rng, part = np.random.default_rng([seed, 31]), {}
    for units in (ours & theirs, ours - theirs, theirs - ours):
        names = rng.permutation(sorted(units)).tolist()
        n_choose, n_report = len(names) // 4, -(-len(names) // 4)
        kinds = [CHOOSE] * n_choose + [REPORT] * n_report
        part |= dict(zip(names, [*kinds, *[FIT] * (len(names) - len(kinds))], strict=True))
    return [part[name] for name in positive], [part[name] for name in negative]


def best_column(positive: Float[np.ndarray, "ours layer"], negative: Float[np.ndarray, "theirs layer"]) -> int:
    """The layer with the largest AUC; of equal ones that with the largest distance."""
    columns = range(positive.shape[1])
    both = [(positive[:, column], negative[:, column]) for column in columns]
    return max(columns, key=lambda column: (area(*both[column]), np.nan_to_num(distance(*both[column]))))


def among(parts: Sequence[str], part: str) -> Bool[Tensor, "item"]:
    """Items of a part."""
    return torch.tensor([own == part for own in parts])


def _numbers(parts: Sequence[str]) -> tuple[int, ...]:
    return tuple(number for number, part in enumerate(parts) if part == REPORT)


def _checked_units(
    units: tuple[Sequence[str], Sequence[str]] | None, ours: Streams, theirs: Streams
) -> tuple[list[str], list[str]]:
    if units is None:
        return list(ours.digests), list(theirs.digests)
    for kind, names, streams in zip(("positive", "negative"), units, (ours, theirs), strict=True):
        if len(names) != len(streams.digests):
            raise InputError(f"the {kind} set has {len(streams.digests)} items, but {len(names)} names of units")
    return list(map(str, units[0])), list(map(str, units[1]))


def _with_norms(
    separability: pd.DataFrame, vectors: Float[Tensor, "layer d_model"], norms: Float[Tensor, "layer"]
) -> pd.DataFrame:
    """The table with each vector's norm, also as a share of the stream's."""
    own = vectors.norm(dim=-1)
    sizes = {"norm": own, "share of the stream's norm": own / norms}
    return separability.assign(**{name: x.numpy().astype(float) for name, x in sizes.items()})
