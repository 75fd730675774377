"""The study of the vision tower's heads: its ablations by hand, its report, what it leaves out and refuses."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import ONE_TOY, bundled

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.head_attribution import All, Attribute, Compare, Curves, Tokens, Where, compare, run
from hooked_vlm.experiments.head_attribution.ablation import Probe, make_probes, metric_of, probe_on
from hooked_vlm.experiments.head_attribution.measurements import measure
from hooked_vlm.experiments.head_attribution.pages import heads_page
from hooked_vlm.experiments.head_attribution.rankings import gradients, other_rankings
from hooked_vlm.experiments.head_attribution.study import summary
from hooked_vlm.experiments.head_attribution.tasks import Case, toy_items
from hooked_vlm.runtime.tasks import InProcess
from hooked_vlm.toys.pages import NAMING_PROMPT

SMALL: dict[str, Any] = {"samples": 2, "masks": 24, "bootstrap": 5, "random_rankings": 1, "quiet": True}


def cases_of(name: str, n: int = 2) -> list[Case]:
    model = bundled(name)
    return [
        Case(item, model.to_inputs(item.question, images=item.image), model.to_single_token(item.name), None)
        for item in toy_items(n, 0, NAMING_PROMPT)
    ]


def probes_of(name: str, baseline: Any) -> list[Probe]:
    return make_probes(bundled(name), cases_of(name), Attribute(tower="vision", baseline=baseline))


def by_hand(probe: Probe, heads: Any, written: Any) -> float:
    """The target where heads write some numbers [layer, head, d_head] at every patch."""

    def write(z: torch.Tensor, hook: Any, layer: int, head: int) -> None:
        z[:, :, head] = written[layer, head]

    hooks = [(f"vision.blocks.{la}.attn.hook_z", partial(write, layer=la, head=head)) for la, head in heads]
    with torch.no_grad():
        logits = probe.model.run_with_hooks(probe.case.inputs, fwd_hooks=hooks)
    return float(logits[0, -1, probe.case.target])


def outputs(probe: Probe) -> torch.Tensor:
    """Every head's output at every patch [layer, patch, head, d_head]."""
    _, cache = probe.model.run_with_cache(probe.case.inputs)
    layers = range(probe.shape[0])
    return torch.stack([cache[f"vision.blocks.{layer}.attn.hook_z"].flatten(0, 1) for layer in layers])


@pytest.mark.parametrize("name", ONE_TOY)
@pytest.mark.parametrize("baseline", ["mean", "dataset", "zero"])
@pytest.mark.repeats_shapes
def test_ablated_heads_write_their_baseline(name: str, baseline: Any) -> None:
    probes = probes_of(name, baseline)
    every = [outputs(probe) for probe in probes]
    means = {"mean": every[0].mean(1), "dataset": torch.cat(every, 1).mean(1), "zero": 0 * every[0].mean(1)}
    probe = probes[0]
    assert probe.shape == (3, 4) and len(probe.heads) == 12
    kept = np.random.default_rng(0).random((3, 12)) < 0.5
    found = probe.over_heads(kept)
    expected = [
        by_hand(probe, [h for h, k in zip(probe.heads, own, strict=True) if not k], means[baseline]) for own in kept
    ]
    assert found == pytest.approx(expected, abs=1e-3) and np.ptp(found) > 0.1
    assert probe.ends == pytest.approx(
        (by_hand(probe, [], None), by_hand(probe, probe.heads, means[baseline])), abs=1e-3
    )
    again = probe_on(probe.model, *probe.portable())
    assert again.over_heads(kept) == pytest.approx(found, abs=1e-5)


@pytest.mark.repeats_shapes
def test_rankings_without_attention_to_the_image() -> None:
    probe = probes_of("toy-qwen2-vl", "mean")[0]
    table: Any = other_rankings(probe)
    assert list(table.columns) == ["layer", "head", "single", "alone", "gradient"]
    means, z = outputs(probe).mean(1), outputs(probe)
    full = by_hand(probe, [], None)
    index = probe.heads.index((1, 2))
    assert table["single"][index] == pytest.approx(full - by_hand(probe, [(1, 2)], means), abs=1e-3)
    found, step = gradients(probe), 0.02
    assert found.shape == (3, 4)
    for layer, head in ((0, 0), (1, 2), (2, 3)):
        shifts = [z[layer][:, head] + by * (z[layer][:, head] - means[layer, head]) for by in (-step, step)]
        less, more = (by_hand(probe, [(layer, head)], {(layer, head): shift}) for shift in shifts)
        assert found[layer, head] == pytest.approx((more - less) / (2 * step), rel=0.03, abs=0.01)


@pytest.mark.repeats_shapes
def test_a_run_reports_the_tower_and_leaves_token_flow_out(tmp_path: Path) -> None:
    model = bundled("toy-qwen2-vl")
    result = run(All(out=tmp_path / "vision", tower="vision", **SMALL), model)
    assert result.measured.coefficients.shape == (2, 12) and not result.judged
    assert not result.measured.tokens and not result.measured.edges
    assert not (tmp_path / "vision" / "parts" / "tokens_masks").exists()
    assert result.answer[0].startswith(("Heads of the vision tower", "No head adds"))
    text = (tmp_path / "vision" / "report.html").read_text(encoding="utf-8")
    assert "3 layers of 4 heads" in text and "token flow is about these and left out" in text
    assert "patches x layers of the vision tower" in text and "Attention in the vision tower adds" in text
    assert "attention to the image" not in set(result.tables["curve_measures"]["ranking"])
    assert "nan" not in summary(result)
    with pytest.raises(StudyError, match="language model"):
        heads_page(result.measured, 0)
    run(Attribute(out=tmp_path / "text", **SMALL), model)
    page = compare(Compare((tmp_path / "vision", tmp_path / "text"), tmp_path / "both"))
    assert "toy-qwen2-vl, vision tower" in page.read_text(encoding="utf-8")


@pytest.mark.repeats_shapes
def test_both_towers_may_share_a_folder(tmp_path: Path) -> None:
    model = bundled("toy-qwen2-vl")
    configs = [Attribute(out=tmp_path, tower=tower, **SMALL) for tower in ("language", "vision", "language")]
    first, vision, again = (measure(model, config, InProcess(model)) for config in configs)
    assert vision.coefficients.shape[1] == 12 and first.coefficients.shape[1] == 16
    pd.testing.assert_frame_equal(first.answers, again.answers)
    assert (first.coefficients == again.coefficients).all()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Tokens(), "--tower vision has no token flow"),
        (All(baseline="knockout"), "--baseline knockout.*--baseline zero"),
        (Where(rope="after"), "--rope after.*not rotated"),
    ],
)
def test_what_has_no_meaning_in_the_tower_is_refused(config: Any, words: str) -> None:
    with pytest.raises(StudyError, match=words):
        replace(config, tower="vision").check()


def test_more_heads_than_the_tower_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"--top 13.*12"):
        run(Curves(out=tmp_path, tower="vision", top=13, **SMALL), bundled("toy-qwen2-vl"))


def test_a_metric_of_the_answer_is_the_same_in_both_towers() -> None:
    case = cases_of("toy-qwen2-vl", 1)[0]
    probe = Probe(bundled("toy-qwen2-vl"), case, metric_of(case, "logit"), "zero", tower="vision")
    text = replace(probe, tower="language", baseline="mean")
    assert probe.ends[0] == pytest.approx(text.ends[0], abs=1e-4) and probe.ends[1] != pytest.approx(text.ends[1])
