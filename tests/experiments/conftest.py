"""Figures of the studies as sketches: drawn and written, but neither arranged nor fine, and without axes."""

from typing import Any

import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def sketched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arranging figures and setting their type is half the time of a small study; tests of the reports themselves keep
    it."""
    if "report" in request.node.name:
        return
    save = Figure.savefig

    def sketch(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figure.set_layout_engine("none")
        for axes in figure.axes:
            axes.set_axis_off()
        with rc_context({"pdf.use14corefonts": True}):
            save(figure, *args, **{**kwargs, "dpi": 20})

    monkeypatch.setattr(Figure, "savefig", sketch)
