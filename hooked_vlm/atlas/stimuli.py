"""Stimuli of an atlas: pages and objects drawn on the spot, the same questions as text, repeated tokens; or one's own
samples."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from hooked_vlm.atlas.definitions import Kind
from hooked_vlm.data.samples import NamedBox, Sample
from hooked_vlm.errors import InputError
from hooked_vlm.toys import drawings, pages

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

TEXT = "text"
"""Name of the boxes around text, for `text_region`."""
FEW_TOKENS = 1000
"""Size of the vocabulary from which on a model is asked in whole sentences about larger pictures."""
REPEATED_LENGTH = 24
"""Number of tokens that are repeated."""


@dataclass(frozen=True, eq=False)
class Stimulus:
    """What heads are scored on, once."""

    name: str
    kind: Kind
    sample: Sample | None = None
    """All but repeated tokens."""
    tokens: tuple[int, ...] = ()
    """The whole sequence, of repeated tokens."""

    @property
    def asked(self) -> Sample:
        """The sample of a stimulus that asks something."""
        assert self.sample is not None
        return self.sample

    def boxes(self, kind: str) -> list[NamedBox]:
        """The boxes of `"text"`, or `"evidence"`: all others, where the answer is."""
        return [box for box in self.asked.boxes if (box.name == TEXT) == (kind == TEXT)]

    def digest(self) -> str:
        """What the scores on it depend on.

        Raises:
            InputError: a picture that cannot be read.
        """
        own = [self.name, self.kind, self.tokens, "" if self.sample is None else self.sample.digest()]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()


@dataclass(frozen=True)
class Style:
    """How pages and objects are drawn, and what is asked about them."""

    size: tuple[int, int]
    font_size: int | None
    n_lines: int
    suffix: str = ""
    """Behind each question."""


TOY = Style(pages.PAGE_SIZE, None, 3)
LARGE = Style((448, 392), 36, 5, " Answer with one word.")


def shipped(model: "HookedVLM", n: int = 32, seed: int = 0) -> list[Stimulus]:
    """Draw `n` stimuli of each kind, the same for every model that takes the same style: small pages for models whose
    vocabulary knows characters and few words (the bundled toy models), larger ones for all others. A language model
    without a vision tower gets no pictures.

    Raises:
        InputError: fewer than one, or a negative seed.
    """
    if n < 1:
        raise InputError(f"an atlas needs at least one stimulus of each kind, got {n}")
    if seed < 0:
        raise InputError(f"a seed must be 0 or more, got {seed}")
    style = TOY if model.cfg.d_vocab < FEW_TOKENS else LARGE
    found: list[Stimulus] = []
    for i in range(n):
        page, text = _page(np.random.default_rng([seed, 31, i]), style, i)
        shown = [page, _object(np.random.default_rng([seed, 32, i]), style, i)] if model.cfg.vision is not None else []
        found += [*shown, text, _repeated(model, np.random.default_rng([seed, 33, i]), i)]
    return found


def as_stimuli(samples: Iterable[Sample]) -> list[Stimulus]:
    """Take samples as stimuli, each by what it has: pictures with a box for each character of the answer but spaces,
    named by it, are pages, other pictures are objects (their boxes, if any, hold what is asked for), and prompts
    without pictures are text. Boxes named "text" are around text.

    Raises:
        InputError: something else than samples, a sample without an answer, several of one name, or none at all.
    """
    found: list[Stimulus] = []
    for sample in samples:
        if not isinstance(sample, Sample):
            raise InputError(f"expected samples (hooked_vlm.data: read_samples(path), or Sample), got {sample!r:.80}")
        if not sample.answer:
            raise InputError(f"sample {sample.id!r} has no answer: the scores of an atlas are about the answer")
        named = [box.name for box in sample.boxes if box.name != TEXT and box.name.strip()]
        characters = [character for character in sample.answer if not character.isspace()]
        kind: Kind = "text" if not sample.pictures else "page" if characters and named == characters else "object"
        found.append(Stimulus(sample.id, kind, sample))
    check_names(found)
    if not found:
        raise InputError("there are no samples to make an atlas of")
    return found


def check_names(stimuli: Iterable[Stimulus]) -> None:
    """Check that names tell stimuli apart.

    Raises:
        InputError: they do not.
    """
    (name, n), *_ = Counter(stimulus.name for stimulus in stimuli).most_common(1) or [("", 0)]
    if n > 1:
        raise InputError(f"there are several stimuli named {name!r}: names tell stimuli apart, give samples other ids")


def of_kind(stimuli: Iterable[Stimulus], kinds: Sequence[Kind]) -> list[Stimulus]:
    """Those of some kinds."""
    return [stimulus for stimulus in stimuli if stimulus.kind in kinds]


def _page(rng: np.random.Generator, style: Style, i: int) -> tuple[Stimulus, Stimulus]:
    """A page of lines, and the same lines as text."""
    lines = pages.random_lines(rng, style.n_lines)
    page = pages.make_page(rng, size=style.size, lines=lines, font_size=style.font_size)
    line = page.lines[int(rng.integers(len(lines)))]
    question = pages.question_for(line.key) + style.suffix
    characters = [NamedBox(char, box) for char, box in zip(line.value, line.value_boxes, strict=True)]
    text = [NamedBox(TEXT, pages.union(own.key_boxes + own.value_boxes)) for own in page.lines]
    shown = Sample(f"page-{i}", question, (page.image,), (*characters, *text), line.value)
    told = replace(shown, id=f"text-{i}", prompt=f"{page.text}\n{question}", images=(), boxes=())
    return Stimulus(shown.id, "page", shown), Stimulus(told.id, "text", told)


def _object(rng: np.random.Generator, style: Style, i: int) -> Stimulus:
    name = drawings.OBJECTS[int(rng.integers(len(drawings.OBJECTS)))]
    pixels, mask = drawings.draw_object(rng, name, style.size)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    question = pages.NAMING_PROMPT + style.suffix
    sample = Sample(f"object-{i}", question, (Image.fromarray(pixels),), (NamedBox("object", box),), name)
    return Stimulus(sample.id, "object", sample)


def _repeated(model: "HookedVLM", rng: np.random.Generator, i: int) -> Stimulus:
    """Random tokens twice, behind the tokenizer's first token if it has one; different ones where the vocabulary holds
    enough."""
    tokenizer = model.input_builder.text.require_tokenizer()
    not_text = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *model.input_spec().placeholder_ids}
    usual = np.array([token for token in range(min(len(tokenizer), model.cfg.d_vocab)) if token not in not_text])
    drawn = rng.choice(usual, REPEATED_LENGTH, replace=len(usual) < REPEATED_LENGTH).tolist()
    first = tokenizer("")["input_ids"][:1]
    return Stimulus(f"repeated-{i}", "repeated", tokens=(*first, *drawn, *drawn))
