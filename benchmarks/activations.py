"""A gigabyte of activations streamed to disk and read back: rates, and peak memory beyond the loaded model.

The model is small, so that writing is most of the work, and every residual, norm, query and MLP of it is kept.

python benchmarks/activations.py [--device cuda] [--dtype bfloat16]
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import PeakMemory, read_settings, save

from hooked_vlm import HookedVLM
from hooked_vlm.activations import Activations, NamedBox, Sample, stream_activations
from hooked_vlm.toys import make_page

MODEL = "toy-qwen2-vl"
BYTES = 10**9


def pages(n_bytes: int, per_sample: int) -> Iterator[Sample]:
    """Pages drawn when their turn comes, until their activations are `n_bytes`."""
    rng = np.random.default_rng(0)
    for number in range(-(-n_bytes // per_sample)):
        page = make_page(rng, n_lines=4)
        yield Sample(str(number), page.question(2), [page.image], [NamedBox("value", page.lines[2].value_box)])


def measure(folder: Path, device: str, dtype: Any, n_bytes: int) -> dict[str, float]:
    """Bytes, seconds and peak memory of writing `n_bytes`, and seconds of reading a quarter of the rows at random."""
    model = HookedVLM.from_pretrained(MODEL, device=device, dtype=dtype)
    names = "blocks.*"
    first = stream_activations(model, pages(1, 1), names, folder / "one")
    per_sample = sum(path.stat().st_size for path in first.folder.glob("shards/*.safetensors"))
    # on an accelerator too, it is the host's memory that a data set could fill
    with PeakMemory("cpu") as peak:
        start = time.perf_counter()
        # a hundredth more: a file of one sample is headers in larger part
        acts = stream_activations(model, pages(n_bytes * 101 // 100, per_sample), names, folder / "all")
        writing = time.perf_counter() - start
    rows = np.random.default_rng(0).permutation(len(acts["blocks.2.hook_resid_post"]))
    start = time.perf_counter()
    for at in range(0, len(rows) // 4, 1024):
        acts["blocks.2.hook_resid_post"][rows[at : at + 1024]]
    return {
        "bytes": sum(path.stat().st_size for path in Activations(folder / "all").folder.rglob("*.*")),
        "seconds": writing,
        "extra_bytes": peak.extra_bytes,
        "rows": len(rows),
        "rows_read_a_second": len(rows) // 4 / (time.perf_counter() - start),
    }


def main() -> None:
    settings = read_settings(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), settings.device, settings.torch_dtype, BYTES)
    print(
        f"{found['bytes'] / 1e6:.0f} MB in {found['seconds']:.1f} s, {found['extra_bytes'] / 1e6:.0f} MB beyond the "
        f"model; {found['rows_read_a_second']:,.0f} random rows a second read back",
        flush=True,
    )
    save(replace(settings, model=MODEL), "activations", {"activations streamed": found})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:  # for the test: folder, bytes
        print(json.dumps(measure(Path(sys.argv[2]), "cpu", None, int(sys.argv[3]))))
    else:
        main()
