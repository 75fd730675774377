"""The bundled models by name."""

import pytest

from tools.toy_training.families import FAMILIES


@pytest.fixture(params=FAMILIES)
def toy(request: pytest.FixtureRequest) -> str:
    """The bundled models' names, one after the other."""
    return request.param
