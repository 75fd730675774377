"""Render text as the pages of the OCR-heads paper, with boxes of character spans.

As published (arXiv 2505.15865 and its code): lines of at most 50 characters, 15 lines a page, a margin of 15
pixels, black on white in Pillow's built-in font, each page as wide as its widest line, stored as JPEG. A box
spans the width of its characters and the full height of the line.
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from hooked_vlm.experiments.ocr_heads.examples import Evidence

CHARACTERS_PER_LINE, LINES_PER_PAGE, MARGIN = 50, 15, 15


@dataclass(frozen=True)
class PageLine:
    """A line as drawn, and the position of its first character in the text."""

    text: str
    start: int


def wrap(text: str) -> list[PageLine]:
    """Break text into lines; `text[line.start:]` begins with `line.text` (white space counts as spaces)."""
    lines = []
    offset = 0
    for raw in text.split("\n"):
        plain = raw.translate({ord(c): " " for c in "\t\x0b\x0c\r"})
        at = 0
        for piece in textwrap.wrap(plain, width=CHARACTERS_PER_LINE, expand_tabs=False):
            at = plain.index(piece, at)
            lines.append(PageLine(piece, offset + at))
            at += len(piece)
        offset += len(raw) + 1
    return lines


def render(lines: Sequence[PageLine]) -> list[Image.Image]:
    """Render pages, one image for every 15 lines."""
    font = ImageFont.load_default()
    pages = []
    for at in range(0, len(lines), LINES_PER_PAGE):
        chunk = lines[at : at + LINES_PER_PAGE]
        width = max(_width(line.text) for line in chunk) + 2 * MARGIN
        page = Image.new("RGB", (width, _line_height() * len(chunk) + 2 * MARGIN), "white")
        draw = ImageDraw.Draw(page)
        for i, line in enumerate(chunk):
            draw.text((MARGIN, MARGIN + i * _line_height()), line.text, font=font, fill="black")
        file = io.BytesIO()
        page.save(file, "JPEG")
        pages.append(Image.open(file).convert("RGB"))
    return pages


def evidence_of(lines: Sequence[PageLine], answer_start: int, parts: Sequence[tuple[int, int]]) -> tuple[Evidence, ...]:
    """Find the boxes of parts of an answer that starts in the text at `answer_start`.

    A part broken over two lines gets a box on each.
    """
    found = []
    for start, stop in parts:
        for number, line in enumerate(lines):
            left = max(start + answer_start, line.start) - line.start
            right = min(stop + answer_start, line.start + len(line.text)) - line.start
            if left >= right:
                continue
            page, row = divmod(number, LINES_PER_PAGE)
            x = MARGIN + _width(line.text[:left])
            y = MARGIN + row * _line_height()
            box = (x, y, x + _width(line.text[left:right]), y + _line_height())
            first = line.start + left - answer_start
            found.append(Evidence(first, first + right - left, page, box))
    return tuple(found)


def _width(text: str) -> int:
    left, _, right, _ = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((0, 0), text, ImageFont.load_default())
    return int(right - left)


def _line_height() -> int:
    _, top, _, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((0, 0), "Ay", ImageFont.load_default())
    return int(bottom - top)
