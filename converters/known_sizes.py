"""What is known of a published model."""

from dataclasses import dataclass
from typing import Any

SEEN = "values seen in published config.json files"


@dataclass(frozen=True)
class KnownModel:
    """One published checkpoint."""

    config: dict[str, Any]
    """Its `config.json`."""
    n_params: int
    """Number of parameters; a tied matrix counts once."""
    certainty: str = SEEN
    """The source of the values, and what is not verified."""
