"""Experiment: OCR scores by character (papers 1.12)."""

import numpy as np
import pandas as pd

from hooked_vlm.analysis.statistics import bootstrap_mean
from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.common.frames import each_row
from hooked_vlm.experiments.ocr_heads import plots
from hooked_vlm.experiments.ocr_heads.config import CaseConfig
from hooked_vlm.experiments.ocr_heads.data.scored import SYNTHETIC_TOY, single_characters
from hooked_vlm.experiments.ocr_heads.data.store import DataSet, load_or_build
from hooked_vlm.experiments.ocr_heads.examples import Evidence, Example
from hooked_vlm.experiments.ocr_heads.selection import ranked
from hooked_vlm.experiments.ocr_heads.study import Finding, Study
from hooked_vlm.toys import pages as toy

TOP = 5
LENGTH = 1024
"""Length of the paper's pages, in tokens."""


def case(study: Study, config: CaseConfig) -> Finding:
    """Score every head for every character, on pages where it is (part of) the answer."""
    if not config.characters or set(config.characters) - set(toy.CHARACTERS):
        raise StudyError(f"--characters takes digits and lower-case letters, at least one; got {config.characters!r}")
    characters = tuple(dict.fromkeys(config.characters))
    rows, means = [], []
    for character in characters:
        scores = study.score("ocr", [character_pages(study, config, character)], study.model, study.identity)
        means.append(scores.mean)
        for rank, (layer, head) in enumerate(ranked(scores.mean)[:TOP], 1):
            found = bootstrap_mean(scores.instances[:, layer, head], config.seed)
            rows.append((character, rank, f"{layer}.{head}", found.value, found.low, found.high, found.n, scores.right))
    table = pd.DataFrame(rows, columns=["character", "rank", "head", "score", "low", "high", "n", "answered correctly"])
    stacked = np.stack(means)
    shown = ranked(stacked.max(0))[: min(20, study.n_heads)]
    matrix = np.stack([stacked[:, layer, head] for layer, head in shown], axis=1)
    counts = table["head"][table["score"] > config.threshold].value_counts()
    shared = ", ".join(f"{head} ({n} of {len(characters)})" for head, n in counts.head(10).items())
    lines = [f"heads in the top {TOP} of most characters: {shared or 'none'}", "", "  character  top heads (score)"]
    for character in characters:
        own = table.loc[table["character"] == character]
        best = "  ".join(f"{r.head} {r.score:.2f}" for r in each_row(own) if r.score > config.threshold)
        lines.append(f"  {character:9s}  {best or 'none above the threshold'}")
    labels = [f"{layer}.{head}" for layer, head in shown]
    figures = {
        "characters": (
            plots.grid(matrix, characters, labels, "OCR score"),
            f"OCR score of the top heads for each character, {config.case_samples} pages each",
        )
    }
    tables = {"characters": (table, f"Top {TOP} heads for each character, 95% bootstrap intervals", 40)}
    return Finding("Single characters", lines, [], figures, tables)


def character_pages(study: Study, config: CaseConfig, character: str) -> DataSet:
    """Pages whose answer is (paper) or contains (toy models) one character, with a box around that character."""
    settings = {"seed": config.seed + 2, "n": config.case_samples, "character": character}
    if study.config.data == "toy":
        return load_or_build(
            study.data_folder, f"toy-character-{character}", settings,
            lambda: (toy_pages_with(config.seed + 2, config.case_samples, character), SYNTHETIC_TOY),
        )  # fmt: skip
    return load_or_build(
        study.data_folder, f"character-{character}", settings,
        lambda: single_characters(config.seed + 2, config.case_samples, character, LENGTH),
    )  # fmt: skip


def toy_pages_with(seed: int, n: int, character: str) -> list[Example]:
    """Toy pages whose answer contains a character; the evidence is the box of that character alone."""
    rng = np.random.default_rng([seed, 16, ord(character)])
    examples = []
    while len(examples) < n:
        sample = toy.page_sample(rng)
        assert sample.page is not None and sample.image is not None
        line = sample.page.lines[sample.target_lines[0]]
        if character not in line.value:
            continue
        at = line.value.index(character)
        question, answer = sample.turns[0]
        evidence = (Evidence(at, at + 1, 0, line.value_boxes[at]),)
        examples.append(Example(question, (answer,), (sample.image,), evidence))
    return examples
