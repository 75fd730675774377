"""Metrics of a reply: exact match, SQuAD's EM and F1, ANLS, containment (papers 1.10)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from hooked_vlm.experiments.ocr_heads.examples import Example

METRICS = ("exact", "em", "f1", "anls", "contains")


def judge(example: Example, reply: str) -> dict[str, float]:
    """Every metric of a reply, in [0, 1]: the best over the accepted answers."""
    return {metric: max(_MEASURES[metric](answer, reply) for answer in example.answers) for metric in METRICS}


def is_right(example: Example, reply: str, metric: str) -> bool:
    """Whether a reply is correct by a binary metric."""
    return any(_MEASURES[metric](answer, reply) == 1 for answer in example.answers)


def _exact(answer: str, reply: str) -> float:
    return float(reply.strip() == answer)


def _contains(answer: str, reply: str) -> float:
    return float(answer in reply)


def exact_match(answer: str, reply: str) -> float:
    """SQuAD's EM: equal up to case, punctuation and articles."""
    return float(_normalized(answer) == _normalized(reply))


def f1(answer: str, reply: str) -> float:
    """SQuAD's F1: harmonic mean of precision and recall over words."""
    expected, found = _normalized(answer).split(), _normalized(reply).split()
    shared = sum((Counter(expected) & Counter(found)).values())
    if not shared:
        return float(expected == found)
    precision, recall = shared / len(found), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


def anls(answer: str, reply: str) -> float:
    """1 - Levenshtein distance / length of the longer text, ignoring case; 0 if below 0.5 (Biten et al. 2019)."""
    a, b = answer.strip().lower(), reply.strip().lower()
    if not a and not b:
        return 1.0
    similarity = 1 - edit_distance(a, b) / max(len(a), len(b))
    return similarity if similarity >= 0.5 else 0.0


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Fewest insertions, deletions and replacements that turn `a` into `b` (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _normalized(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


_MEASURES = {"exact": _exact, "em": exact_match, "f1": f1, "anls": anls, "contains": _contains}
