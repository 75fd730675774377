"""Everything that needs the model, picture by picture, kept in parts as it is made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from hooked_vlm.experiments.head_attribution.ablation import Probe, make_probes
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.curves import measure_curves, orders
from hooked_vlm.experiments.head_attribution.image_flow import attention_to_tokens, coverage
from hooked_vlm.experiments.head_attribution.masks import from_frame, measured, n_masks
from hooked_vlm.experiments.head_attribution.rankings import other_rankings
from hooked_vlm.experiments.head_attribution.regression import Fit, fit
from hooked_vlm.experiments.head_attribution.tasks import Case, ask, items_of, right_cases
from hooked_vlm.experiments.head_attribution.text_flow import blocked_edges, receivers
from hooked_vlm.parts import Parts
from hooked_vlm.provenance import weights_hash


@dataclass(frozen=True, eq=False)
class Regressed:
    """Random masks over heads or image tokens of one picture, and what the regression made of them."""

    kept: np.ndarray
    values: np.ndarray
    fit: Fit


@dataclass(eq=False)
class Measured:
    """What was measured of every picture, in the pictures' order; lists of sections not asked for are empty."""

    answers: pd.DataFrame
    """Of all pictures, those answered wrongly included."""
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
        """[image, head], heads layer by layer."""
        return np.stack([one.fit.coefficients for one in self.heads])

    @property
    def gaps(self) -> np.ndarray:
        """What the image adds to each target: with all heads in place, less with all ablated. [image]"""
        return np.array([full - none for full, none in self.ends])


def measure(model: Any, config: HeadAttributionConfig) -> Measured:
    """All that the configured sections need; what is in the parts already is taken from there.

    Raises:
        StudyError, ImageError: see `items_of` and `right_cases`.
    """
    items = items_of(config)
    key: dict[str, Any] = {"weights": weights_hash(model), "version": version("hooked-vlm")}
    answers = ask(model, items, Parts(config.out / "parts" / "answers"), key, config.quiet)
    cases = right_cases(model, items, answers)
    probes = make_probes(model, cases, config)
    found = Measured(answers, probes, [])
    bar = tqdm(probes, desc="ablating", unit="image", disable=config.quiet)
    key |= {name: getattr(config, name) for name in ("target", "baseline", "rope", "seed")}
    if config.baseline == "dataset":
        key["dataset"] = [case.item.id for case in cases]
    for index, probe in enumerate(bar):
        own = key | {"image": probe.case.item.id, "index": index}
        own |= {"foil": probe.case.foil} if config.target == "difference" else {}
        _measure_one(_Keeper(config, own), probe, config, index, found)
    return found


@dataclass(frozen=True)
class _Keeper:
    """The parts of one picture."""

    config: HeadAttributionConfig
    key: Mapping[str, Any]

    def __call__(self, folder: str, make: Callable[[], pd.DataFrame], *settings: str) -> pd.DataFrame:
        """A part that also depends on some settings."""
        extra = {name: getattr(self.config, name) for name in settings}
        return Parts(self.config.out / "parts" / folder).get_or_make({**self.key, **extra}, make)


def _measure_one(kept: _Keeper, probe: Probe, config: HeadAttributionConfig, index: int, found: Measured) -> None:
    ends = kept("ends", lambda: pd.DataFrame([probe.ends], columns=["full", "none"]))
    full, none = ends.to_numpy()[0].tolist()
    found.ends.append((full, none))
    wanted = config.sections
    if "attribution" in wanted:
        found.heads.append(_regress(kept, "heads", probe.over_heads, len(probe.heads), config, index))
    if "curves" in wanted or "where" in wanted:
        found.rankings.append(kept("rankings", lambda: other_rankings(probe)))
    settings = ("keep", "masks", "held_out", "regression", "random_rankings")
    if "curves" in wanted:
        others = found.rankings[-1].drop(columns=["layer", "head"])
        scores = {"attribution": found.heads[-1].fit.coefficients, **{n: others[n].to_numpy() for n in others}}
        ranked = orders(scores, config.random_rankings, [config.seed, 22, index])
        found.curves.append(kept("curves", lambda: measure_curves(probe.over_heads, ranked), *settings))
    if "tokens" in wanted:
        found.receivers.append(kept("receivers", lambda: receivers(probe, config.window), "window"))
        found.edges.append(kept("edges", lambda: blocked_edges(probe, config.window), "window"))
        found.tokens.append(_regress(kept, "tokens", probe.over_tokens, len(probe.image), config, index))
        scores = {"attribution": found.tokens[-1].fit.coefficients, "attention": attention_to_tokens(probe)}
        covered = coverage(probe)
        scores |= {} if covered is None else {"object": covered}
        ranked = orders(scores, config.random_rankings, [config.seed, 23, index])
        settings = (*settings, "token_masks")
        found.token_curves.append(kept("token_curves", lambda: measure_curves(probe.over_tokens, ranked), *settings))


def _regress(
    kept: _Keeper, units: str, measure: Any, n_units: int, config: HeadAttributionConfig, index: int
) -> Regressed:
    """Random masks over heads or tokens, and their regression, both kept."""
    asked = "masks" if units == "heads" else "token_masks"
    n = n_masks(getattr(config, asked), n_units)
    seed = [config.seed, 20 if units == "heads" else 21, index]
    frame = kept(f"{units}_masks", lambda: measured(measure, n, n_units, config.keep, seed), "keep", asked)
    masks, values = from_frame(frame, n_units)

    def regress() -> pd.DataFrame:
        return as_row(fit(masks, values, config.regression, config.held_out, config.bootstrap, config.seed))

    settings = ("keep", asked, "held_out", "regression", "bootstrap")
    return Regressed(masks, values, from_row(kept(f"{units}_coefficients", regress, *settings)))


def as_row(fit: Fit) -> pd.DataFrame:
    """A fit as one row of lists and numbers."""
    return pd.DataFrame([{name: _plain(value) for name, value in vars(fit).items()}])


def from_row(frame: pd.DataFrame) -> Fit:
    """What `as_row` was made from."""
    (row,) = frame.to_dict("records")
    values: dict[str, Any] = {name: np.array(v) if isinstance(v, list) else v for name, v in row.items()}
    return Fit(**values)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
