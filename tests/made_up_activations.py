"""Folders of activations made of given numbers, without a model."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.activations import Activations
from hooked_vlm.activations.index import SCHEMA
from hooked_vlm.activations.shards import Shard, claim, key_of, shard_path, write_manifest, write_shard

HOOK = "blocks.1.hook_resid_post"


def planted(
    n: int, d: int, active: int, seed: int = 0, n_directions: int | None = None
) -> tuple[Float[Tensor, "row d"], Float[Tensor, "feature d"]]:
    """Rows that are a mean plus few of some orthonormal directions, each with a weight between 1 and 2; and those."""
    drawn = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn((d, d), generator=drawn))[0][: n_directions or d]
    chosen = torch.rand((n, len(directions)), generator=drawn).topk(active, dim=1).indices
    weights = torch.zeros((n, len(directions))).scatter(1, chosen, 1 + torch.rand((n, active), generator=drawn))
    return 3 * weights @ directions + torch.randn(d, generator=drawn), directions


def write_activations(
    folder: Path, rows: Float[Tensor, "row d"], per_sample: int = 10, per_shard: int = 20, finished: bool = True
) -> Activations:
    """Samples of `per_sample` rows, image and text in turn, in shards of `per_shard` samples."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"model": "made up", "names": {HOOK: {"rows": "tokens", "shape": [rows.shape[1]]}}, "written_as": "float32"}
    claim(folder, made)
    pieces = rows.split(per_sample * per_shard)
    for number, own in enumerate(pieces):
        start, n = number * per_shard, -(-len(own) // per_sample)
        at = np.arange(len(own))
        columns = {
            "kind": ["tokens"] * len(own),
            "sample": [f"sample {start + i}" for i in at // per_sample],
            "position": at % per_sample,
            "group": np.where(at % 2, "question", "image"),
        }
        arrays = {name: pa.array(values, SCHEMA.field(name).type) for name, values in columns.items()}
        missing = {field.name: pa.nulls(len(own), field.type) for field in SCHEMA if field.name not in arrays}
        shard = Shard(
            shard_path(folder, key_of(made), start), key_of(made), start, n, str(number), {"tokens": len(own)}
        )
        write_shard(shard, {HOOK: [own]}, [pa.Table.from_pydict({**arrays, **missing}, schema=SCHEMA)])
    if finished:
        write_manifest(folder, made, {"samples": -(-len(rows) // per_sample)})
    return Activations(folder)
