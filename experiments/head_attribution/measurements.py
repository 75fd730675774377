"""Measurements that need the model, picture by picture; every table is stored when it is finished."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from hooked_vlm.experiments.head_attribution.ablation import Probe, make_probes, probe_on
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig, Regression, n_masks
from hooked_vlm.experiments.head_attribution.curves import measure_curves, orders
from hooked_vlm.experiments.head_attribution.image_flow import attention_to_tokens, coverage
from hooked_vlm.experiments.head_attribution.masks import from_frame, measured
from hooked_vlm.experiments.head_attribution.rankings import other_rankings
from hooked_vlm.experiments.head_attribution.regression import Fit, fit
from hooked_vlm.experiments.head_attribution.tasks import Case, ask, items_of, right_cases
from hooked_vlm.experiments.head_attribution.text_flow import blocked_edges, receivers
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import SharedSetup, Task, Workers


@dataclass(frozen=True, eq=False)
class Regressed:
    """Random masks over heads or image tokens of one picture, their targets, and the regression."""

    kept: np.ndarray
    values: np.ndarray
    fit: Fit


@dataclass(eq=False)
class Measured:
    """Measurements of every picture, in order; lists of sections that were not requested are empty."""

    answers: pd.DataFrame
    """Answers to all pictures, wrong ones included."""
    probes: list[Probe]
    ends: list[tuple[float, float]]
    heads: list[Regressed] = field(default_factory=list)
    rankings: list[pd.DataFrame] = field(default_factory=list)
    curves: list[pd.DataFrame] = field(default_factory=list)
    receivers: list[pd.DataFrame] = field(default_factory=list)
    edges: list[pd.DataFrame] = field(default_factory=list)
    tokens: list[Regressed] = field(default_factory=list)
    token_curves: list[pd.DataFrame] = field(default_factory=list)

    @property
    def cases(self) -> list[Case]:
        return [probe.case for probe in self.probes]

    @property
    def images(self) -> list[str]:
        return [case.item.id for case in self.cases]

    @property
    def names(self) -> list[str]:
        return [case.item.name for case in self.cases]

    @property
    def coefficients(self) -> np.ndarray:
        """Coefficients [image, head], heads layer by layer."""
        return np.stack([one.fit.coefficients for one in self.heads])

    @property
    def gaps(self) -> np.ndarray:
        """Contribution of the image to each target [image]: all heads in place minus all heads ablated."""
        return np.array([full - none for full, none in self.ends])


def measure(model: HookedVLM, config: HeadAttributionConfig, workers: Workers) -> Measured:
    """Measure everything that the configured sections need; finished tables are read from the result store.

    This process encodes the pictures; `workers` do the rest on replicas of the model.

    Raises:
        StudyError, ImageError: see `items_of` and `right_cases`.
        WorkerError: see `hooked_vlm.runtime.ray_workers`.
    """
    items = items_of(config)
    key: dict[str, Any] = {"model": model.identity()}
    answers = ask(workers, items, ResultStore(config.out / "parts" / "answers"), key, config.quiet)
    cases = right_cases(model, items, answers)
    probes = make_probes(model, cases, config)
    key |= {name: getattr(config, name) for name in ("target", "baseline", "rope", "seed")}
    if config.baseline == "dataset":
        key["dataset"] = [case.item.id for case in cases]
    pictures = [_Picture(config, key, index, probe) for index, probe in enumerate(probes)]
    stages = {"ablating": _Picture.ablations, "regressing": _Picture.regressions, "ranking": _Picture.curves}
    for what, stage in stages.items():  # each needs the tables of those before it
        wanted = [(picture.tables, name, task) for picture in pictures for name, task in stage(picture).items()]
        made = workers.tables([task for *_, task in wanted], what, each="table", quiet=config.quiet or not wanted)
        for (tables, name, _), table in zip(wanted, made, strict=True):
            tables[name] = table
    return _gathered(answers, pictures)


Units = Literal["heads", "tokens"]
UNITS: tuple[Units, ...] = ("heads", "tokens")
"""Units that random masks keep or ablate: heads, or image tokens."""
SCORED = ("keep", "held_out", "regression")
"""Settings that coefficients depend on, besides the masks."""


@dataclass(frozen=True, eq=False)
class _Picture:
    """One picture's tasks, and their tables by the folder they are stored in."""

    config: HeadAttributionConfig
    shared: Mapping[str, Any]
    index: int
    probe: Probe
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def task(
        self, folder: str, work: Callable[..., pd.DataFrame], arguments: tuple, *settings: str, on_probe: bool = True
    ) -> Task:
        """Task whose table depends on `settings`, too; with `on_probe` its work receives the probe."""
        case, config = self.probe.case, self.config
        key = {**self.shared, "image": case.item.id, "index": self.index}
        key |= {"foil": case.foil} if config.target == "difference" else {}
        key |= {name: getattr(config, name) for name in settings}
        common = self.placed if on_probe else None
        return Task(ResultStore(config.out / "parts" / folder), key, work, arguments, setup=common)

    @cached_property
    def placed(self) -> SharedSetup:
        """The probe on a worker's replica of the model."""
        return SharedSetup(probe_on, self.probe.portable())

    def ablations(self) -> dict[str, Task]:
        """Tasks that need only the picture."""
        config, wanted = self.config, self.config.sections
        found = {"ends": self.task("ends", ends_of, ())}
        if "attribution" in wanted:
            found["heads_masks"] = self.task("heads_masks", over_heads, self._masks("heads"), "keep", "masks")
        if "curves" in wanted or "where" in wanted:
            found["rankings"] = self.task("rankings", rankings_of, ())
        if "tokens" in wanted:
            found["receivers"] = self.task("receivers", receivers_of, (config.window,), "window")
            found["edges"] = self.task("edges", edges_of, (config.window,), "window")
            found["tokens_masks"] = self.task("tokens_masks", over_tokens, self._masks("tokens"), "keep", "token_masks")
        return found

    def _masks(self, units: Units) -> tuple[int, float, list[int]]:
        """Number of masks over heads or image tokens, the share they keep, and their seed."""
        asked, number = (self.config.masks, 20) if units == "heads" else (self.config.token_masks, 21)
        return n_masks(asked, self.n_units(units)), self.config.keep, [self.config.seed, number, self.index]

    def n_units(self, units: Units) -> int:
        return len(self.probe.heads if units == "heads" else self.probe.image)

    def regressions(self) -> dict[str, Task]:
        """Regressions on random masks."""
        config, found = self.config, {}
        for units in UNITS:
            asked = "masks" if units == "heads" else "token_masks"
            if f"{units}_masks" in self.tables:
                arguments = (self.tables[f"{units}_masks"], self.n_units(units), config.regression, config.held_out)
                arguments = (*arguments, config.bootstrap, config.seed)
                name, settings = f"{units}_coefficients", (*SCORED, asked, "bootstrap")
                found[name] = self.task(name, regression_of, arguments, *settings, on_probe=False)
        return found

    def curves(self) -> dict[str, Task]:
        """Curves over the ranking by attribution, and over others."""
        config, found = self.config, {}
        settings = (*SCORED, "masks", "random_rankings")
        if "curves" in config.sections:
            others = self.tables["rankings"].drop(columns=["layer", "head"])
            scores = {"attribution": self.regressed("heads").fit.coefficients}
            scores |= {name: others[name].to_numpy() for name in others}
            ranked = orders(scores, config.random_rankings, [config.seed, 22, self.index])
            found["curves"] = self.task("curves", curves_of, (ranked,), *settings)
        if "tokens" in config.sections:
            seed = [config.seed, 23, self.index]
            arguments = (self.regressed("tokens").fit.coefficients, config.random_rankings, seed)
            found["token_curves"] = self.task("token_curves", token_curves_of, arguments, *settings, "token_masks")
        return found

    def regressed(self, units: Units) -> Regressed:
        masks, values = from_frame(self.tables[f"{units}_masks"], self.n_units(units))
        return Regressed(masks, values, from_row(self.tables[f"{units}_coefficients"]))


def _gathered(answers: pd.DataFrame, pictures: Sequence[_Picture]) -> Measured:
    ends = [tuple(picture.tables["ends"].to_numpy()[0].tolist()) for picture in pictures]
    found = Measured(answers, [picture.probe for picture in pictures], ends)
    for name in ("rankings", "curves", "receivers", "edges", "token_curves"):
        setattr(found, name, [picture.tables[name] for picture in pictures if name in picture.tables])
    for units in UNITS:
        known = [picture for picture in pictures if f"{units}_masks" in picture.tables]
        setattr(found, units, [picture.regressed(units) for picture in known])
    return found


# ---------------------------------------------------------------- the work: functions of a replica of the model


def ends_of(model: HookedVLM, probe: Probe) -> pd.DataFrame:
    """`Probe.ends` as columns `full` and `none`."""
    return pd.DataFrame([probe.ends], columns=["full", "none"])


def over_heads(model: HookedVLM, probe: Probe, n: int, keep: float, seed: list[int]) -> pd.DataFrame:
    """Target under random masks over heads."""
    return measured(probe.over_heads, n, len(probe.heads), keep, seed)


def over_tokens(model: HookedVLM, probe: Probe, n: int, keep: float, seed: list[int]) -> pd.DataFrame:
    """Target under random masks over image tokens."""
    return measured(probe.over_tokens, n, len(probe.image), keep, seed)


def rankings_of(model: HookedVLM, probe: Probe) -> pd.DataFrame:
    """Rankings of heads other than attribution: `other_rankings`."""
    return other_rankings(probe)


def receivers_of(model: HookedVLM, probe: Probe, width: int | None) -> pd.DataFrame:
    """Losses by text tokens: `receivers`."""
    return receivers(probe, width)


def edges_of(model: HookedVLM, probe: Probe, width: int | None) -> pd.DataFrame:
    """Losses by blocked edges: `blocked_edges`."""
    return blocked_edges(probe, width)


def regression_of(
    model: HookedVLM,
    masks: pd.DataFrame,
    n_units: int,
    regression: Regression,
    held_out: float,
    bootstrap: int,
    seed: int,
) -> pd.DataFrame:
    """Fit of the random masks; does not use the model."""
    return as_row(fit(*from_frame(masks, n_units), regression, held_out, bootstrap, seed))


def curves_of(model: HookedVLM, probe: Probe, ranked: Mapping[tuple[str, int], np.ndarray]) -> pd.DataFrame:
    """Curves over heads."""
    return measure_curves(probe.over_heads, ranked)


def token_curves_of(
    model: HookedVLM, probe: Probe, attribution: np.ndarray, n_random: int, seed: list[int]
) -> pd.DataFrame:
    """Curves over image tokens, ranked by attribution, by attention and by their share of the object."""
    scores = {"attribution": attribution, "attention": attention_to_tokens(probe)}
    covered = coverage(probe)
    scores |= {} if covered is None else {"object": covered}
    return measure_curves(probe.over_tokens, orders(scores, n_random, seed))


# ---------------------------------------------------------------- fits as tables


def as_row(fit: Fit) -> pd.DataFrame:
    """Store a fit as one row of lists and numbers."""
    return pd.DataFrame([{name: _plain(value) for name, value in vars(fit).items()}])


def from_row(frame: pd.DataFrame) -> Fit:
    """Read the fit that `as_row` stored."""
    (row,) = frame.to_dict("records")
    values: dict[str, Any] = {name: np.array(v) if isinstance(v, list) else v for name, v in row.items()}
    return Fit(**values)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
