"""Figures of the studies as sketches: drawn and written, but neither arranged nor fine."""

from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def sketched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arranging figures is a quarter of the time of a small study; tests of the reports themselves keep it."""
    if "report" in request.node.name:
        return
    save = Figure.savefig

    def sketch(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figure.set_layout_engine("none")
        save(figure, *args, **{**kwargs, "dpi": 20})

    monkeypatch.setattr(Figure, "savefig", sketch)
