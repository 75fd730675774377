"""Result of a patching experiment: the metric of every cell on every example, with means, intervals and p values."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from hooked_vlm.analysis.intervals import ratio_interval, ratio_of_means, share_interval
from hooked_vlm.analysis.pictures import heatmap, overlay
from hooked_vlm.analysis.statistics import Estimate, paired_p
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.boxes import Part
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.patching.pairs import Direction
from hooked_vlm.patching.places import patches_on_image

Label = str | int
ROUNDING = 1e-5
"""Two runs whose metrics are relatively closer than this are the same: nothing is a share of their difference."""


@dataclass(frozen=True)
class Agreement:
    """Correlations of estimated and real effects over cells and examples: the quality of attribution patching."""

    pearson: float
    spearman: float
    n: int

    def __str__(self) -> str:
        return f"Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f} over {self.n} effects"


@dataclass(frozen=True, eq=False)
class PatchingResult:
    """The metric of every cell, example by example; cells are the product of the axes.

    Values that are not numbers are kept, left out of means, and listed by `not_numbers`.
    """

    what: str
    axes: dict[str, tuple[Label, ...]]
    values: Float[np.ndarray, "*cells example"]
    base: Float[np.ndarray, "example"]
    """The metric of the run that is edited, without an edit."""
    source: Float[np.ndarray, "example"] | None
    """The metric of the run the patches come from; None where nothing is patched in (knock-out)."""
    direction: Direction | None
    seed: int = 0
    """Seed of the bootstrap and of the flips of signs."""
    estimated: bool = False
    """Whether effects are estimates from gradients instead of real runs."""
    agreement: Agreement | None = None
    """Agreement of estimates with real patches of some cells."""

    @property
    def n_examples(self) -> int:
        return len(self.base)

    @property
    def clean(self) -> Float[np.ndarray, "example"]:
        """The metric of the clean run."""
        return self.source if self.direction == "denoising" and self.source is not None else self.base

    @property
    def corrupt(self) -> Float[np.ndarray, "example"] | None:
        """The metric of the corrupt run."""
        return self.base if self.direction == "denoising" else self.source

    @property
    def effects(self) -> Float[np.ndarray, "*cells example"]:
        """Change of the metric by each edit."""
        with np.errstate(invalid="ignore"):  # infinite metrics
            return self.values - self.base

    @property
    def normalised(self) -> Float[np.ndarray, "*cells example"]:
        """Effects as shares of the way from the edited run to the other: 0 changes nothing, 1 goes all the way.

        NaN for an example whose two runs have the same metric, up to rounding.
        """
        gap = self._gap
        return self.effects / np.where(gap == 0, np.nan, gap)

    @property
    def _gap(self) -> Float[np.ndarray, "example"]:
        if self.source is None:
            return np.ones_like(self.base)
        with np.errstate(invalid="ignore"):
            gap = self.source - self.base
            return np.where(np.abs(gap) <= ROUNDING * (1 + np.abs(self.base)), 0.0, gap)

    @property
    def counted(self) -> Bool[np.ndarray, "*cells example"]:
        """Whether the metrics of the cell and of both runs are finite."""
        return np.isfinite(self.effects) & np.isfinite(self._gap)

    @cached_property
    def _interval(self) -> tuple[Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"]]:
        """Intervals of `mean`: Wilson's where it is a share of the examples, else those of `ratio_interval`."""
        values, gap = np.where(self.counted, self.values, np.nan), self._gap
        start = self.base[np.isfinite(self.base)]
        whole = gap[np.isfinite(gap)]
        shares = len(start) and (start == start[0]).all() and (whole == whole[0]).all() and abs(whole[0]) == 1
        if shares and np.isin(values[self.counted], (0.0, 1.0)).all() and start[0] in (0.0, 1.0):
            ends = np.stack(share_interval(np.moveaxis(values, -1, 0)))
            low, high = np.sort((ends - start[0]) / whole[0], axis=0)
            return low, high
        return ratio_interval(np.moveaxis(self.effects, -1, 0), gap, self.seed)

    @property
    def mean(self) -> Float[np.ndarray, "*cells"]:
        """The mean effect over the mean way from the edited run to the other, over examples (knock-out: the mean
        effect). A ratio of means, because a single example's two runs may be next to equal."""
        return ratio_of_means(np.moveaxis(self.effects, -1, 0), self._gap)

    def estimate(self, **labels: Label) -> Estimate:
        """The mean of one cell with its 95% interval over examples: `estimate(layer=2, place="image")`.

        Fewer than three examples have no interval (NaN), fewer than ten Student's, more a bootstrap interval
        (`hooked_vlm.analysis.intervals`); a metric of 0 and 1 that starts from one value has Wilson's.
        """
        cell = self.select(**labels)
        if cell.values.ndim > 1 and cell.values[..., 0].size > 1:
            free = [name for name, own in cell.axes.items() if len(own) > 1]
            raise InputError(f"one cell is meant: also give {', '.join(free)}")
        mean, low, high = (float(x.reshape(-1)[0]) for x in (cell.mean, *cell._interval))
        return Estimate(mean, low, high, int(cell.counted.sum()))

    @cached_property
    def p(self) -> Float[np.ndarray, "*cells"]:
        """Two-sided p of each cell that it has no effect (signs of the effects flipped), not corrected for their
        number. With n examples it is at least 2 / 2**n. Effects up to rounding are none."""
        rounding = np.abs(self.effects) <= ROUNDING * (1 + np.abs(self.base))
        flat = np.where(self.counted, np.where(rounding, 0.0, self.effects), np.nan).reshape(-1, self.n_examples)
        found = [paired_p(own, np.zeros_like(own), self.seed) for own in flat]
        return np.array(found).reshape(self.values.shape[:-1])

    def select(self, **labels: Label) -> "PatchingResult":
        """The same of some labels, each axis by its name: `select(layer=2, place="image")`. Axes stay, with one label.

        Raises:
            InputError: an unknown axis or label.
        """
        axes, values = dict(self.axes), self.values
        for name, label in labels.items():
            if name not in axes:
                raise InputError(f"there is no axis {name!r}: this result has {', '.join(axes)}")
            if label not in axes[name]:
                raise InputError(f"the axis {name!r} has no {label!r}: it has {', '.join(map(str, axes[name]))}")
            values = values.take([axes[name].index(label)], axis=list(axes).index(name))
            axes[name] = (label,)
        return replace(self, axes=axes, values=values)

    def to_dataframe(self) -> pd.DataFrame:
        """A line for each cell and example: the axes, `example`, `value`, `base`, `source`, `effect`, `normalised`."""
        frame = self._frame(self.values.shape[-1])
        frame["example"] = np.tile(np.arange(self.n_examples), len(frame) // max(self.n_examples, 1))
        frame["value"] = self.values.reshape(-1)
        frame["base"] = np.broadcast_to(self.base, self.values.shape).reshape(-1)
        if self.source is not None:
            frame["source"] = np.broadcast_to(self.source, self.values.shape).reshape(-1)
        frame["effect"] = self.effects.reshape(-1)
        if self.source is not None:
            frame["normalised"] = self.normalised.reshape(-1)
        return frame

    def summary(self) -> pd.DataFrame:
        """One line for each cell: the axes, `mean`, its 95% interval `low` to `high`, `p`, the examples it is made of
        (`n`), and those whose metric is not a number (`not_numbers`)."""
        frame = self._frame(1)
        for name, column in zip(("mean", "low", "high"), (self.mean, *self._interval), strict=True):
            frame[name] = column.reshape(-1)
        frame["p"] = self.p.reshape(-1)
        n = self.counted.sum(-1).reshape(-1)
        frame["n"], frame["not_numbers"] = n, self.n_examples - n
        return frame

    def not_numbers(self) -> pd.DataFrame:
        """The lines of `to_dataframe` whose metric, or that of one of the two runs, is not a finite number."""
        return self.to_dataframe().loc[~self.counted.reshape(-1)]

    def _frame(self, repeats: int) -> pd.DataFrame:
        rows = [labels for labels in product(*self.axes.values()) for _ in range(repeats)]
        columns: dict[str, Any] = {name: [row[i] for row in rows] for i, name in enumerate(self.axes)}
        return pd.DataFrame(columns)

    # ---------------------------------------------------------------- pictures

    def show(self, title: str = "", **labels: Label) -> Figure:
        """Draw the means; a notebook shows the figure. The name that all results share: here it is `heatmap`."""
        return self.heatmap(title, **labels)

    def heatmap(self, title: str = "", **labels: Label) -> Figure:
        """The means over two axes; further ones are fixed by labels, as in `select`.

        Raises:
            InputError: more than two axes are left.
        """
        cells = self.select(**labels)
        axes = {name: own for name, own in cells.axes.items() if len(own) > 1 or len(cells.axes) <= 2}
        if len(axes) > 2:
            raise InputError(f"a heatmap has two axes: fix one of {', '.join(axes)} by a label")
        while len(axes) < 2:  # axes of one label are shown where nothing else is
            name = next(name for name in cells.axes if name not in axes)
            axes = {n: own for n, own in cells.axes.items() if n in axes or n == name}
        (row_name, rows), (column_name, columns) = axes.items()
        values = cells.mean.reshape(len(rows), len(columns))
        return heatmap(values, rows, columns, (row_name, column_name), self.label, title or self.title)

    def on_image(
        self,
        inputs: VLMInputs,
        picture: Any,
        image: int = 0,
        part: Part = "tiles",
        title: str = "",
        **labels: Label,
    ) -> Figure:
        """The means of a sweep over "each" position (vision tower: patch), laid over the picture: a panel for each
        layer (and head) that labels leave. Tokens that the sweep left out stay clear.

        Args:
            inputs: those that were run with patches: corrupt ones in denoising, clean ones in noising. (Pairs with the
                same columns may give either.)
            picture: the original image, as for `model.to_inputs`.
            image: its number in the inputs.
            part: of a tiled image, its tiles or its thumbnail.

        Raises:
            InputError: the places are not positions or patches, or none of them lies in the image.
        """
        cells = self.select(**labels)
        axis = "patch" if "patch" in cells.axes else "place"
        places = cells.axes.get(axis, ())
        if not places or not all(isinstance(p, int) for p in places):
            raise InputError('the places of this result are not positions: sweep where="each" to lay it over a picture')
        if axis == "patch":
            numbers = patches_on_image(inputs, image, part)
        else:
            numbers = inputs.on_image(image, inputs.image_tokens(image), part)
        column = {place: i for i, place in enumerate(places)}
        index = np.array([[column.get(int(n), -1) for n in row] for row in numbers])
        if (index < 0).all():
            raise InputError(f"no place of this result lies in image {image}: give the inputs that were swept")
        names = [name for name in cells.axes if name != axis]
        panels = list(product(*(cells.axes[name] for name in names)))
        values = np.where(index < 0, np.nan, cells.mean.reshape(len(panels), len(places))[:, index])
        titles = [", ".join(f"{n} {x}" for n, x in zip(names, own, strict=True)) for own in panels]
        figure = overlay(picture, values, titles, self.label)
        figure.suptitle(title or self.title)
        return figure

    @property
    def title(self) -> str:
        """Title of figures."""
        return f"{self.what}, {self.direction}" if self.direction else self.what

    @property
    def label(self) -> str:
        """Name of the means in figures."""
        what = "effect" if self.source is None else "normalised effect"
        return f"{what}, estimated" if self.estimated else what
