"""`--compat` equals the published code to the digit: the numbers its scripts gave on these inputs (`official.json`)."""

import hashlib
import json
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import official_inputs as given
import pandas as pd
import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.experiments.ocr_heads import changed
from hooked_vlm.experiments.ocr_heads.config import CompareConfig, Protocol, SinkConfig
from hooked_vlm.experiments.ocr_heads.controls import choose_heads
from hooked_vlm.experiments.ocr_heads.data import as_code
from hooked_vlm.experiments.ocr_heads.data.haystack import HaystackItem, needles_by_code
from hooked_vlm.experiments.ocr_heads.data.pages import as_jpeg
from hooked_vlm.experiments.ocr_heads.data.prompts import about_pages
from hooked_vlm.experiments.ocr_heads.data.store import DataSet
from hooked_vlm.experiments.ocr_heads.data.tasks import QATask
from hooked_vlm.experiments.ocr_heads.deviations import ALL, DEVIATIONS, effect, measured, shipped
from hooked_vlm.experiments.ocr_heads.examples import Example, as_asked, to_inputs
from hooked_vlm.experiments.ocr_heads.masking import masked
from hooked_vlm.experiments.ocr_heads.official import INTERNVL2, QWEN2_VL, official_code
from hooked_vlm.experiments.ocr_heads.published import in_order_of_names
from hooked_vlm.experiments.ocr_heads.reading import read, until_stop
from hooked_vlm.experiments.ocr_heads.scoring import Scores, gather, score_batch
from hooked_vlm.experiments.ocr_heads.selection import kept_by_code, ranked, select
from hooked_vlm.experiments.ocr_heads.sink_redistribution import redistribution, sink_conditions
from hooked_vlm.experiments.ocr_heads.study import Study
from hooked_vlm.inputs.images import load_image
from tools.deviation_table import NEW_TOKENS, PIXELS, examples, markdown

pytestmark = pytest.mark.repeats_shapes  # the scores of whole replies

CODE = QWEN2_VL.protocol


@cache
def official() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "official.json").read_text())


# ---------------------------------------------------------------- pages


def test_passkey_pages_and_boxes_are_those_of_the_code() -> None:
    for item, expected in zip(given.passkeys(), official()["passkey pages"], strict=True):
        same_page(as_code.passkey_example(item, QWEN2_VL.passkey_question), expected)


def test_needles_are_drawn_and_drawn_on_pages_as_the_code_does() -> None:
    items = needles_by_code(given.haystack_texts(), given.needle_rows(), 0, given.NEEDLE_SIZES, given.N_NEEDLES)
    assert len(items) == len(official()["needle pages"]) == len(given.NEEDLE_SIZES) * given.N_NEEDLES
    for item, expected in zip(items, official()["needle pages"], strict=True):
        assert item.question == expected["question"]
        assert hashlib.sha256(item.context.encode()).hexdigest()[:16] == expected["context"]
        same_page(as_code.needle_example(item), expected)


def same_page(example: Example, expected: dict[str, Any]) -> None:
    assert [list(image.size) for image in example.images] == expected["sizes"]  # type: ignore[union-attr]
    pixels = b"".join(image.tobytes() for image in example.images)  # type: ignore[union-attr]
    assert hashlib.sha256(pixels).hexdigest()[:16] == expected["pixels"]
    assert [list(e.box) for e in example.evidence] == expected["boxes"]
    assert {e.image for e in example.evidence} == {expected["page"]} and example.answer == expected["answer"]


# ---------------------------------------------------------------- scores


def ocr_examples() -> list[Example]:
    return [*(as_code.passkey_example(i, QWEN2_VL.passkey_question) for i in given.passkeys()), *given.pages()]


def text_examples() -> list[Example]:
    passkeys = [HaystackItem(prompt, "", answer, 0) for prompt, answer in given.texts()]
    needles = [HaystackItem(text, question, answer, 0) for text, question, answer in given.page_texts()]
    return [
        *(as_code.passkey_text(item, QWEN2_VL.passkey_text_question) for item in passkeys),
        *(as_code.needle_text(item) for item in needles),
    ]


@cache
def scores(kind: Any, new_tokens: int) -> Scores:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    examples = [as_asked(e, CODE) for e in (ocr_examples() if kind == "ocr" else text_examples())]
    batches = [examples[i : i + 8] for i in range(0, len(examples), 8)]
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    with torch.no_grad():
        tables = [score_batch(model, kind, own, CODE, given.PIXELS, new_tokens, False) for own in batches]
    return gather(kind, pd.concat(tables, ignore_index=True), shape, CODE.instance(kind))


def expected_scores(name: str) -> np.ndarray:
    found = official()[name]
    values = np.zeros((found["n"], 4, 4))
    for head, own in found["heads"].items():
        layer, number = map(int, head.split("."))
        values[:, layer, number] = own
    return values


@pytest.mark.parametrize("kind", ["ocr", "retrieval"])
@pytest.mark.parametrize("new_tokens", [QWEN2_VL.reply_tokens, 4])
def test_scores_of_every_instance_equal_the_codes(kind: Any, new_tokens: int) -> None:
    """Of 4 tokens, too: the last one of a reply that is cut has no row."""
    expected = expected_scores(f"{kind} scores" + (", 4 tokens" if new_tokens == 4 else ""))
    np.testing.assert_array_equal(scores(kind, new_tokens).instances, expected)


# ---------------------------------------------------------------- heads, masked and with the sink redistributed


@pytest.mark.parametrize("kind", ["ocr", "retrieval"])
def test_heads_are_selected_and_ranked_as_the_code_does(kind: Any) -> None:
    found = scores(kind, QWEN2_VL.reply_tokens)
    chosen = [f"{i}.{j}" for i, j in np.argwhere(select(found, 0.1, 0.1, "inverted"))]
    assert chosen == official()["selected"][kind]
    mean = np.where(kept_by_code(found, 0.1), found.mean, 0.0)
    task = "image" if kind == "ocr" else "text"
    for experiment in ("mask", "sink"):
        for k in (1, 2, 4):
            assert [f"{i}.{j}" for i, j in ranked(mean)[:k]] == official()[experiment][f"{task} {k}"]["heads"]


@pytest.mark.parametrize("experiment", ["mask", "sink"])
def test_replies_with_heads_masked_and_the_sink_redistributed_equal_the_codes(experiment: str, qwen: HookedVLM) -> None:
    own = [about_pages([as_jpeg(load_image(e.images[0]))], e.question, e.answers) for e in given.documents()]
    examples = [as_asked(e, CODE) for e in own]
    with torch.no_grad():
        inputs = changed.encoded(qwen, examples, given.PIXELS)
        plain = changed.answers_of(qwen, inputs, None, QWEN2_VL.task_tokens)["reply"]
        n_changed = n_causal = 0
        for name, expected in official()[experiment].items():
            heads = tuple((int(head[0]), int(head[2])) for head in expected["heads"])
            change = masked(heads, "zero") if experiment == "mask" else redistribution(qwen, 0.4, True)(heads)
            found = changed.answers_of(qwen, inputs, change, QWEN2_VL.task_tokens)["reply"]
            texts = [qwen.to_string(until_stop(reply, qwen.cfg.eos_token_ids)) for reply in expected["replies"]]
            assert list(found) == texts, name
            n_changed += sum(a != b for a, b in zip(found, plain, strict=True))
            causal = changed.answers_of(qwen, inputs, redistribution(qwen, 0.4, False)(heads), QWEN2_VL.task_tokens)
            n_causal += sum(a != b for a, b in zip(found, causal["reply"], strict=True))
    assert n_changed > 5 and n_causal > 5  # and neither is what it would be otherwise


# ---------------------------------------------------------------- in a study


def settings(out: Path, **more: Any) -> dict[str, Any]:
    return {"out": out, "samples": 8, "quiet": True, "data": "toy", **more}


def test_a_study_asks_as_the_code_does(toy: HookedVLM, tmp_path: Path) -> None:
    """Protocol, lengths of replies and the way of asking are those for the kind of model; what is given counts."""
    study = Study(SinkConfig(**settings(tmp_path), compat=True), toy)
    code = official_code(toy)
    assert code is (INTERNVL2 if toy.cfg.chat_template else QWEN2_VL)
    assert study.config.protocol == code.protocol
    assert (study.scored_tokens, study.config.new_tokens) == (code.reply_tokens, code.task_tokens)
    short = Study(SinkConfig(**settings(tmp_path), compat=True, max_new_tokens=9), toy)
    assert (short.scored_tokens, short.config.new_tokens) == (9, 9)
    plain = Study(SinkConfig(**settings(tmp_path)), toy)
    assert (plain.scored_tokens, plain.config.new_tokens, plain.config.protocol) == (8, 8, Protocol())
    task = QATask(DataSet("page", given.documents()[:2], "made", "abc"), "exact")
    (asked,) = study.asked([task])
    assert asked.data.digest != task.data.digest and asked.data.examples[0].chat == code.protocol.chat
    assert plain.asked([task]) == [task]


def test_the_code_asks_internvl2_without_a_chat_template_and_stops_at_its_token(tmp_path: Path) -> None:
    model = HookedVLM.from_pretrained("toy-internvl2")
    example = as_asked(given.documents()[0], INTERNVL2.protocol)
    inputs = to_inputs(model, [example], given.PIXELS)
    text = str(model.to_string(inputs.tokens[0]))
    assert text.startswith("<img><IMG_CONTEXT>") and text.endswith(f"</img>\n{example.question}")
    text_example = replace(text_examples()[0], chat=False)
    assert str(model.to_string(to_inputs(model, [text_example], None).tokens[0])).startswith("<img></img>\n")
    chat = to_inputs(model, [given.documents()[0]], given.PIXELS)
    (reading,) = read(model, [given.documents()[0]], lambda *_: [], given.PIXELS, 8)
    assert len(reading.reply) > 2 and chat.shape[1] > inputs.shape[1]
    (cut,) = read(model, [given.documents()[0]], lambda *_: [], given.PIXELS, 8, stop_ids=(reading.reply[2],))
    assert cut.reply == reading.reply[: reading.reply.index(reading.reply[2])]


def test_comparison_uses_pages_in_the_order_of_their_names(
    qwen: HookedVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 11 pages on, as the published scores do; otherwise nothing is scored again."""
    long = DataSet("toy", given.many_pages(4), "made", "many")
    monkeypatch.setattr(Study, "sets", lambda self, as_text, seed, n: [long])
    study = Study(CompareConfig(**settings(tmp_path)), qwen)
    found = in_order_of_names(study)
    protocol = replace(study.config.protocol, page_order="name")
    expected = Study(replace(study.config, protocol=protocol, out=tmp_path / "2"), qwen).ocr
    np.testing.assert_array_equal(found.samples, expected.samples)
    assert study.ocr.mean.max() > 0.1 and not np.array_equal(found.samples, study.ocr.samples)  # boxes on other pages
    short = DataSet("toy", given.documents(), "made", "few")
    monkeypatch.setattr(Study, "sets", lambda self, as_text, seed, n: [short])
    study = Study(CompareConfig(**settings(tmp_path)), qwen)
    assert in_order_of_names(study) is study.ocr


def test_the_codes_sink_redistribution_runs_with_one_beta(toy: HookedVLM, tmp_path: Path) -> None:
    config = SinkConfig(
        **settings(tmp_path, max_new_tokens=8), compat=True, tasks=("page",), task_samples=2, random_draws=2
    )
    study = Study(config, toy)
    chosen = [choose_heads(study, config, 2)]
    changes = [c.change for c in sink_conditions(study, study.config, chosen) if c.change is not None]  # type: ignore[arg-type]
    assert {change.beta for change in changes} == {0.4}  # type: ignore[union-attr]
    assert {len(change.heads) for change in changes} == {2}  # type: ignore[union-attr]
    assert {change.causal for change in changes} == {official_code(toy) is INTERNVL2}  # type: ignore[union-attr]
    assert {change.alone for change in changes} == {"spread"}  # type: ignore[union-attr]


# ---------------------------------------------------------------- the table of deviations


def test_every_deviation_is_in_the_table_and_the_table_is_in_the_docs() -> None:
    differing = {f.name for f in fields(Protocol) if getattr(CODE, f.name) != getattr(Protocol(), f.name)}
    options = [record["option"] for record in shipped()["deviations"]]
    assert {*options} - {ALL, "max_new_tokens"} == differing == {*DEVIATIONS} - {"max_new_tokens"}
    assert options == [*DEVIATIONS, ALL] and options[-1] == ALL
    page = (Path(__file__).parents[3] / "docs" / "ocr-heads.md").read_text(encoding="utf-8")
    assert markdown() in page


def test_effects_by_hand() -> None:
    before, after = (np.zeros((20, 1, 3)) for _ in range(2))
    before[:, 0, 0], before[:, 0, 1], after[:, 0, 0], after[:10, 0, 2] = 0.5, 0.2, 0.9, 0.6
    both = [Scores("ocr", own, own, np.ones((1, 3)), 20, 20) for own in (before, after)]
    found = effect(both[0], both[1], Protocol())
    assert found == {"heads": 3, "largest": 0.4, "in": ["0.2"], "out": ["0.1"]}
    assert effect(both[0], both[1], Protocol(frequency_rule="inverted"))["out"] == ["0.0", "0.1"]


@pytest.mark.full
def test_shipped_effects_are_those_measured_again() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    assert measured(model, QWEN2_VL, examples, NEW_TOKENS, PIXELS) == shipped()["deviations"]
