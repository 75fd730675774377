"""Steering from two data sets to a report: vectors, held-out separability, steered beside unsteered answers.

`run(SteerConfig(Path("circles.jsonl"), Path("squares.jsonl")))`; `hooked-vlm steer` is the same from the command line.
"""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.experiments.steering.config import SteerConfig
    from hooked_vlm.experiments.steering.pipeline import Steered, run

__all__ = ["SteerConfig", "Steered", "run"]
__getattr__, __dir__ = lazy_names(__name__)
