"""Tasks for masking: documents, passages, passkeys, and the toy models' tasks.

Documents and passages are the paper's data sets if available, otherwise synthetic with the same fields; a run records
which.
"""

import ast
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.ocr_heads.data import made_up
from hooked_vlm.experiments.ocr_heads.data.haystack import HUB, SYNTHETIC, from_hub
from hooked_vlm.experiments.ocr_heads.data.prompts import about_pages, about_passages, shuffled
from hooked_vlm.experiments.ocr_heads.data.scored import SYNTHETIC_TOY, niah_pages, passkey_pages, toy_pages
from hooked_vlm.experiments.ocr_heads.data.store import DataSet, load_or_build
from hooked_vlm.experiments.ocr_heads.examples import Example
from hooked_vlm.toys import pages as toy

MOST_PAGES = 8
"""Documents with more pages are left out, as in the paper."""
DISTRACTORS = 5


@dataclass(frozen=True)
class Kind:
    """A kind of task: its metric, its modality, its builder."""

    metric: str
    """The metric it reports: "exact", "em", "f1", "anls" or "contains"."""
    reads_images: bool
    build: Callable[[int, int, Path | None], tuple[list[Example], str]]
    """(seed, n, folder of downloaded files) -> examples and their source."""


@dataclass(frozen=True, eq=False)
class QATask:
    """A data set with its metric."""

    data: DataSet
    metric: str

    @property
    def name(self) -> str:
        return self.data.name


def load_tasks(
    folder: Path, names: Sequence[str], seed: int, n: int, lengths: Sequence[int], files: Path | None
) -> list[QATask]:
    """Load tasks by name.

    Args:
        files: folder with "biencoder-nq-dev.json" and "hotpot_dev_distractor_v1.json", if they were downloaded.

    Raises:
        StudyError: an unknown name, or a data set without the expected fields.
    """
    kinds = all_kinds(lengths)
    tasks = []
    for name in names:
        if name not in kinds:
            raise StudyError(f"there is no task {name!r}: choose from {', '.join(kinds)}")
        kind = kinds[name]
        settings = {"seed": seed, "n": n, "task": True}
        if name in ("passkey", "niah"):
            settings["lengths"] = list(lengths)
        if files is not None:
            settings["files"] = str(files.resolve())
        tasks.append(QATask(load_or_build(folder, name, settings, lambda k=kind: k.build(seed, n, files)), kind.metric))
    return tasks


def all_kinds(lengths: Sequence[int]) -> dict[str, Kind]:
    """Kinds of tasks by name."""
    return {
        "page": Kind("exact", True, lambda seed, n, files: (toy_pages(seed, n), SYNTHETIC_TOY)),
        "text": Kind("exact", False, lambda seed, n, files: (toy_pages(seed, n, as_text=True), SYNTHETIC_TOY)),
        "naming": Kind("exact", True, lambda seed, n, files: (_naming(seed, n), "synthetic: drawn objects")),
        "passkey": Kind("contains", True, lambda seed, n, files: passkey_pages(seed, n, lengths)),
        "niah": Kind("contains", True, lambda seed, n, files: niah_pages(seed, n, lengths)),
        "docvqa": Kind("anls", True, _docvqa),
        "mpdocvqa": Kind("anls", True, _mpdocvqa),
        "nq": Kind("f1", False, _nq),
        "hotpotqa": Kind("f1", False, _hotpotqa),
    }


def _naming(seed: int, n: int) -> list[Example]:
    rng = np.random.default_rng([seed, 1])
    samples = [toy.naming_sample(rng) for _ in range(n)]
    return [Example(s.turns[0][0], (s.turns[0][1],), (s.image,)) for s in samples if s.image is not None]


# ---------------------------------------------------------------- documents


def _docvqa(seed: int, n: int, files: Path | None) -> tuple[list[Example], str]:
    rows = from_hub("lmms-lab/DocVQA", "DocVQA", "validation")
    if rows is None:
        return made_up.documents(seed, n, pages=1), SYNTHETIC
    examples = []
    for row in _answered(rows, n, "DocVQA", ("question", "image", "answers")):
        examples.append(about_pages([row["image"]], row["question"], row["answers"]))
    return examples, HUB


def _mpdocvqa(seed: int, n: int, files: Path | None) -> tuple[list[Example], str]:
    rows = from_hub("lmms-lab/MP-DocVQA", None, "val")
    if rows is None:
        return made_up.documents(seed, n, pages=3), SYNTHETIC
    examples = []
    for row in _answered(rows, None, "MP-DocVQA", ("question", "image_1", "answers")):
        pages = [row[f"image_{i}"] for i in range(1, 20) if row.get(f"image_{i}") is not None]
        if len(pages) > MOST_PAGES:
            continue
        answers = ast.literal_eval(row["answers"]) if isinstance(row["answers"], str) else row["answers"]
        examples.append(about_pages(pages, row["question"], answers))
        if len(examples) == n:
            break
    return examples, HUB


# ---------------------------------------------------------------- passages


def _nq(seed: int, n: int, files: Path | None) -> tuple[list[Example], str]:
    rows = _json_file(files, "biencoder-nq-dev.json")
    if rows is None:
        return made_up.single_facts(seed, n, DISTRACTORS), SYNTHETIC
    rng = np.random.default_rng([seed, 9])
    examples = []
    for row in _answered(rows, n, "NQ", ("question", "answers", "positive_ctxs", "negative_ctxs")):
        passages = [p["text"] for p in row["positive_ctxs"] if float(p.get("title_score", 0)) == 1]
        wrong = [p["text"] for p in row["negative_ctxs"]]
        passages += [wrong[i] for i in rng.permutation(len(wrong))[:DISTRACTORS]]
        examples.append(about_passages(shuffled(rng, passages), row["question"], row["answers"]))
    return examples, f"DPR's NQ development set, from {files}"


def _hotpotqa(seed: int, n: int, files: Path | None) -> tuple[list[Example], str]:
    rows: Any = _json_file(files, "hotpot_dev_distractor_v1.json")
    source = f"HotpotQA's development set, from {files}"
    if rows is None:
        rows, source = from_hub("hotpotqa/hotpot_qa", "distractor", "validation"), HUB
    if rows is None:
        return made_up.two_facts(seed, n, DISTRACTORS), SYNTHETIC
    rng = np.random.default_rng([seed, 10])
    examples = []
    for row in _answered(rows, n, "HotpotQA", ("question", "answer", "context", "supporting_facts")):
        paragraphs, wanted = row["context"], row["supporting_facts"]
        if isinstance(paragraphs, dict):  # the hub's spelling
            paragraphs = list(zip(paragraphs["title"], paragraphs["sentences"], strict=True))
            wanted = [(title, 0) for title in wanted["title"]]
        titles = {title for title, _ in wanted}
        right = [" ".join(sentences) for title, sentences in paragraphs if title in titles]
        wrong = [" ".join(sentences) for title, sentences in paragraphs if title not in titles]
        passages = right + [wrong[i] for i in rng.permutation(len(wrong))[: int(rng.integers(1, DISTRACTORS + 1))]]
        examples.append(about_passages(shuffled(rng, passages), row["question"], [row["answer"]]))
    return examples, source


def _json_file(files: Path | None, name: str) -> list[dict[str, Any]] | None:
    if files is None or not (files / name).exists():
        return None
    try:
        return json.loads((files / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{files / name} cannot be read ({error})") from error


def _answered(rows: Any, n: int | None, name: str, fields: Sequence[str]) -> list[Any]:
    """The first `n` rows that have an answer.

    Raises:
        StudyError: a field is missing.
    """
    found = []
    for row in rows:
        if missing := [field for field in fields if field not in row]:
            raise StudyError(f"{name} has no column {missing[0]!r}: it has {', '.join(map(str, row))}")
        if row.get("answers") or row.get("answer"):
            found.append(row)
        if len(found) == n:
            break
    if not found:
        raise StudyError(f"{name} has no row with an answer")
    return found
