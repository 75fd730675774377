"""Figure of the separability by layer."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hooked_vlm.experiments.common.figures import COLOURS, DOUBLE, SINGLE, new_figure, styled

MANY = 12
"""Layers from which on the figure takes two columns of a paper."""


@styled
def area_by_layer(separability: pd.DataFrame, best: int) -> Figure:
    """AUC of every layer with its 95% interval; chance is dotted, the chosen layer in another colour."""
    figure = new_figure(DOUBLE if len(separability) > MANY else SINGLE, 2.2)
    axes = figure.subplots()
    axes.axhline(0.5, color=COLOURS[-1], linewidth=0.8, linestyle=":")
    chosen = separability["layer"] == best
    for own, colour in ((separability[~chosen], COLOURS[0]), (separability[chosen], COLOURS[1])):
        reach = (own["AUC"] - own["low"], own["high"] - own["AUC"])
        axes.errorbar(own["layer"], own["AUC"], reach, fmt=".", color=colour, linewidth=1, markersize=4)
    axes.set(xlabel="layer", ylabel="AUC of held-out items", ylim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
