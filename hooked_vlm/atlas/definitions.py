"""The scores of an atlas: what each is, on which stimuli, against what, and whose definition it is.

`python -m tools.atlas_page` writes the table of docs/atlas.md from this one.
"""

from dataclasses import dataclass
from typing import Literal

from hooked_vlm.interventions.base import Tower

Kind = Literal["page", "text", "object", "repeated"]
KINDS: dict[Kind, str] = {
    "page": "a picture with text, a question about it and the answer, with a box for each of the answer's characters",
    "text": "the same question about the same lines, given as text",
    "object": "a picture of an object, a question that it answers, and a box around it",
    "repeated": "random tokens, twice in a row, without a picture",
}
"""Kinds of stimuli."""
TOWERS: dict[Tower, str] = {"language": "language model", "vision": "vision tower"}
"""Towers by the names that people read."""


@dataclass(frozen=True)
class Score:
    """The definition of a score."""

    name: str
    title: str
    tower: Tower
    kinds: tuple[Kind, ...]
    """Stimuli it is computed on."""
    formula: str
    """A(q, k) is the attention of query q to key k."""
    null: str
    """What it is compared with, for the same head and stimulus; "0" for effects, empty where nothing is tested."""
    source: str
    unit: str = "share"
    """"share" lies between 0 and 1."""


PICTURES: tuple[Kind, ...] = ("page", "object")
ASKED: tuple[Kind, ...] = ("page", "text", "object")

SCORES = (
    Score(
        "ocr",
        "OCR",
        "language",
        ("page",),
        "share of the answer's tokens that the model predicts while argmax_k A(q, k) is an image token of a character "
        "of the token (it holds more than a tenth of its box, or lies in it for the most part); q: the position that "
        "predicts the token",
        "the boxes of another page",
        "arXiv 2505.15865",
    ),
    Score(
        "text_retrieval",
        "text retrieval",
        "language",
        ("text",),
        "share of the answer's tokens that the model predicts while argmax_k A(q, k) is a token of the same characters "
        "where the answer stands in the text, as whole words if it ever does",
        "any key that the query sees, at random",
        "arXiv 2404.15574",
    ),
    Score(
        "image_from_question",
        "image attention, question",
        "language",
        PICTURES,
        "mean over the question's tokens q of the sum of A(q, k) over image tokens k",
        "uniform attention",
        "arXiv 2509.17588",
    ),
    Score(
        "image_from_header",
        "image attention, header",
        "language",
        PICTURES,
        "the same, over the tokens of the assistant's header",
        "uniform attention",
        "arXiv 2509.17588",
    ),
    Score(
        "image_from_answer",
        "image attention, answer",
        "language",
        PICTURES,
        "the same, over the positions that predict the answer (the first is the last of the header)",
        "uniform attention",
        "arXiv 2509.17588",
    ),
    Score(
        "localisation",
        "localisation",
        "language",
        ("page", "object"),
        "attention to the image tokens of the boxes of what is asked for (as for OCR), divided by attention to all "
        "image tokens; mean over the positions that predict the answer and see the image",
        "uniform attention (the share of these tokens)",
        "after arXiv 2503.06287",
    ),
    Score(
        "induction",
        "induction",
        "language",
        ("repeated",),
        "mean over the second half of A(q, k), k the token after the first occurrence of q's token",
        "uniform attention",
        "TransformerLens",
    ),
    Score(
        "previous_token",
        "previous token",
        "language",
        ("repeated",),
        "mean of A(q, q - 1) over all q but the first",
        "uniform attention",
        "TransformerLens",
    ),
    Score(
        "duplicate_token",
        "duplicate token",
        "language",
        ("repeated",),
        "mean over the second half of A(q, k), k the first occurrence of q's token",
        "uniform attention",
        "TransformerLens",
    ),
    Score(
        "first_token_sink",
        "first-token sink",
        "language",
        ASKED,
        "mean of A(q, first token), over the question's tokens and the positions that predict the answer",
        "uniform attention",
        "arXiv 2309.17453",
    ),
    Score(
        "visual_sink",
        "visual sinks",
        "language",
        PICTURES,
        "over the same q, the sum of A(q, k) over image tokens k with abs(x[d]) / rms(x) of 20 or more in a dimension "
        "d in which the first token's stream x has it, x being the stream that enters the layer",
        "uniform attention",
        "arXiv 2503.03321",
    ),
    Score(
        "locality",
        "locality",
        "language",
        ASKED,
        "1 - mean over the same q of the sum of A(q, k) (q - k) / q; q, k counted from 0",
        "uniform attention",
        "after arXiv 2010.11929",
    ),
    Score(
        "entropy",
        "entropy",
        "language",
        ASKED,
        "mean over the same q of the entropy of A(q, .) divided by the logarithm of the number of keys",
        "",
        "arXiv 1906.04284",
    ),
    Score(
        "transfer",
        "image-to-text transfer, alone",
        "language",
        PICTURES,
        "log-probability of the answer's first token, minus that with the image's keys and values replaced by their "
        "means in this head alone",
        "0",
        "arXiv 2509.17588",
        "nats",
    ),
    Score(
        "transfer_in_groups",
        "image-to-text transfer, in groups",
        "language",
        PICTURES,
        "least-squares coefficient of keeping the head in the log-probability of the answer's first token while random "
        "halves of the heads are so replaced, drawn and fitted for each stimulus",
        "0",
        "arXiv 2509.17588",
        "nats",
    ),
    Score(
        "direct_logit",
        "direct logit of the answer",
        "language",
        PICTURES,
        "what the head adds directly to the logit of the answer's first token at the position that predicts it",
        "the first token of another answer",
        "arXiv 2211.00593",
        "logits",
    ),
    Score(
        "value_norm",
        "value norm",
        "language",
        ASKED,
        "mean norm of v over the prompt's tokens",
        "",
        "arXiv 2004.10102",
        "norm",
    ),
    Score(
        "output_norm",
        "output norm",
        "language",
        ASKED,
        "mean over the prompt's tokens of the norm of what the head adds to the stream",
        "",
        "arXiv 2004.10102",
        "norm",
    ),
    Score(
        "distance",
        "distance attended",
        "vision",
        PICTURES,
        "mean over patches q of the sum of A(q, k) times the distance of the centres of q and k, divided by the "
        "distance of q to the patch farthest from it in the picture or tile",
        "uniform attention",
        "arXiv 2010.11929",
    ),
    Score(
        "sink_patches",
        "sink patches",
        "vision",
        PICTURES,
        "mean over patches q of the sum of A(q, k) over the hundredth of the patches (one at least) whose stream "
        "entering the layer has the largest norms",
        "uniform attention",
        "after arXiv 2309.16588",
    ),
    Score(
        "class_token",
        "class token",
        "vision",
        PICTURES,
        "mean over patches q of A(q, class token)",
        "uniform attention",
        "after arXiv 2309.16588",
    ),
    Score(
        "text_region",
        "text regions",
        "vision",
        ("page",),
        "mean over patches q without text of the sum of A(q, k) over patches k with text, divided by attention to all "
        "patches; a patch has text by the rule for boxes of OCR",
        "uniform attention (the share of these patches)",
        "own",
    ),
    Score(
        "answer_without",
        "ablation",
        "vision",
        PICTURES,
        "log-probability of the answer's first token, minus that with the head's output zeroed",
        "0",
        "arXiv 1905.10650",
        "nats",
    ),
)
BY_NAME = {score.name: score for score in SCORES}
