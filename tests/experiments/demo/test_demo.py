"""The demo's numbers against slow loops: which heads, which page, every answer, probability and map of it."""

import base64
import copy
import json
import re
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import bundled

from hooked_vlm import HookedVLM, cli
from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.demo import Demo, DemoConfig, run
from hooked_vlm.experiments.demo.page import spans_of_tokens
from hooked_vlm.experiments.demo.story import as_data, lines
from hooked_vlm.experiments.demo.turning import FACTORS, TurnedDown, attention_on_image
from hooked_vlm.experiments.ocr_heads import Protocol, reading
from hooked_vlm.experiments.ocr_heads.data.scored import toy_pages
from hooked_vlm.experiments.ocr_heads.examples import to_inputs
from hooked_vlm.experiments.ocr_heads.scoring import gather, score_batch
from hooked_vlm.inputs.images import load_image
from hooked_vlm.interventions import Head, ScaleHeads, ZeroHeads
from hooked_vlm.viewer.scene import image_columns

SAMPLES, PAGES, NEW = 8, 10, 8


def asked(out: Path, **settings: Any) -> DemoConfig:
    return DemoConfig(out=out, samples=SAMPLES, pages=PAGES, quiet=True, **settings)


@pytest.fixture(scope="module", params=["toy-qwen2-vl", pytest.param("toy-internvl2", marks=pytest.mark.full)])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return run(asked(tmp_path_factory.mktemp("demo"), model=request.param), bundled(request.param))


@pytest.fixture
def model(demo: Demo) -> HookedVLM:
    return bundled(demo.config.model)


def shown(demo: Demo, model: HookedVLM) -> Any:
    return to_inputs(model, [demo.example], None)


def some(demo: Demo) -> list[TurnedDown]:
    """The two heads, the first and the last random pair."""
    return [demo.reading, demo.random[0], demo.random[-1]]


def test_the_heads_are_the_top_two_on_other_pages_than_those_asked_about(demo: Demo, model: HookedVLM) -> None:
    with torch.no_grad():
        table = score_batch(model, "ocr", toy_pages(0, SAMPLES), Protocol(), None, NEW, True)
    mean = gather("ocr", table, (model.cfg.n_layers, model.cfg.n_heads), "sample").mean
    order = sorted(np.ndindex(*mean.shape), key=lambda head: -mean[head])
    assert demo.heads == tuple(order[:2])
    scored = [np.asarray(example.images[0]) for example in toy_pages(0, SAMPLES)]
    held_out = [np.asarray(example.images[0]) for example in toy_pages(1, PAGES)]
    assert not any(np.array_equal(a, b) for a in scored for b in held_out)
    assert np.array_equal(np.asarray(load_image(demo.example.images[0])), held_out[demo.pages.shown])


def test_shares_are_those_of_a_loop_over_pages(demo: Demo, model: HookedVLM) -> None:
    def replies(heads: tuple[Head, ...]) -> list[str]:
        found = []
        for example in toy_pages(1, PAGES):
            inputs = to_inputs(model, [example], None)
            hooks = ZeroHeads(heads).hooks(model, inputs) if heads else []
            found.append(str(model.generate(inputs, NEW, fwd_hooks=hooks, return_type="str")))
        return found

    answers = [example.answer for example in toy_pages(1, PAGES)]
    plain, without = replies(()), replies(demo.heads)
    right = [reply == answer for reply, answer in zip(plain, answers, strict=True)]
    changes = [own and a != b for own, a, b in zip(right, plain, without, strict=True)]
    said = as_data(demo)
    assert said["right"]["all"]["value"] == np.mean(right)
    assert said["right"]["without"]["value"] == np.mean([a == b for a, b in zip(without, answers, strict=True)])
    assert said["changed"] == sum(changes) and demo.pages.shown == changes.index(True)
    for number in (0, len(demo.random) - 1):
        own = np.mean([a == b for a, b in zip(replies(demo.random[number].heads), answers, strict=True)])
        assert said["random_pairs"][number]["right"] == own
    assert said["right"]["random"]["value"] == pytest.approx(np.mean([one["right"] for one in said["random_pairs"]]))
    assert all(share["low"] <= share["value"] <= share["high"] for share in said["right"].values())


def test_random_pairs_are_distinct_and_hold_neither_head(demo: Demo) -> None:
    pairs = [one.heads for one in demo.random]
    assert len(set(map(frozenset, pairs))) == len(pairs) == 20
    assert all(len(set(pair)) == 2 and not set(pair) & set(demo.heads) for pair in pairs)


def test_answers_and_probabilities_are_those_of_generation_with_scaled_heads(demo: Demo, model: HookedVLM) -> None:
    inputs = shown(demo, model)
    for one in some(demo):
        for factor, reply in zip(FACTORS, one.replies, strict=True):
            hooks = ScaleHeads(one.heads, factor).hooks(model, inputs)
            tokens, logits = model.generate(inputs, NEW, fwd_hooks=hooks, output_logits=True)
            new = [token for token in tokens[0, inputs.shape[1] :].tolist() if token not in model.cfg.eos_token_ids]
            assert reply.text == str(model.to_string(new)).strip() and "".join(reply.tokens).strip() == reply.text
            expected = [float(logits[0, i].softmax(-1)[token]) for i, token in enumerate(new)]
            np.testing.assert_allclose(reply.probabilities, expected, atol=1e-5)


@torch.no_grad()
def test_the_probability_of_the_answer_is_the_product_over_its_tokens_and_a_stop(demo: Demo, model: HookedVLM) -> None:
    inputs = shown(demo, model)
    ids = model.tokenizer(demo.example.answer, add_special_tokens=False)["input_ids"]
    for one in some(demo):
        for factor, found in zip(FACTORS, one.expected, strict=True):
            expected = 1.0
            for n in range(len(ids) + 1):
                begun = inputs.append([torch.tensor(ids[:n], dtype=torch.long)]) if n else inputs
                hooks = ScaleHeads(one.heads, factor).hooks(model, begun)
                after = model.run_with_hooks(begun, fwd_hooks=hooks)[0, -1].softmax(-1)
                wanted = [ids[n]] if n < len(ids) else list(model.cfg.eos_token_ids)
                expected *= float(after[wanted].sum())
            assert found == pytest.approx(expected, abs=1e-5)


def test_maps_are_the_patterns_of_the_two_heads_as_they_predict(demo: Demo, model: HookedVLM) -> None:
    inputs = shown(demo, model)
    for one in some(demo):
        for factor, reply in list(zip(FACTORS, one.replies, strict=True))[::5]:
            assert reply.attention.shape == (2, len(reply.tokens), len(inputs.image_tokens(0)))
            for n in range(len(reply.tokens)):
                ids = model.tokenizer("".join(reply.tokens[:n]), add_special_tokens=False)["input_ids"]
                begun = inputs.append([torch.tensor(ids, dtype=torch.long)]) if n else inputs
                with model.hooks(fwd_hooks=ScaleHeads(one.heads, factor).hooks(model, begun)):
                    _, cache = model.run_with_cache(begun)
                for own, (layer, head) in zip(reply.attention, demo.heads, strict=True):
                    expected = cache["pattern", layer][0, head, -1, image_columns(inputs)]
                    np.testing.assert_allclose(own[n], expected.numpy(), atol=1e-5)


def test_the_page_holds_these_answers_and_maps_and_reaches_for_nothing(demo: Demo) -> None:
    page = demo.page.read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    maps = re.search(r'<script type="text/plain" id="maps">(.*?)</script>', page, re.DOTALL)
    assert found and maps and "default-src 'none'" in page and not re.findall(r"""(?:src|href)=["']?http""", page)
    data = json.loads(found[1])
    codes = np.frombuffer(zlib.decompress(base64.b64decode(maps[1])), np.uint8).reshape(-1, data["nTokens"])
    for own, one in zip(data["settings"], [demo.reading, *demo.random], strict=True):
        assert own["heads"] == [f"{layer}.{head}" for layer, head in one.heads]
        np.testing.assert_allclose(own["expected"], one.expected, rtol=1e-3)
        for step, reply in zip(own["steps"], one.replies, strict=True):
            assert (step["tokens"], step["text"]) == (list(reply.tokens), reply.text)
            np.testing.assert_allclose(step["probabilities"], reply.probabilities, rtol=1e-3)
            for token in range(len(reply.tokens)):
                for head in range(2):
                    weights = codes[step["first"] + 2 * token + head] / 255 * data["reach"]
                    np.testing.assert_allclose(weights, reply.attention[head, token], atol=data["reach"] / 509)
    boxes = [[tuple(box) for box in own] for own in data["settings"][0]["steps"][-1]["boxes"]]
    assert boxes == [[e.box] for e in demo.example.evidence]


def test_the_story_is_ten_lines_of_eighty_columns(
    demo: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs: list[DemoConfig] = []
    monkeypatch.setattr("hooked_vlm.experiments.demo.commands.run", lambda config: configs.append(config) or demo)
    for more in ([], ["--json", "--quiet"]):
        words = ["--model", demo.config.model, "--out", str(demo.config.out), "--samples", "8", "--pages", "10"]
        monkeypatch.setattr(sys, "argv", ["hooked-vlm", "demo", *words, *more])
        cli.main()
        told = capsys.readouterr().out
        if more:
            assert json.loads(told) == as_data(demo)
        else:
            assert told.splitlines() == lines(demo) and len(lines(demo)) == 10
    assert all(len(line) <= 80 for line in lines(demo)[:-1]) and lines(demo)[-1] == f"page: {demo.page}"
    assert configs == [replace(demo.config, quiet=False), demo.config]


@pytest.mark.repeats_shapes
def test_planted_heads_are_chosen_and_an_answer_that_does_not_change_is_said_to_be_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the heads that read are shown as those of two others, and these write nothing."""
    swapped = {(0, 3): (2, 1), (3, 3): (2, 0)}
    rows = reading.attention_rows

    def planted(*args: Any, **settings: Any) -> torch.Tensor:
        found = rows(*args, **settings)  # [layer, row, head, ...]
        shown = found.clone()
        for (layer, head), (other_layer, other) in swapped.items():
            shown[layer, :, head], shown[other_layer, :, other] = found[other_layer, :, other], found[layer, :, head]
        return shown

    monkeypatch.setattr(reading, "attention_rows", planted)
    model = copy.deepcopy(bundled("toy-qwen2-vl"))
    with torch.no_grad():
        for layer, head in swapped:
            model.blocks[layer].attn.W_O[head] = 0
    demo = run(asked(tmp_path), model)
    assert set(demo.heads) == set(swapped)
    said = as_data(demo)
    assert said["answer_without"] == said["answer"] == demo.example.answer and said["changed"] == 0
    assert demo.pages.shown == demo.pages.right.tolist().index(True)
    assert f"{said['answer']} (unchanged)" in "\n".join(lines(demo))
    assert "they do not matter here" in demo.page.read_text("utf-8")
    assert said["p"] > 0.5  # no random pair matters less


@pytest.mark.repeats_shapes
def test_a_model_that_cannot_read_is_refused(tmp_path: Path) -> None:
    model = copy.deepcopy(bundled("toy-qwen2-vl"))
    with torch.no_grad():
        model.ln_final.weight.zero_()
    with pytest.raises(StudyError, match="none of 10 pages"):
        run(asked(tmp_path), model)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"pages": 0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=f"--{next(iter(wrong))}"):
        run(DemoConfig(out=tmp_path, **wrong))


@pytest.mark.parametrize(
    ("tokens", "spans"),
    [
        (("a", "b", "c"), [(0, 1), (1, 2), (2, 3)]),
        ((" ab", "c"), [(0, 2), (2, 3)]),
        ((" ", "ab", " c"), [(0, 0), (0, 2), (2, 4)]),
        ((), []),
    ],
)
def test_tokens_stand_in_the_text_without_leading_space(tokens: tuple[str, ...], spans: list[tuple[int, int]]) -> None:
    assert spans_of_tokens(tokens) == spans
    text = "".join(tokens).lstrip()
    assert "".join(text[start:stop] for start, stop in spans) == text


def test_replies_of_one_batch_may_be_empty(demo: Demo, model: HookedVLM) -> None:
    """The rows of a batch whose replies are of different lengths have the maps that each has alone."""
    inputs = shown(demo, model)
    ids = model.tokenizer(demo.example.answer, add_special_tokens=False)["input_ids"]
    replies = [ids, [], ids[:2]]
    found = attention_on_image(model, inputs[[0, 0, 0]], replies, demo.heads, [])
    assert [one.shape[1] for one in found] == [len(ids), 0, 2]
    np.testing.assert_allclose(found[0], demo.reading.replies[-1].attention, atol=1e-5)
    np.testing.assert_allclose(found[2], found[0][:, :2], atol=1e-5)
