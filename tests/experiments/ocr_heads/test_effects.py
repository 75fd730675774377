"""Random controls and tests against them: where heads come from, what is tested, and how often a test errs."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.experiments.ocr_heads import MaskConfig, effects
from hooked_vlm.experiments.ocr_heads.answers import METRICS
from hooked_vlm.experiments.ocr_heads.changed import UNCHANGED, Condition, answer_all, tasks_of
from hooked_vlm.experiments.ocr_heads.controls import (
    MATCHED,
    NEAREST,
    candidates,
    choose_heads,
    distinct_sets,
    nearest,
    random_controls,
    top_heads,
)
from hooked_vlm.experiments.ocr_heads.data.scored import toy_pages
from hooked_vlm.experiments.ocr_heads.effects import Tested, against_controls, effect_answer, summarize
from hooked_vlm.experiments.ocr_heads.examples import to_inputs
from hooked_vlm.experiments.ocr_heads.image_attention import image_shares
from hooked_vlm.experiments.ocr_heads.masking import masked, masking_conditions
from hooked_vlm.experiments.ocr_heads.study import Study

SMALL: dict[str, Any] = {"samples": 6, "quiet": True, "device": "cpu", "max_new_tokens": 6, "task_samples": 4}


def table_of(values: dict[str, np.ndarray], task: str = "page") -> pd.DataFrame:
    """Answers with a given value of every metric for each draw and sample."""
    rows = [
        {"task": task, "condition": name, "draw": draw, "heads": "", "sample": sample, "reply": "", "metric": "exact"}
        | dict.fromkeys(METRICS, value)
        for name, table in values.items()
        for (draw, sample), value in np.ndenumerate(table)
    ]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- where random heads come from


@pytest.mark.repeats_shapes
def test_where_random_heads_come_from(qwen: HookedVLM, tmp_path: Path) -> None:
    study = Study(MaskConfig(**SMALL, out=tmp_path), qwen)
    top = study.top(study.ocr, 2)
    live, others, every = (candidates(study, source, top) for source in ("live", "others", "any"))
    assert set(live) <= set(others) < set(every) and len(every) == 16 and not set(others) & set(top)
    assert all(study.ocr.mean[head] < 0.1 and study.retrieval.mean[head] < 0.1 for head in live)
    tops = {"OCR": top}
    assert random_controls(study, "live", tops, 17, 3)["OCR"].sets == ()
    assert "17 are needed" in random_controls(study, "live", tops, 17, 3)["OCR"].origin
    few, enough = (random_controls(study, "any", tops, 2, n)["OCR"].origin for n in (18, 19))
    assert "0.05" in few and "0.05" not in enough
    assert random_controls(study, "any", tops, 3, 2)["OCR"] == random_controls(study, "any", tops, 3, 2)["OCR"]


@pytest.mark.repeats_shapes
@pytest.mark.parametrize("source", list(MATCHED))
def test_matched_heads_are_near_in_what_they_are_matched_on(source: Any, toy: HookedVLM, tmp_path: Path) -> None:
    study = Study(MaskConfig(**SMALL, out=tmp_path), toy)
    tops, quantity = top_heads(study, 3), MATCHED[source](study)
    for kind, control in random_controls(study, source, tops, 3, 20).items():
        assert len(set(control.sets)) == 20 and source in control.name
        pool = candidates(study, source, [head for heads in tops.values() for head in heads])
        near = {head for top in tops[kind] for head in nearest(top, pool, quantity)}
        assert {head for own in control.sets for head in own} <= near <= set(pool)
        assert f"{np.mean([quantity[head] for head in tops[kind]]):.3g} in the changed heads" in control.origin


def test_the_nearest_heads_are_all_that_are_as_near_as_the_last() -> None:
    pool = [(layer, head) for layer in range(4) for head in range(4)]
    layer = np.indices((4, 4))[0].astype(float)
    assert nearest((0, 0), pool, layer, 2) == pool[:4]
    assert nearest((0, 0), pool, layer, 5) == pool[:8]
    assert nearest((0, 0), pool[:NEAREST], layer) == pool[:NEAREST]


def test_draws_are_distinct_and_all_sets_where_there_are_few() -> None:
    pool = [(0, head) for head in range(7)]
    assert set(distinct_sets([pool] * 2, 50, 0)) == set(combinations(pool, 2))  # 21
    found = distinct_sets([pool] * 3, 20, 0)
    assert len(set(found)) == 20 and all(len(set(own)) == 3 for own in found)
    assert distinct_sets([pool] * 8, 20, 0) == ()
    assert set(distinct_sets([pool[:1], pool[:2]], 5, 0)) == {((0, 0), (0, 1))}  # the first pool's head is taken
    counts = np.zeros(7)
    for seed in range(300):
        for _, head in distinct_sets([pool] * 2, 1, seed)[0]:
            counts[head] += 1
    assert counts.min() > 55 and counts.max() < 120  # 600 / 7 = 86 each, sd 8


@pytest.mark.repeats_shapes
def test_random_controls_hold_no_changed_head_of_either_kind(toy: HookedVLM, tmp_path: Path) -> None:
    config = MaskConfig(**SMALL, out=tmp_path, random_from=("live", "others", "layer"))
    study = Study(config, toy)
    conditions = masking_conditions([choose_heads(study, config, 3)], config.modes)
    tops = {head for c in conditions if c.name.startswith("top") for head in c.heads}
    randoms = [c for c in conditions if c.name.startswith("random")]
    assert len(tops) > 3 and not any(tops & set(c.heads) for c in randoms)  # the two kinds differ
    named = {c.name for c in randoms}
    assert all(set(c.controls) <= named and len(c.controls) == 3 for c in conditions if c.name.startswith("top"))
    assert len({(c.name, c.heads) for c in randoms}) == len(randoms) == 20 * len(named)


def test_attention_on_the_image_is_that_of_the_patterns(toy: HookedVLM) -> None:
    examples = toy_pages(5, 3) + toy_pages(5, 1)
    found = image_shares(toy, examples, None)
    for i, example in enumerate(examples):
        inputs = to_inputs(toy, [example], None)
        _, cache = toy.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_pattern"))
        image = inputs.visuals[0]
        for layer in range(toy.cfg.n_layers):
            expected = cache["pattern", layer][0, :, -1, image.start : image.stop].sum(-1)
            torch.testing.assert_close(torch.from_numpy(found[i, layer]), expected.detach(), atol=1e-6, rtol=0)


# ---------------------------------------------------------------- what is tested


def test_summary_and_tests_by_hand() -> None:
    random = np.array([[float(sample != draw) for sample in range(10)] for draw in range(4)])
    values = {"unchanged": np.ones((1, 10)), "top": np.zeros((1, 10)), "same": random[:1], "random": random}
    conditions = [UNCHANGED, *(Condition(name, controls=("random",)) for name in ("top", "same"))]
    conditions += [Condition("random", draw=draw) for draw in range(4)]
    answers = table_of(values)
    table = summarize(answers, conditions, seed=0)
    own = table[table["chosen"]].set_index("condition")
    assert own["value"].to_dict() == pytest.approx({"unchanged": 1.0, "top": 0.0, "same": 0.9, "random": 0.9})
    assert own["change"].to_dict() == pytest.approx({"unchanged": 0.0, "top": -1.0, "same": -0.1, "random": -0.1})
    assert own.loc["random", ["lowest", "highest", "draws", "n"]].tolist() == [0.9, 0.9, 4, 10]
    assert own.loc["unchanged", "low"] == pytest.approx(0.7225, abs=1e-3)  # Wilson, 10 of 10
    assert own.loc["unchanged", "high"] == 1.0 and bool((own["low"].to_numpy() < own["high"].to_numpy()).all())
    assert len(table) == 4 * len(METRICS)
    directions: list[tuple[Tested, list[float]]] = [("worse", [1 / 5, 1.0]), ("better", [1.0, 1.0])]
    for tested, p in directions:  # as bad as a draw counts, and as good
        tests = against_controls(answers, conditions, tested, seed=0)
        here = tests[tests["chosen"]]
        assert here["p"].tolist() == pytest.approx(p) and set(here["tested"]) == {tested}
        assert here["difference"].tolist() == pytest.approx([-0.9, 0.0])
        assert here["p, Holm"].tolist() == pytest.approx([min(1, 2 * min(p)), 1.0])
        assert tests.loc[~tests["chosen"], "p, Holm"].isna().all()
    sentences = effect_answer("Masking", "top", table, against_controls(answers, conditions, "worse", 0))
    assert "page from 100.0% to 0.0%" in sentences[0] and "p = 0.200 for worse" in sentences[1]


def test_each_control_has_a_test_of_its_own() -> None:
    values = {"unchanged": np.ones((1, 5)), "top": np.full((1, 5), 0.5)}
    values |= {"random low": np.zeros((3, 5)), "random high": np.ones((3, 5))}
    conditions = [UNCHANGED, Condition("top", controls=("random low", "random high"))]
    conditions += [Condition(name, draw=d) for name in ("random low", "random high") for d in range(3)]
    tests = against_controls(table_of(values), conditions, "worse", seed=0)
    own = tests[tests["chosen"]].set_index("control")
    assert own["p"].to_dict() == {"random low": 1.0, "random high": 0.25}
    assert against_controls(table_of(values), [UNCHANGED, Condition("top")], "worse", 0).empty  # no control, no test


@pytest.mark.slow
def test_a_random_pair_against_random_pairs_is_rarely_worse_and_intervals_cover(
    qwen: HookedVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pairs of live heads are masked, one at a time; 200 times one plays the selected pair against 20 others."""
    config = MaskConfig(out=tmp_path, tasks=("text", "page"), quiet=True, device="cpu")
    study = Study(config, qwen)
    pool = candidates(study, "live", [head for heads in top_heads(study, 2).values() for head in heads])
    pairs = list(combinations(pool, 2))
    conditions = [UNCHANGED, *(Condition("pair", own, masked(own, "zero"), i) for i, own in enumerate(pairs))]
    answers = answer_all(study, tasks_of(study, config), conditions, "pairs")
    monkeypatch.setattr(effects, "METRICS", ("exact",))  # the others cost time and say the same
    for task in ("text", "page"):
        own = answers[(answers["task"] == task) & (answers["condition"] == "pair")]
        values = own.pivot(index="draw", columns="sample", values="exact").to_numpy()
        rng, ps, covered, differences = np.random.default_rng(0), [], 0, 0
        for _ in range(200):
            selected, *others = rng.choice(len(pairs), size=21, replace=False)
            played = {"unchanged": np.ones((1, 100)), "top": values[[selected]], "random": values[others]}
            named = [UNCHANGED, Condition("top", controls=("random",)), Condition("random")]
            table = table_of(played, task)
            found = summarize(table, named, 0).set_index(["condition", "metric"]).loc[("random", "exact")]
            test = against_controls(table, named, "worse", 0).set_index("metric").loc["exact"]
            ps.append(test["p"])
            covered += found["low"] <= values.mean() <= found["high"]
            differences += test["low"] <= values[selected].mean() - values.mean() <= test["high"]
        assert np.mean(np.array(ps) <= 0.05) <= 0.07
        assert 0.86 * 200 <= covered <= 0.99 * 200
        assert differences >= 0.86 * 200
