"""OCR score and text retrieval score of every head.

OCR score (papers 1.3 to 1.6): share of the answer's tokens at which the argmax of the head's attention is an image
token that contains the character. Text retrieval score (Wu et al., arXiv 2404.15574; papers part 3): share of the
needle's tokens that are generated while the argmax of the head's attention is that token in the needle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from hooked_vlm.analysis.intervals import mean_interval
from hooked_vlm.analysis.statistics import score_interval
from hooked_vlm.errors import GeometryError, NotSeenError, StudyError
from hooked_vlm.experiments.ocr_heads.alignment import Span, align, longest_run
from hooked_vlm.experiments.ocr_heads.answers import is_right
from hooked_vlm.experiments.ocr_heads.config import Granularity, Protocol
from hooked_vlm.experiments.ocr_heads.examples import Evidence, Example, picture_size
from hooked_vlm.experiments.ocr_heads.reading import NOWHERE, Ask, Copy, Reading, read
from hooked_vlm.inputs.token_layout import Visual
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.model.vlm import HookedVLM

Kind = Literal["ocr", "retrieval"]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of every head, by sample and by answer token.

    One rule for both kinds: every sample counts, answered or not, and what was not generated was not copied. Means
    among answered samples (whose reply is, or contains, the answer) stand beside those.
    """

    kind: Kind
    samples: Float[np.ndarray, "sample layer head"]
    tokens: Float[np.ndarray, "token layer head"]
    output_norm: Float[np.ndarray, "layer head"]
    """Mean norm of a head's output in the residual stream, over the prompts' positions without padding."""
    right: int
    """Number of examples answered correctly."""
    n_asked: int
    """Number of examples."""
    granularity: Granularity = "sample"
    """Instances of `mean` and `frequency`."""
    answered_samples: Bool[np.ndarray, "sample"] | None = None
    """Which samples are answered correctly; None if this is not known."""
    answered_tokens: Bool[np.ndarray, "token"] | None = None
    """Which tokens are those of an answered sample."""
    token_samples: Int[np.ndarray, "token"] | None = None
    """Number of the sample that each token is of; None if every token is a sample of its own."""
    looked: Sequence["Looked"] = ()
    """Where heads look in each sample's page; of OCR scores."""

    @property
    def instances(self) -> Float[np.ndarray, "instance layer head"]:
        return self.samples if self.granularity == "sample" else self.tokens

    @property
    def answered(self) -> Float[np.ndarray, "instance layer head"]:
        """The instances of answered samples; none if it is not known which are."""
        known = self.answered_samples if self.granularity == "sample" else self.answered_tokens
        return self.instances[np.zeros(len(self.instances), dtype=bool) if known is None else known]

    @property
    def mean(self) -> Float[np.ndarray, "layer head"]:
        return self.instances.mean(0)

    @property
    def mean_answered(self) -> Float[np.ndarray, "layer head"]:
        """Mean among answered samples; not numbers if there are none."""
        return self.answered.mean(0) if len(self.answered) else np.full(self.mean.shape, np.nan)

    @property
    def interval(self) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]:
        """95% interval of the mean over instances, for other samples. Retrieval scores above 1 (a token copied twice)
        are bootstrapped."""
        if self.instances.max() > 1 + 1e-6:
            return mean_interval(self.instances, 0, self.instance_samples)
        return score_interval(self.instances.clip(0, 1), self.instance_samples)

    @property
    def instance_samples(self) -> Int[np.ndarray, "instance"]:
        """Number of the sample that each instance is of."""
        if self.granularity == "sample" or self.token_samples is None:
            return np.arange(len(self.instances))
        return self.token_samples

    def frequency(self, threshold: float) -> Float[np.ndarray, "layer head"]:
        """Share of instances in which a head scores above `threshold`."""
        return (self.instances > threshold).mean(0)


def score_batch(
    model: HookedVLM,
    kind: Kind,
    examples: Sequence[Example],
    protocol: Protocol,
    pixels: int | None,
    new_tokens: int,
    exact: bool,
) -> pd.DataFrame:
    """Score a batch of examples.

    Returns:
        One row per example: `reply`, `right`, `sample` (the example's scores, empty if it does not count), `tokens`
        (scores of its tokens), `norms` (the heads' output norms); arrays are flattened [.., layer, head].
    """
    keys = protocol.keys
    if kind == "ocr":
        ask: Ask = partial(find_copies, model, protocol=protocol, limit=new_tokens)
    elif protocol.retrieval == "same_token":
        ask, keys = partial(same_tokens, model), "prompt"
    else:
        ask = partial(find_retrievals, model)
    rows = []
    for example, reading in zip(
        examples, read(model, examples, ask, pixels, new_tokens, keys, protocol.stop_ids), strict=True
    ):
        reply = str(model.to_string(reading.reply))
        lost = kind == "retrieval" and protocol.retrieval == "same_token"
        lost = lost and _lost_its_row(model, example, reading.reply, new_tokens)
        sample, tokens = (None, None) if lost else _values(reading, kind, protocol)
        rows.append(
            {
                "reply": reply,
                "right": is_right(example, reply, "exact" if exact else "contains"),
                "sample": np.empty(0) if sample is None else sample.ravel(),
                "tokens": np.empty(0) if tokens is None else tokens.ravel(),
                "norms": reading.norms.ravel().astype(np.float32),
                **(_looked(reading) if kind == "ocr" else {}),
            }
        )
    return pd.DataFrame(rows)


def gather(kind: Kind, table: pd.DataFrame, shape: tuple[int, int], granularity: Granularity) -> Scores:
    """Collect the scores of all examples, given as rows of `score_batch`."""
    right = table["right"].to_numpy(dtype=bool)

    def stacked(column: str) -> tuple[np.ndarray, np.ndarray]:
        """Values of all examples, and the example that each is of."""
        values = [np.asarray(v, dtype=np.float64).reshape(-1, *shape) for v in table[column]]
        return np.concatenate(values), np.arange(len(table)).repeat([len(own) for own in values])

    (samples, of_samples), (tokens, of_tokens) = stacked("sample"), stacked("tokens")
    return Scores(
        kind, samples, tokens, stacked("norms")[0].mean(0), int(right.sum()), len(table), granularity,
        right[of_samples], right[of_tokens], of_tokens, _gather_looked(table, shape),
    )  # fmt: skip


def _values(
    reading: Reading, kind: Kind, protocol: Protocol
) -> tuple[Float[np.ndarray, "layer head"] | None, Float[np.ndarray, "token layer head"]]:
    """Scores of an example, and scores of its answer's tokens."""
    weights = np.array([copy.weight for copy in reading.copies])
    values = reading.hits * weights[:, None, None]
    if kind == "retrieval":
        tokens = reading.hits[[copy.token for copy in reading.copies]].astype(float)
        if protocol.retrieval == "same_token":
            return tokens.mean(0) if len(tokens) else values.sum(0), tokens
        return values.sum(0), tokens
    counted = [copy.position is not None or protocol.missing == "zero" for copy in reading.copies]
    return (values[counted].mean(0) if any(counted) else None), values[counted]


@dataclass(frozen=True, eq=False)
class Looked:
    """Where heads look while a sample's tokens are read, and where these are; both from where the page begins."""

    at: Int[np.ndarray, "token layer head"]
    """NOWHERE, or another negative number, for places outside of the page."""
    evidence: list[Int[np.ndarray, "_"]]


def _looked(reading: Reading) -> dict[str, np.ndarray]:
    """Columns of `Looked`, flattened."""
    origins = np.array([copy.origin for copy in reading.copies], dtype=int)
    at = np.where(reading.looked == NOWHERE, NOWHERE, reading.looked - origins[:, None, None])
    evidence = [np.array(copy.evidence, dtype=np.int32) - copy.origin for copy in reading.copies]
    return {
        "looked": at.ravel().astype(np.int32),
        "evidence": np.concatenate([*evidence, np.empty(0, np.int32)]).astype(np.int32),
        "evidence_sizes": np.array([len(own) for own in evidence], dtype=np.int32),
    }


def _gather_looked(table: pd.DataFrame, shape: tuple[int, int]) -> list[Looked]:
    if "looked" not in table:
        return []
    rows = zip(table["looked"], table["evidence"], table["evidence_sizes"], strict=True)
    return [
        Looked(np.asarray(at).reshape(-1, *shape), np.split(np.asarray(evidence), np.cumsum(sizes)[:-1]))
        if len(sizes)
        else Looked(np.empty((0, *shape), dtype=int), [])
        for at, evidence, sizes in rows
    ]


def _lost_its_row(model: HookedVLM, example: Example, reply: list[int], new_tokens: int) -> bool:
    """Whether the code drops a sample: its last token is one of the answer's and was never fed back, so has no row."""
    cut = len(reply) == new_tokens
    return cut and reply[-1] in model.tokenizer(example.answer, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------- evidence in images


def find_copies(
    model: HookedVLM,
    inputs: VLMInputs,
    row: int,
    example: Example,
    reply: list[int],
    *,
    protocol: Protocol,
    limit: int | None = None,
) -> list[Copy]:
    """Find the tokens of the reply that copy the answer, each with its evidence, and the answer's tokens that none
    copies.

    `inputs` are prompt and reply; the reply starts at `inputs.stop[row] - len(reply)`. `limit` is the length at which
    generation ends: the last token of such a reply was not fed back, and has no row where the copied token is asked.
    """
    encoded = model.tokenizer(example.answer, add_special_tokens=False, return_offsets_mapping=True)
    answer, spans = encoded["input_ids"], encoded["offset_mapping"]
    start = inputs.stop[row] - len(reply)
    shift = 0 if protocol.query == "copied" else -1
    weight = 1.0
    if protocol.weight_by_run != "no":
        first = start if protocol.weight_by_run == "reply" else inputs.first[row]
        weight = longest_run(answer, inputs.tokens[row, first : inputs.stop[row]].tolist())[2] / len(answer)
    pages = [visual for visual in inputs.visuals if visual.row == row]
    boxes = [(e, _tokens_of(inputs, pages[e.image], example, e, protocol)) for e in example.evidence]
    origin = pages[example.evidence[0].image].start if example.evidence else 0
    coarse = len(boxes) == 1 and (boxes[0][0].start, boxes[0][0].stop) == (0, len(example.answer))
    if protocol.matching == "in_order":
        places = [n for n, token in enumerate(reply) if token in set(answer)]
        first = min((e.start for e, _ in boxes), default=0)
        # where only a later part of the answer has boxes, the first box belongs to the first token of that part
        places = places[sum(b <= first and any(map(str.isalnum, example.answer[a:b])) for a, b in spans) :]
        if coarse:  # one box around the whole answer serves every place
            boxes = boxes * max(1, len(places))
        no_row = limit - 1 if protocol.query == "copied" and limit is not None else None
        with_row = [None if n == no_row else start + n + shift for n in places]
        return [Copy(p, weight, own, origin=origin) for p, (_, own) in zip_longest(with_row[: len(boxes)], boxes)]
    found = align(model.tokenizer, example.answer, reply)
    parts = [(span, start + n + shift) for n, span in found.spans.items()]
    parts += [(span, None) for span in spans if not found.copied(span)]
    copies = []
    for (a, b), position in sorted(parts, key=lambda part: part[0]):
        own = [tokens for e, tokens in boxes if e.start < b and a < e.stop]
        if not own:
            continue  # white space, or a character without a box
        evidence = {t for tokens in own for t in tokens}  # empty if no token contains enough of a large box
        copies.append(Copy(position, weight, tuple(sorted(evidence)), origin=origin))
    return copies


def _tokens_of(
    inputs: VLMInputs, visual: Visual, example: Example, evidence: Evidence, protocol: Protocol
) -> tuple[int, ...]:
    """Positions of the image tokens that contain enough of an evidence box; none where the model does not see it.

    Where several parts show the same place (a first tile, and the grid of the others), a token of any of them counts.
    """
    grid = inputs.image_grid(visual.index)
    if example.first_resize is not None:  # boxes are those of the picture before its first resizing
        grid = grid.scaled_to(picture_size(example.images[evidence.image]))
    try:
        found = grid.tokens_in_box(evidence.box, protocol.min_overlap, truncate=protocol.truncate_boxes)
    except NotSeenError:
        return ()
    except GeometryError:
        if protocol.page_order == "name":
            return ()  # a box of another page, which is larger
        raise
    return tuple(visual.positions[found].tolist())


# ---------------------------------------------------------------- evidence in text


def find_retrievals(model: HookedVLM, inputs: VLMInputs, row: int, example: Example, reply: list[int]) -> list[Copy]:
    """Find the generated tokens that occur in the needle, where a head may copy them from.

    They occur there by their id (Wu et al.), or by the characters they share with it where the tokenizer cuts the reply
    in another way. Together those that cover a needle's token have the weight one over the needle's length. Instances
    by token are the needle's tokens as the reply has them; those that it has not count as not copied.
    """
    needle, spans = needle_positions(model, inputs, row, example, len(reply))
    tokens = inputs.tokens[row].tolist()
    start = inputs.stop[row] - len(reply)
    found = align(model.tokenizer, example.answer, reply)
    sharers = [found.copied(span) for span in spans]  # of each of the needle's tokens
    copies = [Copy(None, 0.0, ()) for sharing in sharers if not sharing]
    for n, token in enumerate(reply):
        covered = [i for i, sharing in enumerate(sharers) if n in sharing]
        same = [i for i, at in enumerate(needle) if tokens[at] == token]
        if evidence := tuple(needle[i] for i in sorted({*covered, *same})):
            weight = sum(1 / len(sharers[i]) for i in covered) if covered else 1.0
            copies.append(Copy(start + n - 1, weight / len(needle), evidence, bool(covered)))
    return copies


def same_tokens(model: HookedVLM, inputs: VLMInputs, row: int, example: Example, reply: list[int]) -> list[Copy]:
    """Find every token of prompt or reply whose id is one of the answer's, as the published code does.

    A head scores if it attends most to the same id anywhere in the prompt.
    """
    answer = set(model.tokenizer(example.answer, add_special_tokens=False)["input_ids"])
    tokens, first, stop = inputs.tokens[row].tolist(), inputs.first[row], inputs.stop[row]
    prompt = range(first, stop - len(reply) - 1)
    queries = [i for i in range(first, stop) if tokens[i] in answer]
    return [Copy(i, 1.0, tuple(j for j in prompt if tokens[j] == tokens[i])) for i in queries]


def needle_positions(
    model: HookedVLM, inputs: VLMInputs, row: int, example: Example, n_reply: int
) -> tuple[list[int], list[Span]]:
    """Positions of the answer's tokens in the text, and the characters of the answer that each holds.

    Raises:
        StudyError: the answer's position is unknown, or the tokenizer reports no offsets.
    """
    if example.answer_at is None:
        raise StudyError("a retrieval score needs `answer_at`, the answer's position in the context; got None")
    text = model.chat_text(example.prompt)
    encoded = model.input_builder.text.prompt_with_spans(text, chat=True)
    first, stop = inputs.first[row], inputs.stop[row] - n_reply
    if encoded is None:
        raise StudyError(
            f"retrieval scores need a tokenizer that reports offsets; {type(model.tokenizer).__name__} does not"
        )
    ids, spans = encoded
    if ids != inputs.tokens[row, first:stop].tolist():
        raise StudyError("the tokens of this prompt are not those of its text: needles are found in text alone")
    begin = text.index(example.prompt) + example.answer_at
    end = begin + len(example.answer)
    inside = [(first + i, (max(a, begin) - begin, min(b, end) - begin)) for i, (a, b) in enumerate(spans)]
    inside = [(at, span) for at, span in inside if span[0] < span[1]]
    return [at for at, _ in inside], [span for _, span in inside]
