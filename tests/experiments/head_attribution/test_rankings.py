"""Other rankings of heads, against patterns, slopes and single edits."""

from functools import partial
from typing import Any

import pytest
import torch
from probes import ablation, probe_of, value_under

from hooked_vlm.experiments.head_attribution.rankings import attention_scores_of, gradients, other_rankings


def test_attention_scores_are_those_of_the_pattern(toy: str) -> None:
    probe = probe_of(toy)
    _, cache = probe.model.run_with_cache(probe.case.inputs)
    mass, of_final, weighted = attention_scores_of(probe)
    share = probe.model.cfg.n_heads // probe.model.cfg.n_key_value_heads
    for layer, head in ((0, 1), (2, 3), (3, 2)):
        pattern = cache["pattern", layer][0, head][list(probe.text)][:, list(probe.image)]
        assert mass[layer, head] == pytest.approx(float(pattern.sum(1).mean()), rel=1e-4)
        assert of_final[layer, head] == pytest.approx(float(pattern[-1].sum()), rel=1e-4)
        values = cache["v", layer][0, list(probe.image), head // share]
        written = (values @ probe.model.blocks[layer].attn.W_O[head]).detach()
        assert weighted[layer, head] == pytest.approx(float((pattern @ written.norm(dim=-1)).mean()), rel=1e-4)


def test_attribution_patching_is_the_slope_of_ablating_a_little(toy: str) -> None:
    probe, step = probe_of(toy), 0.02
    found = gradients(probe)
    for layer, head in ((0, 0), (2, 3), (3, 1)):
        ((name, ablate),) = ablation(probe, [(layer, head)])

        def shifted(z: torch.Tensor, hook: Any, by: float, ablate: Any = ablate) -> torch.Tensor:
            return z + by * (z - ablate(z, hook))

        less, more = (value_under(probe, [(name, partial(shifted, by=by))]) for by in (-step, step))
        assert found[layer, head] == pytest.approx((more - less) / (2 * step), rel=0.02, abs=0.01)


def test_single_heads_are_ablated_and_kept_one_by_one(toy: str) -> None:
    probe = probe_of(toy)
    table: Any = other_rankings(probe)
    full, none = value_under(probe, []), value_under(probe, ablation(probe, probe.heads))
    index = probe.heads.index((2, 3))
    assert tuple(table.loc[index, ["layer", "head"]]) == (2, 3)
    others = [head for head in probe.heads if head != (2, 3)]
    assert table["single"][index] == pytest.approx(full - value_under(probe, ablation(probe, [(2, 3)])), abs=1e-4)
    assert table["alone"][index] == pytest.approx(value_under(probe, ablation(probe, others)) - none, abs=1e-4)
