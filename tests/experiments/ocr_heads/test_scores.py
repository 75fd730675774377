"""Both scores against literal re-computations and planted attention, and what is made of them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.ocr_heads import Protocol, reading
from hooked_vlm.experiments.ocr_heads.alignment import longest_run
from hooked_vlm.experiments.ocr_heads.characters import toy_pages_with
from hooked_vlm.experiments.ocr_heads.config import OFFICIAL_CODE
from hooked_vlm.experiments.ocr_heads.data.scored import toy_pages
from hooked_vlm.experiments.ocr_heads.examples import Evidence, Example, to_inputs
from hooked_vlm.experiments.ocr_heads.published import compare, overlap_rows, per_range, published_for, published_models
from hooked_vlm.experiments.ocr_heads.scoring import (
    Scores,
    find_copies,
    find_retrievals,
    gather,
    score_batch,
)
from hooked_vlm.experiments.ocr_heads.selection import ranked, select

NEW = 6
PROTOCOLS = {
    "paper": Protocol(),
    "code": OFFICIAL_CODE,
    "copied": Protocol(query="copied"),
    "in order": Protocol(matching="in_order", ocr_instance="token"),
}


def score(model: HookedVLM, kind: Any, examples: list[Example], protocol: Protocol) -> Scores:
    with torch.no_grad():
        table = score_batch(model, kind, examples, protocol, None, NEW, exact=True)
    return gather(kind, table, (model.cfg.n_layers, model.cfg.n_heads), protocol.instance(kind))


def patterns_of_generation(model: HookedVLM, inputs: Any, n: int) -> tuple[list[int], list[dict[int, torch.Tensor]]]:
    """Generated ids, and of every pass the patterns [head, query, key] by layer, one pass after the other."""
    steps: list[dict[int, torch.Tensor]] = [{} for _ in range(n)]

    def keep(pattern: torch.Tensor, hook: Any) -> None:
        steps[hook.ctx["step"]][hook.layer()] = pattern[0].clone()

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    hooks = [(name, keep) for name in names]
    tokens = model.generate(inputs, n, stop_at_eos=False, fwd_hooks=hooks)[0, inputs.shape[1] :].tolist()
    return tokens, steps


def until_stop(model: HookedVLM, tokens: list[int]) -> list[int]:
    stops = [i for i, token in enumerate(tokens) if token in model.cfg.eos_token_ids]
    return tokens[: stops[0]] if stops else tokens


# ---------------------------------------------------------------- the OCR score


def literal_ocr(model: HookedVLM, examples: list[Example], protocol: Protocol, max_new_tokens: int) -> np.ndarray:
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
                a0, b0, a1, b1 = grid.boxes[token]
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
                    weight = 1.0
                    if protocol.weight_by_run != "no":
                        whole = inputs.tokens[0].tolist() + reply
                        weight = longest_run(answer, whole)[2] / len(answer)
                    values.append(hit(places[i] + shift, box) * weight)
                elif protocol.missing == "zero":
                    values.append(np.zeros(shape))
        instances += [np.mean(values, axis=0)] if protocol.ocr_instance == "sample" and values else values
    return np.array(instances)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.repeats_shapes
def test_ocr_scores_equal_a_literal_loop_over_the_steps_of_generation(protocol: str, toy: HookedVLM) -> None:
    examples = toy_pages(3, 5)
    scores = score(toy, "ocr", examples, PROTOCOLS[protocol])
    expected = literal_ocr(toy, examples, PROTOCOLS[protocol], NEW)
    assert scores.instances.shape == expected.shape
    np.testing.assert_allclose(scores.mean, expected.mean(0), atol=1e-6)


def test_only_examples_that_are_not_answered_as_expected_are_generated(
    qwen: HookedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = toy_pages(3, 8)
    examples[4] = Example(examples[4].question, ("zz",), examples[4].images, examples[4].evidence[:2])
    plain = score(qwen, "ocr", examples, Protocol())
    generate, rows = qwen.generate, []
    monkeypatch.setattr(
        qwen, "generate", lambda inputs, *rest, **more: rows.append(len(inputs)) or generate(inputs, *rest, **more)
    )
    again = score(qwen, "ocr", examples, Protocol())
    assert again.instances.tobytes() == plain.instances.tobytes()
    assert sum(rows) == len(examples) - plain.right < len(examples)


def planted(monkeypatch: pytest.MonkeyPatch, looks: dict[tuple[int, int], dict[int, int]]) -> None:
    """Attention rows in which head (layer, head) looks at looks[...][query], and at the first token otherwise."""

    def rows(model: Any, inputs: Any, positions: Any, reduce: Any = None, fwd_hooks: Any = ()) -> torch.Tensor:
        model.run_with_hooks(inputs, return_type=None, fwd_hooks=list(fwd_hooks))
        found = []
        for layer in range(model.cfg.n_layers):
            own = torch.zeros(len(inputs), model.cfg.n_heads, positions.shape[1], inputs.shape[1])
            for head in range(model.cfg.n_heads):
                for i, query in enumerate(positions[0].tolist()):
                    own[0, head, i, looks.get((layer, head), {}).get(query, 0)] = 1
            found.append(reduce(own))
        return torch.stack(found)

    monkeypatch.setattr(reading, "attention_rows", rows)


@pytest.mark.parametrize("query", ["producing", "copied"])
def test_a_planted_head_scores_one_and_all_others_nothing(
    query: Any, qwen: HookedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One head looks at the evidence while it produces a character, another one step later."""
    example = toy_pages(4, 1)[0]
    inputs = to_inputs(qwen, [example], None)
    n, first, grid = inputs.shape[1], int(inputs.image_tokens(0)[0]), inputs.image_grid(0)
    boxes = [tuple(box) for box in grid.boxes[[3, 9, 14, 20]].tolist()]
    example = replace(example, evidence=tuple(Evidence(i, i + 1, 0, box) for i, box in enumerate(boxes)))
    evidence = [first + token for token in (3, 9, 14, 20)]
    while_producing = {n - 1 + i: token for i, token in enumerate(evidence)}
    one_later = {n + i: token for i, token in enumerate(evidence)}
    planted(monkeypatch, {(1, 2): while_producing, (3, 0): one_later})
    scores = score(qwen, "ocr", [example], Protocol(query=query))
    expected = np.zeros((qwen.cfg.n_layers, qwen.cfg.n_heads))
    expected[(1, 2) if query == "producing" else (3, 0)] = 1
    np.testing.assert_array_equal(scores.mean, expected)
    np.testing.assert_array_equal(scores.tokens.mean(0), expected)


def test_a_box_too_large_for_any_token_counts_as_not_copied(qwen: HookedVLM) -> None:
    examples = toy_pages(4, 3)
    scores = score(qwen, "ocr", examples, Protocol(min_overlap=0.99))
    n_tokens = [len(qwen.tokenizer(e.answer, add_special_tokens=False)["input_ids"]) for e in examples]
    assert len(scores.samples) == 3 and len(scores.tokens) == sum(n_tokens)
    assert (scores.mean <= score(qwen, "ocr", examples, Protocol()).mean).all()


def test_the_code_holds_a_part_of_the_answer_against_its_own_token_alone(qwen: HookedVLM) -> None:
    for example in toy_pages_with(4, 3, "7"):
        inputs = to_inputs(qwen, [example], None)
        reply = qwen.tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        continued = inputs.append([torch.tensor(reply)])
        (copy,) = find_copies(qwen, continued, 0, example, reply, protocol=OFFICIAL_CODE)
        assert copy.position == inputs.shape[1] + example.answer.index("7")


def test_the_producing_query_is_the_one_before_the_token(qwen: HookedVLM) -> None:
    example = toy_pages(4, 1)[0]
    inputs = to_inputs(qwen, [example], None)
    reply = qwen.tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    continued = inputs.append([torch.tensor(reply)])
    for query, shift in (("producing", -1), ("copied", 0)):
        copies = find_copies(qwen, continued, 0, example, reply, protocol=Protocol(query=query))  # type: ignore[arg-type]
        expected = [inputs.shape[1] + i + shift for i in range(len(reply))]
        assert [copy.position for copy in copies] == expected
        for copy, i in zip(copies, range(len(reply)), strict=True):
            assert int(continued.tokens[0, expected[i] - shift]) == reply[i], copy


def test_output_norm_is_that_of_the_heads_result(qwen: HookedVLM) -> None:
    examples = toy_pages(3, 1)
    scores = score(qwen, "ocr", examples, Protocol())
    inputs = to_inputs(qwen, examples, None)
    _, cache = qwen.run_with_cache(inputs, names_filter=lambda n: n.endswith("hook_z") and n.startswith("blocks"))
    for layer, block in enumerate(qwen.blocks):
        result = torch.einsum("bphd,hdm->bphm", cache["z", layer], block.attn.W_O)
        expected = result.norm(dim=-1).mean((0, 1)).detach().numpy()
        np.testing.assert_allclose(scores.output_norm[layer], expected, rtol=1e-4)


# ---------------------------------------------------------------- the text retrieval score


def needle(model: HookedVLM, inputs: Any, example: Example) -> list[int]:
    """The only place where the answer's tokens follow each other (toy values are drawn to be unique)."""
    ids = model.tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    tokens = inputs.tokens[0].tolist()
    starts = [i for i in range(len(tokens)) if tokens[i : i + len(ids)] == ids]
    assert len(starts) == 1
    return list(range(starts[0], starts[0] + len(ids)))


def test_retrieval_scores_equal_wu_et_als_loop_over_the_steps_of_generation(toy: HookedVLM) -> None:
    examples = toy_pages(6, 5, as_text=True)
    expected = []
    for example in examples:
        inputs = to_inputs(toy, [example], None)
        tokens, steps = patterns_of_generation(toy, inputs, NEW)
        reply, place = until_stop(toy, tokens), needle(toy, inputs, example)
        own = np.zeros((toy.cfg.n_layers, toy.cfg.n_heads))
        for step, token in enumerate(reply):
            for layer, head in np.ndindex(own.shape):
                j = int(steps[step][layer][head, -1].argmax())
                if place[0] <= j <= place[-1] and int(inputs.tokens[0, j]) == token:
                    own[layer, head] += 1 / len(place)
        expected.append(own)
    scores = score(toy, "retrieval", examples, Protocol())
    np.testing.assert_allclose(scores.samples, np.array(expected), atol=1e-6)
    assert scores.mean.max() > 0.5


def test_retrieval_scores_of_the_code_count_every_equal_token(toy: HookedVLM) -> None:
    examples = toy_pages(6, 3, as_text=True)
    expected = []
    for example in examples:
        inputs = to_inputs(toy, [example], None)
        tokens, _ = patterns_of_generation(toy, inputs, NEW)
        whole = inputs.append([torch.tensor(until_stop(toy, tokens))])
        _, cache = toy.run_with_cache(whole, names_filter=lambda name: name.endswith("hook_pattern"))
        answer = toy.tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        ids, prompt = whole.tokens[0].tolist(), inputs.shape[1] - 1
        asked = [i for i, token in enumerate(ids) if token in answer]
        own = np.zeros((toy.cfg.n_layers, toy.cfg.n_heads))
        for layer, head in np.ndindex(own.shape):
            rows = cache["pattern", layer][0, head]
            own[layer, head] = np.mean([ids[int(rows[i, :prompt].argmax())] == ids[i] for i in asked])
        expected.append(own)
    scores = score(toy, "retrieval", examples, Protocol(retrieval="same_token"))
    np.testing.assert_allclose(scores.samples, np.array(expected), atol=1e-6)


def test_needle_tokens_that_were_not_generated_count_as_not_copied_by_token(qwen: HookedVLM) -> None:
    example = toy_pages(6, 1, as_text=True)[0]
    inputs = to_inputs(qwen, [example], None)
    place = needle(qwen, inputs, example)
    reply = inputs.tokens[0, place[:-1]].tolist()
    copies = find_retrievals(qwen, inputs.append([torch.tensor(reply)]), 0, example, reply)
    assert sum(copy.token for copy in copies) == len(place)
    assert sum(copy.position is None for copy in copies) == 1


@pytest.mark.parametrize("kind", ["ocr", "retrieval"])
def test_samples_that_were_not_answered_count_in_both_scores_alike(kind: Any, qwen: HookedVLM) -> None:
    examples = toy_pages(6, 4, as_text=kind == "retrieval")
    examples[1] = replace(examples[1], answers=(examples[1].answer[:2] + "zz",))
    found = score(qwen, kind, examples, Protocol())
    assert (len(found.samples), found.n_asked, found.right) == (4, 4, 3)
    assert found.answered_samples is not None and found.answered_samples.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(found.mean, found.samples.mean(0))
    np.testing.assert_array_equal(found.mean_answered, found.samples[[0, 2, 3]].mean(0))
    by_token = replace(found, granularity="token")
    n = [len(qwen.tokenizer(e.answer, add_special_tokens=False)["input_ids"]) for e in examples]
    assert len(by_token.instances) == sum(n) and len(by_token.answered) == sum(n) - n[1]
    assert np.bincount(by_token.instance_samples).tolist() == n
    assert found.instance_samples.tolist() == [0, 1, 2, 3]
    none = score(qwen, kind, examples[1:2], Protocol())
    assert np.isnan(none.mean_answered).all() and np.isfinite(none.mean).all()


def test_a_retrieval_score_needs_the_place_of_the_answer(qwen: HookedVLM) -> None:
    with pytest.raises(StudyError, match="retrieval"):
        score(qwen, "retrieval", [Example("What?", ("x",), context="x")], Protocol())


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
    i, j, n = longest_run(a, b)
    assert n == expected[2]
    assert a[i : i + n] == b[j : j + n]


# ---------------------------------------------------------------- selection


def scores_of(values: Any) -> Scores:
    instances = np.array(values, dtype=float)
    instances = instances[:, None] if instances.ndim == 2 else instances
    return Scores("ocr", instances, instances, np.ones(instances.shape[1:]), len(values), len(values))


def test_selection_asks_for_mean_and_frequency() -> None:
    always, seldom, never = [0.3] * 20, [1.0, 1.0, 0.9] + [0.0] * 17, [0.0] * 20
    scores = scores_of(list(zip(always, seldom, never, strict=True)))
    assert select(scores, 0.1, 0.2, "active").tolist() == [[True, False, False]]
    assert select(scores, 0.1, 0.1, "active").tolist() == [[True, True, False]]


def test_the_codes_inverted_rule_drops_the_strongest_heads() -> None:
    always, often = [0.9] * 20, [0.9] * 10 + [0.0] * 10
    scores = scores_of(list(zip(always, often, strict=True)))
    assert select(scores, 0.1, 0.1, "inverted").tolist() == [[False, True]]


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
    for prefix in ("", "retrieval_"):
        counts = record[f"{prefix}heads_per_bin"]
        assert sum(counts.values()) == shape[0] * shape[1]
        lists = record["ocr_heads" if not prefix else "retrieval_heads"]
        assert all(len(heads) == counts[interval] for interval, heads in lists.items())
    for shares in record["percent_per_range"].values():
        assert sum(shares) == pytest.approx(100, abs=0.03)


def test_comparison_with_the_published_heads_of_themselves_is_perfect() -> None:
    record = published_for("somewhere/Qwen2-VL-2B-Instruct")
    assert record is not None
    mean = np.zeros((28, 12))
    for value, group in zip((0.6, 0.4, 0.2), record["ocr_heads"].values(), strict=True):
        for layer, head in group:
            mean[layer, head] = value
    rows = overlap_rows(scores_of(mean[None]), record["ocr_heads"], seed=0)
    assert [row[1] for row in rows] == pytest.approx([1, 1, 1])
    rows = overlap_rows(scores_of(mean[None, ::-1]), record["ocr_heads"], seed=0)
    assert rows[0][1] < 0.3 and rows[1][1] < 0.3
    assert list(per_range(mean).values())[2:] == [23, 22, 10]
    assert published_for("toy-qwen2-vl") is None and len(published_models()) == 3
    assert callable(compare)


def test_score_ranges_and_order() -> None:
    scores = np.array([[0.0, 0.01, 0.1], [0.3, 0.31, 1.0]])
    assert list(per_range(scores).values()) == [1, 2, 1, 1, 1]
    assert ranked(scores)[:2] == [(1, 2), (1, 1)]


def test_coarse_evidence_is_one_box_around_everything(qwen: HookedVLM) -> None:
    from hooked_vlm.experiments.ocr_heads.examples import coarse

    example = toy_pages(4, 1)[0]
    one = coarse(example)
    boxes = np.array([e.box for e in example.evidence])
    assert [(e.start, e.stop) for e in one.evidence] == [(0, len(example.answer))]
    assert one.evidence[0].box == (*boxes[:, :2].min(0), *boxes[:, 2:].max(0))
    assert isinstance(one.evidence[0], Evidence)
