"""`SweepResult.show`: effects lie where their heads, layers and positions are."""

from typing import Any

import numpy as np
import pytest
import tiny_qwen2_vl as tiny
import torch

from hooked_vlm import InputError, sweep
from hooked_vlm.interventions import AddVector, Compose, PatchActivation, ReplaceImageKV, ScaleHeads, ZeroHeads
from hooked_vlm.metrics import log_prob
from hooked_vlm.sweeps.plan import make_plan
from hooked_vlm.sweeps.run import SweepResult


def result(interventions: Any, n_rows: int = 1) -> SweepResult:
    """Effects that are all different: the number of the run, and in further rows its tenfold."""
    values = torch.arange(len(interventions)).float()[:, None] * torch.tensor([1.0, 10.0])[:n_rows]
    plan = make_plan(tiny.tiny_model(), tiny.inputs(tiny.ONE_IMAGE), (), "last", None)
    return SweepResult(values + 5, torch.full((n_rows,), 5.0), tuple(interventions), plan)


def cells(figure: Any) -> dict[tuple[str, str], float]:
    """The values of a heatmap by the labels of row and column."""
    axes = figure.axes[0]
    names = [[tick.get_text() for tick in ticks] for ticks in (axes.get_yticklabels(), axes.get_xticklabels())]
    values = np.ma.filled(axes.images[0].get_array(), np.nan)
    return {(names[0][r], names[1][c]): float(v) for (r, c), v in np.ndenumerate(values) if not np.isnan(v)}


def test_heads_lie_by_layer_and_head_in_whatever_order_they_ran() -> None:
    heads = [(3, 1), (0, 2), (1, 0), (0, 0), (3, 3)]
    figure = result([ZeroHeads((head,)) for head in heads]).show()
    assert cells(figure) == {(str(layer), str(head)): n for n, (layer, head) in enumerate(heads)}
    assert (figure.axes[0].get_ylabel(), figure.axes[0].get_xlabel()) == ("layer", "head")
    assert figure.axes[0].get_title() == "ZeroHeads"
    assert result([ZeroHeads((head,)) for head in heads]).show("mine").axes[0].get_title() == "mine"


def test_single_positions_and_named_ones_lie_by_layer_and_position() -> None:
    def patch(layer: int, positions: Any) -> PatchActivation:
        return PatchActivation(f"blocks.{layer}.hook_resid_pre", torch.zeros(1, 8, 4), positions)

    found = cells(result([patch(1, (7,)), patch(0, (12,)), patch(10, "final"), patch(1, (12,))]).show())
    assert found == {("1", "7"): 0, ("0", "12"): 1, ("10", "final"): 2, ("1", "12"): 3}
    steered = [AddVector(f"blocks.{layer}.hook_resid_post", torch.ones(4)) for layer in (2, 1)]
    figure = result(steered).show()
    assert cells(figure) == {("1", "all positions"): 1, ("2", "all positions"): 0}
    assert figure.axes[0].get_title() == "AddVector blocks.{l}.hook_resid_post"


def test_heads_of_patched_activations_lie_by_head() -> None:
    z = torch.zeros(1, 8, 4, 2)
    runs = [PatchActivation(f"blocks.{layer}.attn.hook_z", z, "final", [head]) for layer in (0, 1) for head in (3, 2)]
    assert cells(result(runs).show()) == {("0", "3"): 0, ("0", "2"): 1, ("1", "3"): 2, ("1", "2"): 3}


@pytest.mark.parametrize(
    "runs",
    [
        [ZeroHeads(((0, 1),)), ZeroHeads(((0, 1), (0, 2)))],
        [ZeroHeads(((0, 1),)), ScaleHeads(((0, 2),), 0.5)],
        [ZeroHeads(((0, 1),)), ZeroHeads(((0, 1),))],
        [ScaleHeads(((0, 1),), 0.5), ScaleHeads(((0, 2),), 2.0)],
        [ZeroHeads(((0, 1),)), ZeroHeads(((0, 2),), tower="vision")],
        [ReplaceImageKV(((0, 1),)), ReplaceImageKV(((0, 2),), queries="text")],
        [AddVector(f"blocks.{layer}.hook_resid_post", torch.ones(4), scale=1.0 + layer) for layer in (0, 1)],
        [Compose((ZeroHeads(((0, 1),)),)), ZeroHeads(((1, 1),))],
        [AddVector("hook_embed", torch.ones(4)), AddVector("blocks.0.hook_resid_post", torch.ones(4))],
    ],
    ids=[
        "several heads",
        "two kinds",
        "one cell twice",
        "two factors",
        "two towers",
        "two queries",
        "two scales",
        "composed",
        "no layer",
    ],
)
def test_runs_without_a_grid_are_a_list_in_their_order(runs: list[Any]) -> None:
    figure = result(runs).show()
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == [str(run) for run in runs]
    np.testing.assert_array_equal(np.asarray(figure.axes[0].images[0].get_array())[:, 0], range(len(runs)))


def test_rows_are_averaged_and_the_scale_says_so() -> None:
    figure = result([ZeroHeads(((0, head),)) for head in range(3)], n_rows=2).show()
    assert cells(figure) == {("0", str(head)): 5.5 * head for head in range(3)}
    assert figure.axes[1].get_ylabel() == "effect on the metric, mean of 2 rows"


def test_a_sweep_shows_its_own_effects() -> None:
    model, inputs = tiny.tiny_model(), tiny.inputs(tiny.ONE_IMAGE)
    heads = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    found = sweep(model, inputs, [ZeroHeads((head,)) for head in heads], log_prob(5))
    shown = cells(found.show())
    for (layer, head), effect in zip(heads, found.effects.mean(1), strict=True):
        assert shown[str(layer), str(head)] == pytest.approx(float(effect))
    with pytest.raises(InputError, match="no interventions"):
        sweep(model, inputs, [], log_prob(5)).show()
