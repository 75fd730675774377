"""The OCR-heads study: its numbers against literal re-computations, its files, its refusals."""

import copy
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from hooked_vlm import HookedVLM
from hooked_vlm.experiments.ocr_heads import OcrHeadsConfig, Protocol, run
from hooked_vlm.experiments.ocr_heads.config import OFFICIAL_CODE, StudyError
from hooked_vlm.experiments.ocr_heads.examples import Example, batches, coarse, prompt_length, to_inputs
from hooked_vlm.experiments.ocr_heads.haystack import SYNTHETIC
from hooked_vlm.experiments.ocr_heads.masking import masking_control, random_candidates, wilson
from hooked_vlm.experiments.ocr_heads.pages import evidence_of, render, wrap
from hooked_vlm.experiments.ocr_heads.published import compare, per_range, published_for, ranked
from hooked_vlm.experiments.ocr_heads.scoring import Scores, longest_run, score_heads
from hooked_vlm.experiments.ocr_heads.selection import bootstrap_interval, select
from hooked_vlm.experiments.ocr_heads.sources import niah_pages, passkey_pages, toy_controls, toy_pages
from hooked_vlm.experiments.toy.families import FAMILIES


@lru_cache
def bundled(name: str) -> HookedVLM:
    return HookedVLM.from_pretrained(name)


@pytest.fixture(params=FAMILIES)
def toy(request: pytest.FixtureRequest) -> HookedVLM:
    """The bundled models, one after the other."""
    return bundled(request.param)


def config(**changes: object) -> OcrHeadsConfig:
    small = {"samples": 8, "mask_samples": 6, "random_draws": 2, "max_new_tokens": 6, "quiet": True, "device": "cpu"}
    return OcrHeadsConfig(**{**small, **changes})  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- the score


def literal_scores(model: HookedVLM, examples: list[Example], protocol: Protocol, max_new_tokens: int) -> np.ndarray:
    """The score one example at a time, from patterns hooked at every step of generation."""
    instances = []
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    for example in examples:
        inputs = to_inputs(model, [example], None)
        n_prompt = inputs.shape[1]
        steps: list[dict[int, torch.Tensor]] = [{} for _ in range(max_new_tokens + 1)]

        def keep(pattern: torch.Tensor, hook, steps=steps) -> None:
            steps[hook.ctx["step"]][hook.layer()] = pattern[0, :, -1].clone()

        tokens = model.generate(
            inputs,
            max_new_tokens + 1,
            stop_at_eos=False,
            fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(shape[0])],
        )[0, n_prompt:].tolist()
        stops = model.cfg.eos_token_ids
        reply = []
        for token in tokens[:max_new_tokens]:
            if token in stops:
                break
            reply.append(token)
        answer = model.tokenizer.encode(example.answer, add_special_tokens=False)
        best = max(
            (n, i, j)
            for i in range(len(answer))
            for j in range(max(1, len(reply)))
            for n in range(min(len(answer) - i, len(reply) - j) + 1)
            if answer[i : i + n] == reply[j : j + n]
        )
        run_length = best[0]
        start_a, start_r = min(
            (i, j)
            for i in range(len(answer))
            for j in range(max(1, len(reply)))
            if answer[i : i + run_length] == reply[j : j + run_length]
        )
        grid = inputs.image_grid(0)
        first = int(inputs.image_tokens(0)[0])

        def hit(step: int, box, grid=grid, first=first, steps=steps, n_prompt=n_prompt) -> np.ndarray:
            x0, y0, x1, y1 = box
            evidence = set()
            for token in range(grid.n_tokens):
                a0, b0, a1, b1 = grid.box_of(token)
                if protocol.truncate_boxes:
                    x0, y0, x1, y1 = (int(v) for v in box)
                inside = max(0, min(x1, a1) - max(x0, a0)) * max(0, min(y1, b1) - max(y0, b0))
                if inside / ((x1 - x0) * (y1 - y0)) > protocol.min_overlap:
                    evidence.add(first + token)
            out = np.zeros(shape, bool)
            for layer in range(shape[0]):
                row = steps[step][layer]
                if protocol.keys == "prompt":
                    row = row[:, : n_prompt - 1]
                out[layer] = [int(k) in evidence for k in row.argmax(-1)]
            return out

        boxes = [e.box for e in example.evidence]
        shift = 1 if protocol.query == "copied" else 0
        values = []
        if protocol.matching == "aligned":
            for i, box in enumerate(boxes):
                n = start_r + i - start_a
                if start_a <= i < start_a + run_length:
                    values.append(hit(n + shift, box).astype(float))
                elif protocol.missing == "zero":
                    values.append(np.zeros(shape))
        else:
            places = [n for n, token in enumerate(reply) if token in set(answer)]
            for i, box in enumerate(boxes):
                if i < len(places):
                    weight = run_length / len(answer) if protocol.weight_by_run else 1.0
                    values.append(hit(places[i] + shift, box) * weight)
                elif protocol.missing == "zero":
                    values.append(np.zeros(shape))
        instances += [np.mean(values, axis=0)] if protocol.instance == "sample" and values else values
    return np.array(instances)


@pytest.mark.parametrize(
    "protocol",
    [Protocol(), OFFICIAL_CODE, Protocol(query="copied"), Protocol(matching="in_order", instance="token")],
    ids=["paper", "code", "copied", "in order"],
)
def test_scores_equal_a_literal_loop_over_the_steps_of_generation(protocol: Protocol, toy: HookedVLM) -> None:
    examples = toy_pages(3, 6)
    settings = config(protocol=protocol)
    scores = score_heads(toy, examples, settings, None)
    expected = literal_scores(toy, examples, protocol, settings.max_new_tokens or 0)
    assert scores.instances.shape == expected.shape
    np.testing.assert_allclose(scores.instances.mean(0), expected.mean(0), atol=1e-6)


def test_compat_is_the_official_code() -> None:
    assert config(compat=True).measured_by == OFFICIAL_CODE
    assert config().measured_by == Protocol()


def test_only_examples_that_are_not_answered_as_expected_are_generated(
    toy: HookedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = toy_pages(3, 12)
    examples[4] = replace(examples[4], answer="zz")
    plain = score_heads(toy, examples, config(), None)
    generate, rows = toy.generate, []
    monkeypatch.setattr(toy, "generate", lambda inputs, *rest: rows.append(len(inputs)) or generate(inputs, *rest))
    again = score_heads(toy, examples, config(), None)
    assert again.instances.tobytes() == plain.instances.tobytes()
    assert sum(rows) == len(examples) - round(plain.exact * len(examples)) < len(examples)


def test_output_norm_is_that_of_the_heads_result(toy: HookedVLM) -> None:
    model, examples = toy, toy_pages(3, 2)
    scores = score_heads(model, examples[:1], config(), None)
    inputs = to_inputs(model, examples[:1], None)
    _, cache = model.run_with_cache(inputs, names_filter=lambda n: n.endswith("hook_z") and n.startswith("blocks"))
    for layer, block in enumerate(model.blocks):
        result = torch.einsum("bphd,hdm->bphm", cache["z", layer], block.attn.W_O)
        expected = result.norm(dim=-1).mean((0, 1)).detach().numpy()
        np.testing.assert_allclose(scores.output_norm[layer], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [9, 1, 2, 3, 8], (0, 1, 3)),
        ([1, 2, 3, 4], [3, 4, 9, 1, 2], (0, 3, 2)),
        ([1, 2], [3, 4], (0, 0, 0)),
        ([1, 2], [], (0, 0, 0)),
        ([5, 5, 5], [5, 5], (0, 0, 2)),
    ],
)
def test_longest_run(a: list, b: list, expected: tuple) -> None:
    _, _, n = longest_run(a, b)
    assert n == expected[2]
    if n:
        i, j, _ = longest_run(a, b)
        assert a[i : i + n] == b[j : j + n]


# ---------------------------------------------------------------- selection and statistics


def scores_of(values: list[list[float]]) -> Scores:
    instances = np.array(values, dtype=float)[:, None, :]
    return Scores(instances, np.ones(instances.shape[1:]), 1.0, len(values), len(values))


def test_selection_asks_for_mean_and_frequency() -> None:
    always, seldom, never = [0.3] * 20, [1.0, 1.0, 0.9] + [0.0] * 17, [0.0] * 20
    scores = scores_of(list(map(list, zip(always, seldom, never, strict=True))))
    chosen = select(scores, config(min_frequency=0.2))
    assert chosen.tolist() == [[True, False, False]]
    assert select(scores, config()).tolist() == [[True, True, False]]


def test_the_codes_inverted_rule_drops_the_strongest_heads() -> None:
    always, often = [0.9] * 20, [0.9] * 10 + [0.0] * 10
    scores = scores_of(list(map(list, zip(always, often, strict=True))))
    assert select(scores, config(compat=True)).tolist() == [[False, True]]


def test_wilson_interval_by_hand() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == pytest.approx(1)


def test_bootstrap_interval_covers_the_mean_at_its_rate() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval((rng.random((60, 1, 1)) < 0.4).astype(float), trial, draws=300)
        hits += bool(low[0, 0] <= 0.4 <= high[0, 0])
    assert 0.88 <= hits / 200 <= 0.99


def test_random_candidates_are_live_low_scoring_and_not_masked() -> None:
    scores, norms = np.array([[0.5, 0.0], [0.05, 0.2]]), np.array([[1.0, 1.0], [0.05, 1.0]])
    assert random_candidates(scores, norms, [(0, 0)]) == [(0, 1)]


def test_masking_top_heads_equals_zeroing_their_output_by_hand(toy: HookedVLM) -> None:
    model = toy
    tasks = {"page": toy_pages(5, 6)}
    scores = np.zeros((model.cfg.n_layers, model.cfg.n_heads))
    scores[2, 1], scores[1, 3] = 0.9, 0.8
    outcomes = masking_control(model, tasks, scores, np.ones_like(scores), config(mask_heads=2), None)
    top = next(o for o in outcomes if o.condition == "top")
    assert set(top.heads) == {(2, 1), (1, 3)}

    def zero(head: int):
        def hook(z: torch.Tensor, hook: object) -> None:
            z[:, :, head] = 0

        return hook

    right = 0
    for example in tasks["page"]:
        hooks = [("blocks.2.attn.hook_z", zero(1)), ("blocks.1.attn.hook_z", zero(3))]
        reply = model.generate(to_inputs(model, [example], None), 6, fwd_hooks=hooks, return_type="str")
        right += reply.strip() == example.answer
    assert top.right == right
    draws = [o for o in outcomes if o.condition == "random"]
    assert len(draws) == 2 and all(len(o.heads) == 2 and not set(o.heads) & set(top.heads) for o in draws)


# ---------------------------------------------------------------- the paper's pages


def test_wrapped_lines_stand_where_they_say() -> None:
    text = "The first line is long enough to be broken into two of them, surely.\n\nAnd\ta tab."
    lines = wrap(text)
    assert all(len(line.text) <= 50 for line in lines)
    for line in lines:
        assert text[line.start : line.start + len(line.text)].replace("\t", " ") == line.text


def test_a_box_holds_the_ink_of_its_character_and_of_no_other() -> None:
    text = "word " * 60 + "The pass key is 48159. Remember it. " + "word " * 60
    lines = wrap(text)
    start = text.index("48159")
    evidence = evidence_of(lines, start, [(i, i + 1) for i in range(5)])
    assert [e.start for e in evidence] == list(range(5))
    for part in evidence:
        at = start + part.start
        blank = render(wrap(text[:at] + "1" + text[at + 1 :] if text[at] != "1" else text[:at] + "8" + text[at + 1 :]))
        page, other = (np.asarray(p[part.image].convert("L"), dtype=int) for p in (render(lines), blank))
        width = min(page.shape[1], other.shape[1])
        changed = np.argwhere(np.abs(page[:, :width] - other[:, :width]) > 100)
        x0, y0, x1, y1 = part.box
        assert len(changed)
        # digits of this font are equally wide, so what follows does not move
        assert (changed[:, 1] >= x0 - 1).all() and (changed[:, 1] < x1 + 1).all()
        assert (changed[:, 0] >= y0 - 1).all() and (changed[:, 0] < y1 + 3).all()


def test_paper_pages_have_the_papers_shape() -> None:
    examples, source = passkey_pages(0, 2, (1024,))
    assert source == SYNTHETIC
    for example in examples:
        assert len(example.images) > 1 and len(example.evidence) == 5
        assert all(isinstance(page, Image.Image) and page.mode == "RGB" for page in example.images)
        assert not example.is_right("no") and example.is_right(f"It is {example.answer}.")
        one = coarse(example)
        assert len(one.evidence) == 1 and (one.evidence[0].start, one.evidence[0].stop) == (0, 5)
    niah, source = niah_pages(0, 2, (1024, 2048))
    assert source == SYNTHETIC
    assert len(niah[1].images) > len(niah[0].images)
    assert all(e.answer[part.start : part.stop].isalnum() for e in niah for part in e.evidence)


def test_data_is_a_function_of_the_seed() -> None:
    def same(a: list[Example], b: list[Example]) -> bool:
        return all(
            x.question == y.question
            and x.answer == y.answer
            and all(np.array_equal(np.asarray(p), np.asarray(q)) for p, q in zip(x.images, y.images, strict=True))
            for x, y in zip(a, b, strict=True)
        )

    assert same(toy_pages(1, 3), toy_pages(1, 3)) and not same(toy_pages(1, 3), toy_pages(2, 3))
    assert same(toy_controls(1, 3)["naming"], toy_controls(1, 3)["naming"])
    assert same(passkey_pages(1, 2, (1024,))[0], passkey_pages(1, 2, (1024,))[0])


def test_prompt_length_bounds_the_prompt(toy: HookedVLM) -> None:
    for example in [*toy_pages(0, 3), *toy_controls(0, 3)["text"]]:
        n = to_inputs(toy, [example], None).shape[1]
        assert n <= prompt_length(toy, example, None) <= n + 3


def test_batches_hold_every_index_once_and_keep_to_the_budget() -> None:
    lengths = [10, 300, 20, 300, 5, 1000]
    groups = batches(lengths, 600)
    assert sorted(i for g in groups for i in g) == list(range(6))
    assert all(len(g) == 1 or max(lengths[i] for i in g) * len(g) <= 600 for g in groups)


# ---------------------------------------------------------------- published heads


@pytest.mark.parametrize(
    ("name", "shape", "n"),
    [
        ("Qwen/Qwen2-VL-2B-Instruct", (28, 12), 55),
        ("Qwen/Qwen2-VL-7B-Instruct", (28, 28), 68),
        ("OpenGVLab/InternVL2-8B", (32, 32), 44),
    ],
)
def test_published_lists_are_whole(name: str, shape: tuple[int, int], n: int) -> None:
    record = published_for(name)
    assert record is not None
    heads = [tuple(h) for group in record["ocr_heads"].values() for h in group]
    assert len(heads) == len(set(heads)) == n  # the paper's count of heads above 0.1
    assert all(layer < shape[0] and head < shape[1] for layer, head in heads)
    assert sum(record["heads_per_bin"].values()) == shape[0] * shape[1]


def test_comparison_with_the_published_heads_of_themselves_is_perfect() -> None:
    record = published_for("somewhere/Qwen2-VL-2B-Instruct")
    assert record is not None
    scores = np.zeros((28, 12))
    for value, group in zip((0.6, 0.4, 0.2), record["ocr_heads"].values(), strict=True):
        for layer, head in group:
            scores[layer, head] = value
    found = compare("/models/Qwen2-VL-2B-Instruct", scores)
    assert found is not None and found.jaccard == 1 and found.top_k_found == found.top_k == 10
    assert [b for _, b in found.heads_per_range.values()][2:] == [23, 22, 10]
    assert compare("toy-qwen2-vl", scores) is None


def test_score_ranges_and_order() -> None:
    scores = np.array([[0.0, 0.01, 0.1], [0.3, 0.31, 1.0]])
    assert list(per_range(scores).values()) == [1, 2, 1, 1, 1]
    assert ranked(scores)[:2] == [(1, 2), (1, 1)]


# ---------------------------------------------------------------- the run


def test_a_run_writes_its_tables_and_the_same_seed_gives_the_same_bytes(tmp_path: Path, toy: HookedVLM) -> None:
    first = run(config(out=tmp_path / "a"), toy)
    run(config(out=tmp_path / "b"), toy)
    names = ["config.json", "heatmap.png", "masking.parquet", "masking.png", "pages.png", "scores.parquet"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    for name in ("scores.parquet", "masking.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    table: Any = pd.read_parquet(tmp_path / "a" / "scores.parquet")
    assert len(table) == first.scores.mean.size
    assert table["score"].between(0, 1).all() and (table["low"] <= table["high"]).all()
    record = json.loads((tmp_path / "a" / "config.json").read_text())
    assert record["config"]["seed"] == 0 and record["versions"]["torch"] and record["protocol"]
    assert [(int(r.layer), int(r.head)) for r in table[table.selected].itertuples()] == sorted(first.ocr_heads)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 0}, "--samples must be at least 1"),
        ({"threshold": 1.5}, "--threshold must lie in"),
        ({"mask_heads": 0}, "--mask-heads"),
        ({"seed": -1}, "--seed"),
        ({"lengths": ()}, "--lengths"),
        ({"protocol": Protocol(min_overlap=2.0)}, "min-overlap"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_loaded(changes: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=words):
        run(config(model="/nowhere", out=tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_asked_about_images_is_refused_before_any_page_is_made(tmp_path: Path) -> None:
    blind = copy.copy(bundled("toy-qwen2-vl"))
    blind.cfg = blind.cfg.with_(vision=None)
    with pytest.raises(StudyError, match="has no vision tower"):
        run(config(out=tmp_path / "out"), blind)
    silent = copy.copy(bundled("toy-qwen2-vl"))
    silent.tokenizer = None
    with pytest.raises(StudyError, match="has no tokenizer"):
        run(config(out=tmp_path / "out"), silent)


def test_an_output_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot write to --out"):
        run(config(out=tmp_path / "file"))
