"""Small runs of everything that can be interrupted and resumed, for kills and full disks.

Each writes into a folder and, called again on what an interrupted one left, goes on from there.
"""

import io
import json
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fuzz.seeds import models, picture
from hooked_vlm.activations import Sample, stream_activations
from hooked_vlm.experiments.head_attribution import Attribute
from hooked_vlm.experiments.head_attribution import run as attribute
from hooked_vlm.experiments.ocr_heads import MaskConfig
from hooked_vlm.experiments.ocr_heads import run as ocr_heads
from hooked_vlm.experiments.ocr_heads.data.scored import scored_sets
from hooked_vlm.interventions import ZeroHeads
from hooked_vlm.metrics import logit
from hooked_vlm.runtime.files import atomic_write
from hooked_vlm.sweeps.many import SweepCase, sweep_many
from tools.toy_training import train
from tools.toy_training.recipes import RECIPES, Stage


def data_sets(out: Path) -> None:
    """Pages and texts of the OCR-heads study."""
    for as_text in (False, True):
        scored_sets(out, ["toy"], as_text, 0, 12, ())


def masking(out: Path) -> None:
    """Scores of all heads, and what masking some of them does, with the report."""
    small: dict[str, Any] = {
        "samples": 4,
        "task_samples": 2,
        "random_draws": 1,
        "max_new_tokens": 4,
        "tokens_per_batch": 400,
    }
    ocr_heads(MaskConfig(**small, out=out, quiet=True, device="cpu"), models()["toy-qwen2-vl"])


def attribution(out: Path) -> None:
    """Head attribution of one picture, with the report."""
    config = Attribute(samples=2, masks=24, bootstrap=5, random_rankings=2, out=out, quiet=True, device="cpu")
    attribute(config, models()["toy-qwen2-vl"])


def training(out: Path) -> None:
    """A toy model trained for six steps."""
    stage = Stage(
        0,
        continuations=1,
        texts=1,
        text_lines=(1.0,),
        echo=0.5,
        strips=1,
        strip_sizes=((32, 32),),
        drawings=1,
        drawing_sizes=((48, 48),),
    )
    recipe = replace(RECIPES["toy-qwen2-vl"], curriculum=(stage,), steps=6, specialise_from=99)
    recipe = replace(recipe, schedule=((0, 0.5), (2, 1.0), (6, 0.0)))
    config = train.TrainConfig(out=out, resume=True, threads=1, log_every=3, save_every=2)
    with mock.patch.object(train, "held_out", lambda seed, n: {}), redirect_stderr(io.StringIO()):
        train.train(config, recipe)


def activations(out: Path) -> None:
    """Activations of pages, streamed to shards of some samples each."""
    samples = [Sample(f"page {i}", "What is the value of a1?", [picture(48 + 16 * i, 32)]) for i in range(8)]
    names = ["blocks.1.hook_resid_post", "blocks.2.attn.hook_z"]
    stream_activations(models()["toy-qwen2-vl"], samples, names, out, shard_bytes=2**15, tokens_per_batch=64)


def sweeps(out: Path) -> None:
    """Sweeps over several images, in blocks of interventions."""
    model = models()["toy-qwen2-vl"]
    heads = [ZeroHeads(((layer, head),)) for layer in range(3) for head in range(4)]
    cases = [
        SweepCase(
            f"page {i}", model.to_inputs("What is the value of a1?", images=[picture(48 + 16 * i)]), heads, logit(5)
        )
        for i in range(4)
    ]
    table = sweep_many(model, cases, out / "parts", runs_per_block=3)
    atomic_write(out / "table.parquet", table.to_parquet)


WORK: dict[str, Callable[[Path], None]] = {
    "data sets": data_sets,
    "ocr-heads": masking,
    "head-attribution": attribution,
    "training": training,
    "activations": activations,
    "sweeps": sweeps,
}


def done(name: str, out: Path) -> None:
    """One of them, alone in its process and without a word."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WORK[name](out)


def differences(whole: Path, other: Path, complete: bool) -> list[str]:
    """Files of `other` that are not those of `whole`, byte by byte; all must be there where it is `complete`.

    What begins with a dot is being written; progress.jsonl holds times. A training's times differ from run to run; its
    state and log, and the counts of a stream of activations, are steps behind until it is complete.
    """
    names = {_name(whole, file) for file in whole.rglob("*") if file.is_file() and file.name != "progress.jsonl"}
    found = {_name(other, file) for file in other.rglob("*") if file.is_file() and file.name != "progress.jsonl"}
    wrong = [f"{n} is not a file of a whole run" for n in found - names if not _hidden(n)]
    wrong += [f"{n} is missing" for n in names - found if complete]
    return wrong + [n for n in sorted(names & found) if not _alike(whole / n, other / n, complete)]


def _name(folder: Path, file: Path) -> str:
    return str(file.relative_to(folder))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def _alike(whole: Path, other: Path, complete: bool) -> bool:
    if whole.name == "training_state.pt":
        a, b = (torch.load(path, weights_only=True) for path in (whole, other))
        return (
            a["step"] > b["step"]
            if not complete and a["step"] != b["step"]
            else _equal({**a, "seconds": 0}, {**b, "seconds": 0})
        )
    if whole.name == "training_log.csv":
        a, b = ([[c for i, c in enumerate(row.split(",")) if i != 1] for row in path.read_text().splitlines()]
                for path in (whole, other))  # fmt: skip
        return a == b if complete else a[: len(b)] == b
    if whole.name == "activations.json" and not complete:  # counts what is there
        return json.loads(other.read_text()).keys() <= json.loads(whole.read_text()).keys()
    return whole.read_bytes() == other.read_bytes()


def _equal(a: object, b: object) -> bool:
    """Nested dictionaries and lists of tensors, bit by bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b
