"""Variance of coefficients by design of the masks, at equal numbers of masks, on pictures of a toy model.

python benchmarks/mask_designs.py [--pictures 10] [--repeats 8] [--masks 160]
"""

import argparse
import json

import numpy as np
import pandas as pd
from interleaved import RESULTS

from hooked_vlm import HookedVLM
from hooked_vlm.experiments.head_attribution.ablation import Probe, metric_of
from hooked_vlm.experiments.head_attribution.masks import PAIRED, draw_masks
from hooked_vlm.experiments.head_attribution.regression import solved, sums_of
from hooked_vlm.experiments.head_attribution.tasks import Case, to_inputs, toy_items
from hooked_vlm.toys.pages import NAMING_PROMPT


def probes(model: HookedVLM, n: int) -> list[Probe]:
    found = []
    for item in toy_items(n, 0, NAMING_PROMPT):
        inputs = to_inputs(model, item)
        inputs = inputs.with_image_features(model.encode_images(inputs).detach())
        case = Case(item, inputs, int(model.to_tokens(item.name)[0, 0]), None)
        found.append(Probe(model, case, metric_of(case, "logit")))
    return found


def coefficients(probe: Probe, design: str, masks: int, repeat: int) -> np.ndarray:
    kept = draw_masks(design, masks, 0, len(probe.heads), 0.5, [repeat, 40])  # pyright: ignore[reportArgumentType]
    values = probe.over_heads(kept)
    return solved(sums_of(kept.astype(float), values, [0, masks])[masks], 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for name, default in (("pictures", 10), ("repeats", 8), ("masks", 160)):
        parser.add_argument(f"--{name}", type=int, default=default)
    settings = parser.parse_args()
    found = {}
    for toy in ("toy-qwen2-vl", "toy-internvl2"):
        own = probes(HookedVLM.from_pretrained(toy, device="cpu"), settings.pictures)
        variances = {
            design: np.array(
                [
                    np.var(
                        [coefficients(p, design, settings.masks, r) for r in range(settings.repeats)], 0, ddof=1
                    ).mean()
                    for p in own
                ]
            )
            for design in PAIRED
        }
        rng = np.random.default_rng(0)
        rows = {}
        for design, each in variances.items():
            drawn = [
                each[i].sum() / variances["random"][i].sum() for i in rng.integers(len(own), size=(2000, len(own)))
            ]
            low, high = np.percentile(drawn, [2.5, 97.5])
            rows[design] = {
                "variance": each.mean(),
                "ratio": each.sum() / variances["random"].sum(),
                "low": low,
                "high": high,
            }
        print(toy, f"{settings.masks} masks, {settings.repeats} repeats on {settings.pictures} pictures")
        print(pd.DataFrame(rows).T.round(3).to_string())
        found[toy] = rows
    (RESULTS / "mask-designs.json").write_text(json.dumps(vars(settings) | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
