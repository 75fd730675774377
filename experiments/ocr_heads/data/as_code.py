"""Pages, boxes and texts exactly as the code published with the paper makes them (step1 and step2; papers 1.2).

Where it differs from `scored`: needles are drawn by Python's generator and stand between the characters of the essays,
whose line breaks are deleted; their pages have lines of 12 pixels; the boxes are all digits (passkeys) or the words
that begin in the first occurrence of the answer in any case (needles), of which those of the first page with any count.
"""

import re
from collections.abc import Callable

from PIL import Image

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.ocr_heads.data.haystack import HaystackItem
from hooked_vlm.experiments.ocr_heads.data.pages import INK, LINES_PER_PAGE, MARGIN, PEN, PageLine, render, wrap
from hooked_vlm.experiments.ocr_heads.examples import Box, Evidence, Example

Boxes = list[tuple[int, int, Box]]
"""Of each page: (first character in the text, one past the last, box)."""


def passkey_example(item: HaystackItem, question: str) -> Example:
    """Pages with a passkey: a box for every digit, each as far right as the digits before it are wide."""
    text = _passkey_text(item)
    lines = wrap(text)
    return _on_pages(item.answer, question, render(lines), _digits(lines), text.find(item.answer))


def needle_example(item: HaystackItem) -> Example:
    """Pages with a needle: a box for every word that begins in the answer.

    Raises:
        StudyError: the answer is not in its text.
    """
    text = item.context.replace("\n", "")
    at = text.lower().find(item.answer.lower())
    if at < 0:
        raise StudyError(f"the answer {item.answer!r} does not occur on its page: expected a needle data set")
    lines = wrap(text)
    words = _words(lines, lambda start: at <= start < at + len(item.answer))
    return _on_pages(item.answer, item.question, render(lines, PEN), words, at)


def passkey_text(item: HaystackItem, question: str) -> Example:
    """The passkey's text, which ends with a question of its own."""
    text = _passkey_text(item)
    return Example(question, (item.answer,), context=text, answer_at=text.find(item.answer))


def needle_text(item: HaystackItem) -> Example:
    """The needle's text and question."""
    text = item.context.replace("\n", "")
    at = text.lower().find(item.answer.lower())
    return Example(f"\n Question: {item.question}", (item.answer,), context=text, answer_at=at)


def _passkey_text(item: HaystackItem) -> str:
    return item.context.replace(f"{item.answer} is the pass key.", "")


def _on_pages(answer: str, question: str, images: list[Image.Image], boxes: list[Boxes], at: int) -> Example:
    """Keep the boxes of the first page that has any."""
    page = next((number for number, own in enumerate(boxes) if own), None)
    evidence = () if page is None else tuple(Evidence(a - at, b - at, page, box) for a, b, box in boxes[page])
    return Example(question, (answer,), tuple(images), evidence)


def _digits(lines: list[PageLine]) -> list[Boxes]:
    """Boxes of all digits, as if they were on the first page that has any (the code's list is never emptied)."""
    found: list[Boxes] = [[] for _ in range(0, len(lines), LINES_PER_PAGE)]
    first: int | None = None
    for number, line in enumerate(lines):
        page, row = divmod(number, LINES_PER_PAGE)
        y = MARGIN + row * INK.line_height
        for run in re.finditer(r"\d+", line.text):
            first = page if first is None else first
            x = MARGIN + INK.width(line.text[: run.start()])
            for i, digit in enumerate(run.group(), line.start + run.start()):
                found[first].append((i, i + 1, (x, y, x + INK.width(digit), y + INK.line_height)))
                x += INK.width(digit)
    return found


def _words(lines: list[PageLine], counts: Callable[[int], bool]) -> list[Boxes]:
    """Boxes of the whole words whose first character counts."""
    found: list[Boxes] = [[] for _ in range(0, len(lines), LINES_PER_PAGE)]
    for number, line in enumerate(lines):
        page, row = divmod(number, LINES_PER_PAGE)
        y = MARGIN + row * PEN.line_height
        for word in re.finditer(r"\b\w+\b", line.text):
            start = line.start + word.start()
            if counts(start):
                x = MARGIN + PEN.width(line.text[: word.start()])
                box = (x, y, x + PEN.width(word.group()), y + PEN.line_height)
                found[page].append((start, start + len(word.group()), box))
    return found
