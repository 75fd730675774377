"""Pictures of the study, and those the model answers correctly."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.head_attribution.coco import coco_items
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.items import Item
from hooked_vlm.inputs.images import load_image
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import Task, Workers
from hooked_vlm.toys.drawings import OBJECTS
from hooked_vlm.toys.pages import NAMING_PROMPT, naming_sample

ONE_WORD = NAMING_PROMPT + " Answer with one word."
ANSWER_TOKENS = 8


@dataclass(frozen=True, eq=False)
class Case:
    """A picture whose object the model names correctly."""

    item: Item
    inputs: VLMInputs
    """One row, with its image features; with its pixels where the vision tower is ablated."""
    target: int
    """First token of the model's answer."""
    foil: int | None
    """Among the first tokens of answers to other pictures, the one with the largest logit; None if there is none."""


def items_of(config: HeadAttributionConfig) -> list[Item]:
    """Pictures of the configured source, without duplicates.

    Raises:
        StudyError: no pictures.
        ImageError: a picture is corrupt.
    """
    return list({item.id: item for item in _drawn_items(config)}.values())


def _drawn_items(config: HeadAttributionConfig) -> list[Item]:
    if config.source == "toy":
        return toy_items(config.samples, config.seed, config.question or NAMING_PROMPT)
    question = config.question or ONE_WORD
    assert config.images is not None
    if config.source == "folder":
        return folder_items(config.images, question, config.samples, config.seed)
    assert config.annotations is not None
    bounds = (config.min_object, config.max_object)
    return coco_items(config.annotations, config.images, question, config.samples, config.seed, *bounds)


def toy_items(n: int, seed: int, question: str) -> list[Item]:
    """Draw `n` objects, all names equally often."""
    rng = np.random.default_rng([seed, 11])
    items = []
    for i in range(n):
        sample = naming_sample(rng, name=OBJECTS[i % len(OBJECTS)])
        assert sample.image is not None
        items.append(Item(sample.image, sample.turns[0][1], question, sample.object_mask))
    return items


def folder_items(folder: Path, question: str, n: int, seed: int) -> list[Item]:
    """Draw `n` pictures from a folder with one folder of pictures per name, or all if there are fewer.

    Raises:
        StudyError: there are none.
        ImageError: a picture is corrupt.
    """
    known = Image.registered_extensions()
    files = sorted(file for file in folder.glob("*/*") if file.suffix.lower() in known)
    if not files:
        raise StudyError(
            f"--images {folder} has no pictures in folders named after their objects: expected NAME/picture.jpg"
        )
    order = np.random.default_rng([seed, 1]).permutation(len(files))[:n]
    named = [(files[i], files[i].parent.name.replace("_", " ")) for i in order]
    return [Item(load_image(file), name, question) for file, name in named]


def is_right(reply: str, name: str) -> bool:
    """Whether a reply is the name, up to case and punctuation."""
    return _bare(reply) == _bare(name)


def _bare(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def ask(
    workers: Workers, items: Sequence[Item], parts: ResultStore, key: dict[str, Any], quiet: bool, what: str
) -> pd.DataFrame:
    """Ask about every picture; `what` labels the progress bar.

    Returns:
        Table with `image`, `name`, `reply`, `token` (the reply's first) and `right`.
    """
    tasks = [Task(parts, key | {"image": item.id}, answer_of, (item,)) for item in items]
    return pd.concat(workers.tables(tasks, what, each="picture", quiet=quiet), ignore_index=True)


def answer_of(model: HookedVLM, item: Item) -> pd.DataFrame:
    """Answer one item: one row of `ask`."""
    inputs = to_inputs(model, item)
    tokens = model.generate(inputs, ANSWER_TOKENS)[0, inputs.shape[1] :].tolist()
    end = next((i for i, token in enumerate(tokens) if token in model.cfg.eos_token_ids), len(tokens))
    reply = str(model.to_string(tokens[:end])).strip() if end else ""
    row = {"image": item.id, "name": item.name, "reply": reply, "token": tokens[0]}
    return pd.DataFrame([row | {"right": is_right(reply, item.name)}])


def to_inputs(model: HookedVLM, item: Item) -> VLMInputs:
    return model.to_inputs(item.question, images=item.image)


@torch.no_grad()
def right_cases(model: HookedVLM, items: Sequence[Item], answers: pd.DataFrame, encode: bool = True) -> list[Case]:
    """Cases of the items answered correctly, with their image features if `encode`.

    Raises:
        StudyError: there are none.
    """
    right = answers["right"].to_numpy()
    if not right.any():
        first = answers.head(3).to_dict("records")
        shown = ", ".join(f"{answer['reply']!r} for {answer['name']!r}" for answer in first)
        raise StudyError(f"none of {len(items)} pictures was answered correctly ({shown}): try another --question")
    spoken = sorted(set(answers["token"][right]))
    cases = []
    for item, token in zip(np.array(items, dtype=object)[right], answers["token"][right], strict=True):
        inputs = to_inputs(model, item)
        if encode:
            inputs = inputs.with_image_features(model.encode_images(inputs))
        others = [other for other in spoken if other != token]
        foil = None
        if others:
            logits = model(inputs, logits_at="last")[0, 0]
            foil = others[int(logits[others].argmax())]
        cases.append(Case(item, inputs, int(token), foil))
    return cases
