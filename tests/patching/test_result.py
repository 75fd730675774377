"""What a result says on the whole, by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

from hooked_vlm import HookedVLM, InputError
from hooked_vlm.analysis.intervals import ratio_interval, ratio_of_means
from hooked_vlm.analysis.statistics import share
from hooked_vlm.patching import PatchingResult, Region
from hooked_vlm.patching.attribution import agreement_of
from hooked_vlm.patching.places import n_patches, patches_in_box

BASE, SOURCE = np.array([0.0, 1.0, 2.0]), np.array([4.0, 3.0, 2.0])
VALUES = np.array(
    [
        [[0.0, 1.0, 2.0], [4.0, 3.0, 2.0]],
        [[2.0, 2.0, 2.0], [1.0, np.nan, 5.0]],
    ]
)


def result(**changes: Any) -> PatchingResult:
    axes = {"layer": (0, 1), "place": ("image", "final")}
    settings: dict[str, Any] = {"direction": "denoising", "axes": axes, "values": VALUES, "source": SOURCE}
    return PatchingResult(what="z", base=BASE, **{**settings, **changes})


def test_normalised_effects_are_shares_of_the_way() -> None:
    found = result()
    np.testing.assert_allclose(found.normalised[0], [[0, 0, np.nan], [1, 1, np.nan]])
    np.testing.assert_allclose(found.mean, [[0.0, 1.0], [(2 + 1 + 0) / (4 + 2 + 0), (1 + 3) / (4 + 0)]])
    assert found.clean is SOURCE and found.corrupt is BASE
    noising = result(direction="noising")
    assert noising.clean is BASE and noising.corrupt is SOURCE


def test_the_interval_is_that_of_resampled_examples() -> None:
    rng = np.random.default_rng(0)
    values, scale = rng.normal(2, 1, (40, 2)), rng.normal(4, 1, 40)
    low, high = ratio_interval(values, scale, seed=0)
    np.testing.assert_allclose(ratio_of_means(values, scale), values.mean(0) / scale.mean())
    many = np.tile(values, (1, 700))  # more than are resampled at a time
    np.testing.assert_allclose(ratio_interval(many, scale, seed=0), np.tile([low, high], (1, 700)))
    drawn = np.array([(values[i].mean(0) / scale[i].mean()) for i in (rng.integers(40, size=40) for _ in range(4000))])
    np.testing.assert_allclose([low, high], np.percentile(drawn, [2.5, 97.5], axis=0), atol=0.02)
    estimate = result().estimate(layer=1, place="final")
    assert estimate.value == 1.0 and estimate.n == 2
    with pytest.raises(InputError, match="place"):
        result().estimate(layer=1)


def test_intervals_over_few_examples_are_students_or_none() -> None:
    found = result()  # three examples; of the last cell, two are known
    low, high = found._interval
    assert np.isnan([low[1, 1], high[1, 1]]).all()
    np.testing.assert_allclose([low[1, 0], high[1, 0]], 0.5)  # half of each way
    effects = np.array([0.9, 1.0, 1.4, 0.7])
    one = PatchingResult("z", {"layer": (0,)}, effects[None], np.zeros(4), np.full(4, 2.0), "denoising")
    estimate, reference = one.estimate(), stats.ttest_1samp(effects / 2, 0.0).confidence_interval()
    assert (estimate.low, estimate.high) == pytest.approx(tuple(reference))


def test_answers_that_flip_have_wilsons_interval() -> None:
    flips = np.array([[1.0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, np.nan, 1, 0, np.nan]])
    axes: Any = {"layer": (0, 1, 2)}
    patched = PatchingResult("z", axes, flips, np.zeros(5), np.ones(5), "denoising")
    assert patched.estimate(layer=0) == share(4, 5) and patched.estimate(layer=1) == share(0, 5)
    assert patched.estimate(layer=2) == share(2, 3)
    lost = PatchingResult("knock-out", axes, flips, np.ones(5), None, None).estimate(layer=0)
    assert (lost.value, lost.low, lost.high) == pytest.approx((-0.2, share(4, 5).low - 1, share(4, 5).high - 1))
    # where some were right before, the mean is no share
    mixed = PatchingResult("z", axes, flips, np.array([1.0, 0, 0, 0, 0]), np.ones(5), "denoising").estimate(layer=0)
    assert mixed.low != share(4, 5).low


def test_p_values_flip_signs_example_by_example() -> None:
    # effects: none; 4, 2, 0; 2, 1, 0; 1, 3 and one unknown. Two changed examples: 4 ways, 2 of them as far.
    np.testing.assert_allclose(result().p, [[1.0, 0.5], [0.5, 0.5]])


def test_one_example_has_no_interval_and_rounding_no_effect() -> None:
    one = PatchingResult("z", {"layer": (0,), "place": ("a",)}, np.ones((1, 1, 1)), np.zeros(1), np.ones(1), "noising")
    found = one.estimate()
    assert found.value == 1.0 and np.isnan([found.low, found.high]).all() and found.n == 1
    # six effects of one sign, but of rounding only: no p of 2 / 2**6
    rounding = replace(one, values=np.full((1, 1, 6), 5 + 1e-6), base=np.full(6, 5.0), source=np.zeros(6))
    assert rounding.p.item() == 1.0
    real = replace(rounding, values=np.full((1, 1, 6), 5.1))
    assert real.p.item() == 2 / 2**6


def test_infinite_metrics_and_an_unknown_source_are_not_numbers() -> None:
    found = result(values=np.where(VALUES == 5.0, -np.inf, VALUES), source=np.array([4.0, np.nan, 2.0]))
    assert found.summary()["n"].tolist() == [2, 2, 2, 1]
    np.testing.assert_allclose(found.mean, [[0.0, 4 / 4], [2 / 4, 1 / 4]])
    assert sorted(found.not_numbers()["example"].tolist()) == [1, 1, 1, 1, 2]


def test_tables() -> None:
    frame = result().to_dataframe()
    assert list(frame.columns) == ["layer", "place", "example", "value", "base", "source", "effect", "normalised"]
    line = frame[(frame.layer == 1) & (frame.place == "image") & (frame.example == 0)].iloc[0]
    assert (line.value, line.base, line.source, line.effect, line.normalised) == (2.0, 0.0, 4.0, 2.0, 0.5)
    assert len(frame) == 12
    summary = result().summary()
    assert summary["not_numbers"].tolist() == [0, 0, 0, 1] and summary["n"].tolist() == [3, 3, 3, 2]
    assert len(result().not_numbers()) == 1
    assert isinstance(summary, pd.DataFrame) and len(summary) == 4


def test_select_and_its_refusals() -> None:
    one = result().select(layer=1)
    assert one.axes == {"layer": (1,), "place": ("image", "final")}
    np.testing.assert_array_equal(one.values, VALUES[1:])
    with pytest.raises(InputError, match=r"'head'.*layer, place"):
        result().select(head=1)
    with pytest.raises(InputError, match=r"7.*0, 1"):
        result().select(layer=7)


def test_without_another_run_means_are_mean_effects() -> None:
    found = result(source=None, direction=None)
    np.testing.assert_allclose(found.mean, [[0, 2], [1, 2]])
    assert "normalised" not in found.to_dataframe()


def test_heatmaps_show_the_means() -> None:
    figure: Any = result().heatmap("a title")
    shown: Any = result().show("a title")  # the same, by the name that all results share
    assert shown._repr_png_() == figure._repr_png_()
    assert isinstance(figure, Figure)
    image: Any = figure.axes[0].images[0]
    np.testing.assert_allclose(image.get_array(), [[0, 1], [0.5, 1]])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["image", "final"]
    heads: Any = result(
        axes={"layer": (0, 1), "head": (0, 1), "place": ("image",)}, values=VALUES.reshape(2, 2, 1, 3)
    ).heatmap()
    np.testing.assert_allclose(heads.axes[0].images[0].get_array(), [[0, 1], [0.5, 1]])
    with pytest.raises(InputError, match="layer, head, place"):
        axes: dict[str, Any] = {"layer": (0, 1), "head": (0, 1), "place": ("image", "final")}
        result(axes=axes, values=np.zeros((2, 2, 2, 3))).heatmap()


@pytest.mark.parametrize("name", ["toy-qwen2-vl", "toy-internvl2"])
def test_overlays_put_each_value_on_its_token(name: str) -> None:
    model = HookedVLM.from_pretrained(name)
    picture = np.full((112, 128, 3), 255, dtype=np.uint8)
    inputs = model.to_inputs("Read the text.", images=picture)
    token = inputs.tokens_in_box(0, (65, 33, 67, 34))[0]
    places = tuple(range(inputs.shape[1]))
    values = np.zeros((1, len(places), 1))
    values[0, token] = 3.0
    found = PatchingResult("z", {"layer": (2,), "place": places}, values, np.zeros(1), np.ones(1), "denoising")
    figure = found.on_image(inputs, picture)
    shown = np.asarray(figure.axes[0].images[1].get_array())
    rows, cols = shown.shape
    assert shown.sum() == 3.0 and shown[int(33.5 / 112 * rows), int(66 / 128 * cols)] == 3.0
    with pytest.raises(InputError, match='where="each"'):
        result().on_image(inputs, picture)
    with pytest.raises(InputError, match="image 0"):
        replace(found, axes={"layer": (2,), "place": (0,)}, values=values[:, :1]).on_image(inputs, picture)


@pytest.mark.parametrize("name", ["toy-qwen2-vl", "toy-internvl2"])
def test_patches_of_the_vision_tower_lie_over_the_picture(name: str) -> None:
    model = HookedVLM.from_pretrained(name)
    picture = np.full((128, 128, 3), 255, dtype=np.uint8)
    inputs = model.to_inputs("Read the text.", images=picture)
    ((image, chosen),) = patches_in_box(inputs, Region((65, 33, 66, 34), part="all"))
    places = tuple(range(sum(n_patches(inputs))))
    values = np.zeros((1, len(places), 1))
    values[0, chosen] = 3.0
    found = PatchingResult("z", {"layer": (2,), "patch": places}, values, np.zeros(1), np.ones(1), "denoising")
    shown = np.asarray(found.on_image(inputs, picture).axes[0].images[1].get_array())
    rows, cols = shown.shape
    assert image == 0 and shown.sum() == 3.0 and shown[int(33.5 / 128 * rows), int(65.5 / 128 * cols)] == 3.0


def test_agreement_is_correlation() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=30)
    assert agreement_of(a, 2 * a).pearson == pytest.approx(1.0)
    assert agreement_of(a, np.exp(a)).spearman == pytest.approx(1.0)
    b = a.copy()
    b[0] = np.nan
    assert agreement_of(a, b).n == 29
    assert np.isnan(agreement_of(a, np.zeros(30)).pearson)
