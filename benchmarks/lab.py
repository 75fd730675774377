"""A lab's week in small: memory of a sweep over many pictures, how soon a repeated call works, shards side by side.

python benchmarks/lab.py [--device cuda] [--dtype bfloat16]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from interleaved import Settings, read_settings, save
from models import batch_of, one_gigabyte, tiny_model
from PIL import Image

from hooked_vlm import HookedVLM, SweepCase, sweep_many
from hooked_vlm.data import Sample
from hooked_vlm.interventions import CustomHooks, ZeroHeads
from hooked_vlm.metrics import logit
from hooked_vlm.sweeps import sweep_each

TOY = "toy-qwen2-vl"
PICTURES, EARLY = 10_000, 1_000
SHARDS, SHARDED = 8, 160


def pictures(n: int) -> Iterator[SweepCase]:
    """Pictures of noise, made when their turn comes, each with one intervention."""
    for number in range(n):
        noise = np.random.default_rng(number).integers(0, 256, (56, 56, 3), dtype=np.uint8)
        sample = Sample(str(number), "What is this?", (Image.fromarray(noise),))
        yield SweepCase(sample.id, sample, (ZeroHeads(((2, 1),)),), logit(5))


def memory(settings: Settings, folder: Path) -> dict[str, Any]:
    """Memory of this process behind the first pictures and behind all, while they are swept over and read back.

    The model is tiny, so that ten thousand pictures take minutes; their pixels are a megabyte each.
    """
    model = HookedVLM.from_hf(tiny_model(settings.device, settings.torch_dtype))
    first = model.inputs_from_hf(batch_of([(16, 16)], settings.device))
    process, at = psutil.Process(), {}

    def watched() -> Iterator[SweepCase]:
        for number in range(PICTURES):
            if number in (EARLY, PICTURES - 1):
                at[number] = process.memory_info().rss
            assert first.pixel_values is not None
            inputs = replace(first, pixel_values=first.pixel_values + number)
            yield SweepCase(str(number), inputs, (ZeroHeads(((1, 1),)),), logit(5))

    start = time.perf_counter()
    rows = sum(len(table) for table in sweep_each(model, watched(), folder))
    seconds = time.perf_counter() - start
    early, late = at.values()
    return {
        "pictures": PICTURES,
        "rows": rows,
        "bytes grown from the first thousand": late - early,
        "bytes at the end, results read": process.memory_info().rss - early,
        "pictures a second": PICTURES / seconds,
    }


def second_call(settings: Settings, folder: Path) -> dict[str, Any]:
    """Seconds from a call of `sweep_many` to its first block, for weights of about a gigabyte."""
    model = HookedVLM.from_hf(one_gigabyte(settings.device, settings.torch_dtype))
    n_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    begun = 0.0
    waited: list[float] = []

    def first_block(x: Any, hook: Any) -> None:
        waited.append(time.perf_counter() - begun)

    inputs = model.as_inputs(torch.tensor([[5, 6, 7]]))
    for number in range(2):
        hooks = CustomHooks([("blocks.0.hook_resid_pre", first_block)], label="clock", version=number)
        waited.clear()
        begun = time.perf_counter()
        sweep_many(model, [SweepCase("a", inputs, [hooks], logit(5))], folder)
    return {"bytes of weights": n_bytes, "seconds to the first block of a second call": waited[0]}


def shards(folder: Path) -> dict[str, Any]:
    """Pictures a second of eight shards at once, against one process over all of them, with and without start-up."""
    lines = []
    for number, case in enumerate(pictures(SHARDED)):
        sample: Any = case.inputs
        sample.images[0].save(folder / f"{number}.png")
        lines.append(json.dumps({"id": sample.id, "prompt": sample.prompt, "images": [f"{number}.png"]}))
    (folder / "pages.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "hooked_vlm.cli", "sweep", "--data", str(folder / "pages.jsonl"), "--quiet"]
    one = ["--shard", "0/1", "--out", str(folder / "one")]
    eight = [["--shard", f"{i}/{SHARDS}", "--out", str(folder / str(i))] for i in range(SHARDS)]
    alone = _seconds([[*command, *one]], {})
    together = _seconds([[*command, *own] for own in eight], {"OMP_NUM_THREADS": "1"})
    return {
        "cores": os.cpu_count(),
        "pictures a second, one process": SHARDED / alone,
        f"pictures a second, {SHARDS} shards": SHARDED / together,
        "without start-up, one process": _rate([folder / "one"]),
        f"without start-up, {SHARDS} shards": _rate([folder / str(i) for i in range(SHARDS)]),
    }


def _rate(runs: list[Path]) -> float:
    """Pictures a second of runs at once, from what each tells of its progress."""
    last = [(run / "progress.jsonl").read_text(encoding="utf-8").splitlines()[-1] for run in runs]
    return sum(json.loads(line)["per_second"] for line in last)


def _seconds(commands: list[list[str]], environment: dict[str, str]) -> float:
    start = time.perf_counter()
    running = [
        subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL) for command in commands
    ]
    if any(process.wait() for process in running):
        raise SystemExit("a shard failed")
    return time.perf_counter() - start


def main() -> None:
    settings = read_settings(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("many", "again", "shards")]
        for place in places:
            place.mkdir()
        found = {
            "second call": second_call(settings, places[1]),
            "shards": shards(places[2]),
            "many pictures": memory(settings, places[0]),
        }
    for name, numbers in found.items():
        print(f"{name}: {', '.join(f'{what} {value:,.4g}' for what, value in numbers.items())}", flush=True)
    save(replace(settings, model=TOY), "lab", found)


if __name__ == "__main__":
    main()
