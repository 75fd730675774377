"""Draws what the benchmarks wrote: docs/pictures/benchmarks.png.

python benchmarks/figure.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from interleaved import RESULTS

KIND = "cpu-float32-middle"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "benchmarks.png"


def tables(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}-{KIND}.json").read_text())["tables"]


def main() -> None:
    figure, (speed, sweeps, memory) = plt.subplots(1, 3, figsize=(15, 3.6), width_ratios=(1.2, 1, 0.8))
    forward, scoring = tables("forward"), tables("scoring")
    one, mixed, generated = forward.values()
    bars = {
        "forward, one image": one["hooked_vlm"]["ratio"],
        "forward, last logits": one["hooked_vlm, logits_at='last'"]["ratio"],
        "run_with_cache, one image": one["hooked_vlm, run_with_cache"]["ratio"],
        "forward, 8 images of mixed sizes": mixed["hooked_vlm"]["ratio"],
        "generation, a hook on every z": generated["hooked_vlm, a hook on every hook_z"]["ratio"],
        "OCR scoring, answer as expected": scoring["one page"]["hooked_vlm, the answer as expected"]["ratio"],
    }
    draw_bars(speed, bars, "time / transformers' time", mark=1.0)
    found = {title.replace("image-to-text ", ""): table["forwards"] for title, table in tables("sweeps").items()}
    draw_bars(sweeps, {wrapped(title): value for title, value in found.items()}, "time in plain forwards")
    sweeps.set_xscale("log")
    grown = tables("memory")
    tokens = [int(title.split()[0].replace(",", "")) for title in grown]
    extra = [table["residual hooks"]["extra_bytes"] / 2**20 for table in grown.values()]
    memory.plot(tokens, extra, marker="o", color="#0072b2")
    memory.set(xlabel="tokens", ylabel="MiB beyond the model", xlim=(0, None), ylim=(0, None))
    memory.set_title("a forward with residual hooks", fontsize=9)
    for axes in (speed, sweeps, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)
    print(f"drawn to {PICTURE}")


def draw_bars(axes: Any, values: dict[str, float], label: str, mark: float | None = None) -> None:
    names = list(values)[::-1]
    drawn = axes.barh(names, [values[name] for name in names], color="#56b4e9")
    axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=2)
    axes.set_xlabel(label, fontsize=9)
    if mark is not None:
        axes.axvline(mark, color="#555555", linewidth=1, linestyle="--")


def wrapped(title: str) -> str:
    first, _, rest = title.partition(", ")
    return f"{first},\n{rest}" if rest else title


if __name__ == "__main__":
    main()
