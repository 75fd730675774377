"""From a model to a dictionary, and from a dictionary to what its features stand for."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from hooked_vlm.activations import Activations, stream_activations
from hooked_vlm.data import read_samples
from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.features.config import FindConfig, TrainConfig
from hooked_vlm.features import Dictionary, load_dictionary, save_dictionary
from hooked_vlm.features.config import TrainingConfig
from hooked_vlm.features.labelled import TOY_LABELS, LabelledPicture, boxed_pictures, toy_pictures
from hooked_vlm.features.meanings import find_meanings
from hooked_vlm.features.reading import ReadTokens, read_tokens
from hooked_vlm.features.training import Trained, train_dictionary
from hooked_vlm.model.by_name import load
from hooked_vlm.runtime.files import atomic_write, writable_folder

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

FOLDER = "dictionary"
TRAINING, FINDING = 1, 2
"""Purposes of toy pictures: those that a dictionary is trained on are never those that it is read with."""


def train(config: TrainConfig, model: "HookedVLM | None" = None) -> Trained:
    """Train a dictionary, on activations that are made first if none are given, and write it to `config.out`.

    Raises:
        StudyError, InputError, HookError, ActivationsError, CheckpointError, OutputError, WorkerError: what a user can
            mend.
    """
    config.check()
    out = writable_folder(config.out)
    if config.activations is None:
        model = model or load(config.model, config.device, config.dtype)
        samples = [picture.sample for picture in toy_pictures(config.pictures, config.seed, TRAINING)]
        tokens = "image" if config.group == "image" else "all"
        activations = stream_activations(
            model, samples, config.hook, out / "activations", tokens=tokens, progress=not config.quiet
        )
    else:
        activations = Activations(config.activations)
    settings = {field.name: getattr(config, field.name) for field in fields(TrainingConfig)}
    found = train_dictionary(
        activations,
        config.hook,
        TrainingConfig(**settings),
        out,
        processes=config.processes,
        device=None if config.device == "auto" else config.device,
        progress=not config.quiet,
    )
    save_dictionary(found.dictionary, out / FOLDER)
    return found


@dataclass(frozen=True, eq=False)
class Found:
    """What features stand for."""

    dictionary: Dictionary
    pictures: Sequence[LabelledPicture]
    read: ReadTokens
    features: Float[np.ndarray, "token feature"]
    meanings: pd.DataFrame
    """meanings.csv: one row per label."""
    table: pd.DataFrame
    """features.csv: one row per feature."""


def find(config: FindConfig, model: "HookedVLM | None" = None) -> Found:
    """Find the feature of each label, and write both tables to `config.out`.

    Raises:
        StudyError, InputError, FeatureError, HookError, CheckpointError, OutputError: what a user can mend.
    """
    config.check()
    inner = config.dictionary / FOLDER
    dictionary = load_dictionary(inner if inner.is_dir() else config.dictionary)
    pictures, names = _pictures(config)
    out = writable_folder(config.out)
    model = model or load(config.model, config.device, config.dtype)
    dictionary.check_fits(model)
    read = read_tokens(model, dictionary.hook_name, pictures, names, at=config.at, progress=not config.quiet)
    with torch.no_grad():
        features = dictionary.encode(read.values).float().numpy()
    table = find_meanings(
        features, read.values.numpy(), read.tokens, names,
        seed=config.seed, permutations=config.permutations, at_least=config.at_least,
    )  # fmt: skip
    found = Found(dictionary, pictures, read, features, table, _of_features(features, table))
    for name, frame in (("meanings.csv", found.meanings), ("features.csv", found.table)):
        atomic_write(out / name, partial(frame.to_csv, index=False))
    return found


def _pictures(config: FindConfig) -> tuple[list[LabelledPicture], tuple[str, ...]]:
    if config.data is None:
        return list(toy_pictures(config.pictures, config.seed, FINDING)), TOY_LABELS
    pictures, names = boxed_pictures(islice(read_samples(config.data), config.pictures))
    if not names:
        raise StudyError(f"--data needs samples of one picture with named boxes, and {config.data} has none")
    return pictures, names


def _of_features(features: Float[np.ndarray, "token feature"], table: pd.DataFrame) -> pd.DataFrame:
    """One row per feature: how often it is active on the tokens read, how strongly, and the label that chose it.

    A feature that several labels chose has the one with the largest F1.
    """
    active = features > 0
    n = active.sum(0)
    frame = pd.DataFrame(
        {
            "feature": np.arange(features.shape[1]),
            "active": active.mean(0),
            "mean when active": np.divide(features.sum(0), n, out=np.zeros(len(n)), where=n > 0),
            "largest": features.max(0),
        }
    )
    best = table.sort_values("F1", ascending=False).drop_duplicates("feature")
    return frame.merge(best[["feature", "label", "F1", "low", "high", "found"]], on="feature", how="left")
