"""The bundled models, and examples for them."""

from functools import lru_cache

import pytest

from hooked_vlm import HookedVLM
from hooked_vlm.experiments.toy.families import FAMILIES


@lru_cache
def bundled(name: str) -> HookedVLM:
    return HookedVLM.from_pretrained(name, device="cpu")


@pytest.fixture(params=FAMILIES)
def toy(request: pytest.FixtureRequest) -> HookedVLM:
    """The bundled models, one after the other."""
    return bundled(request.param)


@pytest.fixture
def qwen() -> HookedVLM:
    return bundled("toy-qwen2-vl")
