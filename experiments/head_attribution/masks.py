"""Masks over heads or image tokens, and the target under each.

Designs, of which "random" needs no assumption:

- random: each unit is kept with probability `keep`, independently.
- antithetic: each mask is followed by its complement, which cancels what is even in the mask (keep 0.5 only).
- balanced: in every block of `BLOCK` masks each unit is kept equally often.
- paired: each mask comes twice, with one unit kept and dropped; the units take turns.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from hooked_vlm.experiments.head_attribution.config import BLOCK, Design

PAIRED = {"random": 1, "antithetic": 2, "balanced": 1, "paired": 2}
"""Consecutive masks that are drawn together, by design."""
Masks = Bool[np.ndarray, "mask unit"]


def draw_masks(design: Design, n: int, n_random: int, n_units: int, keep: float, seed: list[int]) -> Masks:
    """Draw `n` masks, the last `n_random` of them random in every design: the regression is judged by these."""
    if design == "random":
        return random_masks(n, n_units, keep, seed)
    drawn = DESIGNS[design](n - n_random, n_units, keep, np.random.default_rng([*seed, 1]))
    return np.concatenate((drawn, random_masks(n_random, n_units, keep, seed)))


def random_masks(n: int, n_units: int, keep: float, seed: list[int]) -> Masks:
    """Each unit is kept with probability `keep`, independently."""
    return np.random.default_rng(seed).random((n, n_units)) < keep


def antithetic_masks(n: int, n_units: int, keep: float, rng: np.random.Generator) -> Masks:
    """Each mask, then its complement."""
    first = rng.random((-(-n // 2), n_units)) < keep
    return np.stack((first, ~first), axis=1).reshape(-1, n_units)[:n]


def balanced_masks(n: int, n_units: int, keep: float, rng: np.random.Generator) -> Masks:
    """Blocks in which each unit is kept equally often, in an order of its own; the last block may be cut off."""
    kept = np.arange(BLOCK) < round(keep * BLOCK)
    blocks = np.broadcast_to(kept[:, None], (-(-n // BLOCK), BLOCK, n_units))
    return rng.permuted(blocks, axis=1).reshape(-1, n_units)[:n]


def paired_masks(n: int, n_units: int, keep: float, rng: np.random.Generator) -> Masks:
    """Each mask with one unit kept, then dropped; every unit once before any comes again."""
    pairs = -(-n // 2)
    rounds = -(-pairs // n_units)
    turns = rng.permuted(np.tile(np.arange(n_units), (rounds, 1)), axis=1).reshape(-1)[:pairs]
    found = np.repeat(rng.random((pairs, n_units)) < keep, 2, axis=0)
    found[::2][np.arange(pairs), turns] = True
    found[1::2][np.arange(pairs), turns] = False
    return found[:n]


DESIGNS: dict[str, Callable[[int, int, float, np.random.Generator], Masks]] = {
    "antithetic": antithetic_masks,
    "balanced": balanced_masks,
    "paired": paired_masks,
}


def as_frame(kept: Masks, values: Float[np.ndarray, "mask"]) -> pd.DataFrame:
    """One row a mask: `kept`, its bits packed, and `value`."""
    return pd.DataFrame({"kept": [row.tobytes() for row in np.packbits(kept, axis=1)], "value": values})


def from_frame(frame: pd.DataFrame, n_units: int) -> tuple[Masks, Float[np.ndarray, "mask"]]:
    """Read masks back from the table of `as_frame`."""
    packed = np.stack([np.frombuffer(row, dtype=np.uint8) for row in frame["kept"]])
    return np.unpackbits(packed, axis=1, count=n_units).astype(bool), frame["value"].to_numpy(dtype=float)
