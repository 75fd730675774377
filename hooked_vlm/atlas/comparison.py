"""Two atlases head by head: which heads do something else in another model, or after training?

found = compare(Atlas.load("before"), Atlas.load("after"))
found.table  # a row for each head and score that both have
print(found.text)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from hooked_vlm.analysis.intervals import mean_interval
from hooked_vlm.analysis.multiple_testing import holm
from hooked_vlm.analysis.text_tables import text_table
from hooked_vlm.atlas.definitions import BY_NAME, SCORES, TOWERS, Score
from hooked_vlm.atlas.result import Atlas
from hooked_vlm.atlas.show import ALPHA, no_power
from hooked_vlm.atlas.summary import described, mean_of_known
from hooked_vlm.errors import InputError
from hooked_vlm.interventions.base import Tower

COLUMNS = ("tower", "layer", "head", "score", "a", "b", "difference", "low", "high", "p", "p_holm", "n")
LISTED = 3
"""Heads of a score that the text lists."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What heads do in one model and in another, on the stimuli that both saw."""

    a: str
    """Name of a model."""
    b: str
    table: pd.DataFrame
    """A row for each head and score.

    `a`, `b`: means over the `n` stimuli on which both have a value; `difference`: b - a, with its 95% interval `low` to
    `high` over the differences of single stimuli; `p`: two-sided, Student's t over these, that it is 0; `p_holm`:
    corrected for all heads of the score.
    """
    refused: Mapping[str, str]
    """Towers and scores that cannot be compared, each with the reason as a sentence."""

    def changed(self, tower: Tower) -> Bool[np.ndarray, "layer head"]:
        """Heads of a tower of which at least one score changed: p corrected for all heads and scores of the tower.

        Raises:
            InputError: the tower is not compared.
        """
        rows = self._rows(tower)
        layers, heads = (rows[name].to_numpy() for name in ("layer", "head"))
        hit = holm(rows["p"].to_numpy()) <= ALPHA
        found = np.zeros((layers.max() + 1, heads.max() + 1), bool)
        found[layers[hit], heads[hit]] = True
        return found

    @cached_property
    def scores(self) -> pd.DataFrame:
        """A row for each score: `stimuli`, heads that went `up` and `down` (p_holm of 0.05 or less), heads `untested`
        (fewer than three stimuli), the `largest` change among those, and its `head`."""
        groups: Any = self.table.groupby("score", sort=False)
        return pd.DataFrame([_counts(name, rows) for name, rows in groups])

    @property
    def text(self) -> str:
        """The answer for a terminal."""
        answers = [
            f"{found.sum():,} of {found.size:,} heads of the {TOWERS[tower]} changed in at least one score (p of "
            f"{ALPHA} or less, Holm over all {len(self._rows(tower)):,} tests of heads and scores)."
            f"{no_power(self._rows(tower))}"
            for tower, found in self._changed().items()
        ]
        parts = [f"a: {self.a}\nb: {self.b}", "\n".join([*answers, *self.refused.values()])]
        if lines := self._score_lines():
            header = ("score", "stimuli", "up", "down", "untested", "largest change")
            parts.append(
                f"Heads whose score is higher (up) or lower (down) in b, p of {ALPHA} or less, Holm over the heads of "
                f"the score:\n{text_table(header, lines)}"
            )
        if still := [BY_NAME[row["score"]].title for row in self.scores.to_dict("records") if not _moved(row)]:
            parts.append(f"No head changed, by the same rule: {'; '.join(still)}.")
        if lines := self._head_lines():
            header = ("head", "score", "a", "b", "b - a", "95% interval")
            parts.append(f"Clearest changes (smallest p, {LISTED} of a score):\n{text_table(header, lines, left=2)}")
        return "\n\n".join(parts)

    @property
    def data(self) -> dict[str, Any]:
        """The answer as JSON."""
        heads = {
            tower: {"changed": [f"{layer}.{head}" for layer, head in np.argwhere(found)], "heads": int(found.size)}
            for tower, found in self._changed().items()
        }
        scores = {str(row.pop("score")): _plain(row) for row in self.scores.to_dict("records")}
        return {"a": self.a, "b": self.b, "towers": heads, "scores": scores, "refused": dict(self.refused)}

    def _rows(self, tower: Tower) -> pd.DataFrame:
        rows = pd.DataFrame(self.table[self.table["tower"] == tower])
        if rows.empty:
            raise InputError(f"the {TOWERS[tower]} is not compared: {self.refused.get(tower, 'it has no scores')}")
        return rows

    def _changed(self) -> dict[Tower, Bool[np.ndarray, "layer head"]]:
        return {tower: self.changed(tower) for tower in TOWERS if tower in set(self.table["tower"])}

    def _score_lines(self) -> list[tuple[str, ...]]:
        return [
            (
                BY_NAME[row["score"]].title,
                *(f"{row[name]:,}" for name in ("stimuli", "up", "down", "untested")),
                f"{row['head']} {row['largest']:+.3g}" if row["head"] else "-",
            )
            for row in self.scores.to_dict("records")
            if _moved(row)
        ]

    def _head_lines(self) -> list[tuple[str, ...]]:
        hit = pd.DataFrame(self.table[self.table["p_holm"] <= ALPHA]).sort_values("p", kind="stable")
        rows = hit.groupby("score", sort=False).head(LISTED)
        return [
            (
                _name(row),
                row["score"],
                *(f"{row[name]:.3g}" for name in ("a", "b")),
                f"{row['difference']:+.3g}",
                f"{row['low']:.3g} to {row['high']:.3g}",
            )
            for row in rows.to_dict("records")
        ]


def compare(a: Atlas, b: Atlas) -> Comparison:
    """Compare two atlases, head by head and stimulus by stimulus.

    Raises:
        InputError: no score that both have on stimuli that both saw, with equally many layers and heads.
    """
    both = [score for score in SCORES if score.name in a.observed and score.name in b.observed]
    if both and not any(_shared(score, a, b) for score in both):
        raise InputError(
            "these atlases have no stimulus in common, so nothing can be compared: make both with the same --n, --seed "
            "or --data"
        )
    refused: dict[str, str] = {}
    parts = []
    for score in SCORES:
        if score.name not in a.observed and score.name not in b.observed:
            continue
        why = _misfit(score, a, b)
        if why is None:
            parts.append(_compared(score, a, b))
        else:
            refused.setdefault(*why)
    if not parts:
        raise InputError(f"these atlases cannot be compared: {' '.join(refused.values()) or 'they have no scores.'}")
    return Comparison(a.model, b.model, pd.concat(parts, ignore_index=True), refused)


def _shared(score: Score, a: Atlas, b: Atlas) -> list[tuple[int, int]]:
    """Places in both atlases of the stimuli that are the same, not in name alone."""
    digests = [atlas.settings.get("digests", {}) for atlas in (a, b)]
    places = {name: i for i, name in enumerate(b.observed[score.name].stimuli)}
    return [
        (i, places[name])
        for i, name in enumerate(a.observed[score.name].stimuli)
        if name in places and digests[0].get(name) == digests[1].get(name)
    ]


def _misfit(score: Score, a: Atlas, b: Atlas) -> tuple[str, str] | None:
    """Tower or score that cannot be compared, and why."""
    lacking = [atlas.model for atlas in (a, b) if score.name not in atlas.observed]
    if lacking:
        return score.name, f"{score.title}: not in the atlas of {lacking[0]}."
    shapes = [atlas.shape(score.tower) for atlas in (a, b)]
    if shapes[0] != shapes[1]:
        (layers, heads), (other_layers, other_heads) = shapes
        return score.tower, (
            f"Heads of the {TOWERS[score.tower]} do not correspond: {layers} layers of {heads} in {a.model}, "
            f"{other_layers} of {other_heads} in {b.model}."
        )
    if not _shared(score, a, b):
        return score.name, f"{score.title}: no stimulus in common (same --n, --seed or --data, and tokenizer)."
    return None


def _compared(score: Score, a: Atlas, b: Atlas) -> pd.DataFrame:
    ours, theirs = a.observed[score.name], b.observed[score.name]
    shared = _shared(score, a, b)
    before, after = ours.values[[i for i, _ in shared]], theirs.values[[i for _, i in shared]]
    differences: Float[np.ndarray, "stimulus layer head"] = after - before
    known = np.isfinite(differences)
    ends = mean_interval(differences, int(a.settings.get("seed", 0)))
    rows = described(score, differences, np.zeros_like(differences), ends)
    means = {name: mean_of_known(np.where(known, own, np.nan)).ravel() for name, own in (("a", before), ("b", after))}
    return pd.DataFrame(rows.rename(columns={"value": "difference"}).assign(**means)[list(COLUMNS)])


def _counts(name: str, rows: pd.DataFrame) -> dict[str, Any]:
    hit = pd.DataFrame(rows[rows["p_holm"] <= ALPHA]).to_dict("records")
    largest = max(hit, key=lambda row: abs(row["difference"]), default=None)
    return {
        "score": name,
        "stimuli": int(rows["n"].to_numpy().max()),
        "up": sum(row["difference"] > 0 for row in hit),
        "down": sum(row["difference"] < 0 for row in hit),
        "untested": int(np.isnan(rows["p"].to_numpy()).sum()),
        "largest": np.nan if largest is None else float(largest["difference"]),
        "head": "" if largest is None else _name(largest),
    }


def _moved(row: Mapping[str, Any]) -> bool:
    """Whether a head changed by a score, or could not be tested."""
    return bool(row["up"] or row["down"] or row["untested"])


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['layer']}.{row['head']}"


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Without numbers that JSON lacks."""
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in row.items()}
