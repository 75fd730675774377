"""Flow of image information through text tokens, and its order (arXiv 2509.17588, section 5.1)."""

from collections.abc import Mapping

import pandas as pd

from hooked_vlm.experiments.head_attribution.ablation import Probe
from hooked_vlm.interventions import BlockAttention, Intervention
from hooked_vlm.interventions.attention import all_heads

Groups = Mapping[str, tuple[int, ...]]
Window = tuple[int, int]
"""The first layer and one past the last."""

MIN_LOSS = 0.01
"""Smallest share of the image's effect for which an edge has a mean layer."""

EDGES = (
    ("image", "question"),
    ("image", "assistant header"),
    ("image", "final"),
    ("question", "assistant header"),
    ("question", "final"),
    ("assistant header", "final"),
)
"""(source, receiver) of information."""


def text_groups(probe: Probe) -> Groups:
    """Groups of the text behind the image: closing marks, question, assistant header (but its last token), final token.

    Groups without tokens are left out.
    """
    inputs, text = probe.case.inputs, set(probe.text)
    (question,), (header,), (final,) = (
        [tuple(int(p) for p in row) for row in group]
        for group in (inputs.positions.question, inputs.positions.assistant_header, inputs.positions.final)
    )
    named = {
        "question": tuple(p for p in question if p in text and p not in final),
        "assistant header": tuple(p for p in header if p in text and p not in final),
        "final": final,
    }
    taken = {p for members in named.values() for p in members}
    groups = {"closing marks": tuple(sorted(text - taken))} | named
    return {name: members for name, members in groups.items() if members}


def windows(n_layers: int, width: int | None) -> list[Window]:
    """All layers, then every window of `width` layers (default: a quarter of them)."""
    width = min(n_layers, width or max(1, n_layers // 4))
    sliding = [(first, first + width) for first in range(n_layers - width + 1)]
    return [(0, n_layers), *(window for window in sliding if window != (0, n_layers))]


def receivers(probe: Probe, width: int | None) -> pd.DataFrame:
    """Target when some text does not see the image, or when it alone sees it.

    Returns:
        One row per run: `text` (a group, or the number and text of a token), `change` ("ablated", "kept alone" or
        "one token ablated"), `first` and `stop` of the layers whose heads are ablated, `value`.
    """
    groups, model = text_groups(probe), probe.model
    everything = (0, model.cfg.n_layers)
    names = model.to_str_tokens(probe.case.inputs.tokens)
    rows: list[tuple[str, str, Window]] = []
    runs: list[Intervention] = []
    for name, members in groups.items():
        for first, stop in windows(model.cfg.n_layers, width):
            rows.append((name, "ablated", (first, stop)))
            runs.append(probe.ablated(all_heads(model, range(first, stop)), queries=members))
        others = tuple(p for p in probe.text if p not in members)
        rows.append((name, "kept alone", everything))
        runs.append(probe.ablated(probe.heads, queries=others) if others else probe.ablated(()))
    for i, position in enumerate(probe.text):
        rows.append((f"{i} {names[position]!r}", "one token ablated", everything))
        runs.append(probe.ablated(probe.heads, queries=(position,)))
    return _frame(["text", "change"], rows, probe.measure(runs))


def blocked_edges(probe: Probe, width: int | None) -> pd.DataFrame:
    """Target when one group of tokens cannot attend to another in a window of layers.

    Blocked scores are minus infinity, for any baseline of ablations.

    Returns:
        One row per run: `source`, `receiver`, `first` and `stop` of the layers, `value`.
    """
    groups = {"image": probe.image, **text_groups(probe)}
    rows: list[tuple[str, str, Window]] = []
    runs: list[Intervention] = []
    for source, receiver in EDGES:
        if source not in groups or receiver not in groups:
            continue
        for first, stop in windows(probe.model.cfg.n_layers, width):
            rows.append((source, receiver, (first, stop)))
            layers = range(first, stop)
            runs.append(BlockAttention.in_layers(probe.model, layers, query=groups[receiver], key=groups[source]))
    return _frame(["source", "receiver"], rows, probe.measure(runs))


def _frame(names: list[str], rows: list[tuple[str, str, Window]], values: object) -> pd.DataFrame:
    found = pd.DataFrame([(a, b, *window) for a, b, window in rows], columns=[*names, "first", "stop"])
    return found.assign(value=values)


def with_losses(frame: pd.DataFrame, full: float, gap: float) -> pd.DataFrame:
    """Add `loss`: the share of the image's effect on the target that a run removes."""
    return frame.assign(loss=(full - frame["value"]) / gap)


def mean_layer(edge: pd.DataFrame, n_layers: int) -> float:
    """Mean centre of the windows, weighted by the loss when an edge is blocked there.

    Negative losses count as 0; NaN where all together are less than `MIN_LOSS`.
    """
    first, stop, loss = edge.query(f"stop - first < {n_layers}")[["first", "stop", "loss"]].to_numpy().T
    loss = loss.clip(0)
    return float(((first + stop - 1) / 2 * loss).sum() / loss.sum()) if loss.sum() >= MIN_LOSS else float("nan")
