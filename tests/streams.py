"""Streams of activations for tests. As a script, one that a test can kill:

python tests/streams.py FAMILY FOLDER N_SAMPLES
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hooked_vlm import HookedVLM
from hooked_vlm.activations import Activations, NamedBox, Sample, stream_activations
from hooked_vlm.toys.pages import make_page

NAMES = ["blocks.*.hook_resid_post", "blocks.1.attn.hook_z", "vision.blocks.0.hook_mlp_out", "hook_image_features"]


def samples(n: int, seed: int = 0) -> Iterator[Sample]:
    """Questions about pages: rows of many lengths, some with an answer, every third with two pictures of different
    sizes (the second is several tiles), every fifth with none."""
    rng = np.random.default_rng(seed)
    for number in range(n):
        page = make_page(rng, n_lines=int(rng.integers(2, 5)))
        images: list[Any] = [page.image]
        if number % 3 == 0:
            images.append(page.image.resize((260, 130)))
        if number % 5 == 2:
            images = []
        line = page.lines[1]
        boxes = [NamedBox("key", line.key_boxes[0]), NamedBox("value", line.value_box)] if images else []
        if len(images) == 2:
            boxes.append(NamedBox("value", (200.0, 20.0, 240.0, 40.0), image=1))
        answer = line.value if number % 2 else None
        yield Sample(f"page {number}", page.question(1), images, boxes, answer)


def stream(model: Any, folder: Path, n: int = 4, **settings: Any) -> Activations:
    """Several shards of small batches."""
    chosen = {"names_filter": NAMES, "tokens_per_batch": 700, "shard_bytes": 2**20, **settings}
    return stream_activations(model, samples(n), folder=folder, **chosen)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the times of its progress, hidden ones included."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "progress.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


if __name__ == "__main__":
    family, out, n_samples = sys.argv[1:]
    stream(HookedVLM.from_pretrained(family, device="cpu"), Path(out), int(n_samples))
