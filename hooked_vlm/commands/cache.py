"""`hooked-vlm cache`: activations of a data set, written to a folder. Repeat an interrupted command to go on."""

from typing import Any

from hooked_vlm.activations.read import Activations
from hooked_vlm.activations.write import stream_activations
from hooked_vlm.commands.config import CacheConfig
from hooked_vlm.data.sources import read_samples
from hooked_vlm.loading.settings import as_dtype
from hooked_vlm.model.by_name import load
from hooked_vlm.runtime.files import writable_folder


def answer(config: CacheConfig) -> tuple[str, dict[str, Any]]:
    """Write the activations; what `hooked-vlm cache` prints, and the same as data."""
    found = written(config)
    return summary(found), {"folder": str(found.folder), "samples": found.n_samples, "rows": found.n_rows}


def written(config: CacheConfig) -> Activations:
    """Write the activations.

    Raises:
        InputError, HookError, CheckpointError, OutputError, ActivationsError: what a user can mend.
    """
    samples = read_samples(config.data, config.prompt)
    writable_folder(config.out)
    model = load(config.model, config.device, config.dtype)
    return stream_activations(
        model,
        samples,
        config.names,
        config.out,
        tokens=[int(part) if part.lstrip("-").isdigit() else part for part in config.tokens],
        tokens_per_batch=config.tokens_per_batch,
        dtype=as_dtype(config.keep_as),
        shard_bytes=config.shard_megabytes * 2**20,
        min_overlap=config.min_overlap,
        max_pixels=config.max_pixels,
        max_tiles=config.max_tiles,
        progress=not config.quiet,
    )


def summary(activations: Activations) -> str:
    """Summarize a folder of activations in a few lines."""
    counts = ", ".join(f"{n:,} rows of {kind.replace('_', ' ')}" for kind, n in activations.n_rows.items() if n)
    size = sum(path.stat().st_size for shard in activations.shards for path in (shard.data, shard.index))
    return (
        f"{activations.n_samples:,} samples, {len(activations.names)} hook points, {counts or 'no rows'}, "
        f"{size / 1e6:,.1f} MB\nactivations: {activations.folder}"
    )
