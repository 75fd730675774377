"""How replies are judged: exact, SQuAD's EM and F1, ANLS, and whether the answer occurs (papers 1.10)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from hooked_vlm.experiments.ocr_heads.examples import Example

METRICS = ("exact", "em", "f1", "anls", "contains")


def judge(example: Example, reply: str) -> dict[str, float]:
    """Every metric of a reply: the best over the right answers, between 0 and 1."""
    return {metric: max(_MEASURES[metric](answer, reply) for answer in example.answers) for metric in METRICS}


def is_right(example: Example, reply: str, metric: str) -> bool:
    """Whether a reply is right by a metric that says yes or no."""
    return any(_MEASURES[metric](answer, reply) == 1 for answer in example.answers)


def _exact(answer: str, reply: str) -> float:
    return float(reply.strip() == answer)


def _contains(answer: str, reply: str) -> float:
    return float(answer in reply)


def exact_match(answer: str, reply: str) -> float:
    """SQuAD's: equal without case, punctuation and articles."""
    return float(_normalized(answer) == _normalized(reply))


def f1(answer: str, reply: str) -> float:
    """SQuAD's: the harmonic mean of precision and recall over words."""
    expected, found = _normalized(answer).split(), _normalized(reply).split()
    shared = sum((Counter(expected) & Counter(found)).values())
    if not shared:
        return float(expected == found)
    precision, recall = shared / len(found), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


def anls(answer: str, reply: str) -> float:
    """1 - Levenshtein distance / length of the longer, without case; 0 where it is below 0.5 (Biten et al. 2019)."""
    a, b = answer.strip().lower(), reply.strip().lower()
    if not a and not b:
        return 1.0
    similarity = 1 - edit_distance(a, b) / max(len(a), len(b))
    return similarity if similarity >= 0.5 else 0.0


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Insertions, deletions and replacements that turn one into the other (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def rouge_1_recall(answer: str, reply: str) -> float:
    """The share of the answer's words that the reply has, each as often as there (Lin 2004)."""
    expected, found = (Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in (answer, reply))
    return sum((expected & found).values()) / sum(expected.values()) if expected else 0.0


def _normalized(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


_MEASURES = {"exact": _exact, "em": exact_match, "f1": f1, "anls": anls, "contains": _contains}
