"""Measurements that need the model, picture by picture; every table is stored when it is finished."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from hooked_vlm.experiments.common.steps import Step, untimed
from hooked_vlm.experiments.head_attribution.ablation import Probe, make_probes, probe_on
from hooked_vlm.experiments.head_attribution.config import (
    Design,
    HeadAttributionConfig,
    Regression,
    Section,
    n_held_out,
    n_masks,
)
from hooked_vlm.experiments.head_attribution.curves import measure_curves, orders
from hooked_vlm.experiments.head_attribution.image_flow import attention_to_tokens, coverage
from hooked_vlm.experiments.head_attribution.masks import PAIRED, as_frame, draw_masks, from_frame
from hooked_vlm.experiments.head_attribution.rankings import at_budgets, other_rankings, with_sums
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


def measure(model: HookedVLM, config: HeadAttributionConfig, workers: Workers, step: Step = untimed) -> Measured:
    """Measure everything that the configured sections need; finished tables are read from the result store.

    This process encodes the pictures; `workers` do the rest on replicas of the model.

    Raises:
        StudyError, ImageError: see `items_of` and `right_cases`.
        WorkerError: see `hooked_vlm.runtime.ray_workers`.
    """
    items = items_of(config)
    key: dict[str, Any] = {"model": model.identity()}
    steps = [name for name, (_, sections) in STEPS.items() if set(sections) & set(config.shown_sections)]

    def label(number: int, what: str) -> str:
        return f"step {number} of {1 + len(steps)}: {what}"

    store = ResultStore(config.out / "parts" / "answers")
    with step("answers"):
        answers = ask(workers, items, store, key, config.quiet, label(1, "answers"))
    cases = right_cases(model, items, answers, encode=config.tower == "language")
    probes = make_probes(model, cases, config)
    key |= {name: getattr(config, name) for name in ("target", "baseline", "rope", "seed", "tower")}
    if config.baseline == "dataset":
        key["dataset"] = [case.item.id for case in cases]
    pictures = [_Picture(config, key, index, probe) for index, probe in enumerate(probes)]
    for number, name in enumerate(steps, start=2):  # each needs the tables of those before it
        tasks = [picture.step(name) for picture in pictures]
        what = STEPS[name][0]
        with step(what):
            tables = workers.tables(tasks, label(number, what), each="picture", quiet=config.quiet)
        for picture, table in zip(pictures, tables, strict=True):
            picture.tables[name] = table
    return _gathered(answers, pictures)


EVERY: tuple[Section, ...] = ("attribution", "curves", "where", "tokens")
STEPS: dict[str, tuple[str, tuple[Section, ...]]] = {
    "ends": ("with all heads and with none", EVERY),
    "heads_masks": ("masks over heads", ("attribution",)),
    "heads_coefficients": ("regression over heads", ("attribution",)),
    "rankings": ("other rankings", ("curves", "where")),
    "curves": ("faithfulness and completeness", ("curves",)),
    "receivers": ("text that sees the image", ("tokens",)),
    "edges": ("blocked edges", ("tokens",)),
    "tokens_masks": ("masks over image tokens", ("tokens",)),
    "tokens_coefficients": ("regression over image tokens", ("tokens",)),
    "token_curves": ("curves over image tokens", ("tokens",)),
}
"""Tables of each picture, in the order they are made: folder of the store -> label, sections that need it."""
Units = Literal["heads", "tokens"]
UNITS: tuple[Units, ...] = ("heads", "tokens")
"""Units that random masks keep or ablate: heads, or image tokens."""
DRAWN = ("keep", "held_out", "design")
"""Settings that masks depend on, besides their number."""
SCORED = (*DRAWN, "regression")
"""Settings that coefficients depend on, besides the number of masks."""


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

    def step(self, name: str) -> Task:
        """The task of one of `STEPS`."""
        config = self.config
        match name:
            case "ends":
                return self.task(name, ends_of, ())
            case "rankings":
                return self.task(name, rankings_of, ())
            case "receivers" | "edges":
                work = receivers_of if name == "receivers" else edges_of
                return self.task(name, work, (config.window,), "window")
            case "heads_masks":
                return self.task(name, over_heads, self._masks("heads"), *DRAWN, "masks")
            case "tokens_masks":
                return self.task(name, over_tokens, self._masks("tokens"), *DRAWN, "token_masks")
            case "heads_coefficients":
                return self._regression("heads", "masks")
            case "tokens_coefficients":
                return self._regression("tokens", "token_masks")
            case "curves":
                ranked = orders(self._scores(), config.random_rankings, [config.seed, 22, self.index])
                return self.task(name, curves_of, (ranked,), *SCORED, "masks", "random_rankings")
        assert name == "token_curves"
        arguments = (
            self.regressed("tokens").fit.coefficients,
            config.random_rankings,
            [config.seed, 23, self.index],
        )
        return self.task(name, token_curves_of, arguments, *SCORED, "random_rankings", "token_masks")

    def _masks(self, units: Units) -> tuple[Design, int, int, float, list[int]]:
        """Design, number of masks over heads or image tokens, how many are held out, share kept, seed."""
        config = self.config
        asked, number = (config.masks, 20) if units == "heads" else (config.token_masks, 21)
        n = n_masks(asked, self.n_units(units))
        return config.design, n, n_held_out(n, config.held_out), config.keep, [config.seed, number, self.index]

    def n_units(self, units: Units) -> int:
        return len(self.probe.heads if units == "heads" else self.probe.image)

    def _regression(self, units: Units, number: str) -> Task:
        config = self.config
        arguments = (self.tables[f"{units}_masks"], self.n_units(units), config.regression, config.held_out)
        arguments = (*arguments, config.bootstrap, config.seed, PAIRED[config.design])
        settings = (*SCORED, number, "bootstrap")
        return self.task(f"{units}_coefficients", regression_of, arguments, *settings, on_probe=False)

    def _scores(self) -> dict[str, np.ndarray]:
        """Scores of every ranking: attribution from all masks, from few, and the others."""
        found = self.regressed("heads")
        others = self.tables["rankings"].drop(columns=["layer", "head"])
        scores = {"attribution": found.fit.coefficients}
        scores |= at_budgets(found.kept, found.values, found.fit.n_train, self.config.regression)
        return with_sums(scores | {name: others[name].to_numpy() for name in others})

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


def over_heads(
    model: HookedVLM, probe: Probe, design: Design, n: int, n_random: int, keep: float, seed: list[int]
) -> pd.DataFrame:
    """Target under masks over heads."""
    kept = draw_masks(design, n, n_random, len(probe.heads), keep, seed)
    return as_frame(kept, probe.over_heads(kept))


def over_tokens(
    model: HookedVLM, probe: Probe, design: Design, n: int, n_random: int, keep: float, seed: list[int]
) -> pd.DataFrame:
    """Target under masks over image tokens."""
    kept = draw_masks(design, n, n_random, len(probe.image), keep, seed)
    return as_frame(kept, probe.over_tokens(kept))


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
    group: int,
) -> pd.DataFrame:
    """Fit of the masks; does not use the model."""
    return as_row(fit(*from_frame(masks, n_units), regression, held_out, bootstrap, seed, group))


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
    # NaN in a list come back as None
    listed = {name: np.asarray(v, dtype=float) for name, v in row.items() if isinstance(v, list | np.ndarray)}
    return Fit(**{**row, **listed})


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
