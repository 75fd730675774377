"""Experiment: OCR scores by character (papers 1.12)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hooked_vlm.analysis.multiple_testing import group_tests
from hooked_vlm.analysis.statistics import mean_score
from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.common.frames import each_row
from hooked_vlm.experiments.ocr_heads import plots
from hooked_vlm.experiments.ocr_heads.config import CaseConfig
from hooked_vlm.experiments.ocr_heads.data.scored import SYNTHETIC_TOY, single_characters
from hooked_vlm.experiments.ocr_heads.data.store import DataSet, load_or_build
from hooked_vlm.experiments.ocr_heads.examples import Evidence, Example
from hooked_vlm.experiments.ocr_heads.scoring import Scores
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
    if config.case_samples < 2:
        raise StudyError(
            f"--case-samples must be at least 2, got {config.case_samples}: heads are ranked on one half of a "
            "character's pages and scored on the other"
        )
    characters = tuple(dict.fromkeys(config.characters))
    scored = [
        study.score("ocr", [character_pages(study, config, character)], study.model, study.identity)
        for character in characters
    ]
    table, tests = top_table(characters, scored), specific_table(characters, scored, config.seed)
    stacked = np.stack([scores.mean for scores in scored])
    shown = ranked(stacked.max(0))[: min(20, study.n_heads)]
    matrix = np.stack([stacked[:, layer, head] for layer, head in shown], axis=1)
    counts = table.loc[table["score"] > config.threshold, "head"].value_counts()
    shared = ", ".join(f"{head} ({n} of {len(characters)})" for head, n in counts.head(10).items())
    answer = _answer(tests, shared, len(characters))
    lines = [*answer, "", "  character  top heads (score on the other half of the pages)"]
    for character in characters:
        own = table.loc[table["character"] == character]
        best = "  ".join(f"{r.head} {r.score:.2f}" for r in each_row(own) if r.score > config.threshold)
        lines.append(f"  {character:9s}  {best or 'none above the threshold'}")
    figures = {
        "characters": (
            plots.grid(matrix, characters, [f"{layer}.{head}" for layer, head in shown], "OCR score"),
            f"OCR score of the top heads for each character, {config.case_samples} pages each",
        )
    }
    tables = {
        "characters": (table, f"Top {TOP} heads for each character: ranked on one half of its pages, score and 95% "
                              "interval on the other", 40),
        "character-tests": (tests, "Heads that score higher for a character than for all others; p one-sided, adjusted "
                                   f"for the choice among all {len(tests)} pairs (max-T permutation)", 10),
    }  # fmt: skip
    return Finding("Single characters", lines, [], figures, tables, answer)


def top_table(characters: Sequence[str], scored: Sequence[Scores]) -> pd.DataFrame:
    """Top heads of each character: ranked on every other page, scored on the rest, so that being chosen does not raise
    a score."""
    rows = []
    for character, scores in zip(characters, scored, strict=True):
        ranking, rest = scores.instances[::2], scores.instances[1::2]
        for rank, (layer, head) in enumerate(ranked(ranking.mean(0))[:TOP], 1):
            found = mean_score(rest[:, layer, head])
            rows.append((character, rank, f"{layer}.{head}", found.value, found.low, found.high, found.n, scores.right))
    columns = ["character", "rank", "head", "score", "low", "high", "n", "answered correctly"]
    return pd.DataFrame(rows, columns=columns)


def specific_table(characters: Sequence[str], scored: Sequence[Scores], seed: int) -> pd.DataFrame:
    """Test of every head and character: does the head score higher for it than for all others? Smallest p first."""
    values = np.concatenate([scores.instances for scores in scored])
    groups = np.repeat(np.arange(len(scored)), [len(scores.instances) for scores in scored])
    t, p = group_tests(values.reshape(len(values), -1), groups, seed)
    sums, total = np.stack([scores.instances.sum(0).ravel() for scores in scored]), values.sum(0).ravel()
    sizes = np.bincount(groups)[:, None]
    others = (total - sums) / np.maximum(len(values) - sizes, 1)
    n_heads = values.shape[2]
    at_character, at_head = np.indices(t.shape)
    table = pd.DataFrame(
        {
            "character": np.array(list(characters))[at_character.ravel()],
            "head": [f"{i // n_heads}.{i % n_heads}" for i in at_head.ravel()],
            "score": (sums / sizes).ravel(),
            "score, others": others.ravel(),
            "t": t.ravel(),
            "p": p.ravel(),
        }
    )
    return table.sort_values(["p", "t"], ascending=[True, False], ignore_index=True)


def _answer(tests: pd.DataFrame, shared: str, n_characters: int) -> list[str]:
    found = tests.loc[tests["p"] <= 0.05]
    named = ", ".join(f"{r.head} for {r.character} (p = {r.p:.3f})" for r in each_row(found.head(5)))
    specific = (
        f"{len(found)} of {len(tests)} pairs of head and character score higher than the head does for other "
        f"characters (adjusted p <= 0.05): {named}."
        if len(found)
        else f"No head reads one of {n_characters} characters better than the others (smallest adjusted p "
        f"{tests['p'].min():.2f} of {len(tests)} pairs of head and character)."
    )
    return [specific, f"Heads in the top {TOP} of most characters: {shared or 'none'}."]


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
