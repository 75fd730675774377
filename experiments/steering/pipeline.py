"""From two data sets to steering.safetensors and a report."""

import math
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hooked_vlm.analysis.text_tables import text_table
from hooked_vlm.data import Sample, read_samples
from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.common.command import changed_settings
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.steering.answers import (
    UNSTEERED,
    Question,
    changes,
    random_at,
    scaled,
    steered_answers,
)
from hooked_vlm.experiments.steering.config import SteerConfig
from hooked_vlm.experiments.steering.plots import area_by_layer
from hooked_vlm.inputs.images import load_image
from hooked_vlm.model.by_name import load
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.files import writable_folder
from hooked_vlm.steering import SteeringVectors, steering_vectors

FILE = "steering.safetensors"
WIDEST = 40
"""Characters of an answer in the terminal."""


@dataclass(frozen=True, eq=False)
class Steered:
    """Vectors, answers and report of a run."""

    config: SteerConfig
    vectors: SteeringVectors
    answers: pd.DataFrame
    """One row per prompt: unsteered, and at every scale the steered answer and that with a random vector."""
    changes: pd.DataFrame
    """One row per scale: share of answers that change."""
    file: Path
    report: Path

    @property
    def best(self) -> dict[str, Any]:
        """Separability of the chosen layer."""
        return next(row for row in _records(self.vectors.separability) if row["layer"] == self.vectors.best)

    @property
    def answer(self) -> list[str]:
        """Sentences to quote."""
        best, last = self.best, _records(self.changes)[-1]
        n, sizes = int(last["n prompts"]), (int(best["n positive"]), int(best["n negative"]))
        smallest = 1 / math.comb(sum(sizes), sizes[0])
        few = "; so few cannot reach 5%" if smallest > 0.05 else ""
        return [
            f"Along the mean difference at {self.vectors.name(self.vectors.best)}, held-out items have an AUC of "
            f"{best['AUC']:.3f} (95% interval {best['low']:.3f} to {best['high']:.3f}; {sizes[0]} positive and "
            f"{sizes[1]} negative {self.config.unit}s; one-sided against permuted labels, p = {best['p']:.2g}{few}).",
            "The layer was chosen on other items than these, and the vectors were fitted on others again.",
            f"Added {last['scale']:g} times at {self.config.at}, it changes {round(last['changed'] * n)} of {n} "
            f"answers; random vectors of the same norm change {round(last['random vector'] * n)} (difference "
            f"{100 * last['difference']:+.0f} points, 95% interval {100 * last['difference, low']:+.0f} to "
            f"{100 * last['difference, high']:+.0f}).",
        ]

    @property
    def summary(self) -> str:
        """Text for the terminal: the answer, separability by layer, answers side by side."""
        layers = [
            [
                f"{row['layer']:.0f}", f"{row['AUC']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}",
                f"{row['p, adjusted']:.2g}", f"{row[SHARE]:.3f}",
            ]
            for row in _records(self.vectors.separability)
        ]  # fmt: skip
        shown = [UNSTEERED, *map(scaled, self.config.scales), random_at(self.config.scales[-1])]
        answers = [_block(row["id"], {name: row[name] for name in shown}) for row in _records(self.answers)]
        return "\n".join(
            [
                *self.answer, "",
                text_table(["layer", "AUC", "95% interval", "p, adjusted", "norm / stream"], layers), "",
                *answers, "",
                f"vectors: {self.file}", f"report: {self.report}",
            ]
        )  # fmt: skip


SHARE = "share of the stream's norm"
FIGURE = "AUC of held-out items by layer, with 95% intervals; the chosen layer in orange, chance as a dotted line"


def run(config: SteerConfig, model: HookedVLM | None = None) -> Steered:
    """Fit vectors, measure their separability, ask with and without the best one, and write everything to `config.out`.

    Args:
        model: a loaded model to use instead of loading `config.model`.

    Raises:
        StudyError: a setting out of range.
        InputError: data that cannot be used, too few items.
        OutputError: the output folder cannot be written.
        CheckpointError, ImageError: see `HookedVLM.from_pretrained` and `to_inputs`.
    """
    config.check()
    sets = [read_samples(path, config.prompt) for path in (config.positive, config.negative)]
    units = (_pictures(sets[0]), _pictures(sets[1])) if config.unit == "picture" else None
    writable_folder(config.out)
    model = model or load(config.model, config.device, config.dtype)
    vectors = steering_vectors(
        model,
        *sets,
        hook=config.hook,
        positions=config.positions,
        layers=config.layers or None,
        units=units,
        seed=config.seed,
        max_pixels=config.max_pixels,
        max_tiles=config.max_tiles,
        progress=not config.quiet,
    )
    questions = _questions(model, config, _numbered(sets[1], vectors.held_out[1]))
    answers = steered_answers(model, vectors, questions, config)
    file = vectors.save(config.out / FILE)
    result = Steered(config, vectors, answers, changes(answers, config.scales), file, config.out / "report.html")
    _write(result, questions)
    return result


def _numbered(samples: Iterable[Sample], numbers: Collection[int]) -> Iterator[Sample]:
    return (sample for number, sample in enumerate(samples) if number in numbers)


def _questions(model: HookedVLM, config: SteerConfig, held_out: Iterable[Sample]) -> list[Question]:
    """The prompts to ask, without their answers."""
    if config.ask_prompt is not None:
        asked: Any = [Sample("prompt", config.ask_prompt, config.ask_image)]
    else:
        asked = held_out if config.ask is None else read_samples(config.ask, config.prompt)
    bounds = {"max_pixels": config.max_pixels, "max_tiles": config.max_tiles}
    questions = []
    for sample in islice(asked, config.samples):
        text = sample.prompt if isinstance(sample.prompt, str) else "(messages)"
        picture = np.asarray(load_image(sample.images[0])) if sample.images else None
        alone = replace(sample, answer=None, boxes=())
        questions.append(Question(sample.id, text, picture, alone.inputs(model, **bounds)))
    return questions


def _pictures(samples: Iterable[Sample]) -> list[str]:
    """Digest of each sample's pictures."""
    digests = []
    for sample in samples:
        if not sample.images:
            raise StudyError(f"--unit picture needs samples with images, and {sample.id!r} has none: leave it out")
        digests.append(replace(sample, id="", prompt="", boxes=(), answer=None).digest())
    return digests


def _write(result: Steered, questions: Sequence[Question]) -> None:
    config, vectors = result.config, result.vectors
    page = Report(
        f"Steering {config.model}",
        f"Does the mean difference from {config.negative.name} to {config.positive.name} separate new items, and what "
        "does the model answer with it added?",
        shlex.join(["hooked-vlm", "steer", *_words(config)]),
    )
    page.answer = result.answer
    page.section(
        "Separability",
        f"Each vector is the mean of `{config.hook}` at {config.positions} over positive items, minus that over "
        f"negative ones, on half of the {config.unit}s. A quarter of them chose the layer. Of the last quarter, every "
        f"{config.unit} is projected on the vector; AUC is the probability that a positive one lies above a negative "
        "one, its interval is Newcombe's score interval, and p is one-sided (positive above negative) against "
        "permutations of the labels, adjusted over the layers by Holm's method. The distance is that of the means in "
        "pooled standard deviations.",
    )
    page.figure("separability", area_by_layer(vectors.separability, vectors.best), FIGURE)
    page.table("separability", vectors.separability, "Separability of held-out items by layer")
    page.section(
        "Answers",
        f"The vector of layer {vectors.best} is added at {config.at}; × 1 is the mean difference itself. The random "
        "vectors have its norm, and a direction drawn for each prompt.",
    )
    answers = result.answers.copy()
    answers.insert(1, "picture", [question.picture for question in questions])
    page.table("answers", answers, "Greedy answers")
    page.table("changes", result.changes, "Share of answers that differ from the unsteered one, with 95% intervals")
    about = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    about["ask_image"] = [str(path) for path in config.ask_image]
    page.write(config.out, {"config": about, **vectors.provenance}, config.zip)


def _words(config: SteerConfig) -> list[str]:
    given = ["--model", config.model, "--positive", str(config.positive), "--negative", str(config.negative)]
    return given + changed_settings(config, replace(SteerConfig(config.positive, config.negative), model=config.model))


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _block(name: str, answers: Mapping[str, str]) -> str:
    first, *others = [(f"  {how}", _short(text)) for how, text in answers.items()]
    return f"{_short(name)}\n{text_table(first, others, left=2)}"


def _short(text: str) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= WIDEST else line[: WIDEST - 1] + "…"
