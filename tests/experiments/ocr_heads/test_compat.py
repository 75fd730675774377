"""`--compat` equals the published code to the digit: the numbers its scripts gave on these inputs (`official.json`)."""

import hashlib
import json
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
from hooked_vlm.experiments.ocr_heads.config import Protocol
from hooked_vlm.experiments.ocr_heads.data import as_code
from hooked_vlm.experiments.ocr_heads.data.haystack import HaystackItem, needles_by_code
from hooked_vlm.experiments.ocr_heads.data.pages import as_jpeg
from hooked_vlm.experiments.ocr_heads.data.prompts import about_pages
from hooked_vlm.experiments.ocr_heads.examples import Example, as_asked
from hooked_vlm.experiments.ocr_heads.masking import masked
from hooked_vlm.experiments.ocr_heads.official import QWEN2_VL
from hooked_vlm.experiments.ocr_heads.reading import until_stop
from hooked_vlm.experiments.ocr_heads.scoring import Scores, gather, score_batch
from hooked_vlm.experiments.ocr_heads.selection import kept_by_code, ranked, select
from hooked_vlm.experiments.ocr_heads.sink_redistribution import redistribution
from hooked_vlm.inputs.images import load_image

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
def scores(kind: Any, protocol: Protocol = CODE, new_tokens: int = QWEN2_VL.reply_tokens) -> Scores:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    examples = [as_asked(e, protocol) for e in (ocr_examples() if kind == "ocr" else text_examples())]
    batches = [examples[i : i + 8] for i in range(0, len(examples), 8)]
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    with torch.no_grad():
        tables = [score_batch(model, kind, own, protocol, given.PIXELS, new_tokens, False) for own in batches]
    return gather(kind, pd.concat(tables, ignore_index=True), shape, protocol.instance(kind))


def expected_scores(name: str) -> np.ndarray:
    found = official()[name]
    values = np.zeros((found["n"], 4, 4))
    for head, own in found["heads"].items():
        layer, number = map(int, head.split("."))
        values[:, layer, number] = own
    return values


@pytest.mark.parametrize("kind", ["ocr", "retrieval"])
@pytest.mark.parametrize("new_tokens", [128, 4])
def test_scores_of_every_instance_equal_the_codes(kind: Any, new_tokens: int) -> None:
    """Of 4 tokens, too: the last one of a reply that is cut has no row."""
    expected = expected_scores(f"{kind} scores" + (", 4 tokens" if new_tokens == 4 else ""))
    np.testing.assert_array_equal(scores(kind, new_tokens=new_tokens).instances, expected)


# ---------------------------------------------------------------- heads, masked and with the sink redistributed


@pytest.mark.parametrize("kind", ["ocr", "retrieval"])
def test_heads_are_selected_and_ranked_as_the_code_does(kind: Any) -> None:
    found = scores(kind)
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
        n_changed = 0
        for name, expected in official()[experiment].items():
            heads = tuple((int(head[0]), int(head[2])) for head in expected["heads"])
            change = masked(heads, "zero") if experiment == "mask" else redistribution(qwen, 0.4, True)(heads)
            found = changed.answers_of(qwen, inputs, change, QWEN2_VL.task_tokens)["reply"]
            texts = [qwen.to_string(until_stop(reply, qwen.cfg.eos_token_ids)) for reply in expected["replies"]]
            assert list(found) == texts, name
            n_changed += sum(a != b for a, b in zip(found, plain, strict=True))
    assert n_changed > 5
