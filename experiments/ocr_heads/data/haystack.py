"""Passkeys and needles in haystacks: the paper's data sets from the hub, or synthetic ones where it is unreachable.

Both give the same kind of item; a run's run.json records which it used.
"""

import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from huggingface_hub import constants

from hooked_vlm.errors import StudyError

PASSKEY_DATASET = "nanotron/simple_needle_in_a_hay_stack"
NEEDLE_DATASET = "opencompass/NeedleBench"
PAPER_SEED = 42
FIRST_ENGLISH_NEEDLE, N_NEEDLES = 191, 150
"""Row of the first English needle, and how many of them are drawn (the paper's code)."""
HUB, SYNTHETIC = "the paper's data set, from the hub", "synthetic (the hub cannot be reached)"


@dataclass(frozen=True)
class HaystackItem:
    """A context that contains the answer, and the question."""

    context: str
    question: str
    answer: str
    length: int


def passkey_items(seed: int, n: int, lengths: Sequence[int]) -> tuple[list[HaystackItem], str]:
    """Make `n` contexts of about the given numbers of tokens, each with one pass key of five digits.

    Returns:
        (items, source in words).

    Raises:
        StudyError: the hub's data set has no contexts of these lengths.
    """
    rows = from_hub(PASSKEY_DATASET, None, "train")
    if rows is None:
        rng = np.random.default_rng([seed, 2])
        return [_synthetic_passkey(rng, lengths[i % len(lengths)]) for i in range(n)], SYNTHETIC
    items: list[HaystackItem] = []
    for i, length in enumerate(lengths):
        share = n // len(lengths) + (i < n % len(lengths))
        subset = rows.filter(lambda row, length=length: row["context_length"] == length)
        subset = subset.shuffle(seed=PAPER_SEED + seed)
        items += [
            HaystackItem(row["prompt"], "What is the pass key?", str(row["answer"]), length)
            for row in subset.select(range(min(share, len(subset))))
        ]
    if not items:
        raise StudyError(f"{PASSKEY_DATASET} has no contexts of {', '.join(map(str, lengths))} tokens (--lengths)")
    return items, HUB


def niah_items(seed: int, n: int, lengths: Sequence[int], by_code: bool = False) -> tuple[list[HaystackItem], str]:
    """Make `n` contexts of the given numbers of characters with one sentence hidden at a random position.

    Args:
        by_code: draw needles and texts as the published code does: the first `n` of its 150 x lengths.

    Returns:
        (items, source in words).

    Raises:
        StudyError: the hub's data set has no English needles.
    """
    texts = from_hub(NEEDLE_DATASET, "en_haystack_texts", "test")
    needles = from_hub(NEEDLE_DATASET, "retrieval_needles", "test")
    rng = np.random.default_rng([seed, 3])
    if by_code and texts is not None and needles is not None:
        rows = [(row["needle"], row["retrieval_question"], row["arg2"]) for row in needles]
        return needles_by_code(texts["text"], rows, seed, lengths)[:n], HUB
    if texts is None or needles is None:
        made = [_synthetic_needle(rng) for _ in range(n)]
        haystack, source = None, SYNTHETIC
    else:
        english = np.arange(FIRST_ENGLISH_NEEDLE, len(needles))
        rows = [needles[int(i)] for i in np.sort(rng.permutation(english)[:n])]
        if not rows:
            raise StudyError(f"{NEEDLE_DATASET} has {len(needles)} needles; English ones are expected from row 191 on")
        # fewer than 200: as in the paper, larger sets hide them again in other texts
        made = [
            (row["needle"], row["retrieval_question"], row["arg2"]) for row in (rows[i % len(rows)] for i in range(n))
        ]
        haystack, source = " ".join(texts["text"]), HUB
    items = []
    for i, (needle, question, answer) in enumerate(made):
        length = lengths[i % len(lengths)]
        if haystack is None:
            context = _prose(rng, length)
        else:
            at = int(rng.integers(max(1, len(haystack) - length)))
            context = haystack[at : at + length]
        at = int(rng.integers(len(context)))
        items.append(HaystackItem(f"{context[:at]} {needle} {context[at:]}", question, answer, length))
    return items, source


def needles_by_code(
    texts: Sequence[str],
    needles: Sequence[tuple[str, str, str]],
    seed: int,
    lengths: Sequence[int],
    n_needles: int = N_NEEDLES,
) -> list[HaystackItem]:
    """Draw needles as the published code does and hide each in one text of every length, read on through the essays.

    Args:
        texts: essays, joined without space.
        needles: (needle, question, answer) rows, of which English ones begin at 191.
        lengths: characters of a text, its needle included.

    Raises:
        StudyError: too few needles, or one longer than a text.
    """  # fmt: skip
    rng = random.Random(PAPER_SEED + seed)
    candidates = range(FIRST_ENGLISH_NEEDLE, len(needles))
    if len(candidates) < n_needles:
        raise StudyError(f"there are {len(candidates)} English needles, from row 191 on; the code draws {n_needles}")
    essays = "".join(texts)
    at, items = 0, []
    for index in sorted(rng.sample(candidates, n_needles)):
        needle, question, answer = needles[index]
        for length in lengths:
            n = length - len(needle)
            if n <= 0:
                raise StudyError(f"a needle of {len(needle)} characters does not fit in {length} (--lengths)")
            around = (essays[at:] + essays)[:n] if at + n > len(essays) else essays[at : at + n]
            at = at + n if at + n <= len(essays) else n - len(essays[at:])
            place = rng.randint(0, n)
            items.append(HaystackItem(around[:place] + needle + around[place:], question, answer, length))
    return items


def from_hub(name: str, subset: str | None, split: str) -> Any:
    """Load a split of a data set from the hub or its local cache; None if neither has it."""
    from datasets import config, load_dataset  # slow to import, and needed by this function only

    was_offline = config.HF_HUB_OFFLINE
    # without a network the client would retry for most of a minute
    config.HF_HUB_OFFLINE = was_offline or not _has_network()
    try:
        return load_dataset(name, subset, split=split)
    except (OSError, RuntimeError, ValueError, httpx.HTTPError):  # offline, refused, or gone from the hub
        return None
    finally:
        config.HF_HUB_OFFLINE = was_offline


def _has_network() -> bool:
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


# ---------------------------------------------------------------- synthetic

PLACES = [
    "Arvel",
    "Bruni",
    "Castom",
    "Dorrel",
    "Esk",
    "Farrow",
    "Gildon",
    "Harth",
    "Ilden",
    "Jorvik",
    "Kelda",
    "Lorne",
    "Marsk",
    "Norrow",
    "Ostel",
]
MATERIALS = ["oak", "granite", "copper", "linen", "amber", "slate", "silver", "clay", "walnut", "marble"]
COLOURS = ["blue", "green", "crimson", "golden", "violet", "white", "black", "orange"]
OBJECTS = ["gate", "bell", "bridge", "throne", "lantern", "fountain"]
_SUBJECTS = ["The baker", "A careful clerk", "My neighbour", "The old sailor", "A young gardener", "The night train"]
_VERBS = ["waited near", "walked past", "wrote about", "remembered", "drew a map of", "looked for"]
GOALS = ["the quiet harbour", "a row of lime trees", "the second bridge", "an empty market", "the long wall"]
_ENDS = ["before the rain came", "until the evening", "for most of the year", "without a word", "as everyone does"]


def pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def sentence(rng: np.random.Generator) -> str:
    return f"{pick(rng, _SUBJECTS)} {pick(rng, _VERBS)} {pick(rng, GOALS)} {pick(rng, _ENDS)}."


def _prose(rng: np.random.Generator, n_characters: int) -> str:
    sentences: list[str] = []
    while sum(map(len, sentences)) + len(sentences) < n_characters:
        sentences.append(sentence(rng))
    return " ".join(sentences)[:n_characters]


def _synthetic_passkey(rng: np.random.Generator, n_tokens: int) -> HaystackItem:
    key = str(int(rng.integers(10000, 100000)))
    filler = [sentence(rng) for _ in range(max(2, n_tokens // 12))]  # a sentence has about 12 tokens
    at = int(rng.integers(len(filler) + 1))
    filler.insert(at, f"The pass key is {key}. Remember it. {key} is the pass key.")
    question = "What is the pass key?"
    return HaystackItem(" ".join(filler) + f"\n{question}", question, key, n_tokens)


def _synthetic_needle(rng: np.random.Generator) -> tuple[str, str, str]:
    place, thing = pick(rng, PLACES), pick(rng, OBJECTS)
    answer = f"{pick(rng, COLOURS)} {pick(rng, MATERIALS)}"
    needle = f"The {thing} in the town of {place} is made of {answer}."
    return needle, f"What is the {thing} in the town of {place} made of?", answer
