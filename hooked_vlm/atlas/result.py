"""An atlas: what every head of both towers does, by scores on the same stimuli, with intervals and nulls.

found = atlas(model)
found.table                # a row for each head and score
found.wide("language")     # a row for each head, a column for each score
found.save("out")          # Atlas.load("out")
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_vlm.analysis.intervals import mean_interval
from hooked_vlm.atlas.definitions import SCORES, Kind, Score
from hooked_vlm.atlas.files import read_atlas, write_atlas
from hooked_vlm.atlas.summary import Values, described, mean_of_known, share_ends
from hooked_vlm.errors import InputError
from hooked_vlm.interventions.base import Tower

COLUMNS = ("tower", "layer", "head", "score", "value", "low", "high", "null", "p", "p_holm", "n")


@dataclass(frozen=True, eq=False)
class Observed:
    """One score of every head of a tower, on each stimulus that it is defined on."""

    stimuli: tuple[str, ...]
    """Their names."""
    values: Values
    """NaN where a head has no value on a stimulus."""
    nulls: Values
    """What the score is without what it is about (`Score.null`), for the same head and stimulus; NaN if it has none."""


@dataclass(frozen=True, eq=False)
class Atlas:
    """Scores of the heads of one model."""

    model: str
    observed: Mapping[str, Observed]
    """By the name of the score, in the order of `SCORES`; a score that the model cannot have is missing."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the numbers depend on: weights, seed, number of groups, kind and digest of each stimulus."""

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores that there are."""
        return tuple(score for score in SCORES if score.name in self.observed)

    def shape(self, tower: Tower) -> tuple[int, int]:
        """Number of layers and of heads in each.

        Raises:
            InputError: no score of that tower.
        """
        for score in self.scores:
            if score.tower == tower:
                _, layers, heads = self.observed[score.name].values.shape
                return layers, heads
        raise InputError(f"this atlas has no scores of the {tower} tower")

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The towers that have scores."""
        return tuple(dict.fromkeys(score.tower for score in self.scores))

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each head and score.

        `value`: mean over stimuli, with its 95% interval `low` to `high` (over stimuli); `null`: mean of what it would
        be without what the score is about; `p`: two-sided, Student's t over stimuli and 2^(1 - n) at least, that value
        and null differ (value and 0, of effects); `p_holm`: corrected for all heads of the score; `n`: number
        of stimuli.
        """
        return pd.concat([self._rows(score) for score in self.scores], ignore_index=True)

    def rows(self, name: str) -> pd.DataFrame:
        """The rows of `table` of one score, in the order of the heads.

        Raises:
            InputError: a score that this atlas does not have.
        """
        self._observed(name)
        return pd.DataFrame(self.table[self.table["score"] == name])

    def values(self, name: str) -> Float[np.ndarray, "layer head"]:
        """The mean of a score over stimuli, for every head.

        Raises:
            InputError: a score that this atlas does not have.
        """
        return mean_of_known(self._observed(name).values)

    def wide(self, tower: Tower = "language") -> pd.DataFrame:
        """A row for each head of a tower, with a column for each score."""
        layers, heads = self.shape(tower)
        where = {"layer": np.repeat(np.arange(layers), heads), "head": np.tile(np.arange(heads), layers)}
        own = [score.name for score in self.scores if score.tower == tower]
        return pd.DataFrame(where | {name: self.values(name).ravel() for name in own})

    def on(self, kind: Kind) -> "Atlas":
        """The same from the stimuli of one kind alone.

        Raises:
            InputError: there are none.
        """
        kinds = self.settings.get("kinds", {})
        observed = {}
        for name, own in self.observed.items():
            chosen = [i for i, stimulus in enumerate(own.stimuli) if kinds.get(stimulus) == kind]
            if chosen:
                stimuli = tuple(own.stimuli[i] for i in chosen)
                observed[name] = Observed(stimuli, own.values[chosen], own.nulls[chosen])
        if not observed:
            raise InputError(
                f"this atlas has no stimuli of the kind {kind!r}; it has {', '.join(sorted({*kinds.values()}))}"
            )
        return Atlas(self.model, observed, self.settings)

    def strongest(self, name: str, layer: int, head: int, n: int = 3) -> list[str]:
        """Names of the stimuli on which a head scores highest above the null, best first.

        Raises:
            InputError: a score that this atlas does not have, or a head that the tower does not have.
        """
        found = self._observed(name)
        _, layers, heads = found.values.shape
        if not (0 <= layer < layers and 0 <= head < heads):
            raise InputError(f"there is no head {layer}.{head}: layers are 0 to {layers - 1}, heads 0 to {heads - 1}")
        above = found.values[:, layer, head] - np.nan_to_num(found.nulls[:, layer, head])
        order = np.argsort(-np.nan_to_num(above, nan=-np.inf), kind="stable")
        return [found.stimuli[i] for i in order[:n] if np.isfinite(above[i])]

    def save(self, folder: str | Path) -> None:
        """Write `atlas.json`, `observations.parquet` and `heads.csv` (`table`).

        Raises:
            OutputError: the folder cannot be written.
        """
        write_atlas(Path(folder), self.model, dict(self.settings), self.observed, self.table)

    @classmethod
    def load(cls, folder: str | Path) -> "Atlas":
        """Read what `save` wrote.

        Raises:
            InputError: no atlas is there, or it is damaged.
        """
        model, settings, parts = read_atlas(Path(folder))
        observed = {score.name: Observed(*parts[score.name]) for score in SCORES if score.name in parts}
        return cls(model, observed, settings)

    def _observed(self, name: str) -> Observed:
        if name not in self.observed:
            raise InputError(f"this atlas has no score {name!r}; it has {', '.join(self.observed)}")
        return self.observed[name]

    def _rows(self, score: Score) -> pd.DataFrame:
        found = self.observed[score.name]
        shares = score.unit == "share"
        ends = share_ends(found.values) if shares else mean_interval(found.values, int(self.settings.get("seed", 0)))
        return described(score, found.values, found.nulls if score.null else None, ends)
