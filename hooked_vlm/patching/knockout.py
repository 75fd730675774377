"""Attention knock-out: no attention from some tokens to others, in a window of layers
(Geva et al. 2023, arXiv 2304.14767; between image and text, arXiv 2411.18620)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import BlockAttention, Compose, Intervention
from hooked_vlm.interventions.base import Positions, position_table
from hooked_vlm.patching.exact import Metrics, swept, warn_of_bad_numbers
from hooked_vlm.patching.pairs import Place
from hooked_vlm.patching.places import group, positions_in
from hooked_vlm.patching.result import PatchingResult

Edge = tuple[str, str]
"""(query, key): who no longer looks where. Each a place, or several joined by "+": "final+generated"."""
Places = Mapping[str, Place]


def attention_knockout(
    model: Any, inputs: VLMInputs, layers: range, edge: Edge, places: Places | None = None
) -> Intervention:
    """The intervention that cuts an edge in some layers, for `run_with_hooks`, `generate` or `sweep`.

        cut = attention_knockout(model, inputs, range(8, 17), ("final+generated", "value"), {"value": Region(box)})
        model.generate(inputs, fwd_hooks=cut.hooks(model, inputs))

    Args:
        places: regions and positions by names, beside the groups ("image", "question", "assistant_header", "final",
            "generated", "text", "all").

    Raises:
        InputError: an unknown place.
    """
    queries, keys = ([_positions(inputs, name, places or {}) for name in side.split("+")] for side in edge)
    parts = tuple(BlockAttention.in_layers(model, layers, query, key) for query in queries for key in keys)
    return parts[0] if len(parts) == 1 else Compose(parts)


def sweep_knockout(
    model: Any,
    inputs: VLMInputs | Sequence[VLMInputs],
    metric: Metrics,
    *,
    edges: Sequence[Edge],
    window: int,
    places: Places | Sequence[Places] | None = None,
    logits_at: Literal["last", "all"] = "last",
    max_runs: int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> PatchingResult:
    """The metric with each edge cut in each window of layers, on the sweep engine.

    Args:
        inputs: every row is an example.
        metric: as for `sweep`; a list gives each of the inputs its own.
        window: so many layers; one window begins at each layer where it fits.
        places: as for `attention_knockout`; a list gives each of the inputs its own.

    Raises:
        InputError: an unknown place, a side of an edge that a row has no token of, or a window that does not fit.
    """
    batches = [inputs] if isinstance(inputs, VLMInputs) else list(inputs)
    metrics = list(metric) if isinstance(metric, Sequence) else [metric] * len(batches)
    named = [places or {}] * len(batches) if places is None or isinstance(places, Mapping) else list(places)
    if not batches or not edges:
        raise InputError(f"{len(batches)} inputs and {len(edges)} edges came: at least one of each is needed")
    if {len(metrics), len(named)} != {len(batches)}:
        raise InputError(
            f"{len(metrics)} metrics and {len(named)} places came for {len(batches)} inputs: give one for all, or one "
            "for each"
        )
    windows = _windows(model, window)
    values, base_values = [], []
    steps = tqdm(batches, disable=not progress, desc="knock-out", unit="input")
    for batch, own_metric, own_places in zip(steps, metrics, named, strict=True):
        for edge in edges:
            _check_tokens(batch, edge, own_places)
        cuts = [attention_knockout(model, batch, layers, edge, own_places) for edge in edges for layers in windows]
        found, baseline = swept(model, batch, cuts, own_metric, logits_at=logits_at, max_runs=max_runs)
        values.append(found)
        base_values.append(baseline)
    axes: dict[str, tuple[str | int, ...]] = {"edge": tuple(map(_said, edges)), "layers": tuple(map(_layers, windows))}
    shape = (len(edges), len(windows), -1)
    result = PatchingResult(
        "attention knock-out",
        axes,
        np.concatenate(values, axis=1).reshape(shape),
        np.concatenate(base_values),
        None,
        None,
        seed,
    )
    warn_of_bad_numbers(result)
    return result


def answers_without(
    model: Any,
    inputs: VLMInputs,
    *,
    edges: Sequence[Edge],
    window: int,
    places: Places | None = None,
    max_new_tokens: int = 32,
) -> pd.DataFrame:
    """What the model says with each edge cut in each window, at the prompt and at every step of generation.

    Returns:
        One line for each edge, window and row: `edge`, `layers`, `example`, `answer`, and what it says without a cut,
        `uncut`.
    """
    uncut = _texts(model, inputs, [], max_new_tokens)
    rows = []
    for edge in edges:
        for layers in _windows(model, window):
            hooks = attention_knockout(model, inputs, layers, edge, places).hooks(model, inputs)
            for example, answer in enumerate(_texts(model, inputs, hooks, max_new_tokens)):
                rows.append((_said(edge), _layers(layers), example, answer, uncut[example]))
    return pd.DataFrame(rows, columns=["edge", "layers", "example", "answer", "uncut"])


def _texts(model: Any, inputs: VLMInputs, hooks: list, max_new_tokens: int) -> list[str]:
    said = model.generate(inputs, max_new_tokens=max_new_tokens, fwd_hooks=hooks, return_type="str")
    return [said] if isinstance(said, str) else said


def _positions(inputs: VLMInputs, name: str, places: Places) -> Positions:
    return positions_in(inputs, name, places) if name in places else group(inputs, name, places)


def _check_tokens(inputs: VLMInputs, edge: Edge, places: Places) -> None:
    """Raises `InputError` where nothing would be cut, which would count as an effect of 0."""
    for side in edge:
        tables = [position_table(_positions(inputs, name, places), inputs)[:, :-1] for name in side.split("+")]
        empty = ~torch.stack(tables).any(0).any(-1)
        if empty.any():
            raise InputError(
                f"row {int(empty.nonzero()[0])} has no {side} positions: the edge {_said(edge)} is not there"
            )


def _windows(model: Any, window: int) -> list[range]:
    n_layers = model.cfg.n_layers
    if not 1 <= window <= n_layers:
        raise InputError(f"a window of {window} layers does not fit: the model has {n_layers}")
    return [range(first, first + window) for first in range(n_layers - window + 1)]


def _layers(layers: range) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _said(edge: Edge) -> str:
    return f"{edge[0]} to {edge[1]}"
