"""Trains a toy model: ``python -m tools.toy_training.train --out DIR --seed 0 [--model toy-internvl2]``.

Every step's samples are drawn from ``(seed, step)``, so an interrupted run resumed with ``--resume``
goes through the same batches as an uninterrupted one. What a model is trained on is its recipe (`recipes`).
"""

import csv
import io
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from hooked_vlm.errors import OutputError
from hooked_vlm.loading.folders import TOY_MODELS
from hooked_vlm.runtime.files import atomic_write, writable_folder
from hooked_vlm.toys import pages as data
from hooked_vlm.toys.pages import Sample
from tools.toy_training import imitate
from tools.toy_training.batches import Batch, answer_logits, collate
from tools.toy_training.evaluate import exact_match, held_out
from tools.toy_training.families import FAMILIES, QWEN2_VL, family_of
from tools.toy_training.family import HFModel, text_shape
from tools.toy_training.guidance import Guidance
from tools.toy_training.heads import Head, kept_heads, ocr_scores, visible_patterns
from tools.toy_training.internvl2 import TILE_SIZE, start_from_qwen2_vl
from tools.toy_training.recipes import RECIPES, Recipe, Sizes
from tools.toy_training.specialise import (
    Specialisation,
    attention_on_evidence,
    random_gates,
    top_heads,
)

TASKS = ("page", "text", "transcription", "naming", "continuation")


@dataclass(frozen=True)
class TrainConfig:
    """Which model to train, where and how its run is kept."""

    out: Path
    model: Literal["toy-qwen2-vl", "toy-internvl2"] = "toy-qwen2-vl"
    seed: int = 0
    device: str = "cpu"
    threads: int = 2
    resume: bool = False
    teacher: Path = TOY_MODELS / "toy-qwen2-vl"
    """Whose decoder and vision tower toy-internvl2 learns from."""
    log_every: int = 25
    eval_every: int = 250
    save_every: int = 100


def step_samples(recipe: Recipe, seed: int, step: int) -> list[list[Sample]]:
    """The step's rows in groups of one image size (or none) and similar length."""
    rng = np.random.default_rng([seed, step])
    stage = recipe.stage_at(step)

    def n_lines(shares: tuple[float, ...], most: int = data.MAX_LINES) -> int:
        return min(most, 1 + int(rng.choice(len(shares), p=shares)))

    def one_of(sizes: Sizes) -> tuple[int, int]:
        return sizes[int(rng.integers(len(sizes)))]

    texts = [
        data.text_sample(rng, n_lines(stage.text_lines), recipe.turns, stage.echo, stage.separators, stage.decoys)
        for _ in range(stage.texts)
    ]
    texts += [data.continuation_sample(rng) for _ in range(stage.continuations)]
    groups = [texts]
    if stage.pages:
        size = one_of(stage.page_sizes)
        fitting = size[1] // 16  # lines of the smallest font
        pages = [
            data.page_sample(rng, n_lines(stage.lines, fitting), size, recipe.turns, stage.echo, stage.decoys)
            for _ in range(stage.pages)
        ]
        pages += [data.full_page_sample(rng, n_lines(stage.lines, fitting), size) for _ in range(stage.full_pages)]
        groups.append(pages)
    size = one_of(stage.strip_sizes)
    strips = [data.transcription_sample(rng, size) for _ in range(stage.strips)]
    size = one_of(stage.drawing_sizes)
    drawings = [data.naming_sample(rng, size) for _ in range(stage.drawings)]
    return [*groups, strips, drawings]


GUIDANCE_WEIGHT, GUIDANCE_LR = 0.3, 3e-3
LOSS_WEIGHTS = {"page": 1.0, "text": 0.7, "transcription": 1.0, "naming": 0.3, "continuation": 0.5}


@dataclass(frozen=True, eq=False)
class Pressure:
    """What one step does towards few reading heads."""

    rng: np.random.Generator
    reading: list[Head]
    strength: Specialisation
    penalty: float


def task_losses(
    model: HFModel,
    samples: list[Sample],
    batch: Batch,
    pressure: Pressure | None = None,
    residuals: list[Tensor] | None = None,
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Per task of the batch the mean cross-entropy and the accuracy over answer tokens; the penalty.

    ``residuals`` receives what enters each layer.
    """
    penalty = torch.zeros((), device=batch.tokens.device)
    if pressure is None:
        logits, targets, producing = answer_logits(model, batch, residuals=residuals)
    else:
        rng, reading, strength = pressure.rng, pressure.reading, pressure.strength
        gates = random_gates(rng, samples, text_shape(model), reading, strength).to(penalty.device)
        patterns: list[Tensor] = []
        with kept_heads(model, gates), visible_patterns(model):
            logits, targets, producing = answer_logits(model, batch, patterns, residuals)
        if samples[0].task == "page":
            start = family_of(model).image_start
            penalty = pressure.penalty * attention_on_evidence(samples, batch, patterns, reading, start)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    correct = (logits.argmax(-1) == targets).float()
    row = producing.nonzero()[:, 0]
    task_of_row = torch.tensor([TASKS.index(sample.task) for sample in samples], device=row.device)
    result = {}
    for index in task_of_row.unique().tolist():
        chosen = task_of_row[row] == index
        result[TASKS[index]] = (losses[chosen].mean(), correct[chosen].mean())
    return result, penalty


def choose_reading_heads(model: HFModel, recipe: Recipe, seed: int) -> list[Head]:
    """The heads with the highest OCR scores on pages that are neither trained on nor evaluated."""
    rng = np.random.default_rng([seed, 2**41])
    pages = [data.page_sample(rng) for _ in range(256)]
    scores = ocr_scores(model, pages)
    heads = top_heads(scores, recipe.specialisation.layer, recipe.specialisation.reading_heads)
    tqdm.write(f"OCR scores {scores.round(2).tolist()}; reading heads from here on: {heads}")
    return heads


def make_optimizers(model: nn.Module, guidance: Guidance, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks and merger (about half the steps of AdamW), AdamW for the rest.

    The read-outs of the guidance have an AdamW of their own: they are not clipped with the model.
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    muon = torch.optim.Muon(
        matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon, torch.optim.AdamW(guidance.parameters(), lr=GUIDANCE_LR)]


class Log:
    """A CSV file that is cut back to the checkpoint's step when training resumes; whole at any moment."""

    def __init__(self, path: Path, start: int) -> None:
        sets = [f"page{n}" for n in range(1, data.MAX_LINES + 1)] + ["text", "transcription", "naming"]
        self.fields = ["step", "seconds", "lr"]
        self.fields += [f"loss_{t}" for t in TASKS] + [f"token_accuracy_{t}" for t in TASKS]
        self.fields += [f"exact_{name}" for name in sets] + [
            "penalty",
            "loss_guidance_text",
            "loss_guidance_page",
            "loss_imitation",
        ]
        self.path, self.rows = path, []
        if path.exists() and start > 0:
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
        atomic_write(path, self._save)

    def write(self, row: dict[str, float | int]) -> None:
        self.rows.append({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
        atomic_write(self.path, self._save)

    def _save(self, aside: Path) -> None:
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            writer.writeheader()
            writer.writerows(self.rows)


def save_state(path: Path, state: dict) -> None:
    """A killed run leaves the previous state whole."""
    content = io.BytesIO()
    torch.save(state, content)  # into a file it does not say that the disk is full
    atomic_write(path, lambda aside: aside.write_bytes(content.getbuffer()))


def train(config: TrainConfig, recipe: Recipe) -> HFModel:
    """Train from the start, or from the state that an interrupted run left.

    Raises:
        OutputError: the folder cannot be written; what was written before is whole.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    writable_folder(config.out)
    family = FAMILIES[config.model]
    model = family.build().to(device).train()
    family.prepare_training(model)
    teacher: HFModel = None
    if recipe.imitation:
        teacher = QWEN2_VL.load(config.teacher).to(device).eval()
        QWEN2_VL.prepare_training(teacher)
        start_from_qwen2_vl(model, teacher)
    guidance = Guidance(model.config.text_config.hidden_size).to(device)
    optimizers = make_optimizers(model, guidance, recipe)
    state_path = config.out / "training_state.pt"
    start, seconds = 0, 0.0
    sums: dict[str, list[float]] = {}
    reading: list[Head] = []
    if config.resume and state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        guidance.load_state_dict(state["guidance"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, seconds, sums = state["step"], state["seconds"], state["sums"]
        reading = [(layer, head) for layer, head in state["reading"]]
    log = Log(config.out / "training_log.csv", start)
    evaluation = held_out(config.seed, 32)
    begun = time.monotonic() - seconds
    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, mininterval=10)
    for step in bar:
        factor = recipe.learning_rate_factor(step)
        for optimizer, lr in zip(optimizers, (recipe.lr, recipe.muon_lr, GUIDANCE_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.zero_grad()
        if step < recipe.imitation:
            results = imitation_step(model, teacher, np.random.default_rng([config.seed, step]))
        else:
            pressure = None
            if step >= recipe.specialise_from:
                reading = reading or choose_reading_heads(model, recipe, config.seed)
                strength = recipe.specialisation
                rng = np.random.default_rng([config.seed, step, 1])
                pressure = Pressure(rng, reading, strength, strength.penalty_at(step))
            guide = guidance if recipe.stage_at(step).guided else None
            results = task_step(
                model, step_samples(recipe, config.seed, step), pressure, guide, recipe.specialisation.layer
            )
        for name, values in results.items():
            sums.setdefault(name, []).extend(values)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()

        done = step + 1
        last = done == recipe.steps
        if done % config.log_every == 0 or last:
            row: dict[str, float | int] = {k: float(np.mean(v)) for k, v in sums.items()}
            bar.set_postfix({t[:5]: f"{row.get(f'token_accuracy_{t}', 0):.2f}" for t in TASKS})
            sums = {}
            if done % config.eval_every == 0 or last:
                for name, samples in evaluation.items():
                    row[f"exact_{name}"] = float(exact_match(model, samples).mean())
            log.write({"step": done, "seconds": time.monotonic() - begun, "lr": recipe.lr * factor, **row})
        if done % config.save_every == 0 or last:
            state = {
                "step": done,
                "seconds": time.monotonic() - begun,
                "reading": reading,
                "sums": sums,
                "model": model.state_dict(),
                "guidance": guidance.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            save_state(state_path, state)
    family.save(model, config.out)
    return model


def imitation_step(model: HFModel, teacher: HFModel, rng: np.random.Generator) -> dict[str, list[float]]:
    """Gradients of the imitation, and what to log."""
    images = imitate.step_images(rng, (TILE_SIZE, TILE_SIZE)).to(next(model.parameters()).device)
    loss = imitate.imitation_loss(model, teacher, images)
    loss.backward()
    return {"loss_imitation": [loss.item()]}


def task_step(
    model: HFModel,
    groups: list[list[Sample]],
    pressure: Pressure | None,
    guidance: Guidance | None,
    reading_layer: int,
) -> dict[str, list[float]]:
    """Gradients of all tasks, and what to log."""
    device, family = next(model.parameters()).device, family_of(model)
    logged: dict[str, list[float]] = {}
    for samples in groups:
        batch = collate(family, samples).to(device)
        guides = guidance if samples[0].task in ("text", "page") else None
        residuals: list[Tensor] | None = None if guides is None else []
        results, penalty = task_losses(model, samples, batch, pressure, residuals)
        total = penalty + sum(LOSS_WEIGHTS[task] * loss for task, (loss, _) in results.items())
        if guides is not None and residuals is not None:
            guided = guides.loss(family, samples, batch, residuals[reading_layer])
            total = total + GUIDANCE_WEIGHT * guided
            logged.setdefault(f"loss_guidance_{samples[0].task}", []).append(guided.item())
        total.backward()
        if samples[0].task == "page":
            logged.setdefault("penalty", []).append(float(penalty.detach()))
        for task, (loss, accuracy) in results.items():
            logged.setdefault(f"loss_{task}", []).append(loss.item())
            logged.setdefault(f"token_accuracy_{task}", []).append(accuracy.item())
    return logged


def main() -> None:
    config = tyro.cli(TrainConfig, description=__doc__)
    try:
        train(config, RECIPES[config.model])
    except OutputError as error:
        sys.exit(str(error))
    print({k: str(v) for k, v in asdict(config).items()})


if __name__ == "__main__":
    main()
