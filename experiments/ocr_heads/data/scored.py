"""Pages that heads are scored on, and the same content as text: toy pages, passkeys, needles in haystacks."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.ocr_heads.data import as_code
from hooked_vlm.experiments.ocr_heads.data.haystack import niah_items, passkey_items
from hooked_vlm.experiments.ocr_heads.data.pages import evidence_of, render, wrap
from hooked_vlm.experiments.ocr_heads.data.store import DataSet, load_or_build
from hooked_vlm.experiments.ocr_heads.examples import Evidence, Example
from hooked_vlm.experiments.ocr_heads.official import OfficialCode
from hooked_vlm.toys import pages as toy

PAPER_PIXELS = 256 * 28 * 28
"""The paper's area of a resized page: about 256 visual tokens for Qwen2-VL."""
SYNTHETIC_TOY = "synthetic: lines `key = value`"
PASSKEY_QUESTION = "What is the pass key?"


def scored_sets(
    folder: Path,
    names: Sequence[str],
    as_text: bool,
    seed: int,
    n: int,
    lengths: Sequence[int],
    code: OfficialCode | None = None,
) -> list[DataSet]:
    """Load or build data sets with `n` examples in total, as pages or as text.

    Args:
        code: make passkeys and needles as the published code does, with its questions.
    """
    sets = []
    for position, name in enumerate(names):
        share = max(1, n // len(names) + (position < n % len(names)))
        kind = f"{name}-text" if as_text else name
        settings: dict[str, Any] = {"seed": seed, "n": share} | ({} if name == "toy" else {"lengths": list(lengths)})
        if code is not None and name != "toy":
            settings["as code"] = [code.passkey_question, code.passkey_text_question]
        build = {
            "toy": lambda n=share: (toy_pages(seed, n, as_text), SYNTHETIC_TOY),
            "passkey": lambda n=share: passkey_pages(seed, n, lengths, as_text, code),
            "niah": lambda n=share: niah_pages(seed, n, lengths, as_text, code is not None),
        }[name]
        sets.append(load_or_build(folder, kind, settings, build))
    return sets


def toy_pages(seed: int, n: int, as_text: bool = False) -> list[Example]:
    """Make pages of one to six lines `key = value` with a question about one value, or the same lines as text."""
    rng = np.random.default_rng([seed, 0])
    examples = []
    for _ in range(n):
        sample = toy.page_sample(rng)
        assert sample.page is not None and sample.image is not None
        line = sample.page.lines[sample.target_lines[0]]
        question, answer = sample.turns[0]
        if as_text:
            text = sample.page.text + "\n"
            at = text.index(line.text) + len(line.text) - len(line.value)
            examples.append(Example(question, (answer,), context=text, answer_at=at))
        else:
            boxes = tuple(Evidence(i, i + 1, 0, box) for i, box in enumerate(line.value_boxes))
            examples.append(Example(question, (answer,), (sample.image,), boxes))
    return examples


def passkey_pages(
    seed: int, n: int, lengths: Sequence[int], as_text: bool = False, code: OfficialCode | None = None
) -> tuple[list[Example], str]:
    """Make the paper's image passkeys ("The pass key is N." in filler text).

    Returns:
        (examples, source in words).
    """
    items, source = passkey_items(seed, n, lengths)
    if code is not None:
        make, question = as_code.passkey_example, code.passkey_question
        if as_text:
            make, question = as_code.passkey_text, code.passkey_text_question
        return [make(item, question) for item in items], source
    examples = []
    for item in items:
        # the needle's second statement is deleted, so that the number occurs once
        text = item.context.replace(f"{item.answer} is the pass key.", "")
        digits = [(i, i + 1) for i in range(len(item.answer))]
        examples.append(_example(PASSKEY_QUESTION, item.answer, text, digits, as_text))
    return examples, source


def single_characters(seed: int, n: int, characters: Sequence[str], length: int) -> tuple[list[Example], str]:
    """Make the paper's case study: passkey pages whose key is one character, `n` per character."""
    items, source = passkey_items(seed, n, (length,))
    examples = []
    for character in characters:
        for item in items:
            text = item.context.replace(f"{item.answer} is the pass key.", "")
            start = text.index(item.answer)
            text = text[:start] + character + text[start + len(item.answer) :]
            pages = _example(PASSKEY_QUESTION, character, text, [(0, 1)], False, start)
            examples.append(pages)
    return examples, source


def niah_pages(
    seed: int, n: int, lengths: Sequence[int], as_text: bool = False, by_code: bool = False
) -> tuple[list[Example], str]:
    """Make the paper's image needles in a haystack: a fact in unrelated prose."""
    items, source = niah_items(seed, n, lengths, by_code)
    if by_code:
        return [(as_code.needle_text if as_text else as_code.needle_example)(item) for item in items], source
    examples = []
    for item in items:
        words = [match.span() for match in re.finditer(r"\b\w+\b", item.answer)]
        text = item.context.replace("\n", " ")
        examples.append(_example(item.question, item.answer, text, words, as_text))
    return examples, source


def _example(
    question: str, answer: str, text: str, parts: list[tuple[int, int]], as_text: bool, at: int | None = None
) -> Example:
    if at is None:
        at = text.find(answer)
    if at < 0:
        raise StudyError(f"the answer {answer!r} does not occur on its page: expected a passkey or needle data set")
    if as_text:
        return Example(f"Question: {question}", (answer,), context=f"{text}\n", answer_at=at)
    lines = wrap(text)
    return Example(question, (answer,), tuple(render(lines)), evidence_of(lines, at, parts))
