"""The interventions of a sweep over heads, and the means that some of them need."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.data.samples import Sample
from hooked_vlm.data.sources import Samples
from hooked_vlm.errors import InputError
from hooked_vlm.experiments.head_sweep.config import HeadSweepConfig
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import Head, Intervention, MeanHeads, ReplaceImageKV, ScaleHeads, ZeroHeads
from hooked_vlm.interventions.heads import Tower, head_output_sums, tower_shape
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import SKIPPED, Task, Workers
from hooked_vlm.sweeps.answers import without_answer

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

SAMPLES_PER_TASK = 64
"""Samples whose head outputs are summed in one task."""


def interventions(
    config: HeadSweepConfig, heads: Sequence[Head], means: Float[Tensor, "layer head d_head"] | None
) -> tuple[Intervention, ...]:
    """The intervention on each head; `means` are needed for --intervention mean."""
    tower = config.tower
    match config.intervention:
        case "zero":
            return tuple(ZeroHeads((head,), tower=tower) for head in heads)
        case "scale":
            return tuple(ScaleHeads((head,), config.factor, tower=tower) for head in heads)
        case "mean":
            assert means is not None
            return tuple(MeanHeads((head,), means, tower=tower) for head in heads)
        case "image-kv":
            return tuple(ReplaceImageKV((head,)) for head in heads)
        case "knockout":
            return tuple(ReplaceImageKV((head,), "knockout") for head in heads)


def means_over(
    samples: Samples, config: HeadSweepConfig, model: "HookedVLM", workers: Workers
) -> Float[Tensor, "layer head d_head"]:
    """The mean output of every head over the prompts of all samples (`mean_head_outputs`), from sums over parts of the
    data that are stored in `out/parts`.

    Raises:
        InputError: a sample that cannot be used, with --on-error stop; none that can.
    """
    bounds = {"max_pixels": config.max_pixels, "max_tiles": config.max_tiles}
    skips = config.on_error == "skip"
    store = ResultStore(config.out / "parts")
    shared = {"model": model.identity(), "means": config.tower, **bounds}
    n_tasks = -(-len(samples) // SAMPLES_PER_TASK)

    def tasks() -> Iterator[Task]:
        for i in range(n_tasks):
            own = samples.shard(i, n_tasks)
            key = shared | {"samples": [_digest(sample, skips) for sample in own]}
            yield Task(store, key, summed, (own, config.tower, bounds, skips), len(own))

    parts = workers.stored(tasks(), "means of heads", each="part", total=n_tasks, quiet=config.quiet)
    total, n = np.zeros(()), 0
    for part in parts:
        assert part is not None  # none is skipped: a part leaves out the samples that cannot be used
        table = part.read()
        total, n = total + table["sum"].to_numpy(), n + int(table["n"].to_numpy()[0])
    if not n:
        raise InputError("no sample can be used, so there is no mean of a head's output")
    return torch.from_numpy(total / n).float().view(tower_shape(model, config.tower))


def summed(
    model: "HookedVLM", samples: Samples, tower: Tower, bounds: dict[str, int | None], skips: bool
) -> pd.DataFrame:
    """Sums of head outputs over some samples, [layer, head, d_head] in one column, and the number of positions."""

    def usable() -> Iterator[VLMInputs]:
        for sample in samples:
            try:
                yield without_answer(sample).inputs(model, **bounds)
            except SKIPPED:
                if not skips:
                    raise

    total, n = head_output_sums(model, usable(), tower=tower)
    return pd.DataFrame({"sum": total.double().flatten().cpu().numpy(), "n": n})


def _digest(sample: Sample, skips: bool) -> str:
    """The digest of a sample; empty if it cannot be read and such samples are skipped."""
    try:
        return without_answer(sample).digest()
    except SKIPPED:
        if not skips:
            raise
        return ""
