"""Attention knock-out: no attention from some tokens to others, in a window of layers
(Geva et al. 2023, arXiv 2304.14767; between image and text, arXiv 2411.18620)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import BlockAttention, Compose, Intervention
from hooked_vlm.interventions.base import Positions, position_table
from hooked_vlm.metrics import Metric
from hooked_vlm.patching.experiment import Metrics, Values, one_for_each, over_batches, swept
from hooked_vlm.patching.pairs import Place
from hooked_vlm.patching.places import group, positions_in
from hooked_vlm.patching.result import Label, PatchingResult

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Edge = tuple[str, str]
"""(query, key): no attention from one to the other. Each a place, or several joined by "+": "final+generated"."""
Places = Mapping[str, Place]


def attention_knockout(
    model: "HookedVLM", inputs: VLMInputs, layers: range, edge: Edge, places: Places | None = None
) -> Intervention:
    """Build the intervention that cuts an edge in some layers, for `run_with_hooks`, `generate` or `sweep`.

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
    model: "HookedVLM",
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
    """Measure the metric with each edge cut in each window of layers, on the sweep engine.

    Args:
        inputs: every row is an example.
        metric: as for `sweep`; a list gives each of the inputs its own.
        window: number of layers; one window begins at each layer where it fits.
        places: as for `attention_knockout`; a list gives each of the inputs its own.

    Raises:
        InputError: an unknown place, a side of an edge that a row has no token of, or a window that does not fit.
    """
    batches = [inputs] if isinstance(inputs, VLMInputs) else list(inputs)
    if not batches or not edges:
        raise InputError(f"{len(batches)} inputs and {len(edges)} edges came: at least one of each is needed")
    with_places = list(zip(batches, one_for_each(places or {}, len(batches), "places"), strict=True))
    windows = _windows(model, window)

    def run(batch: tuple[VLMInputs, Places], metric: Metric) -> Values:
        for edge in edges:
            _check_tokens(batch[0], edge, batch[1])
        cuts = [attention_knockout(model, batch[0], layers, edge, batch[1]) for edge in edges for layers in windows]
        return (*swept(model, batch[0], cuts, metric, logits_at, max_runs), None)

    axes: dict[str, tuple[Label, ...]] = {"edge": tuple(map(_label, edges)), "layers": tuple(map(_layers, windows))}
    return over_batches(with_places, metric, run, "attention knock-out", axes, None, seed, progress)


def answers_without(
    model: "HookedVLM",
    inputs: VLMInputs,
    *,
    edges: Sequence[Edge],
    window: int,
    places: Places | None = None,
    max_new_tokens: int = 32,
) -> pd.DataFrame:
    """Generate answers with each edge cut in each window, at the prompt and at every step of generation.

    Returns:
        One line for each edge, window and row: `edge`, `layers`, `example`, `answer`, and the answer without a cut,
        `uncut`.
    """
    uncut = _texts(model, inputs, [], max_new_tokens)
    rows = []
    for edge in edges:
        for layers in _windows(model, window):
            hooks = attention_knockout(model, inputs, layers, edge, places).hooks(model, inputs)
            for example, answer in enumerate(_texts(model, inputs, hooks, max_new_tokens)):
                rows.append((_label(edge), _layers(layers), example, answer, uncut[example]))
    return pd.DataFrame(rows, columns=["edge", "layers", "example", "answer", "uncut"])


def _texts(model: "HookedVLM", inputs: VLMInputs, hooks: list, max_new_tokens: int) -> list[str]:
    texts = model.generate(inputs, max_new_tokens=max_new_tokens, fwd_hooks=hooks, return_type="str")
    return [texts] if isinstance(texts, str) else texts


def _positions(inputs: VLMInputs, name: str, places: Places) -> Positions:
    return positions_in(inputs, name, places) if name in places else group(inputs, name, places)


def _check_tokens(inputs: VLMInputs, edge: Edge, places: Places) -> None:
    """Refuse rows without the edge, whose effect would count as 0."""
    for side in edge:
        tables = [position_table(_positions(inputs, name, places), inputs)[:, :-1] for name in side.split("+")]
        empty = ~torch.stack(tables).any(0).any(-1)
        if empty.any():
            raise InputError(
                f"row {int(empty.nonzero()[0])} has no {side} positions, so there is no edge {_label(edge)} to cut"
            )


def _windows(model: "HookedVLM", window: int) -> list[range]:
    n_layers = model.cfg.n_layers
    if not 1 <= window <= n_layers:
        raise InputError(f"a window of {window} layers does not fit: the model has {n_layers}")
    return [range(first, first + window) for first in range(n_layers - window + 1)]


def _layers(layers: range) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _label(edge: Edge) -> str:
    return f"{edge[0]} to {edge[1]}"
