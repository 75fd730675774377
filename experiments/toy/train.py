"""Trains a toy model from scratch: ``python -m hooked_vlm.experiments.toy.train --out DIR --seed 0``.

Every step's samples are drawn from ``(seed, step)``, so an interrupted run resumed with ``--resume``
goes through the same batches as an uninterrupted one. The learning rate stays, falls
a little while the model learns to read, and to zero after the pressure towards few reading heads has begun.
"""

import csv
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from hooked_vlm.experiments.toy import data
from hooked_vlm.experiments.toy.batches import Batch, answer_logits, collate
from hooked_vlm.experiments.toy.data import Sample
from hooked_vlm.experiments.toy.evaluate import exact_match, held_out
from hooked_vlm.experiments.toy.heads import Head, kept_heads, ocr_scores, visible_patterns
from hooked_vlm.experiments.toy.model import HFModel, batch_vision_attention, build_model, save_checkpoint_folder
from hooked_vlm.experiments.toy.specialise import (
    Specialisation,
    attention_on_evidence,
    random_gates,
    top_heads,
)

TASKS = ("page", "text", "transcription", "naming", "continuation")


@dataclass(frozen=True)
class TrainConfig:
    """What the shipped model was trained with."""

    out: Path
    seed: int = 0
    device: str = "cpu"
    threads: int = 2
    resume: bool = False
    steps: int = 8900
    specialise_from: int = 5300  # step
    specialisation: Specialisation = field(default_factory=Specialisation)
    schedule: tuple[tuple[int, float], ...] = (  # (step, factor on the learning rates), straight lines between
        (0, 0.01), (100, 1.0), (3200, 1.0), (4200, 0.643), (5000, 0.643), (5300, 0.514), (6500, 0.514),
        (7300, 0.377), (8900, 0.0),
    )  # fmt: skip
    lr: float = 1.5e-3
    muon_lr: float = 4e-3
    weight_decay: float = 0.02
    clip: float = 1.0
    turns: int = 4  # questions per page or text
    log_every: int = 25
    eval_every: int = 250
    save_every: int = 100


Sizes = tuple[tuple[int, int], ...]  # width, height


@dataclass(frozen=True)
class Stage:
    """From step ``first`` on: rows of one step, number of lines, sizes of images."""

    first: int
    continuations: int
    texts: int
    text_lines: tuple[float, ...]  # how often a text has 1, 2, ... lines
    echo: float  # share of questions (pages and texts) whose answer is the whole line
    pages: int = 0
    full_pages: int = 0
    strips: int = 0
    drawings: int = 0
    lines: tuple[float, ...] = (1.0,)  # as ``text_lines``, for pages
    separators: tuple[str, ...] = (data.SEPARATOR,)  # between key and value in texts
    page_sizes: Sizes = ()
    strip_sizes: Sizes = ()
    drawing_sizes: Sizes = ()


FULL = (*(data.PAGE_SIZE,) * 6, *data.OTHER_PAGE_SIZES)

SMALL_PAGES = ((112, 32), (112, 48), (128, 48))
MIDDLE_PAGES = ((128, 64), (128, 80), (112, 80))

# First the two elements: finding a place by its content, in text with the value right behind its key, and
# letters and objects, on small images (while no glyph is known, a large page is mostly cost and noise).
# Then pages, from small ones to full size.
CURRICULUM = (
    Stage(
        0, continuations=10, texts=12, text_lines=(0.0, 0.34, 0.33, 0.33), echo=0.5,
        strips=56, drawings=20, strip_sizes=((32, 32), (32, 32), (48, 32), (64, 32)),
        drawing_sizes=((64, 64),), separators=("", " ", "=", data.SEPARATOR),
    ),
    Stage(
        600, continuations=2, texts=8, text_lines=(0.0, 0.3, 0.3, 0.2, 0.1, 0.1), echo=0.5,
        pages=20, full_pages=4, strips=32, drawings=16, lines=(0.5, 0.5), page_sizes=SMALL_PAGES,
        strip_sizes=((32, 32), (48, 32), (64, 32), (96, 32)), drawing_sizes=((64, 64),),
        separators=("", "=", data.SEPARATOR, data.SEPARATOR),
    ),
    Stage(
        1100, continuations=1, texts=6, text_lines=(0.0, 0.2, 0.2, 0.2, 0.2, 0.2), echo=0.4,
        pages=22, full_pages=6, strips=12, drawings=10, lines=(0.25, 0.25, 0.25, 0.25),
        page_sizes=MIDDLE_PAGES, strip_sizes=((128, 48), (96, 64)), drawing_sizes=((80, 80), (112, 96)),
    ),
    Stage(
        1700, continuations=0, texts=6, text_lines=(0.0, 0.1, 0.15, 0.25, 0.25, 0.25), echo=0.1,
        pages=28, full_pages=4, strips=6, drawings=6, lines=(0.1, 0.1, 0.15, 0.2, 0.2, 0.25),
        page_sizes=FULL, strip_sizes=FULL, drawing_sizes=FULL,
    ),
    # What is left to learn is to tell glyphs apart: whole pages read out supervise every one of them.
    Stage(
        2700, continuations=0, texts=6, text_lines=(0.0, 0.1, 0.15, 0.25, 0.25, 0.25), echo=0.1,
        pages=16, full_pages=16, strips=8, drawings=6, lines=(0.1, 0.1, 0.15, 0.2, 0.2, 0.25),
        page_sizes=FULL, strip_sizes=FULL, drawing_sizes=FULL,
    ),
    # Glyphs are known; lines are still mixed up, on pages and in texts of many lines.
    Stage(
        7500, continuations=0, texts=10, text_lines=(0.0, 0.05, 0.1, 0.2, 0.3, 0.35), echo=0.05,
        pages=28, full_pages=4, strips=4, drawings=4, lines=(0.05, 0.05, 0.1, 0.2, 0.3, 0.3),
        page_sizes=FULL, strip_sizes=FULL, drawing_sizes=FULL,
    ),
)  # fmt: skip


def stage_at(step: int) -> Stage:
    return [stage for stage in CURRICULUM if step >= stage.first][-1]


def step_samples(config: TrainConfig, step: int) -> list[list[Sample]]:
    """The step's rows in groups of one image size (or none) and similar length."""
    rng = np.random.default_rng([config.seed, step])
    stage = stage_at(step)

    def n_lines(shares: tuple[float, ...], most: int = data.MAX_LINES) -> int:
        return min(most, 1 + int(rng.choice(len(shares), p=shares)))

    def one_of(sizes: Sizes) -> tuple[int, int]:
        return sizes[int(rng.integers(len(sizes)))]

    texts = [
        data.text_sample(rng, n_lines(stage.text_lines), config.turns, stage.echo, stage.separators)
        for _ in range(stage.texts)
    ]
    texts += [data.continuation_sample(rng) for _ in range(stage.continuations)]
    groups = [texts]
    if stage.pages:
        size = one_of(stage.page_sizes)
        fitting = size[1] // 16  # lines of the smallest font
        pages = [
            data.page_sample(rng, n_lines(stage.lines, fitting), size, config.turns, stage.echo)
            for _ in range(stage.pages)
        ]
        pages += [data.full_page_sample(rng, n_lines(stage.lines, fitting), size) for _ in range(stage.full_pages)]
        groups.append(pages)
    size = one_of(stage.strip_sizes)
    strips = [data.transcription_sample(rng, size) for _ in range(stage.strips)]
    size = one_of(stage.drawing_sizes)
    drawings = [data.naming_sample(rng, size) for _ in range(stage.drawings)]
    return [*groups, strips, drawings]


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
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Per task of the batch the mean cross-entropy and the accuracy over answer tokens; the penalty."""
    penalty = torch.zeros((), device=batch.tokens.device)
    if pressure is None:
        logits, targets, producing = answer_logits(model, batch)
    else:
        rng, reading, strength = pressure.rng, pressure.reading, pressure.strength
        text = model.config.text_config
        shape = (text.num_hidden_layers, text.num_attention_heads)
        gates = kept_heads(model, random_gates(rng, samples, shape, reading, strength).to(penalty.device))
        patterns: list[Tensor] = []
        with gates, visible_patterns(model):
            logits, targets, producing = answer_logits(model, batch, patterns)
        if samples[0].task == "page":
            penalty = pressure.penalty * attention_on_evidence(samples, batch, patterns, reading)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    correct = (logits.argmax(-1) == targets).float()
    row = producing.nonzero()[:, 0]
    task_of_row = torch.tensor([TASKS.index(sample.task) for sample in samples], device=row.device)
    result = {}
    for index in task_of_row.unique().tolist():
        chosen = task_of_row[row] == index
        result[TASKS[index]] = (losses[chosen].mean(), correct[chosen].mean())
    return result, penalty


def choose_reading_heads(model: HFModel, config: TrainConfig) -> list[Head]:
    """The heads with the highest OCR scores on pages that are neither trained on nor evaluated."""
    rng = np.random.default_rng([config.seed, 2**41])
    pages = [data.page_sample(rng) for _ in range(256)]
    scores = ocr_scores(model, pages)
    heads = top_heads(scores, config.specialisation.layer, config.specialisation.reading_heads)
    tqdm.write(f"OCR scores {scores.round(2).tolist()}; reading heads from here on: {heads}")
    return heads


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks and merger (about half the steps of AdamW), AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    muon = torch.optim.Muon(
        matrices, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """The factor on every learning rate."""
    steps, factors = zip(*config.schedule, strict=True)
    return float(np.interp(step, steps, factors))


class Log:
    """A CSV file that is cut back to the checkpoint's step when training resumes."""

    def __init__(self, path: Path, start: int) -> None:
        sets = [f"page{n}" for n in range(1, data.MAX_LINES + 1)] + ["text", "transcription", "naming"]
        self.fields = ["step", "seconds", "lr"]
        self.fields += [f"loss_{t}" for t in TASKS] + [f"token_accuracy_{t}" for t in TASKS]
        self.fields += [f"exact_{name}" for name in sets] + ["penalty"]
        rows = []
        if path.exists() and start > 0:
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
        self.path = path
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, row: dict[str, float | int]) -> None:
        with self.path.open("a", newline="") as file:
            written = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
            csv.DictWriter(file, self.fields).writerow(written)


def save_state(path: Path, state: dict) -> None:
    """Written aside and renamed: a killed run leaves the previous checkpoint whole."""
    aside = path.with_suffix(".tmp")
    torch.save(state, aside)
    os.replace(aside, path)


def train(config: TrainConfig) -> HFModel:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    config.out.mkdir(parents=True, exist_ok=True)
    model = build_model().to(device).train()
    batch_vision_attention(model)
    optimizers = make_optimizers(model, config)
    state_path = config.out / "training_state.pt"
    start, seconds = 0, 0.0
    reading: list[Head] = []
    if config.resume and state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, seconds = state["step"], state["seconds"]
        reading = [(layer, head) for layer, head in state.get("reading", [])]
    log = Log(config.out / "training_log.csv", start)
    evaluation = held_out(config.seed, 32)
    sums: dict[str, list[float]] = {}
    begun = time.monotonic() - seconds
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, mininterval=10)
    for step in bar:
        for optimizer, lr in zip(optimizers, (config.lr, config.muon_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate_factor(config, step)
            optimizer.zero_grad()
        pressure = None
        if step >= config.specialise_from:
            if not reading:
                reading = choose_reading_heads(model, config)
            rng = np.random.default_rng([config.seed, step, 1])
            strength = config.specialisation
            pressure = Pressure(rng, reading, strength, strength.penalty_at(step))
        for samples in step_samples(config, step):
            results, penalty = task_losses(model, samples, collate(samples).to(device), pressure)
            total = penalty + sum(LOSS_WEIGHTS[task] * loss for task, (loss, _) in results.items())
            total.backward()
            if samples[0].task == "page":
                sums.setdefault("penalty", []).append(float(penalty.detach()))
            for task, (loss, accuracy) in results.items():
                sums.setdefault(f"loss_{task}", []).append(loss.item())
                sums.setdefault(f"token_accuracy_{task}", []).append(accuracy.item())
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()

        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            row: dict[str, float | int] = {k: float(np.mean(v)) for k, v in sums.items()}
            bar.set_postfix({t[:5]: f"{row.get(f'token_accuracy_{t}', 0):.2f}" for t in TASKS})
            sums = {}
            if done % config.eval_every == 0 or done == config.steps:
                for name, samples in evaluation.items():
                    row[f"exact_{name}"] = float(exact_match(model, samples).mean())
            log.write(
                {
                    "step": done,
                    "seconds": time.monotonic() - begun,
                    "lr": config.lr * learning_rate_factor(config, step),
                    **row,
                }
            )
        if done % config.save_every == 0 or done == config.steps:
            state = {
                "step": done,
                "seconds": time.monotonic() - begun,
                "reading": reading,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            save_state(state_path, state)
    save_checkpoint_folder(model, config.out)
    return model


def main() -> None:
    config = tyro.cli(TrainConfig, description=__doc__)
    train(config)
    print({k: str(v) for k, v in asdict(config).items()})


if __name__ == "__main__":
    main()
