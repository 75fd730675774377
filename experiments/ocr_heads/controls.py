"""Random heads as a control of the top heads: where they come from, how they are matched, distinct draws."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from jaxtyping import Float

from hooked_vlm.experiments.ocr_heads.config import MaskConfig, Source, TaskConfig
from hooked_vlm.experiments.ocr_heads.image_attention import attention_on_images
from hooked_vlm.experiments.ocr_heads.study import Study, head_names
from hooked_vlm.interventions import Head, all_heads
from hooked_vlm.interventions.heads import check_heads

LIVE_SHARE = 0.1
"""A head is live if its mean output norm is at least this share of the largest."""
NEAREST = 8
"""A matched head is one of this many nearest to the head it stands for, in the quantity that is matched."""
ENOUGH = 19
"""Fewer draws cannot reach p = 0.05."""
TRIES = 200
"""Attempts for each distinct set."""

MATCHED: Mapping[str, Callable[[Study], Float[np.ndarray, "layer head"]]] = {
    "layer": lambda study: np.indices(study.ocr.mean.shape)[0].astype(float),
    "norm": lambda study: study.ocr.output_norm,
    "attention": attention_on_images,
}
"""Sources that match: name -> the matched quantity of every head."""
QUANTITIES = {"layer": "layer", "norm": "output norm", "attention": "share of attention on the image"}


@dataclass(frozen=True)
class Control:
    """Distinct sets of random heads."""

    name: str
    sets: tuple[tuple[Head, ...], ...]
    origin: str
    """Where the heads come from and what matching did, in words."""


@dataclass(frozen=True)
class ChangedHeads:
    """Top heads of every kind, or named ones, and their random controls: drawn once, changed in one way or several."""

    k: int
    tops: Mapping[str, tuple[Head, ...]]
    """Kind -> heads."""
    randoms: Sequence[Mapping[str, Control]]
    """Of each source: kind -> control."""
    ranked: bool = True
    """Whether they are the top heads by a score."""

    def name(self, kind: str) -> str:
        """As conditions are named: "top 2 OCR", or "2 vision"."""
        return f"{'top ' if self.ranked else ''}{self.k} {kind}"

    @property
    def controls(self) -> list[Control]:
        """Every control once; kinds may share one."""
        return list({control.name: control for own in self.randoms for control in own.values()}.values())

    def describe(self) -> list[str]:
        """Lines that name the top heads, and say where each random control comes from."""
        lines = [f"{self.name(kind)} heads: {head_names(heads)}" for kind, heads in self.tops.items()]
        return lines + [f"{control.name}: {control.origin}" for control in self.controls]


def top_heads(study: Study, k: int) -> dict[str, tuple[Head, ...]]:
    """Top `k` OCR heads and top `k` retrieval heads."""
    return {"OCR": study.top(study.ocr, k), "retrieval": study.top(study.retrieval, k)}


def choose_heads(study: Study, config: TaskConfig, k: int) -> ChangedHeads:
    """Top `k` heads of either kind, with random heads from every configured source."""
    tops = top_heads(study, k)
    sources: tuple[Source, ...] = ("live",) if config.random_from is None else config.random_from
    randoms = [random_controls(study, source, tops, k, config.random_draws) for source in sources]
    return ChangedHeads(k, tops, randoms)


def vision_heads(study: Study, config: MaskConfig) -> ChangedHeads:
    """The named heads of the vision tower, with random heads of the tower from every configured source.

    Raises:
        InputError: a head that the tower does not have.
    """
    heads = tuple(check_heads(study.model, config.named_heads, "vision"))
    tops, k, every = {"vision": heads}, len(heads), all_heads(study.model, tower="vision")
    sources: tuple[Source, ...] = ("others",) if config.random_from is None else config.random_from
    layers = np.zeros((max(layer for layer, _ in every) + 1, max(head for _, head in every) + 1))
    layers += np.arange(len(layers))[:, None]
    randoms = []
    for source in sources:
        pool = every if source == "any" else [head for head in every if head not in heads]
        what = f"{WORDS['any' if source == 'any' else 'others']}, of the vision tower"
        quantity = layers if source == "layer" else None
        randoms.append(_controls(source, tops, k, config.random_draws, study.config.seed, pool, what, quantity))
    return ChangedHeads(k, tops, randoms, ranked=False)


def different(tops: Mapping[str, tuple[Head, ...]]) -> dict[tuple[str, ...], tuple[Head, ...]]:
    """Top heads by the kinds that have them: kinds with the same heads are together."""
    kinds: dict[frozenset[Head], tuple[str, ...]] = {}
    for kind, heads in tops.items():
        kinds[frozenset(heads)] = (*kinds.get(frozenset(heads), ()), kind)
    return {own: tops[own[0]] for own in kinds.values()}


def random_controls(
    study: Study, source: Source, tops: Mapping[str, tuple[Head, ...]], k: int, draws: int
) -> dict[str, Control]:
    """Draw the control of each kind of top heads: the same for all kinds, or matched to each.

    Returns:
        Kind -> its control; without sets if there are fewer than `k` candidates.
    """
    excluded = [head for heads in tops.values() for head in heads]
    pool = candidates(study, source, excluded)
    quantity = MATCHED[source](study) if source in MATCHED else None
    return _controls(source, tops, k, draws, study.config.seed, pool, WORDS.get(source, WORDS["matched"]), quantity)


def _controls(
    source: Source,
    tops: Mapping[str, tuple[Head, ...]],
    k: int,
    draws: int,
    seed: int,
    pool: Sequence[Head],
    what: str,
    quantity: Float[np.ndarray, "layer head"] | None,
) -> dict[str, Control]:
    """Draw from a pool, or from its heads nearest to each changed one in a quantity; `what` is the pool in words."""
    if quantity is None:
        sets = distinct_sets([pool] * k, draws, seed)
        control = Control(f"random {k} {source}", sets, _origin(sets, pool, k, what))
        return dict.fromkeys(tops, control)
    found = {}
    for kinds, heads in different(tops).items():
        sets = distinct_sets([nearest(head, pool, quantity) for head in heads], draws, seed)
        origin = _origin(sets, pool, k, what)
        if sets:
            drawn = np.mean([quantity[head] for own in sets for head in own])
            masked, all_of_them = (np.mean([quantity[head] for head in own]) for own in (heads, pool))
            origin += (
                f", each among the {NEAREST} nearest in {QUANTITIES[source]}: mean {masked:.3g} in the changed heads, "
                f"{drawn:.3g} in the control, {all_of_them:.3g} in all candidates"
            )
        control = Control(f"random {k} like {' and '.join(kinds)} in {source}", sets, origin)
        found |= dict.fromkeys(kinds, control)
    return found


WORDS = {
    "live": "live heads that score below the threshold in both scores",
    "others": "heads that are not changed",
    "any": "heads, changed ones among them",
    "matched": "heads that score below the threshold in both scores",
}


def candidates(study: Study, source: Source, excluded: Sequence[Head]) -> list[Head]:
    """Heads to draw from.

    "any": all; "others": all but the excluded; "live": those of "others" that are live and score below the threshold in
    both scores; matched sources: those of "others" that score below the threshold in both.
    """
    heads = [(layer, head) for layer in range(study.model.cfg.n_layers) for head in range(study.model.cfg.n_heads)]
    if source == "any":
        return heads
    others = [head for head in heads if head not in set(excluded)]
    if source == "others":
        return others
    scores = np.maximum(study.ocr.mean, study.retrieval.mean)
    low = [head for head in others if scores[head] < study.config.threshold]
    if source != "live":
        return low
    norms = study.ocr.output_norm
    return [head for head in low if norms[head] >= LIVE_SHARE * norms.max()]


def nearest(
    head: Head, pool: Sequence[Head], quantity: Float[np.ndarray, "layer head"], n: int = NEAREST
) -> list[Head]:
    """The `n` heads of a pool nearest to a head in a quantity, with all that are as near as the last of them."""
    distance = np.array([abs(quantity[other] - quantity[head]) for other in pool])
    if len(pool) <= n:
        return list(pool)
    return [other for other, far in zip(pool, distance, strict=True) if far <= np.sort(distance)[n - 1] + 1e-12]


def distinct_sets(pools: Sequence[Sequence[Head]], draws: int, seed: int) -> tuple[tuple[Head, ...], ...]:
    """Draw different sets with one head from each pool: `draws` of them, or all that were found where there are fewer.

    No sets if the pools hold fewer heads than sets need.
    """
    rng, found = np.random.default_rng([seed, 4]), dict[tuple[Head, ...], None]()
    for _ in range(TRIES * draws):
        own: list[Head] = []
        for i in rng.permutation(len(pools)):
            left = [head for head in pools[i] if head not in own]
            if left:
                own.append(left[rng.integers(len(left))])
        if len(own) == len(pools):
            found[tuple(sorted(own))] = None
        if len(found) == draws:
            break
    return tuple(found)


def _origin(sets: Sequence[tuple[Head, ...]], pool: Sequence[Head], k: int, what: str) -> str:
    if not sets:
        return f"no random control: {len(pool)} {what}, {k} are needed"
    possible = comb(len(pool), k)
    count = f"all {possible}" if len(sets) == possible else f"{len(sets)}"
    reach = "" if len(sets) >= ENOUGH else f" (fewer than {ENOUGH} cannot reach p = 0.05)"
    return f"{count} distinct sets{reach} of {k} from {len(pool)} {what}"
