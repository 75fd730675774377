"""Which tokens of a reply copy which characters of an answer, however a tokenizer cuts either."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hooked_vlm.inputs.text import Span, token_spans


@dataclass(frozen=True)
class Alignment:
    """The longest text that an answer and a reply share, in tokens of the reply."""

    spans: dict[int, Span]
    """Tokens of the reply, by their numbers, and the characters of the answer that each copies."""

    def copied(self, part: Span) -> list[int]:
        """Tokens of the reply that copy any character of a part of the answer."""
        return [n for n, span in self.spans.items() if overlap(span, part)]


def overlap(a: Span, b: Span) -> bool:
    """Whether two spans share a character."""
    return a[0] < b[1] and b[0] < a[1]


def align(tokenizer: Any, answer: str, reply: Sequence[int]) -> Alignment:
    """Find the reply's tokens that lie in the longest text it shares with the answer.

    A byte-level tokenizer joins a word with the space in front of it, so the answer's tokens inside a sentence are not
    those of the answer alone. A token may therefore hold white space and marks beside the shared text; one that holds
    other letters or digits is another word.
    """
    text, spans = token_spans(tokenizer, reply)
    in_answer, _, length = longest_run(answer, text)
    run = answer[in_answer : in_answer + length]
    places = [i for i in range(len(text)) if run and text.startswith(run, i)]
    copied = [_copied(text, spans, (i, i + length)) for i in places]
    best = max(copied, key=lambda found: sum(b - a for a, b in found.values()), default={})  # whole words, not parts
    return Alignment({n: (a + in_answer, b + in_answer) for n, (a, b) in best.items()})


def _copied(text: str, spans: Sequence[Span], shared: Span) -> dict[int, Span]:
    """Find the tokens that hold a shared text, or a part of it, and no letter or digit beside it."""
    found = {}
    for n, (a, b) in enumerate(spans):
        beside = text[a : max(a, min(b, shared[0]))] + text[min(b, max(a, shared[1])) : b]
        if overlap((a, b), shared) and not any(character.isalnum() for character in beside):
            found[n] = (max(a, shared[0]) - shared[0], min(b, shared[1]) - shared[0])
    return found


def longest_run(a: Sequence[object], b: Sequence[object]) -> tuple[int, int, int]:
    """Longest common run of tokens or characters: its start in `a`, its start in `b`, its length."""
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
