"""Requests of the served page to a model, and their results; independent of the browser."""

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import Compose, Intervention, ScaleHeads, ZeroHeads
from hooked_vlm.steering import SteeringVectors
from hooked_vlm.viewer.attention_view import Query, attention
from hooked_vlm.viewer.view import Head

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

MOST_TOKENS = 512
"""Largest number of new tokens."""
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, eq=False)
class Picture:
    """An upright RGB image. Equal to itself alone: pictures of one name may differ."""

    name: str
    image: Image.Image


@dataclass(frozen=True)
class Asked:
    """All settings that decide a result."""

    picture: Picture | None
    prompt: str
    max_new_tokens: int | None
    factors: tuple[tuple[Head, float | int], ...] = ()
    """Heads with the factors of their outputs, in order; 0 masks a head."""
    steering: tuple[int, float | int] | None = None
    """Layer and scale of the steering vector that is added."""

    @property
    def edits(self) -> str:
        """Description of the edited heads, and of the steering."""
        said = [f"{layer}.{head} × {factor:g}" for (layer, head), factor in self.factors]
        if self.steering is not None:
            said.append(f"steering at layer {self.steering[0]} × {self.steering[1]:g}")
        return ", ".join(said) or "no head edited"

    def __str__(self) -> str:
        name = "no picture" if self.picture is None else self.picture.name
        return f"{name} · “{self.prompt}” · at most {self.max_new_tokens} tokens · {self.edits}"


@dataclass(frozen=True)
class Piece:
    """The text of a token."""

    text: str
    changed: bool
    """Whether the token is missing from the other answer, once the two are aligned."""


@dataclass(frozen=True)
class Answer:
    """An answer."""

    pieces: tuple[Piece, ...]
    ended: bool
    """Whether generation ended with a stop token."""

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, eq=False)
class Shown:
    """A result and its settings."""

    asked: Asked
    unedited: Answer
    edited: Answer
    page: str
    """The attention of the edited run, HTML."""


class Session:
    """A model that answers one question at a time, however many threads ask."""

    def __init__(
        self,
        model: "HookedVLM",
        *,
        max_pixels: int | None = None,
        max_tiles: int | None = None,
        ranked: Sequence[Head] = (),
        query: Query = "producing",
        steering: SteeringVectors | None = None,
    ) -> None:
        self.model = model
        self.steering = steering
        """Vectors that may be added."""
        self._bounds: dict[str, Any] = {"max_pixels": max_pixels, "max_tiles": max_tiles}
        self._view = {"heads": ranked, "query": query}
        self._alone = threading.Lock()

    @torch.no_grad()
    def answer(self, asked: Asked) -> Shown:
        """Generate greedy answers with and without the edits, and the attention of the edited run.

        Raises:
            InputError: no picture, an empty prompt, a length or factor out of range, or heads or
                steering vectors that do not exist.
            ImageError: a picture that the model cannot take.
        """
        if asked.picture is None:
            raise InputError("there is no picture yet: choose a file")
        if not asked.prompt.strip():
            raise InputError("the prompt is empty: write a question about the picture")
        n_tokens = asked.max_new_tokens
        if n_tokens is None or not 1 <= n_tokens <= MOST_TOKENS:
            raise InputError(f"an answer may have 1 to {MOST_TOKENS} tokens, got {n_tokens}")
        with self._alone:
            inputs = self.model.to_inputs(asked.prompt, images=[asked.picture.image], **self._bounds)
            hooks = Compose((intervention(asked.factors), *self._steer(asked))).hooks(self.model, inputs)
            unedited = self._generated(inputs, n_tokens, [])
            edited = self._generated(inputs, n_tokens, hooks) if hooks else unedited
            title = f"Where the model looks: {asked.edits}"
            page = attention(
                self.model, inputs, edited, images=asked.picture.image, fwd_hooks=hooks, title=title, **self._view
            ).html
            return Shown(asked, *compared(self.model, unedited, edited), page)

    def _steer(self, asked: Asked) -> list[Intervention]:
        if asked.steering is None:
            return []
        if self.steering is None:
            raise InputError("there are no steering vectors: start with --steer FILE")
        return [self.steering.at(*asked.steering)]

    def _generated(self, inputs: VLMInputs, n_tokens: int, hooks: list) -> list[int]:
        return self.model.generate(inputs, n_tokens, fwd_hooks=hooks)[0, inputs.shape[1] :].tolist()


def compared(model: "HookedVLM", first: list[int], second: list[int]) -> tuple[Answer, Answer]:
    """Two answers, each with the tokens marked that are not in both; the token that ends one is not shown."""
    stops = model.cfg.eos_token_ids
    words = [[token for token in ids if token not in stops] for ids in (first, second)]
    blocks = SequenceMatcher(None, *words, autojunk=False).get_matching_blocks()
    of_first = {block.a + i for block in blocks for i in range(block.size)}
    of_second = {block.b + i for block in blocks for i in range(block.size)}
    return _answer(model, first, of_first), _answer(model, second, of_second)


def _answer(model: "HookedVLM", ids: list[int], kept: set[int]) -> Answer:
    stops = model.cfg.eos_token_ids
    texts = _texts(model, [token for token in ids if token not in stops])
    return Answer(tuple(Piece(text, at not in kept) for at, text in enumerate(texts)), bool(ids) and ids[-1] in stops)


def intervention(factors: Sequence[tuple[Head, float | int]]) -> Intervention:
    """Heads scaled together, those of one factor at once; a factor of 0 is a mask whatever the head holds."""
    by_factor: dict[float | int, list[Head]] = defaultdict(list)
    for head, factor in factors:
        by_factor[factor].append(head)
    return Compose(
        tuple(
            ScaleHeads(tuple(heads), float(factor)) if factor else ZeroHeads(tuple(heads))
            for factor, heads in by_factor.items()
        )
    )


def _texts(model: "HookedVLM", ids: list[int]) -> list[str]:
    """The text token by token; a character that is several tokens stands at its last one."""
    done, texts = "", []
    for n in range(1, len(ids) + 1):
        text = str(model.to_string(ids[:n]))
        whole = done if text.endswith(_UNFINISHED) and n < len(ids) else text
        texts.append(whole[len(done) :])
        done = whole
    return texts
