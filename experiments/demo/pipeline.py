"""The demo's measurements, in order: which two heads read, what removing them does to many pages, and one page on which
they are turned down step by step."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.common.frames import each_row
from hooked_vlm.experiments.demo.config import DemoConfig
from hooked_vlm.experiments.demo.page import write_page
from hooked_vlm.experiments.demo.turning import TurnedDown, turn_down
from hooked_vlm.experiments.ocr_heads import changed, effects
from hooked_vlm.experiments.ocr_heads.config import MaskConfig
from hooked_vlm.experiments.ocr_heads.controls import ChangedHeads, Control, random_controls
from hooked_vlm.experiments.ocr_heads.examples import Example, to_inputs
from hooked_vlm.experiments.ocr_heads.masking import masked
from hooked_vlm.experiments.ocr_heads.scoring import Scores
from hooked_vlm.experiments.ocr_heads.study import Study
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import Head
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.files import writable_folder
from hooked_vlm.viewer.scene import Scene, scene_of

N_HEADS = 2
KIND, METRIC = "OCR", "exact"


@dataclass(frozen=True, eq=False)
class Pages:
    """Answers to held-out pages: with all heads, without the two, without random ones."""

    answers: pd.DataFrame
    """One row per condition, draw and page: `reply`, and whether it is right (`exact`)."""
    summary: pd.DataFrame
    """Share answered right with its 95% interval, by condition."""
    test: Any
    """The two heads against the random ones (a row of `effects.against_controls`)."""
    name: str
    """Condition without the two heads."""
    control: Control

    def share(self, condition: str) -> Any:
        """Share answered right: value, low, high."""
        return next(row for row in each_row(self.summary) if row.condition == condition)

    def column(self, condition: str, column: str, draw: int = 0) -> np.ndarray:
        """Values of every page under a condition, in the order of the pages."""
        own = self.answers.set_index(["condition", "draw", "sample"])[column]
        return own.loc[condition, draw].sort_index().to_numpy()

    @property
    def right(self) -> Bool[np.ndarray, "page"]:
        """Pages answered right with all heads."""
        return self.column(changed.UNCHANGED.name, METRIC).astype(bool)

    @property
    def flipped(self) -> Bool[np.ndarray, "page"]:
        """Pages answered right with all heads, and otherwise without the two."""
        replies = [self.column(name, "reply") for name in (changed.UNCHANGED.name, self.name)]
        return self.right & (replies[0] != replies[1])

    @property
    def random_shares(self) -> list[float]:
        """Share answered right without each random pair."""
        n = range(len(self.control.sets))
        return [float(self.column(self.control.name, METRIC, draw).mean()) for draw in n]

    @property
    def shown(self) -> int:
        """The page to show: the first answered right whose answer changes without the two heads; if there is none, the
        first answered right."""
        return int(np.argmax(self.flipped if self.flipped.any() else self.right))


@dataclass(frozen=True, eq=False)
class Demo:
    """All that the terminal and the page tell."""

    config: DemoConfig
    scores: Scores
    """OCR score of every head, on other pages than `pages`."""
    heads: tuple[Head, ...]
    """The two heads with the highest score."""
    pages: Pages
    example: Example
    """The page that is shown."""
    scene: Scene
    reading: TurnedDown
    """The two heads turned down on the page that is shown."""
    random: tuple[TurnedDown, ...]
    """Each random pair turned down on it."""
    page: Path


def run(config: DemoConfig, model: HookedVLM | None = None) -> Demo:
    """Find the two heads, measure what they do, and write demo.html to `config.out`.

    Args:
        model: a loaded model to use instead of loading `config.model`.

    Raises:
        StudyError: a setting out of range, a model that reads no page or has no heads to compare with.
        OutputError: the output folder cannot be written.
        CheckpointError, InputError, ImageError: see `HookedVLM.from_pretrained` and `to_inputs`.
    """
    config.check()
    writable_folder(config.out)
    study = Study(config.study, model)
    with study.workers:
        heads = study.top(study.ocr, N_HEADS)
        pages, examples = ask_pages(study, config.study, heads)
    example = examples[pages.shown]
    inputs = to_inputs(study.model, [example], study.pixels)
    turned = partial(_turned_down, study, encoded(study.model, inputs), example, heads)
    demo = Demo(
        config=config, scores=study.ocr, heads=heads, pages=pages, example=example,
        scene=scene_of(inputs, list(example.images), [e.box for e in example.evidence]),
        reading=turned(heads), random=tuple(map(turned, pages.control.sets)), page=config.out / "demo.html",
    )  # fmt: skip
    write_page(demo)
    return demo


def ask_pages(study: Study, config: MaskConfig, heads: tuple[Head, ...]) -> tuple[Pages, list[Example]]:
    """Ask about pages that heads were not scored on: with all heads, without the given ones, without random ones.

    Raises:
        StudyError: no page is answered right, or there are no random heads to compare with.
    """
    tops = {KIND: heads}
    control = random_controls(study, "live", tops, len(heads), config.random_draws)
    if not control[KIND].sets:
        raise StudyError(f"the demo compares two heads with random ones, and there is {control[KIND].origin}")
    chosen = ChangedHeads(len(heads), tops, [control])
    conditions = [changed.UNCHANGED, *changed.conditions_of(chosen, partial(masked, mode="zero"))]
    tasks = changed.tasks_of(study, config)
    answers = changed.answer_all(study, tasks, conditions, "pages")
    summary = effects.summarize(answers, conditions, config.seed)
    tests = effects.against_controls(answers, conditions, "worse", config.seed)
    own, test = summary.loc[summary["chosen"]], next(each_row(tests.loc[tests["chosen"]]))
    pages = Pages(answers, own, test, chosen.name(KIND), control[KIND])
    if not pages.right.any():
        raise StudyError(
            f"{config.model} answers none of {len(pages.right)} pages of `key = value` lines right, so no heads can "
            "be seen to read: use a model that reads small print, or one of the bundled toy models"
        )
    return pages, list(tasks[0].data.examples)


def encoded(model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
    """The inputs with their image features, which no head of the language model changes."""
    return inputs.with_image_features(model.encode_images(inputs).detach())


def _turned_down(
    study: Study, inputs: VLMInputs, example: Example, watched: tuple[Head, ...], heads: tuple[Head, ...]
) -> TurnedDown:
    return turn_down(study.model, inputs, example.answer, heads, watched, study.config.new_tokens)
