"""Whole atlases: effects against loops and planted models, tasks that go on, tables, files."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from hooked_vlm import HookedVLM
from hooked_vlm.atlas import Atlas, Observed, Stimulus, atlas, shipped
from hooked_vlm.atlas import study as study_module
from hooked_vlm.atlas.attention import attention_scores
from hooked_vlm.atlas.definitions import BY_NAME
from hooked_vlm.atlas.effects import default_groups, effect_scores, first_token, group_masks
from hooked_vlm.atlas.show import above_null, in_terminal
from hooked_vlm.atlas.stimuli import of_kind
from hooked_vlm.data.samples import Sample
from hooked_vlm.errors import InputError
from hooked_vlm.interventions import ReplaceImageKV, ZeroHeads


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-qwen2-vl")


@pytest.fixture(scope="module")
def small(model: HookedVLM) -> Atlas:
    return atlas(model, n=3, groups=32)


@pytest.mark.repeats_shapes
def test_effects_are_those_of_a_loop(model: HookedVLM) -> None:
    page, other = of_kind(shipped(model, 2, seed=3), ("page",))
    found = effect_scores(model, page, other, 24, seed=5)
    sample = page.asked
    inputs = model.as_inputs(Sample(sample.id, sample.prompt, sample.images).inputs(model))
    token = int(model.tokenizer.encode(sample.answer, add_special_tokens=False)[0])
    assert first_token(model, page) == token

    def log_prob(hooks: list) -> float:
        with torch.no_grad():
            return float(model.run_with_hooks(inputs, fwd_hooks=hooks)[0, -1].log_softmax(-1)[token])

    plain, n_heads = log_prob([]), model.cfg.n_heads
    for layer, head in ((0, 1), (2, 0), (2, 1)):
        alone = log_prob(ReplaceImageKV(((layer, head),)).hooks(model, inputs))
        assert found["transfer"][0][layer, head] == pytest.approx(plain - alone, abs=1e-5)
    for layer, head in ((0, 0), (1, 1)):
        zeroed = log_prob(ZeroHeads(((layer, head),), tower="vision").hooks(model, inputs))
        assert found["answer_without"][0][layer, head] == pytest.approx(plain - zeroed, abs=1e-5)
    masks = group_masks(24, model.cfg.n_layers * n_heads, 5, page)
    values = []
    for kept in masks:
        dropped = tuple((int(i) // n_heads, int(i) % n_heads) for i in np.flatnonzero(~kept))
        values.append(log_prob(ReplaceImageKV(dropped).hooks(model, inputs)))
    design = np.column_stack((np.ones(24), masks.astype(float)))
    expected = np.linalg.solve(design.T @ design, design.T @ np.array(values))[1:]
    np.testing.assert_allclose(found["transfer_in_groups"][0].ravel(), expected, atol=1e-4)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=["blocks.2.attn.hook_z", "ln_final.hook_scale"])
        written = cache["blocks.2.attn.hook_z"][0, -1, 1] @ model.blocks[2].attn.W_O[1]
        normed = written * model.ln_final.factor / cache["ln_final.hook_scale"][0, -1]
        direct = [float(normed @ model.W_U[:, t]) for t in (token, first_token(model, other))]
    assert [float(own[2, 1]) for own in found["direct_logit"]] == pytest.approx(direct, rel=1e-4)


def test_masks_of_groups_determine_every_coefficient() -> None:
    masks = group_masks(32, 16, 0, Stimulus("a", "repeated"))
    assert np.linalg.matrix_rank(np.column_stack((np.ones(32), masks))) == 17 and len(np.unique(masks, axis=0)) == 32
    assert default_groups(16) == 64 and default_groups(784) == 1568


@pytest.mark.repeats_shapes
def test_a_head_that_alone_sees_the_image_has_exactly_the_whole_effect(model: HookedVLM) -> None:
    planted = copy.deepcopy(model)
    d_head = planted.cfg.d_head
    for layer, block in enumerate(planted.blocks):
        keep = slice(d_head, 2 * d_head) if layer == 2 else slice(0, 0)
        weight = torch.zeros_like(block.attn.o_proj.weight)
        weight[:, keep] = block.attn.o_proj.weight.detach()[:, keep]
        block.attn.o_proj.weight.data.copy_(weight)
    page = of_kind(shipped(planted, 1), ("page",))[0]
    found = effect_scores(planted, page, None, 40, seed=0)
    every = tuple((layer, head) for layer in range(4) for head in range(planted.cfg.n_heads))
    inputs = planted.as_inputs(Sample("p", page.asked.prompt, page.asked.images).inputs(planted))
    with torch.no_grad():
        runs = [planted(inputs), planted.run_with_hooks(inputs, fwd_hooks=ReplaceImageKV(every).hooks(planted, inputs))]
    with_head, without = (float(logits[0, -1].log_softmax(-1)[first_token(planted, page)]) for logits in runs)
    whole = with_head - without
    assert abs(whole) > 1e-3
    for name in ("transfer", "transfer_in_groups"):
        share = found[name][0] / whole
        assert share[2, 1] == pytest.approx(1, abs=1e-3)
        share[2, 1] = 0
        assert np.abs(share).max() < 1e-3
    others = np.delete(found["direct_logit"][0].ravel(), 2 * planted.cfg.n_heads + 1)
    assert found["direct_logit"][0][2, 1] != 0 and not others.any()


@pytest.mark.repeats_shapes
def test_interrupted_work_goes_on_and_ends_with_the_same(
    model: HookedVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = atlas(model, n=2, groups=0)
    calls: list[str] = []
    real = study_module.vision_table

    def stops(model: HookedVLM, stimuli: list) -> pd.DataFrame:
        calls.append(stimuli[0].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, stimuli)

    stops.__name__ = real.__name__
    monkeypatch.setattr(study_module, "vision_table", stops)
    with pytest.raises(KeyboardInterrupt):
        atlas(model, n=2, groups=0, folder=tmp_path)
    done = set(tmp_path.glob("*.parquet"))
    assert done
    again = atlas(model, n=2, groups=0, folder=tmp_path)
    assert len(calls) == len(set(calls)) + 1 and done < set(tmp_path.glob("*.parquet"))
    pd.testing.assert_frame_equal(again.table, whole.table)


def test_the_table_says_what_the_observations_say(small: Atlas) -> None:
    table = small.table.set_index(["score", "layer", "head"])
    for name, own in small.observed.items():
        row: Any = table.loc[(name, 1, 0)]
        values = own.values[:, 1, 0]
        assert row["value"] == pytest.approx(values.mean()) and row["n"] == len(values)
        value, low, high = float(row["value"]), float(row["low"]), float(row["high"])
        assert np.isnan(low) or low <= value <= high
        if BY_NAME[name].null and np.ptp(values - own.nulls[:, 1, 0]) > 0:
            expected: Any = stats.ttest_1samp(values - own.nulls[:, 1, 0], 0)
            assert row["p"] == pytest.approx(max(expected.pvalue, 2.0 ** (1 - len(values))), rel=1e-6)
    p, corrected = (table[name].to_numpy(dtype=float) for name in ("p", "p_holm"))
    assert (corrected[np.isfinite(p)] >= p[np.isfinite(p)]).all()
    assert set(small.wide("vision").columns) >= {"layer", "head", "distance", "text_region"}


def test_an_atlas_is_what_it_was_after_saving(small: Atlas, tmp_path: Path) -> None:
    small.save(tmp_path)
    again = Atlas.load(tmp_path)
    pd.testing.assert_frame_equal(again.table, small.table)
    assert again.model == small.model and again.settings == small.settings
    pages = again.on("page")
    assert all(name.startswith("page-") for own in pages.observed.values() for name in own.stimuli)
    with pytest.raises(InputError, match="no stimuli of the kind"):
        pages.on("text").on("page")


@pytest.mark.parametrize("damage", ["absent", "cut", "no json", "other shapes", "of another run"])
def test_what_is_no_atlas_is_refused(small: Atlas, tmp_path: Path, damage: str) -> None:
    small.save(tmp_path)
    record = tmp_path / "atlas.json"
    match damage:
        case "absent":
            record.unlink()
        case "cut":
            path = tmp_path / "observations.parquet"
            path.write_bytes(path.read_bytes()[:-100])
        case "no json":
            record.write_text("{")
        case "of another run":  # which stopped before it wrote its record
            whole = record.read_text()
            changed = {name: Observed(own.stimuli, own.values + 1, own.nulls) for name, own in small.observed.items()}
            Atlas(small.model, changed, small.settings).save(tmp_path)
            record.write_text(whole)
        case "other shapes":
            changed = json.loads(record.read_text())
            changed["shapes"]["ocr"] = [5, 5]
            record.write_text(json.dumps(changed))
    with pytest.raises(InputError, match=r"atlas|cannot be read"):
        Atlas.load(tmp_path)


def test_what_does_not_determine_anything_is_refused(model: HookedVLM) -> None:
    with pytest.raises(InputError, match="random groups"):
        atlas(model, n=1, groups=31)
    with pytest.raises(InputError, match="at least one stimulus"):
        atlas(model, n=0)
    with pytest.raises(InputError, match="no answer"):
        atlas(model, [Sample("a", "What?")])
    with pytest.raises(InputError, match="no samples"):
        atlas(model, [])
    with pytest.raises(InputError, match="a seed must be 0 or more"):
        atlas(model, n=1, seed=-1)
    not_samples: Any = iter(["own.jsonl"])
    with pytest.raises(InputError, match=r"expected samples .*got 'own\.jsonl'"):
        atlas(model, not_samples)


def test_the_strongest_stimuli_come_first() -> None:
    values = np.array([[[0.1]], [[0.9]], [[0.5]], [[np.nan]]])
    found = Atlas("m", {"ocr": Observed(("a", "b", "c", "d"), values, np.zeros_like(values))})
    assert found.strongest("ocr", 0, 0) == ["b", "c", "a"]
    with pytest.raises(InputError, match="no score 'induction'"):
        found.values("induction")
    for layer, head in ((1, 0), (0, -1)):
        with pytest.raises(InputError, match="there is no head"):
            found.strongest("ocr", layer, head)


def test_the_terminal_answers_first(small: Atlas) -> None:
    shown = in_terminal(small)
    assert shown.startswith("toy-qwen2-vl: ") and "of 16 heads read text in pictures" in shown.splitlines()[0]
    assert all(len(line) <= 80 for line in shown.splitlines()[1:-1])


def test_the_heads_that_read_are_found(model: HookedVLM) -> None:
    pages = of_kind(shipped(model, 16), ("page",))
    values, nulls = (
        np.stack(own) for own in zip(*(found["ocr"] for found in attention_scores(model, pages)), strict=True)
    )
    rows = Atlas("m", {"ocr": Observed(tuple(page.name for page in pages), values, nulls)}).table
    found = rows[above_null(rows)]
    assert set(zip(found["layer"], found["head"], strict=True)) == {(2, 0), (2, 1)}  # as docs/toy-models.md says


def test_a_head_that_is_perfect_on_every_stimulus_stands_out() -> None:
    values = np.zeros((12, 1, 3))
    values[:, 0, 0] = 1.0
    values[:, 0, 1] = 1.0 - 1e-9 * np.arange(12)
    rows = Atlas("m", {"ocr": Observed(tuple("abcdefghijkl"), values, np.zeros_like(values))}).table
    assert rows["p"].tolist() == [2.0**-11, 2.0**-11, 1.0]  # all signs alike, as two of 2^12 flips have it
    assert above_null(rows).tolist() == [True, True, False]
    wilson = 12 / (12 + stats.norm.ppf(0.975) ** 2)  # of 12 of 12
    assert rows["low"].tolist()[0] == pytest.approx(wilson) and rows["high"].tolist()[0] == 1.0
    assert rows["high"].tolist()[2] == pytest.approx(1 - wilson)


def test_each_head_is_tested_on_the_stimuli_on_which_it_has_a_value() -> None:
    rng = np.random.default_rng(0)
    values, nulls = rng.random((8, 1, 2)), rng.random((8, 1, 2))
    values[2, 0, 1] = np.nan
    rows = Atlas("m", {"localisation": Observed(tuple("abcdefgh"), values, nulls)}).table
    for head in range(2):
        own = (values - nulls)[:, 0, head]
        expected: Any = stats.ttest_1samp(own[np.isfinite(own)], 0)
        n = int(np.isfinite(own).sum())
        assert rows["n"].tolist()[head] == n
        assert rows["p"].tolist()[head] == pytest.approx(max(expected.pvalue, 2.0 ** (1 - n)))
