"""Figures of the studies as sketches."""

import pytest


@pytest.fixture(autouse=True)
def sketched(request: pytest.FixtureRequest) -> None:
    """Arranging figures and setting their type is half the time of a small study; tests of the reports themselves keep
    it."""
    if "report" not in request.node.name:
        request.getfixturevalue("sketches")
