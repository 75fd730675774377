"""What the official scripts were given to make `official.json`, from this package's own generators.

`official.json` holds the numbers that the scripts published with arXiv 2505.15865 (baekingeol/OCR_Head, 7715819) gave
on the bundled toy-qwen2-vl in float32 with transformers 4.46.2, qwen-vl-utils 0.0.8 and Pillow 13.0.0. Changed in the
scripts were: model and data set names, token ids, the side of an image token (16 pixels), the area of a page, `cuda`,
`float16`, `global cursor` (which fails as published), sizes and number of needles, a `break` after one answer.
"""

from dataclasses import replace

import numpy as np

from hooked_vlm.experiments.ocr_heads.data import haystack
from hooked_vlm.experiments.ocr_heads.data.haystack import HaystackItem
from hooked_vlm.experiments.ocr_heads.data.scored import toy_pages
from hooked_vlm.experiments.ocr_heads.examples import Evidence, Example
from hooked_vlm.toys import make_page, random_lines

PIXELS = 56 * 16 * 16
"""Area of a page: 56 tokens of the toy model."""
NEEDLE_SIZES, N_NEEDLES, FIRST_NEEDLE = (300, 900, 1900), 4, 191


def pages() -> list[Example]:
    """Pages with questions of their own: read rightly, asked for the key or a misprint, and on one of twelve pages."""
    plain, others = toy_pages(40, 40), toy_pages(48, 40)  # (the scripts fail on samples of a single page)
    plain = [_with_second_page(e, other, i % 2) for i, (e, other) in enumerate(zip(plain, others, strict=True))]
    keys = [replace(e, answers=(_key(e),), evidence=e.evidence[:2]) for e in plain[20:28]]
    # the question has more of the answer than the reply
    mixed = [replace(e, answers=(_key(e) + e.answer[-2:],)) for e in plain[28:34]]
    wrong = [replace(e, answers=(e.answer[:2] + "zq",)) for e in plain[34:40]]
    return [*plain[:20], *keys, *mixed, *wrong, *many_pages(8)]


def _with_second_page(example: Example, other: Example, at: int) -> Example:
    """The example with another page in front of its own (at=1) or behind it."""
    images = (*other.images, *example.images) if at else (*example.images, *other.images)
    return replace(example, images=images, evidence=tuple(replace(e, image=at) for e in example.evidence))


def _key(example: Example) -> str:
    return example.question.removeprefix("What is the value of ").removesuffix("?")


def many_pages(n: int) -> list[Example]:
    """Twelve pages of one line each, and a question about one of them."""
    rng = np.random.default_rng(41)
    examples = []
    for i in range(n):
        shown = [make_page(rng, lines=random_lines(rng, 1), font_size=14) for _ in range(12)]
        page = (2, 1, 11, 10, 3, 0, 7, 5)[i]
        line = shown[page].lines[0]
        boxes = tuple(Evidence(j, j + 1, page, box) for j, box in enumerate(line.value_boxes))
        images = tuple(one.image for one in shown)
        examples.append(Example(shown[page].question(0), (line.value,), images, boxes))
    return examples


def page_texts() -> list[tuple[str, str, str]]:
    """(text, question, answer) of needles as text."""
    items = toy_pages(43, 6, as_text=True)
    return [(e.context, e.question, e.answer) for e in items]


def passkeys() -> list[HaystackItem]:
    rng = np.random.default_rng(42)
    return [haystack._synthetic_passkey(rng, n) for n in (150, 160, 170, 180, 190, 210, 240, 300)]


def texts() -> list[tuple[str, str]]:
    """(prompt, answer) of passkeys as text: the toy model's texts, and passkeys."""
    asked = [(e.context + e.question, e.answer) for e in toy_pages(44, 16, as_text=True)]
    return [*asked, *((item.context, item.answer) for item in passkeys()[:3])]


def needle_rows() -> list[tuple[str, str, str]]:
    """(needle, question, answer) rows of the needles' data set; the first 191 are not English ones."""
    rng = np.random.default_rng(45)
    made = [("", "", "")] * FIRST_NEEDLE + [haystack._synthetic_needle(rng) for _ in range(9)]
    # an answer in capitals, one with a mark in front, one of a part of a word, a long one that lines break
    needle, question, answer = made[193]
    made[193] = (needle.replace(answer, answer.upper()), question, answer)
    needle, question, answer = made[195]
    made[195] = (needle.replace(answer, f"({answer})"), question, f"({answer})")
    needle, question, answer = made[196]
    made[196] = (needle, question, answer[1:-1])
    needle, question, answer = made[198]
    made[198] = (needle.replace(answer, LONG), question, LONG)
    return made


LONG = "well-known blue granite, grey slate and the old red-brown copper of the second bridge"


def haystack_texts() -> list[str]:
    """Essays with line breaks, between paragraphs and inside sentences, and none at their ends."""
    rng = np.random.default_rng(46)
    essays = []
    for _ in range(5):
        lines = [haystack.sentence(rng) + ("  " if rng.random() < 0.2 else "") for _ in range(25)]
        lines = [line.replace(" ", "\n", 1) if rng.random() < 0.3 else line for line in lines]
        essays.append("\n\n".join(lines))
    return essays


def documents() -> list[Example]:
    """Documents with questions, answered with heads masked or attention redistributed."""
    return toy_pages(47, 10)
