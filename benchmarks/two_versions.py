"""Time of passes in this version of the library beside another one: two processes that take turns.

python benchmarks/two_versions.py OTHER_CHECKOUT [--rounds 30] [--device cuda] [--dtype bfloat16]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
TIMES = {"28 layers of width 64": 5, "2 layers of width 2048": 1}
"""Passes that are timed together, by model."""


def models(device: str, dtype: torch.dtype) -> dict[str, Any]:
    from models import deep_model, few_wide_layers

    return dict(zip(TIMES, (deep_model(device, dtype), few_wide_layers(device, dtype)), strict=True))


@torch.no_grad()
def ways(device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Passes over a prompt, over prompts of several lengths, and steps of generation, of each model."""
    from models import batch_of

    from hooked_vlm import HookedVLM

    found: dict[str, Callable[[], object]] = {}
    for name, hf in models(device, dtype).items():
        model = HookedVLM.from_hf(hf)
        for title, grids in {"one prompt": [(16, 16)], "prompts of 3 lengths": [(8, 8), (16, 16), (12, 8)]}.items():
            inputs = model.inputs_from_hf(batch_of(grids, device))
            found[f"{name}: {title}"] = partial(_several, partial(model, inputs), TIMES[name])
        past = model.new_kv_cache(1, 512)
        model(model.inputs_from_hf(batch_of([(8, 8)], device)), past_kv_cache=past)
        token = torch.tensor([5], device=device)
        found[f"{name}: a step"] = partial(_several, partial(_step, model, token, past, past.length), 5 * TIMES[name])
    return found


def _step(model: Any, token: torch.Tensor, past: Any, length: int) -> None:
    model.next_logits(token, past)
    past.length = length


def _several(work: Callable[[], object], n: int) -> None:
    for _ in range(n):
        work()


@torch.no_grad()
def serve(device: str, dtype: torch.dtype) -> None:
    """Time what is named on each line of the standard input; an empty line asks for the names."""
    known = ways(device, dtype)
    for line in sys.stdin:
        name = line.strip()
        if not name:
            print("\t".join(known), flush=True)
            continue
        start = time.perf_counter()
        known[name]()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        print(time.perf_counter() - start, flush=True)


def ask(server: subprocess.Popen[str], line: str) -> str:
    to, back = server.stdin, server.stdout
    assert to is not None and back is not None
    to.write(line + "\n")
    to.flush()
    return back.readline().rstrip("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.serve:
        serve(settings.device, getattr(torch, settings.dtype))
        return
    call = [sys.executable, __file__, *sys.argv[1:], "--serve"]
    servers = []
    for checkout in (settings.other, HERE.parent):
        paths = {"PYTHONPATH": f"{checkout.resolve()}{os.pathsep}{HERE}"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        servers.append(subprocess.Popen(call, env={**os.environ, **paths}, **pipes))
    for name in ask(servers[0], "").split("\t"):
        times = [[float(ask(server, name)) for server in servers] for _ in range(settings.rounds + 3)][3:]
        ratios = sorted(ours / other for other, ours in times)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        median = statistics.median(ratios)
        before = 1000 * statistics.median(other for other, _ in times)
        print(
            f"  {name:45s} {before:8.1f} ms before, {median:.3f} times that now ({low:.3f} to {high:.3f})", flush=True
        )
    for server in servers:
        server.communicate()


if __name__ == "__main__":
    main()
