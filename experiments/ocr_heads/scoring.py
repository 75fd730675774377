"""Two scores of every head: does it look at what is being read, in an image (OCR) or in a text (retrieval)?

OCR score (papers 1.3 to 1.6): the share of the answer's tokens at which the head's strongest attention lies on an image
token that holds the character. Text retrieval score (Wu et al., arXiv 2404.15574; papers part 3): the share of the
needle's tokens that are generated while the head's strongest attention lies on that token in the needle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.ocr_heads.answers import is_right, rouge_1_recall
from hooked_vlm.experiments.ocr_heads.config import Granularity, Protocol
from hooked_vlm.experiments.ocr_heads.examples import Example
from hooked_vlm.experiments.ocr_heads.reading import Copy, Reading, read
from hooked_vlm.inputs.vlm_inputs import VLMInputs

MIN_ROUGE = 0.5
"""A retrieval counts if the reply holds more than this share of the answer's words (Wu et al.)."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Every head's score in every sample and at every answer token."""

    kind: Literal["ocr", "retrieval"]
    samples: Float[np.ndarray, "sample layer head"]
    tokens: Float[np.ndarray, "token layer head"]
    output_norm: Float[np.ndarray, "layer head"]
    """Mean norm of what a head adds to the residual stream, over the prompts' real positions."""
    right: int
    """How many examples the model answered rightly ..."""
    n_asked: int
    """... of so many."""
    granularity: Granularity = "sample"
    """What `mean` and `frequency` are taken over."""

    @property
    def instances(self) -> Float[np.ndarray, "instance layer head"]:
        return self.samples if self.granularity == "sample" else self.tokens

    @property
    def mean(self) -> Float[np.ndarray, "layer head"]:
        return self.instances.mean(0)

    def frequency(self, threshold: float) -> Float[np.ndarray, "layer head"]:
        """Share of instances in which a head scores above `threshold`."""
        return (self.instances > threshold).mean(0)


def score_batch(
    model: Any,
    kind: Literal["ocr", "retrieval"],
    examples: Sequence[Example],
    protocol: Protocol,
    pixels: int | None,
    new_tokens: int,
    exact: bool,
) -> pd.DataFrame:
    """One row per example: reply, right, its score (`sample`, empty where it does not count), those of its tokens
    (`tokens`), and the heads' output norms; arrays are flattened [.., layer, head]."""
    if kind == "ocr":
        ask = partial(find_copies, model, protocol=protocol)
    elif protocol.retrieval == "same_token":
        ask = partial(same_tokens, model)
    else:
        ask = partial(find_retrievals, model)
    keys = "prompt" if kind == "retrieval" and protocol.retrieval == "same_token" else protocol.keys
    rows = []
    for example, reading in zip(examples, read(model, examples, ask, pixels, new_tokens, keys), strict=True):
        reply = str(model.to_string(reading.reply))
        counts = kind == "ocr" or protocol.retrieval == "same_token"
        counts = counts or rouge_1_recall(example.answer, reply) > MIN_ROUGE
        sample, tokens = _values(reading, kind, protocol) if counts else (None, None)
        rows.append(
            {
                "reply": reply,
                "right": is_right(example, reply, "exact" if exact else "contains"),
                "sample": np.empty(0, np.float32) if sample is None else sample.ravel().astype(np.float32),
                "tokens": np.empty(0, np.float32) if tokens is None else tokens.ravel().astype(np.float32),
                "norms": reading.norms.ravel().astype(np.float32),
            }
        )
    return pd.DataFrame(rows)


def gather(
    kind: Literal["ocr", "retrieval"], table: pd.DataFrame, shape: tuple[int, int], granularity: Granularity
) -> Scores:
    """The scores of all examples."""

    def stacked(column: str) -> np.ndarray:
        return np.concatenate([np.asarray(v, dtype=np.float64) for v in table[column]]).reshape(-1, *shape)

    return Scores(
        kind,
        stacked("sample"),
        stacked("tokens"),
        stacked("norms").mean(0),
        int(table["right"].to_numpy().sum()),
        len(table),
        granularity,
    )


def _values(
    reading: Reading, kind: str, protocol: Protocol
) -> tuple[Float[np.ndarray, "layer head"] | None, Float[np.ndarray, "token layer head"]]:
    """An example's own score, and those of its answer's tokens."""
    weights = np.array([copy.weight for copy in reading.copies])
    values = reading.hits * weights[:, None, None]
    if kind == "retrieval":
        tokens = reading.hits[[copy.token for copy in reading.copies]].astype(float)
        return values.sum(0), tokens
    counted = [copy.position is not None or protocol.missing == "zero" for copy in reading.copies]
    return (values[counted].mean(0) if any(counted) else None), values[counted]


# ---------------------------------------------------------------- where to look: images


def find_copies(
    model: Any, inputs: VLMInputs, row: int, example: Example, reply: list[int], *, protocol: Protocol
) -> list[Copy]:
    """The answer's tokens in the reply, each with its evidence.

    `inputs` are prompt and reply; the reply starts at `inputs.stop[row] - len(reply)`.
    """
    encoded = model.tokenizer(example.answer, add_special_tokens=False, return_offsets_mapping=True)
    answer, spans = encoded["input_ids"], encoded["offset_mapping"]
    start = inputs.stop[row] - len(reply)
    shift = 0 if protocol.query == "copied" else -1
    in_answer, in_reply, run = longest_run(answer, reply)
    weight = run / len(answer) if protocol.weight_by_run else 1.0
    boxes = [(e, _tokens_of(inputs, row, e, protocol)) for e in example.evidence]
    coarse = len(boxes) == 1 and (boxes[0][0].start, boxes[0][0].stop) == (0, len(example.answer))
    if protocol.matching == "in_order":
        places = [n for n, token in enumerate(reply) if token in set(answer)]
        asked = min((e.start for e, _ in boxes), default=0)
        places = places[sum(b <= asked for _, b in spans) :]  # the first box is that of the first of them
        if coarse:  # one box around everything: every place is held against it
            boxes = boxes * max(1, len(places))
        return [
            Copy(start + places[i] + shift if i < len(places) else None, weight, evidence)
            for i, (_, evidence) in enumerate(boxes)
        ]
    copies = []
    for i, (a, b) in enumerate(spans):
        own = [tokens for e, tokens in boxes if e.start < b and a < e.stop]
        if not own:
            continue  # white space, or a character that is not asked about
        evidence = {t for tokens in own for t in tokens}  # none where no token holds enough of a large box
        generated = in_answer <= i < in_answer + run
        position = start + in_reply + i - in_answer + shift if generated else None
        copies.append(Copy(position, weight, tuple(sorted(evidence))))
    return copies


def longest_run(a: Sequence[int], b: Sequence[int]) -> tuple[int, int, int]:
    """The longest run of equal tokens in both: where it starts in `a` and in `b`, and its length."""
    best = (0, 0, 0)
    lengths = [0] * (len(b) + 1)
    for i, token in enumerate(a):
        previous = 0
        for j, other in enumerate(b):
            diagonal, previous = previous, lengths[j + 1]
            lengths[j + 1] = diagonal + 1 if token == other else 0
            if lengths[j + 1] > best[2]:
                n = lengths[j + 1]
                best = (i - n + 1, j - n + 1, n)
    return best


def _tokens_of(inputs: VLMInputs, row: int, evidence: Any, protocol: Protocol) -> tuple[int, ...]:
    """Positions of the image tokens that hold enough of an evidence box."""
    images = [v for v in inputs.visuals if v.row == row]
    visual = images[evidence.image]
    grid = inputs.image_grid(visual.index)
    found = grid.tokens_in_box(evidence.box, protocol.min_overlap, truncate=protocol.truncate_boxes)
    return tuple(visual.start + i for i in found)


# ---------------------------------------------------------------- where to look: text


def find_retrievals(model: Any, inputs: VLMInputs, row: int, example: Example, reply: list[int]) -> list[Copy]:
    """Every generated token that stands in the needle: a head copies it if it looks at it there.

    Each counts one over the needle's length. Instances by token are the needle's: those of the longest run that the
    reply shares with it, and the others as not copied.
    """
    needle = needle_positions(model, inputs, row, example, len(reply))
    tokens = inputs.tokens[row].tolist()
    ids = [tokens[i] for i in needle]
    start = inputs.stop[row] - len(reply)
    _, in_reply, run = longest_run(ids, reply)
    copies = [Copy(None, 0.0, ())] * (len(needle) - run)
    for n, token in enumerate(reply):
        evidence = tuple(i for i in needle if tokens[i] == token)
        if evidence:
            in_run = in_reply <= n < in_reply + run
            copies.append(Copy(start + n - 1, 1 / len(needle), evidence, in_run))
    return copies


def same_tokens(model: Any, inputs: VLMInputs, row: int, example: Example, reply: list[int]) -> list[Copy]:
    """As the published code has it: every token, of prompt or reply, whose id is one of the answer's; a head scores if
    it looks at the same id anywhere in the prompt."""
    answer = set(model.tokenizer(example.answer, add_special_tokens=False)["input_ids"])
    tokens, first, stop = inputs.tokens[row].tolist(), inputs.first[row], inputs.stop[row]
    prompt = range(first, stop - len(reply) - 1)
    asked = [i for i in range(first, stop) if tokens[i] in answer]
    return [Copy(i, 1 / len(asked), tuple(j for j in prompt if tokens[j] == tokens[i])) for i in asked]


def needle_positions(model: Any, inputs: VLMInputs, row: int, example: Example, n_reply: int) -> list[int]:
    """Positions of the tokens in which the answer stands in the text.

    Raises:
        StudyError: the answer's place is not known, or its text is not where it should be.
    """
    if example.answer_at is None:
        raise StudyError("a text without the place of its answer has no retrieval score")
    text = model.chat_text(example.prompt)
    encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    first, stop = inputs.first[row], inputs.stop[row] - n_reply
    if encoded["input_ids"] != inputs.tokens[row, first:stop].tolist():
        raise StudyError(
            f"this tokenizer does not say where the words of a prompt lie: {type(model.tokenizer).__name__}"
        )
    begin = text.index(example.prompt) + example.answer_at
    end = begin + len(example.answer)
    return [first + i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and begin < b]
