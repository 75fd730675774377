"""Settings of a comparison with `transformers`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class VerifyConfig:
    """One checkpoint here and in transformers, side by side on shipped pictures; exit code 0 if all agree, else 1."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-2B-Instruct."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Below float32, the errors of both against a float64 run (float32 where that does not fit) are compared."""
    device: str | None = None
    """CUDA if present by default."""
    out: Path = Path("verify.json")
    """Everything compared, with versions, hash of the weights, seed and device."""
    max_new_tokens: int = 16
    """Length of each greedy answer."""
    seed: int = 0
    """Seed of the colours of one picture."""
    quick: bool = False
    """Text alone and one picture, and nothing is timed."""
    layers: bool = False
    """A line for each layer instead of the worst one of each quantity."""
    quiet: tyro.conf.Suppress[bool] = False
    """Nothing is printed on the way."""
