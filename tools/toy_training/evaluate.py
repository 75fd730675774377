"""Exact match of a toy checkpoint per task, and the control that masks its reading heads.

``python -m tools.toy_training.evaluate --model DIR`` prints the tables and writes
``evaluation.json`` beside the weights.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from hooked_vlm.toys import pages as data
from hooked_vlm.toys.pages import Sample
from tools.toy_training.batches import answer_logits, collate
from tools.toy_training.families import family_in, family_of
from tools.toy_training.family import HFModel, text_shape
from tools.toy_training.heads import Head, head_mask, kept_heads, ocr_scores, output_norms

LIVE_NORM = 0.1  # of the largest head's
NOT_READING = 0.1  # OCR score
WIDE_PAGE = (256, 112)  # width, height in pixels


@dataclass(frozen=True)
class EvaluationConfig:
    model: Path
    samples: int = 500  # per task and per number of lines
    draws: int = 20  # random controls
    seed: int = 0
    threads: int = 2
    masked_heads: int | None = None  # default: an eighth of all heads
    device: str = "cpu"


def held_out(seed: int, n: int) -> dict[str, list[Sample]]:
    """Samples from a stream that training never draws from: pages by number of lines, and the rest."""
    rng = np.random.default_rng([seed, 2**40])
    sets = {f"page{lines}": [data.page_sample(rng, lines) for _ in range(n)] for lines in range(1, data.MAX_LINES + 1)}
    sets["text"] = [data.text_sample(rng) for _ in range(n)]
    sets["transcription"] = [data.transcription_sample(rng) for _ in range(n)]
    sets["naming"] = [data.naming_sample(rng) for _ in range(n)]
    return sets


def wide_pages(seed: int, n: int) -> list[Sample]:
    """Pages of several tiles, for the family that cuts them into tiles."""
    rng = np.random.default_rng([seed, 2**40, 1])
    return [data.page_sample(rng, size=WIDE_PAGE) for _ in range(n)]


@torch.no_grad()
def exact_match(model: HFModel, samples: list[Sample], masked: list[Head] | None = None) -> np.ndarray:
    """Per sample, whether greedy decoding gives the answer and stops; ``masked`` heads output zero.

    One pass over prompt and answer decides it: greedy decoding follows the answer exactly as long as
    every answer token is the most likely one after the right ones before it.
    """
    device, family, shape = next(model.parameters()).device, family_of(model), text_shape(model)
    right = []
    for first in range(0, len(samples), 64):
        part = samples[first : first + 64]
        batch = collate(family, part).to(device)
        with kept_heads(model, head_mask(shape, masked or [], len(part)).to(device)):
            logits, targets, producing = answer_logits(model, batch)
        wrong = torch.zeros(len(part), dtype=torch.long, device=device)
        wrong.index_add_(0, producing.nonzero()[:, 0], (logits.argmax(-1) != targets).long())
        right.append((wrong == 0).cpu().numpy())
    return np.concatenate(right)


def masking_control(model: HFModel, sets: dict[str, list[Sample]], config: EvaluationConfig) -> dict:
    """Masks the heads with the highest OCR score, then as many random live heads that do not read."""
    pages = [sample for name, samples in sets.items() if name.startswith("page") for sample in samples]
    pages = pages[:: max(1, len(pages) // config.samples)]
    scores = ocr_scores(model, pages)
    norms = output_norms(model, pages)
    n_masked = config.masked_heads or max(1, scores.size // 8)
    order = np.argsort(-scores, axis=None)
    top = [_head(scores, index) for index in order[:n_masked]]
    live = [
        _head(scores, index)
        for index in range(scores.size)
        if norms.flat[index] >= LIVE_NORM * norms.max() and scores.flat[index] < NOT_READING
    ]
    rng = np.random.default_rng([config.seed, 1])
    draws = []
    for _ in range(config.draws if len(live) >= n_masked else 0):
        heads = [live[i] for i in rng.choice(len(live), n_masked, replace=False)]
        draws.append({"heads": heads, "page": float(exact_match(model, pages, heads).mean())})
    result = {
        "ocr_score": scores.round(4).tolist(),
        "output_norm": norms.round(4).tolist(),
        "top_heads": top,
        "live_non_reading_heads": live,
        "random_draws": draws,
        "random_page_median": float(np.median([d["page"] for d in draws])) if draws else None,
    }
    for name, heads in (("intact", []), ("masked", top)):
        result[name] = {
            "page": float(exact_match(model, pages, heads).mean()),
            **{
                task: float(exact_match(model, sets[task], heads).mean())
                for task in ("text", "transcription", "naming")
            },
        }
    return result


def _head(scores: np.ndarray, index: int) -> Head:
    layer, head = np.unravel_index(index, scores.shape)
    return int(layer), int(head)


def evaluate(config: EvaluationConfig) -> dict:
    torch.set_num_threads(config.threads)
    family = family_in(config.model)
    model = family.load(config.model).to(config.device).eval()
    family.prepare_training(model)
    sets = held_out(config.seed, config.samples)
    if family.grid(*WIDE_PAGE[::-1]).thumbnail:
        sets["wide"] = wide_pages(config.seed, config.samples)
    exact = {name: float(exact_match(model, samples).mean()) for name, samples in sets.items()}
    exact["page"] = float(np.mean([v for name, v in exact.items() if name.startswith("page")]))
    return {
        "samples": config.samples,
        "seed": config.seed,
        "exact_match": exact,
        "masking": masking_control(model, sets, config),
    }


LABELS = {f"page{n}": f"pages of {n} line{'s' * (n > 1)}" for n in range(1, data.MAX_LINES + 1)} | {
    "page": "pages of 1 to 6 lines, mean",
    "wide": "wide pages (two tiles and a thumbnail)",
    "text": "pages as text",
    "transcription": "transcription of a line",
    "naming": "naming the object",
}


def report(result: dict) -> str:
    """The tables of `docs/toy-models.md`."""
    exact, masking = result["exact_match"], result["masking"]
    median = masking["random_page_median"]
    random_heads = "too few such heads" if median is None else f"{median:.1%}"
    masked = ", ".join(f"{layer}.{head}" for layer, head in masking["top_heads"])
    n_heads = len(masking["ocr_score"][0])
    lines = [
        "| task | exact match |",
        "|---|---|",
        *(f"| {label} | {exact[task]:.1%} |" for task, label in LABELS.items() if task in exact),
        "",
        "| OCR score | " + " | ".join(f"head {head}" for head in range(n_heads)) + " |",
        "|---" * (n_heads + 1) + "|",
        *(
            f"| layer {layer} | " + " | ".join(f"{score:.2f}" for score in scores) + " |"
            for layer, scores in enumerate(masking["ocr_score"])
        ),
        "",
        f"| task | nothing masked | masked: {masked} | masked: two random live heads that do not read |",
        "|---|---|---|---|",
    ]
    for task, value in masking["intact"].items():
        control = f"{random_heads} (median)" if task == "page" else ""
        lines.append(f"| {task} | {value:.1%} | {masking['masked'][task]:.1%} | {control} |")
    return "\n".join(lines)


def main() -> None:
    config = tyro.cli(EvaluationConfig, description=__doc__)
    result = evaluate(config)
    (config.model / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(report(result))


if __name__ == "__main__":
    main()
