"""Synthetic documents and passages, with the fields of the data sets they replace."""

import numpy as np

from hooked_vlm.experiments.ocr_heads.data.haystack import COLOURS, GOALS, MATERIALS, OBJECTS, PLACES, pick, sentence
from hooked_vlm.experiments.ocr_heads.data.pages import render, wrap
from hooked_vlm.experiments.ocr_heads.data.prompts import about_pages, about_passages, shuffled
from hooked_vlm.experiments.ocr_heads.examples import Example

FIELDS = (
    "Invoice number",
    "Date",
    "Sender",
    "Recipient",
    "Department",
    "Total",
    "Room",
    "Account",
    "Reference",
    "City",
)
PEOPLE = ("Anna Berg", "Tomas Reyl", "Ida Morn", "Peter Vask", "Lena Holt", "Jonas Fenn", "Clara Wick", "Otto Lund")


def documents(seed: int, n: int, pages: int) -> list[Example]:
    """Make forms with lines `field: value` between sentences, one per page; the question is about one field."""
    rng = np.random.default_rng([seed, 11, pages])
    examples = []
    for _ in range(n):
        fields = rng.permutation(len(FIELDS))
        images, forms = [], []
        for page in range(pages):
            form = {FIELDS[i]: _value(rng, FIELDS[i]) for i in fields[page * 3 : page * 3 + 3]}
            lines = [f"{name}: {value}" for name, value in form.items()]
            text = "\n".join([sentence(rng), *lines, sentence(rng)])
            images += render(wrap(text))
            forms.append(form)
        form = forms[int(rng.integers(pages))]
        name = list(form)[int(rng.integers(len(form)))]
        examples.append(about_pages(images, f"What is the {name.lower()}?", (form[name],)))
    return examples


def _value(rng: np.random.Generator, field: str) -> str:
    if field in ("Sender", "Recipient"):
        return pick(rng, PEOPLE)
    if field == "City":
        return pick(rng, PLACES)
    if field == "Date":
        return f"{int(rng.integers(1, 29))}.{int(rng.integers(1, 13))}.{int(rng.integers(1950, 2000))}"
    if field == "Department":
        return pick(rng, ("Accounting", "Archive", "Laboratory", "Shipping", "Workshop"))
    return str(int(rng.integers(100, 100000)))


def single_facts(seed: int, n: int, distractors: int) -> list[Example]:
    """Make passages about towns, one of which contains the answer (as in open-domain question answering)."""
    rng = np.random.default_rng([seed, 12])
    examples = []
    for _ in range(n):
        places = [PLACES[i] for i in rng.permutation(len(PLACES))[: distractors + 1]]
        facts = {place: (pick(rng, OBJECTS), f"{pick(rng, COLOURS)} {pick(rng, MATERIALS)}") for place in places}
        passages = [
            f"{place} lies near {pick(rng, GOALS)}. Its {thing} is made of {stuff}. {sentence(rng)}"
            for place, (thing, stuff) in facts.items()
        ]
        thing, stuff = facts[places[0]]
        question = f"what is the {thing} of {places[0]} made of"
        examples.append(about_passages(shuffled(rng, passages), question, (stuff,)))
    return examples


def two_facts(seed: int, n: int, distractors: int) -> list[Example]:
    """Make passages of which two together contain the answer: a town's mayor, and that person's birthplace."""
    rng = np.random.default_rng([seed, 13])
    examples = []
    for _ in range(n):
        places = [PLACES[i] for i in rng.permutation(len(PLACES))]
        people = [PEOPLE[i] for i in rng.permutation(len(PEOPLE))]
        n_pairs = 1 + int(rng.integers(1, max(2, distractors // 2 + 1)))
        passages, births = [], []
        for town, birth, person in zip(places, places[8:], people[:n_pairs], strict=False):
            passages.append(f"{person} is the mayor of {town}. {sentence(rng)}")
            passages.append(f"{person} was born in {birth}. {sentence(rng)}")
            births.append(birth)
        question = f"Where was the mayor of {places[0]} born?"
        examples.append(about_passages(shuffled(rng, passages), question, (births[0],)))
    return examples
