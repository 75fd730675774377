"""Synthetic pages, texts and drawings for training and evaluating the toy models.

All randomness comes from the generator argument; nothing heavier than numpy and Pillow is imported, so experiments and
tests can make pages without loading a model.
Boxes are half-open pixel boxes ``(x0, y0, x1, y1)`` around a character's ink.
"""

import functools
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hooked_vlm.toys.drawings import OBJECTS, draw_object

Box = tuple[int, int, int, int]

Turns = tuple[tuple[str, str], ...]  # question, answer

LETTERS = string.ascii_lowercase
CHARACTERS = string.digits + string.ascii_lowercase
PAGE_SIZE = (128, 112)  # width, height in pixels: 8 x 7 image tokens of 16 x 16
OTHER_PAGE_SIZES = ((128, 96), (144, 112), (128, 128), (112, 112))
SEPARATOR = " = "
VALUE_LENGTH = 4
MAX_LINES = 6
FONT_SIZES = (11, 16)  # inclusive range, Pillow's built-in font

NAMING_PROMPT = "What is the main object in the image?"
TRANSCRIPTION_PROMPT = "Read the text."

# A key or value equal to one of the tokenizer's words would be one token instead of one per character.
RESERVED_WORDS = (
    frozenset(w.lower() for w in ("What", "is", "the", "value", "of", "main", "object", "in", "image", "Read", "text"))
    | frozenset(OBJECTS)
    | {"user", "system", "assistant"}
)


def question_for(key: str) -> str:
    return f"What is the value of {key}?"


def line_question_for(key: str) -> str:
    """Question for a whole line (training only); its answer repeats the key, which makes the line easier to find."""
    return f"What is the text of {key}?"


@dataclass(frozen=True)
class Line:
    """One line ``key = value``; boxes only where the line was rendered (empty for text contexts)."""

    key: str
    value: str
    key_boxes: tuple[Box, ...] = ()
    value_boxes: tuple[Box, ...] = ()

    @property
    def text(self) -> str:
        return self.key + SEPARATOR + self.value

    @property
    def value_box(self) -> Box:
        """Smallest box around the value."""
        return union(self.value_boxes)


@dataclass(frozen=True)
class Page:
    """A rendered page of ``key = value`` lines, from top to bottom."""

    pixels: np.ndarray  # uint8 [height, width, 3]
    lines: tuple[Line, ...]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    def question(self, line: int) -> str:
        return question_for(self.lines[line].key)

    @property
    def text(self) -> str:
        return "\n".join(line.text for line in self.lines)


@dataclass(frozen=True)
class Sample:
    """One conversation: an image or none, then turns of (question, answer).

    ``task`` is ``page``, ``text``, ``transcription``, ``naming`` or ``continuation``. ``target_lines`` holds, for pages
    and texts, the line each turn asks for.
    """

    task: str
    turns: Turns
    pixels: np.ndarray | None = None
    page: Page | None = None
    target_lines: tuple[int, ...] = ()
    char_boxes: tuple[Box, ...] = ()
    object_mask: np.ndarray | None = None  # bool [height, width]: where a drawn object lies

    @property
    def image(self) -> Image.Image | None:
        return None if self.pixels is None else Image.fromarray(self.pixels)


def union(boxes: Sequence[Box]) -> Box:
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return (min(x0), min(y0), max(x1), max(y1))


# --- glyphs and canvases ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def glyph(char: str, size: int) -> tuple[np.ndarray, int, int, int]:
    """Coverage of one glyph of Pillow's built-in font, cropped to its ink.

    Returns the coverage as float32 [height, width] in [0, 1], the offset (dx, dy) of its corner from
    the pen position on the baseline, and the advance width in pixels.
    """
    font = _font(size)
    canvas = Image.new("L", (3 * size, 3 * size))
    ImageDraw.Draw(canvas).text((size, 2 * size), char, fill=255, font=font, anchor="ls")
    box = canvas.getbbox()
    advance = round(font.getlength(char))
    if box is None:
        return np.zeros((0, 0), np.float32), 0, 0, advance
    ink = np.asarray(canvas.crop(box), np.float32) / 255
    ink.flags.writeable = False  # the cache hands out one array to everyone
    return ink, box[0] - size, box[1] - 2 * size, advance


@functools.lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def text_width(text: str, size: int, tracking: int) -> int:
    return sum(glyph(char, size)[3] + tracking for char in text)


def draw_text(coverage: np.ndarray, x: int, baseline: int, text: str, size: int, tracking: int) -> list[Box]:
    """Draw ``text`` into the coverage [height, width] and return one ink box per character, spaces included."""
    boxes = []
    for char in text:
        ink, dx, dy, advance = glyph(char, size)
        top, left = baseline + dy, x + dx
        height, width = ink.shape
        window = coverage[top : top + height, left : left + width]
        np.maximum(window, ink, out=window)
        boxes.append((left, top, left + width, top + height))
        x += advance + tracking
    return boxes


def paint(rng: np.random.Generator, coverage: np.ndarray) -> np.ndarray:
    """Turn coverage into uint8 pixels [height, width, 3]: dark ink on light paper, with random shades and grain."""
    paper = rng.integers(175, 256) + rng.integers(-15, 16, size=3)
    ink = rng.integers(0, 90) + rng.integers(-20, 21, size=3)
    pixels = paper + (ink - paper) * coverage[..., None]
    pixels = pixels + rng.normal(0, rng.uniform(0, 5), size=coverage.shape)[..., None]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


# --- pages -----------------------------------------------------------------------------------------


def random_word(rng: np.random.Generator, alphabet: str, length: int) -> str:
    while True:
        word = "".join(alphabet[i] for i in rng.integers(0, len(alphabet), size=length))
        if word not in RESERVED_WORDS:
            return word


def random_lines(
    rng: np.random.Generator,
    n_lines: int,
    alphabet: str = CHARACTERS,
    value_length: int = VALUE_LENGTH,
    decoys: float = 0.0,
) -> tuple[Line, ...]:
    """Make lines with distinct two-letter keys and random values.

    A share ``decoys`` of the lines has a character, not its last, from the start of another line's value: who goes
    on from the answer's first character alone then reads the wrong line (training only).
    """
    keys: list[str] = []
    while len(keys) < n_lines:
        key = random_word(rng, LETTERS, 2)
        if key not in keys:
            keys.append(key)
    values = [random_word(rng, alphabet, value_length) for _ in keys]
    if decoys and n_lines > 1:
        for index in np.flatnonzero(rng.random(n_lines) < decoys):
            other = int(index + rng.integers(1, n_lines)) % n_lines
            place = int(rng.integers(value_length - 1))
            value = values[index][:place] + values[other][0] + values[index][place + 1 :]
            if value not in RESERVED_WORDS:
                values[index] = value
    return tuple(Line(key, value) for key, value in zip(keys, values, strict=True))


def make_page(
    rng: np.random.Generator,
    n_lines: int | None = None,
    size: tuple[int, int] = PAGE_SIZE,
    lines: Sequence[Line] | None = None,
    font_size: int | None = None,
) -> Page:
    """Render a page of ``size`` (width, height) with 1 to 6 lines; font size, spacing, position and shades are random.

    ``lines`` renders given keys and values instead of random ones.
    """
    if lines is None:
        lines = random_lines(rng, n_lines or int(rng.integers(1, MAX_LINES + 1)))
    width, height = size
    largest = min(FONT_SIZES[1], height // len(lines) - 2)
    tracking = int(rng.integers(1, 3))
    if font_size is None:
        font_size = int(rng.integers(FONT_SIZES[0], largest + 1))
        while max(text_width(line.text, font_size, tracking) for line in lines) > width - 6:
            font_size -= 1
    widest = max(text_width(line.text, font_size, tracking) for line in lines)
    # Ascenders reach about 0.75 of the size above the baseline and descenders 0.25 below it.
    pitch = int(rng.integers(font_size + 2, max(font_size + 3, min(2 * font_size, height // len(lines)) + 1)))
    top = int(rng.integers(1, max(2, height - pitch * len(lines))))
    margin = int(rng.integers(2, max(3, width - widest - 2)))

    coverage = np.zeros((height, width), np.float32)
    rendered = []
    for index, line in enumerate(lines):
        baseline = top + index * pitch + round(0.8 * font_size)
        boxes = draw_text(coverage, margin, baseline, line.text, font_size, tracking)
        rendered.append(Line(line.key, line.value, tuple(boxes[: len(line.key)]), tuple(boxes[-len(line.value) :])))
    return Page(paint(rng, coverage), tuple(rendered))


def make_strip(
    rng: np.random.Generator, text: str | None = None, size: tuple[int, int] = PAGE_SIZE
) -> tuple[np.ndarray, str, tuple[Box, ...]]:
    """Render one short line of random characters anywhere on a page: pixels, text, character boxes."""
    width, height = size
    if text is None:
        longest = min(8, (width - 6) // 11)
        text = random_word(rng, CHARACTERS, int(rng.integers(1, longest + 1)))
    tracking = int(rng.integers(1, 3))
    font_size = int(rng.integers(FONT_SIZES[0], FONT_SIZES[1] + 1))
    while text_width(text, font_size, tracking) > width - 6:
        font_size -= 1
    x = int(rng.integers(2, max(3, width - text_width(text, font_size, tracking) - 2)))
    baseline = int(rng.integers(font_size, height - font_size // 2))
    coverage = np.zeros((height, width), np.float32)
    boxes = draw_text(coverage, x, baseline, text, font_size, tracking)
    return paint(rng, coverage), text, tuple(boxes)


# --- samples of the four tasks ---------------------------------------------------------------------


def dialogue(
    rng: np.random.Generator, lines: Sequence[Line], asked: Sequence[int], echo: float, separator: str
) -> Turns:
    """Make questions for the ``asked`` lines; a share ``echo`` of them asks for the whole line."""
    turns = []
    for index in asked:
        line = lines[index]
        if rng.random() < echo:
            turns.append((line_question_for(line.key), line.key + separator + line.value))
        else:
            turns.append((question_for(line.key), line.value))
    return tuple(turns)


def page_sample(
    rng: np.random.Generator,
    n_lines: int | None = None,
    size: tuple[int, int] = PAGE_SIZE,
    turns: int = 1,
    echo: float = 0.0,
    decoys: float = 0.0,
) -> Sample:
    n_lines = n_lines or int(rng.integers(1, MAX_LINES + 1))
    page = make_page(rng, size=size, lines=random_lines(rng, n_lines, decoys=decoys))
    asked = tuple(int(i) for i in rng.permutation(n_lines)[:turns])
    return Sample("page", dialogue(rng, page.lines, asked, echo, SEPARATOR), page.pixels, page, asked)


def text_sample(
    rng: np.random.Generator,
    n_lines: int | None = None,
    turns: int = 1,
    echo: float = 0.0,
    separators: Sequence[str] = (SEPARATOR,),
    decoys: float = 0.0,
) -> Sample:
    """Other ``separators`` than `` = `` (training only) put the value nearer to its key."""
    lines = random_lines(rng, n_lines or int(rng.integers(1, MAX_LINES + 1)), decoys=decoys)
    separator = separators[int(rng.integers(len(separators)))]
    asked = tuple(int(i) for i in rng.permutation(len(lines))[:turns])
    (first, answer), *rest = dialogue(rng, lines, asked, echo, separator)
    context = "\n".join(line.key + separator + line.value for line in lines) + "\n"
    return Sample("text", ((context + first, answer), *rest), target_lines=asked)


def continuation_sample(rng: np.random.Generator, turns: int = 3) -> Sample:
    """Training only: a random string, then questions for what follows two of its characters.

    The purest form of finding a place by its content; it is learned in some hundred steps, and with it
    the lines of a page or text are found, which by itself was not learned in thousands.
    """
    word = random_word(rng, CHARACTERS, int(rng.integers(8, 17)))
    dialogue = []
    for turn in range(turns):
        start = int(rng.integers(len(word) - 4))
        question = line_question_for(word[start : start + 2])
        dialogue.append((f"{word}\n{question}" if turn == 0 else question, word[start : start + 6]))
    return Sample("continuation", tuple(dialogue))


def transcription_sample(rng: np.random.Generator, size: tuple[int, int] = PAGE_SIZE) -> Sample:
    pixels, text, boxes = make_strip(rng, size=size)
    return Sample("transcription", ((TRANSCRIPTION_PROMPT, text),), pixels, char_boxes=boxes)


def full_page_sample(rng: np.random.Generator, n_lines: int, size: tuple[int, int] = PAGE_SIZE) -> Sample:
    """Make a transcription of a whole page, the densest supervision of reading (training only)."""
    page = make_page(rng, n_lines, size)
    return Sample("transcription", ((TRANSCRIPTION_PROMPT, page.text),), page.pixels, page)


def naming_sample(rng: np.random.Generator, size: tuple[int, int] = PAGE_SIZE, name: str | None = None) -> Sample:
    name = name or OBJECTS[int(rng.integers(len(OBJECTS)))]
    pixels, mask = draw_object(rng, name, size)
    return Sample("naming", ((NAMING_PROMPT, name),), pixels, object_mask=mask)
