"""Flow from image tokens to text, against passes of their own and hooked scores."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from probes import ablation, probe_of, value_under
from sklearn.metrics import roc_auc_score

from hooked_vlm.experiments.head_attribution.image_flow import attention_to_tokens, coverage, inside
from hooked_vlm.experiments.head_attribution.items import Item
from hooked_vlm.experiments.head_attribution.text_flow import (
    blocked_edges,
    mean_layer,
    receivers,
    text_groups,
    windows,
    with_losses,
)
from hooked_vlm.interventions import ReplaceImageKV
from hooked_vlm.toys.pages import NAMING_PROMPT


def test_text_behind_the_image_is_shared_out_between_the_groups(toy: str) -> None:
    probe = probe_of(toy)
    groups = text_groups(probe)
    assert set(groups) == {"closing marks", "question", "assistant header", "final"}
    assert sorted(p for members in groups.values() for p in members) == list(probe.text)
    asked = [probe.case.inputs.tokens[0, p].item() for p in groups["question"]]
    assert str(probe.model.to_string(asked)).strip() == NAMING_PROMPT


def test_losses_of_text_groups_are_those_of_passes_of_their_own(toy: str) -> None:
    probe = probe_of(toy)
    frame = receivers(probe, None)
    table: Any = frame.set_index(["text", "change", "first", "stop"])["value"]
    groups, inputs = text_groups(probe), probe.case.inputs
    final = ReplaceImageKV(tuple(h for h in probe.heads if h[0] == 3), queries="final").hooks(probe.model, inputs)
    assert table["final", "ablated", 3, 4] == pytest.approx(value_under(probe, final), abs=1e-4)
    others = tuple(p for p in probe.text if p not in groups["question"])
    alone = ReplaceImageKV(probe.heads, queries=others).hooks(probe.model, inputs)
    assert table["question", "kept alone", 0, 4] == pytest.approx(value_under(probe, alone), abs=1e-4)
    last = frame["text"].iloc[-1]  # as a single token
    assert table[last, "one token ablated", 0, 4] == pytest.approx(table["final", "ablated", 0, 4], abs=1e-4)


def test_losses_of_cut_edges_are_those_of_hooked_scores(toy: str) -> None:
    probe = probe_of(toy)
    table: Any = blocked_edges(probe, 2).set_index(["source", "receiver", "first", "stop"])["value"]
    groups = text_groups(probe)

    def cut(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        for query in groups["final"]:
            scores[:, :, query, list(groups["question"])] = -torch.inf
        return scores

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", cut) for layer in (1, 2)]
    assert table["question", "final", 1, 3] == pytest.approx(value_under(probe, hooks), abs=1e-4)


def test_windows_and_mean_layers_by_hand() -> None:
    assert windows(4, None) == [(0, 4), (0, 1), (1, 2), (2, 3), (3, 4)]
    assert windows(28, None)[:3] == [(0, 28), (0, 7), (1, 8)] and windows(2, 5) == [(0, 2)]
    edge = pd.DataFrame({"first": [0, 0, 1, 2], "stop": [4, 2, 3, 4], "value": [0.0, 9.0, 6.0, 10.5]})
    losses = with_losses(edge, full=10.0, gap=10.0)
    assert losses["loss"].tolist() == pytest.approx([1.0, 0.1, 0.4, -0.05])
    assert mean_layer(losses, 4) == pytest.approx((0.5 * 0.1 + 1.5 * 0.4) / 0.5)
    assert np.isnan(mean_layer(with_losses(edge, full=0.1, gap=10.0), 4))


def test_tokens_that_are_not_kept_are_replaced_for_all_heads(toy: str) -> None:
    probe = probe_of(toy)
    some = np.random.default_rng(0).random(len(probe.image)) < 0.7
    every = np.ones_like(some)
    lost = tuple(position for position, keep in zip(probe.image, some, strict=True) if not keep)
    expected = ReplaceImageKV(probe.heads, tokens=lost).hooks(probe.model, probe.case.inputs)
    found = probe.over_tokens(np.stack([some, every, ~every]))
    full, none = value_under(probe, []), value_under(probe, ablation(probe, probe.heads))
    np.testing.assert_allclose(found, [value_under(probe, expected), full, none], atol=1e-4)


def test_object_tokens_cover_the_object(toy: str) -> None:
    probe = probe_of(toy)
    covered, mask = coverage(probe), probe.case.item.object_mask
    assert covered is not None and mask is not None and 0.02 < mask.mean() < 0.6
    boxes = probe.case.inputs.image_grid(0).boxes
    areas = np.array([(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes])
    exact = toy == "toy-qwen2-vl"  # there every token is 16 x 16 whole pixels
    assert (covered * areas).sum() / areas.sum() == pytest.approx(mask.mean(), abs=1e-9 if exact else 0.03)
    unknown = replace(probe.case, item=Item(probe.case.item.image, "star", "?"))
    assert coverage(replace(probe, case=unknown)) is None


def test_attention_to_tokens_is_the_last_row_of_all_patterns(toy: str) -> None:
    probe = probe_of(toy)
    _, cache = probe.model.run_with_cache(probe.case.inputs)
    rows = sum(cache["pattern", layer][0, :, -1].sum(0) for layer in range(probe.model.cfg.n_layers))
    assert isinstance(rows, torch.Tensor)
    np.testing.assert_allclose(attention_to_tokens(probe), rows[list(probe.image)].numpy(), rtol=1e-4, atol=1e-5)


def test_the_objects_share_by_hand() -> None:
    coefficients = np.array([3.0, -1.0, 2.0, 1.0, 0.5, 0.5, 0.0, -2.0, 0.0, 0.0])
    on_object = np.array([True, False, True, False, True, False, False, False, False, False])
    found = inside(coefficients, on_object)
    assert found["share of all tokens"] == 0.3 and found["share of the top tokens"] == 1.0
    assert found["share of positive coefficients"] == pytest.approx(5.5 / 7)
    assert found["AUC"] == pytest.approx(roc_auc_score(on_object, coefficients))
    assert np.isnan(inside(coefficients, np.ones(10, dtype=bool))["AUC"])
