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

from hooked_vlm.experiments.ocr_heads.examples import Box, Evidence

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


@dataclass(frozen=True)
class Ruler:
    """How the code measures text: its ink (passkeys), or from the pen's position to the ink's end (needles)."""

    from_pen: bool = False

    def width(self, text: str) -> int:
        left, _, right, _ = _ink(text)
        return int(right if self.from_pen else right - left)

    @property
    def line_height(self) -> int:
        """10 pixels, or 12 from the pen's position."""
        _, top, _, bottom = _ink("Ay")
        return int(bottom if self.from_pen else bottom - top)


INK, PEN = Ruler(), Ruler(from_pen=True)


def render(lines: Sequence[PageLine], ruler: Ruler = INK) -> list[Image.Image]:
    """Render pages, one image for every 15 lines."""
    font = ImageFont.load_default()
    pages = []
    for at in range(0, len(lines), LINES_PER_PAGE):
        chunk = lines[at : at + LINES_PER_PAGE]
        width = max(ruler.width(line.text) for line in chunk) + 2 * MARGIN
        page = Image.new("RGB", (width, ruler.line_height * len(chunk) + 2 * MARGIN), "white")
        draw = ImageDraw.Draw(page)
        for i, line in enumerate(chunk):
            draw.text((MARGIN, MARGIN + i * ruler.line_height), line.text, font=font, fill="black")
        pages.append(as_jpeg(page))
    return pages


def as_jpeg(image: Image.Image) -> Image.Image:
    """The image as the code stores it: with the losses of JPEG at Pillow's default quality."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG")
    return Image.open(file).convert("RGB")


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
            x = MARGIN + INK.width(line.text[:left])
            y = MARGIN + row * INK.line_height
            box = (x, y, x + INK.width(line.text[left:right]), y + INK.line_height)
            first = line.start + left - answer_start
            found.append(Evidence(first, first + right - left, page, box))
    return tuple(found)


def _ink(text: str) -> Box:
    """Box of a text's ink, from the pen's position."""
    return ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((0, 0), text, ImageFont.load_default())
