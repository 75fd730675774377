"""The study from end to end: score, select, mask, compare, write."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float

from hooked_vlm.attention_rows import attention_rows
from hooked_vlm.experiments.ocr_heads import plots, report
from hooked_vlm.experiments.ocr_heads.config import OcrHeadsConfig, StudyError
from hooked_vlm.experiments.ocr_heads.examples import Box, Example, coarse, to_inputs
from hooked_vlm.experiments.ocr_heads.masking import Outcome, masking_control, n_to_mask, random_candidates
from hooked_vlm.experiments.ocr_heads.published import Comparison, compare, ranked
from hooked_vlm.experiments.ocr_heads.scoring import Scores, find_copies, reply_tokens, score_heads
from hooked_vlm.experiments.ocr_heads.selection import bootstrap_interval, select
from hooked_vlm.experiments.ocr_heads.sources import collect
from hooked_vlm.loading import TOY_MODELS
from hooked_vlm.model import HookedVLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class OcrHeadsResult:
    """What a run found."""

    scores: Scores
    selected: Bool[np.ndarray, "layer head"]
    interval: tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]
    """95% bootstrap interval of every head's score."""
    outcomes: list[Outcome]
    """The masking control, one entry per condition, draw and task."""
    n_masked: int
    n_candidates: int
    """Live low-scoring heads the random control was drawn from."""
    published: Comparison | None
    about: dict[str, Any]

    @property
    def ocr_heads(self) -> list[tuple[int, int]]:
        """The selected (layer, head), best first."""
        return [head for head in ranked(self.scores.mean) if self.selected[head]]

    def to_dataframe(self, threshold: float = 0.1) -> pd.DataFrame:
        """One row per head, as in scores.parquet."""
        frequency = self.scores.frequency(threshold)
        rows = []
        for (layer, head), score in np.ndenumerate(self.scores.mean):
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "score": float(score),
                    "low": float(self.interval[0][layer, head]),
                    "high": float(self.interval[1][layer, head]),
                    "frequency": float(frequency[layer, head]),
                    "output_norm": float(self.scores.output_norm[layer, head]),
                    "selected": bool(self.selected[layer, head]),
                    "n_instances": len(self.scores.instances),
                    "n_tokens": self.scores.n_tokens,
                }
            )
        return pd.DataFrame(rows)

    def masking_dataframe(self) -> pd.DataFrame:
        """One row per condition, draw and task, as in masking.parquet."""
        return pd.DataFrame(
            {
                "condition": o.condition,
                "draw": o.draw,
                "heads": " ".join(f"{layer}.{head}" for layer, head in o.heads),
                "task": o.task,
                "right": o.right,
                "n": o.n,
                "exact": o.exact,
                "low": o.interval[0],
                "high": o.interval[1],
            }
            for o in self.outcomes
        )


def run(config: OcrHeadsConfig, model: HookedVLM | None = None) -> OcrHeadsResult:
    """Run the study and write its tables and pictures to `config.out`.

    Args:
        model: a loaded model to use instead of loading `config.model`.

    Raises:
        StudyError: a setting out of range, or an output folder that cannot be written.
        CheckpointError, InputError, ImageError: see `HookedVLM.from_pretrained` and `to_inputs`.
    """
    config.check()
    report.prepare_folder(config.out)
    model = model or load(config)
    if model.cfg.vision is None or model.tokenizer is None:
        lacks = "vision tower" if model.cfg.vision is None else "tokenizer"
        raise StudyError(f"{config.model} has no {lacks}: this study asks questions about images")
    if config.data == "auto":
        is_toy = (TOY_MODELS / Path(config.model).name).exists()
        config = replace(config, data="toy" if is_toy else "paper")
    examples, tasks, about = collect(config)
    if config.granularity == "coarse":
        examples = [coarse(e) for e in examples]
    with torch.no_grad():
        scores = score_heads(model, examples, config, about["pixels"])
        if not len(scores.instances):
            raise report.nothing_generated(scores)
        outcomes = masking_control(model, tasks, scores.mean, scores.output_norm, config, about["pixels"])
        shown = _looks(model, examples[:6], scores, config, about["pixels"])
    k = n_to_mask(config, scores.mean.size)
    candidates = random_candidates(scores.mean, scores.output_norm, ranked(scores.mean)[:k])
    result = OcrHeadsResult(
        scores,
        select(scores, config),
        bootstrap_interval(scores.instances, config.seed),
        outcomes,
        k,
        len(candidates),
        compare(config.model, scores.mean),
        about,
    )
    report.write(result, config, _versions(model), _pictures(result, config, shown))
    return result


def load(config: OcrHeadsConfig) -> HookedVLM:
    dtype = None if config.dtype == "auto" else DTYPES[config.dtype]
    return HookedVLM.from_pretrained(config.model, device=config.device, dtype=dtype)


Shown = list[tuple[Example, list[Box], str]]


def _looks(
    model: HookedVLM, examples: Sequence[Example], scores: Scores, config: OcrHeadsConfig, pixels: int | None
) -> Shown:
    """For some pages, the boxes of the tokens the best head looks at while it reads the answer."""
    layer, head = ranked(scores.mean)[0]
    shown = []
    for example in examples:
        inputs = to_inputs(model, [example], pixels)
        generated = model.generate(inputs, config.new_tokens)[0, inputs.shape[1] :]
        reply = reply_tokens(model, generated)
        continued = inputs.append([torch.tensor(reply, dtype=torch.long)])
        copies = find_copies(model, continued, 0, example, reply, config.measured_by)
        positions = [c.position for c in copies if c.position is not None]
        boxes = []
        if positions:
            rows = attention_rows(model, continued, torch.tensor([positions]), [layer])[0, 0, head]
            page = continued.visuals[example.evidence[0].image]
            keys = [int(k) for k in rows.argmax(-1)]
            boxes = [continued.box_of_token(k) for k in keys if page.start <= k < page.stop]
        text = str(model.to_string(reply)).strip()
        shown.append((example, boxes, f"{example.question}\nanswer {example.answer}, reply {text}"))
    return shown


def _pictures(result: OcrHeadsResult, config: OcrHeadsConfig, shown: Shown) -> dict[str, Any]:
    title = f"{Path(config.model).name}: OCR score of {result.scores.mean.size} heads, {result.scores.n_samples} pages"
    examples, boxes, titles = zip(*shown, strict=True)
    return {
        "heatmap.png": plots.heatmap(result.scores.mean, result.selected, title),
        "pages.png": plots.sample_pages(examples, boxes, titles),
        "masking.png": plots.masking_bars(report.masking_rows(result.outcomes)),
    }


def _versions(model: HookedVLM) -> dict[str, str]:
    packages = ("hooked-vlm", "torch", "transformers", "transformer_lens", "pillow", "numpy")
    named = {name: version(name) for name in packages}
    return {
        **named,
        "python": platform.python_version(),
        "device": str(model.cfg.device),
        "dtype": str(model.cfg.dtype),
    }
