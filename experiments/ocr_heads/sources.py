"""Where the study's questions come from: the toy models' pages, and the paper's passkey and NIAH pages."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hooked_vlm.experiments.ocr_heads.config import OcrHeadsConfig
from hooked_vlm.experiments.ocr_heads.examples import Evidence, Example
from hooked_vlm.experiments.ocr_heads.haystack import niah_items, passkey_items
from hooked_vlm.experiments.ocr_heads.pages import evidence_of, render, wrap
from hooked_vlm.experiments.toy import data as toy

PAPER_PIXELS = 256 * 28 * 28
"""The paper's area of a resized page: about 256 visual tokens for Qwen2-VL."""


def toy_pages(seed: int, n: int) -> list[Example]:
    """Pages of one to six lines `key = value`, with a question for one value."""
    rng = np.random.default_rng([seed, 0])
    examples = []
    for _ in range(n):
        sample = toy.page_sample(rng)
        assert sample.page is not None and sample.image is not None
        line = sample.page.lines[sample.target_lines[0]]
        boxes = tuple(Evidence(i, i + 1, 0, box) for i, box in enumerate(line.value_boxes))
        question, answer = sample.turns[0]
        examples.append(Example(question, answer, (sample.image,), boxes))
    return examples


def toy_controls(seed: int, n: int) -> dict[str, list[Example]]:
    """What masking reading heads should not hurt: the same questions about plain text, and naming an object."""
    rng = np.random.default_rng([seed, 1])
    texts = [toy.text_sample(rng) for _ in range(n)]
    drawings = [toy.naming_sample(rng) for _ in range(n)]
    return {
        "text": [Example(*s.turns[0]) for s in texts],
        "naming": [Example(*s.turns[0], (s.image,)) for s in drawings if s.image is not None],
    }


def passkey_pages(seed: int, n: int, lengths: Sequence[int]) -> tuple[list[Example], str]:
    """The paper's image passkey: "The pass key is N." somewhere in filler text. Also says where it came from."""
    items, source = passkey_items(seed, n, lengths)
    examples = []
    for item in items:
        # the needle's second statement is deleted, so that the number stands on the page once
        text = item.context.replace(f"{item.answer} is the pass key.", "")
        digits = [(i, i + 1) for i in range(len(item.answer))]
        examples.append(_paged("What is the pass key?", item.answer, text, digits))
    return examples, source


def niah_pages(seed: int, n: int, lengths: Sequence[int]) -> tuple[list[Example], str]:
    """The paper's image needle in a haystack: a fact somewhere in unrelated prose."""
    items, source = niah_items(seed, n, lengths)
    examples = []
    for item in items:
        words = [match.span() for match in re.finditer(r"\b\w+\b", item.answer)]
        text = item.context.replace("\n", " ")
        examples.append(_paged(item.question, item.answer, text, words))
    return examples, source


def _paged(question: str, answer: str, text: str, parts: list[tuple[int, int]]) -> Example:
    lines = wrap(text)
    evidence = evidence_of(lines, text.index(answer), parts)
    return Example(question, answer, tuple(render(lines)), evidence, exact=False)


def collect(config: OcrHeadsConfig) -> tuple[list[Example], dict[str, list[Example]], dict[str, Any]]:
    """The pages to score on, the tasks of the masking control, and a description for config.json.

    The control's samples are new ones, drawn from another seed.
    """
    data = config.data
    if data == "toy":
        tasks = {"page": toy_pages(config.seed + 1, config.mask_samples)}
        tasks |= toy_controls(config.seed + 1, config.mask_samples)
        return toy_pages(config.seed, config.samples), tasks, {"data": "toy", "pixels": None}
    makers = {"passkey": passkey_pages, "niah": niah_pages}
    chosen = list(makers) if data == "paper" else [data]
    pages: list[Example] = []
    tasks, sources = {}, {}
    for name, share in zip(chosen, _shares(config.samples, len(chosen)), strict=True):
        examples, sources[name] = makers[name](config.seed, share, config.lengths)
        pages += examples
        tasks[name], _ = makers[name](config.seed + 1, config.mask_samples, config.lengths)
    return pages, tasks, {"data": data, "pixels": PAPER_PIXELS, "sources": sources}


def _shares(n: int, parts: int) -> Iterator[int]:
    return (max(1, n // parts + (i < n % parts)) for i in range(parts))
