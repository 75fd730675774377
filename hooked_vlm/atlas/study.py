"""Make an atlas: the scores of every stimulus in tasks whose tables are stored, so that interrupted work goes on."""

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hooked_vlm.atlas.attention import Found, attention_scores, repeated_scores
from hooked_vlm.atlas.definitions import BY_NAME, KINDS, PICTURES, SCORES
from hooked_vlm.atlas.effects import default_groups, effect_scores, fewest_groups, first_token
from hooked_vlm.atlas.result import Atlas, Observed
from hooked_vlm.atlas.stimuli import Stimulus, as_stimuli, check_names, of_kind, shipped
from hooked_vlm.atlas.vision import vision_scores
from hooked_vlm.data.samples import Sample
from hooked_vlm.errors import InputError
from hooked_vlm.interventions.heads import tower_shape
from hooked_vlm.nn.hooks import hooked_module
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import InProcess, Task, Workers

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

TOGETHER = 8
"""Stimuli of a kind whose attention is scored in one pass, at most."""


def atlas(
    model: "HookedVLM",
    data: Iterable[Sample] | None = None,
    *,
    n: int = 32,
    groups: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    workers: Workers | None = None,
    quiet: bool = True,
) -> Atlas:
    """Score every head of both towers (`SCORES`; docs/atlas.md).

    Args:
        data: samples with answers to score heads on, beside repeated tokens; by default pages, texts and objects drawn
            on the spot (`stimuli.shipped`).
        n: number of stimuli of each kind, of those that are drawn.
        groups: number of random groups of heads for each picture, for `transfer_in_groups`; by default twice the number
            of heads and 64 at least, 0 leaves the score out.
        folder: where finished parts are stored, for interrupted work to go on from; by default nowhere.
        workers: by default this process.

    Raises:
        InputError: hooks are set on the model; data without samples, or a sample that cannot be used.
        OutputError: the folder cannot be written.
    """
    if hooked := hooked_module(model):
        raise InputError(
            f"an atlas is stored as of the model's weights, but {hooked} has a hook that may change what heads do: "
            "remove it (from hook points with model.reset_hooks(including_permanent=True))"
        )
    stimuli = shipped(model, n, seed)
    if data is not None:
        stimuli = [*as_stimuli(data), *of_kind(stimuli, ("repeated",))]
        check_names(stimuli)
    n_layers, n_heads, _ = tower_shape(model, "language")
    groups = default_groups(n_layers * n_heads) if groups is None else groups
    if groups and groups < fewest_groups(n_layers * n_heads):
        raise InputError(
            f"{groups} random groups are too few for coefficients of {n_layers * n_heads} heads: take twice as many as "
            "heads, or 0 to leave the score out"
        )
    identity = model.identity()
    with ExitStack() as stack:
        kept = Path(stack.enter_context(tempfile.TemporaryDirectory()) if folder is None else folder)
        own = stack.enter_context(InProcess(model)) if workers is None else workers
        tasks = list(_tasks(model, identity, stimuli, groups, seed, ResultStore(kept)))
        tables = own.tables(tasks, "atlas", each="part", quiet=quiet)
    settings: dict[str, Any] = {"seed": seed, "groups": groups, "weights": identity.get("weights")}
    settings["kinds"] = {stimulus.name: stimulus.kind for stimulus in stimuli}
    settings["digests"] = {stimulus.name: stimulus.digest()[:16] for stimulus in stimuli}
    return Atlas(model.cfg.model_name, _observed(model, pd.concat(tables)), settings)


def _tasks(
    model: "HookedVLM",
    identity: Mapping[str, str],
    stimuli: Sequence[Stimulus],
    groups: int,
    seed: int,
    store: ResultStore,
) -> Iterator[Task]:
    def task(name: str, work: Any, own: Sequence[Stimulus], *arguments: Any) -> Task:
        known = [stimulus.digest() for stimulus in own]
        return Task(store, {"model": identity, "atlas": name, "stimuli": known, "with": list(arguments)}, work,
                    (list(own), *arguments), len(own), label=own[0].name if name != "attention" else "")  # fmt: skip

    for kind in KINDS:
        some = of_kind(stimuli, (kind,))
        n_batches = -(-len(some) // TOGETHER)
        for i in range(n_batches):  # of equal sizes: a page alone has no null
            start, stop = (len(some) * part // n_batches for part in (i, i + 1))
            yield task("attention", attention_table, some[start:stop])
    shown = of_kind(stimuli, PICTURES)
    tokens = [first_token(model, stimulus) for stimulus in shown]
    for i, stimulus in enumerate(shown):
        later = [*range(i + 1, len(shown)), *range(i)]
        later.sort(key=lambda j: shown[j].kind != stimulus.kind)  # of the same kind if there is one
        other = next((shown[j] for j in later if tokens[j] != tokens[i]), None)
        yield task("vision", vision_table, [stimulus])
        pair = [stimulus] if other is None else [stimulus, other]
        yield task("effects", effect_table, pair, groups, seed)


def attention_table(model: "HookedVLM", stimuli: Sequence[Stimulus]) -> pd.DataFrame:
    """Scores of attention in the language model, on stimuli of one kind."""
    work = repeated_scores if stimuli[0].kind == "repeated" else attention_scores
    return pd.concat(map(_table, stimuli, work(model, stimuli)))


def vision_table(model: "HookedVLM", stimuli: Sequence[Stimulus]) -> pd.DataFrame:
    """Scores of attention in the vision tower, on one stimulus."""
    return _table(stimuli[0], vision_scores(model, stimuli[0]))


def effect_table(model: "HookedVLM", stimuli: Sequence[Stimulus], groups: int, seed: int) -> pd.DataFrame:
    """Effects on the answer to the first stimulus; the second has another answer."""
    stimulus, other = stimuli[0], stimuli[1] if len(stimuli) > 1 else None
    return _table(stimulus, effect_scores(model, stimulus, other, groups, seed))


def _table(stimulus: Stimulus, found: Found) -> pd.DataFrame:
    """One row for each head and score, heads in the order of the model."""
    parts = [
        pd.DataFrame(
            {
                "score": name,
                "stimulus": stimulus.name,
                "value": np.asarray(values, dtype=np.float32).ravel(),
                "null": np.asarray(nulls, dtype=np.float32).ravel(),
            }
        )
        for name, (values, nulls) in found.items()
    ]
    return pd.concat(parts)


def _observed(model: "HookedVLM", table: pd.DataFrame) -> dict[str, Observed]:
    by_score: dict[str, list[tuple[str, pd.DataFrame]]] = defaultdict(list)
    groups: Any = table.groupby(["score", "stimulus"], sort=False)
    for (score, stimulus), own in groups:
        by_score[score].append((stimulus, own))
    found = {}
    for score in SCORES:
        if score.name not in by_score:
            continue
        shape = tower_shape(model, BY_NAME[score.name].tower)[:2]
        names, parts = zip(*by_score[score.name], strict=True)
        values, nulls = (
            np.stack([part[column].to_numpy(dtype=float).reshape(shape) for part in parts])
            for column in ("value", "null")
        )
        found[score.name] = Observed(tuple(names), values, nulls)
    return found
