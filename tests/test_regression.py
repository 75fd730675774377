"""Numbers of the bundled models that a change of the code must not shift.

`tests/regression.json` holds them, with the tolerance of each kind. Every one is a number of its own seed; parity and
laws say that numbers are right, this says that they stay. After a change that is meant to shift one,

    python tests/test_regression.py

writes the table anew, and the commit says why. Tolerances leave room for another machine's rounding: nothing else.
"""

import json
import re
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM, sweep
from hooked_vlm.experiments.head_attribution import Attribute
from hooked_vlm.experiments.head_attribution import run as attribute_heads
from hooked_vlm.experiments.ocr_heads import MaskConfig, ScoreConfig
from hooked_vlm.experiments.ocr_heads import run as ocr_heads
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import ReplaceImageKV, ZeroHeads
from hooked_vlm.interventions.attention import all_heads
from hooked_vlm.lens import logit_lens
from hooked_vlm.metrics import log_prob
from hooked_vlm.model.fingerprints import weights_hash
from hooked_vlm.patching import Pair, Region, attribute, masked, patch
from hooked_vlm.toys.pages import Page, make_page

TABLE = Path(__file__).with_name("regression.json")
TOYS = ("toy-qwen2-vl", "toy-internvl2")
TOLERANCES = {"logits": 1e-3, "effects": 1e-3, "shares": 1e-4, "scores": 1e-6, "coefficients": 1e-2}
"""Absolute. Scores are counts over samples, equal unless an argmax or an answer changes; coefficients are sums over
hundreds of runs; logits are of the size of 10."""


@lru_cache(maxsize=2)
def asked(toy: str) -> tuple[HookedVLM, Page, VLMInputs]:
    model = HookedVLM.from_pretrained(toy, device="cpu")
    size = (240, 112) if toy == "toy-internvl2" else (128, 112)
    page = make_page(np.random.default_rng(7), n_lines=4, size=size)
    return model, page, model.to_inputs(page.question(2), images=page.image)


def first_token(model: HookedVLM, page: Page) -> int:
    return int(model.to_tokens(page.lines[2].value)[0, 0])


@torch.no_grad()
def plain_run(toy: str) -> dict[str, Any]:
    model, page, inputs = asked(toy)
    logits, cache = model.run_with_cache(inputs)
    evidence = inputs.tokens_in_box(0, page.lines[2].value_box, min_overlap=0.1)
    patterns = [cache["pattern", layer][0, :, -1, evidence].sum(-1) for layer in range(model.cfg.n_layers)]
    top = logits[0, -1].topk(5)
    return {
        "logits of the last token, largest five": ("logits", top.values.tolist()),
        "tokens of these": ("scores", top.indices.tolist()),
        "mean and deviation of all logits": ("logits", [float(logits.mean()), float(logits.std())]),
        "attention of the last token to the value": ("shares", torch.stack(patterns).tolist()),
        "norm of the last token's stream by layer": (
            "logits",
            [float(cache["resid_post", layer][0, -1].norm()) for layer in range(model.cfg.n_layers)],
        ),
        "norm of the image features": ("logits", [float(model.encode_images(inputs).norm())]),
        "greedy answer": ("scores", model.generate(inputs, 6)[0, inputs.shape[1] :].tolist()),
    }


def edited_runs(toy: str) -> dict[str, Any]:
    model, page, inputs = asked(toy)
    heads, metric = all_heads(model), log_prob(first_token(model, page))
    zeroed = sweep(model, inputs, [ZeroHeads((head,)) for head in heads], metric)
    blind = sweep(model, inputs, [ReplaceImageKV((head,)) for head in heads], metric)
    box = page.lines[2].value_box
    pair = Pair(inputs, inputs.with_image(0, masked(page.image, box)), {"value": Region(box)})
    where = ("value", "image", "question", "final")
    exact = patch(model, pair, "resid_pre", metric, where=where)
    estimated = attribute(model, pair, "resid_pre", metric, where=where)
    return {
        "log-probability lost, each head zeroed": ("effects", zeroed.effects[:, 0].tolist()),
        "log-probability lost, each head blind": ("effects", blind.effects[:, 0].tolist()),
        "patching resid_pre": ("effects", exact.mean.tolist()),
        "attribution patching resid_pre": ("effects", estimated.mean.tolist()),
        "logit lens of the answer": (
            "effects",
            logit_lens(model, inputs, "final", targets=[first_token(model, page)]).target_log_probs[..., 0].tolist(),
        ),
    }


def studies(toy: str) -> dict[str, Any]:
    model, _, _ = asked(toy)
    with tempfile.TemporaryDirectory() as out:
        settings: dict[str, Any] = {"model": toy, "samples": 16, "quiet": True}
        masked_heads = MaskConfig(out=Path(out) / "ocr", task_samples=8, random_draws=2, **settings)
        found = ocr_heads(masked_heads, model)
        code = ocr_heads(ScoreConfig(out=Path(out) / "code", compat=True, **settings), model)
        masking = found.table("masking")
        settings = {"model": toy, "samples": 3, "masks": 64, "bootstrap": 20, "quiet": True}
        heads = attribute_heads(Attribute(out=Path(out) / "heads", **settings), model)
    return {
        "OCR scores": ("scores", found.scores["ocr"].mean.tolist()),
        "retrieval scores": ("scores", found.scores["retrieval"].mean.tolist()),
        "OCR scores, as the code has them": ("scores", code.scores["ocr"].mean.tolist()),
        "retrieval scores, as the code has them": ("scores", code.scores["retrieval"].mean.tolist()),
        "right answers by task and masked heads": ("scores", masking["value"].tolist()),
        "coefficients of heads": ("coefficients", heads.measured.coefficients.mean(0).tolist()),
        "held-out correlation": ("coefficients", [heads.findings["held-out Pearson"].value]),
    }


KINDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "plain run": plain_run,
    "edited runs": edited_runs,
    "studies": studies,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.repeats_shapes
@pytest.mark.usefixtures("sketches")
def test_numbers_stay(toy: str, kind: str) -> None:
    expected = json.loads(TABLE.read_text(encoding="utf-8"))
    assert weights_hash(asked(toy)[0]) == expected[toy]["weights"], "the bundled weights are others"
    found = KINDS[kind](toy)
    assert list(found) == list(expected[toy][kind]), "the table has other rows: write it anew"
    shifted = []
    for name, (unit, numbers) in found.items():
        before, now = (np.asarray(values, dtype=float) for values in (expected[toy][kind][name], numbers))
        assert before.shape == now.shape, name
        off = np.abs(now - before).max()
        if not off <= TOLERANCES[unit]:
            shifted.append(f"{name}: by {off:.3g}, tolerance {TOLERANCES[unit]:g}")
    assert not shifted, "numbers have shifted:\n" + "\n".join(shifted)


def write() -> None:
    table = {
        toy: {"weights": weights_hash(asked(toy)[0])}
        | {kind: {name: numbers for name, (_, numbers) in make(toy).items()} for kind, make in KINDS.items()}
        for toy in TOYS
    }
    text = json.dumps(_rounded(table), indent=1)
    flat = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)  # innermost lists on a line each
    TABLE.write_text(flat + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


if __name__ == "__main__":
    write()
