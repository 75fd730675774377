"""`hooked-vlm cache`: activations of a data set, written to a folder. Repeat an interrupted command to go on."""

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from hooked_vlm.activations.join import join_activations
from hooked_vlm.activations.read import Activations
from hooked_vlm.activations.write import stream_activations
from hooked_vlm.commands.config import CacheConfig
from hooked_vlm.data.sources import Samples
from hooked_vlm.errors import InputError
from hooked_vlm.experiments.common.workers import workers_of
from hooked_vlm.loading.settings import as_dtype
from hooked_vlm.model.by_name import load
from hooked_vlm.runtime.files import writable_folder
from hooked_vlm.runtime.progress import recorded
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import Task

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

SAMPLES_PER_TASK = 256
"""Samples that a worker on Ray streams at a time."""


def answer(config: CacheConfig) -> tuple[str, dict[str, Any]]:
    """Write the activations; what `hooked-vlm cache` prints, and the same as data."""
    return told(written(config))


def told(found: Activations) -> tuple[str, dict[str, Any]]:
    """A folder of activations as text and as data."""
    counts = {"samples": found.n_samples, "skipped": len(found.skipped), "rows": found.n_rows}
    return summary(found), {"folder": str(found.folder), **counts}


def written(config: CacheConfig) -> Activations:
    """Write the activations.

    Raises:
        InputError, HookError, CheckpointError, OutputError, ActivationsError, WorkerError: what a user can mend.
    """
    config.check_workers()
    if config.shard_megabytes < 1:
        raise InputError(f"--shard-megabytes must be at least 1, got {config.shard_megabytes}")
    samples = config.samples()
    writable_folder(config.out)
    model = load(config.model, config.device, config.dtype)
    return streamed(model, samples, config) if config.ray is None else _on_ray(model, samples, config)


def streamed(model: "HookedVLM", samples: Samples, config: CacheConfig) -> Activations:
    """Write the activations of some samples to `config.out`, in this process."""
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
        on_error=config.on_error,
        progress=not config.quiet,
    )


def _on_ray(model: "HookedVLM", samples: Samples, config: CacheConfig) -> Activations:
    """Let each worker stream some of the samples into a folder of its own, and join them.

    A stream that is there already is repeated, too: it takes no forward pass, and refuses other settings and samples.
    """
    parts = config.out / ".parts"
    done = ResultStore(parts / "done")
    shutil.rmtree(done.folder, ignore_errors=True)
    n = -(-len(samples) // SAMPLES_PER_TASK)
    own = [replace(config, out=(parts / str(i)).resolve(), quiet=True) for i in range(n)]
    tasks = [Task(done, {"part": i}, part, (samples.shard(i, n), config)) for i, config in enumerate(own)]
    with recorded(config.out), workers_of(config, model, config.device) as workers:
        workers.tables(tasks, "activations", each=f"{SAMPLES_PER_TASK} samples", quiet=config.quiet)
    found = join_activations([config.out for config in own], config.out, progress=not config.quiet)
    shutil.rmtree(parts)
    return found


def part(model: "HookedVLM", samples: Samples, config: CacheConfig) -> pd.DataFrame:
    """Stream some of the samples: the work of one task."""
    return pd.DataFrame({"samples": [streamed(model, samples, config).n_samples]})


def summary(activations: Activations) -> str:
    """Summarize a folder of activations in a few lines."""
    counts = ", ".join(f"{n:,} rows of {kind.replace('_', ' ')}" for kind, n in activations.n_rows.items() if n)
    size = sum(path.stat().st_size for shard in activations.shards for path in (shard.data, shard.index))
    return (
        f"{activations.n_samples:,} samples, {len(activations.names)} hook points, {counts or 'no rows'}, "
        f"{size / 1e6:,.1f} MB\nactivations: {activations.folder}"
    )
