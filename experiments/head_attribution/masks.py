"""Random masks over heads or image tokens, and the target under each."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float


def random_masks(n: int, n_units: int, keep: float, seed: list[int]) -> Bool[np.ndarray, "mask unit"]:
    """Each unit is kept with probability `keep`, independently."""
    return np.random.default_rng(seed).random((n, n_units)) < keep


def as_frame(kept: Bool[np.ndarray, "mask unit"], values: Float[np.ndarray, "mask"]) -> pd.DataFrame:
    """One row a mask: `kept`, its bits packed, and `value`."""
    return pd.DataFrame({"kept": [row.tobytes() for row in np.packbits(kept, axis=1)], "value": values})


def from_frame(frame: pd.DataFrame, n_units: int) -> tuple[Bool[np.ndarray, "mask unit"], Float[np.ndarray, "mask"]]:
    """Read masks back from the table of `as_frame`."""
    packed = np.stack([np.frombuffer(row, dtype=np.uint8) for row in frame["kept"]])
    return np.unpackbits(packed, axis=1, count=n_units).astype(bool), frame["value"].to_numpy(dtype=float)


def measured(
    measure: Callable[[Bool[np.ndarray, "mask unit"]], Float[np.ndarray, "mask"]],
    n: int,
    n_units: int,
    keep: float,
    seed: list[int],
) -> pd.DataFrame:
    """The target under `n` random masks."""
    kept = random_masks(n, n_units, keep, seed)
    return as_frame(kept, measure(kept))
