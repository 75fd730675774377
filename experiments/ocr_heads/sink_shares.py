"""Attention on the first token: the amount that sink redistribution can redistribute."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.rows import attention_rows
from hooked_vlm.analysis.statistics import Estimate, mean_score, score_interval
from hooked_vlm.experiments.ocr_heads.attention_shares import measured_by_sample
from hooked_vlm.experiments.ocr_heads.data.tasks import QATask
from hooked_vlm.experiments.ocr_heads.examples import Example, to_inputs
from hooked_vlm.experiments.ocr_heads.study import Study, head_table
from hooked_vlm.interventions import Head
from hooked_vlm.model.vlm import HookedVLM

QUERIES = 64
"""Positions of a prompt whose attention is measured: evenly spread, with the last, without the first, which only sees
itself."""
PLACES = ("where the answer begins", "over the prompt")
"""The last position alone, and the mean over all `QUERIES` (early ones see few other tokens than the first)."""


def sink_attention(study: Study, tasks: Sequence[QATask]) -> Float[np.ndarray, "sample place layer head"]:
    """Share of each head's attention on the first token, for each sample of the tasks, in `PLACES`."""
    sets = {f"sink, {task.name}": task.data for task in tasks}
    settings = {"queries": QUERIES, "places": PLACES}
    return measured_by_sample(study, first_token_shares, sets, "sink attention", settings)


def first_token_shares(
    model: HookedVLM, examples: Sequence[Example], pixels: int | None
) -> Float[np.ndarray, "sample place layer head"]:
    """Attention on each prompt's first token, in `PLACES`."""
    inputs = to_inputs(model, examples, pixels)
    spans = list(zip(inputs.first, inputs.stop, strict=True))
    positions = np.stack([np.linspace(first + 1, stop - 1, QUERIES).round().astype(int) for first, stop in spans])

    def on_first(rows: Tensor) -> Float[Tensor, "sample place head"]:
        shares = torch.stack([rows[i, :, :, first] for i, first in enumerate(inputs.first)])
        return torch.stack([shares[..., -1], shares.mean(-1)], dim=1)

    shares = attention_rows(model, inputs, torch.from_numpy(positions), reduce=on_first)
    return shares.permute(1, 2, 0, 3).float().cpu().numpy()


def sink_table(shares: Float[np.ndarray, "sample place layer head"]) -> pd.DataFrame:
    """One row per head, largest first: mean share of its attention on the first token, 95% interval over samples."""
    low, high = score_interval(shares)
    values = {}
    for i, place in enumerate(PLACES):
        values |= {place: shares.mean(0)[i], f"low, {place}": low[i], f"high, {place}": high[i]}
    table = head_table({**values, "n": np.full(low[0].shape, len(shares))})
    return table.sort_values(PLACES[0], ascending=False, ignore_index=True)


def share_of(heads: Sequence[Head], shares: Float[np.ndarray, "sample place layer head"], place: str) -> Estimate:
    """Mean over some heads, with its interval over samples."""
    here = shares[:, PLACES.index(place)]
    return mean_score(np.mean([here[:, layer, head] for layer, head in heads], axis=0))
