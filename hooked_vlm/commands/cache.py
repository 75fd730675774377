"""`hooked-vlm cache`: activations of a data set, written to a folder. Repeat an interrupted command to go on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Suppress

from hooked_vlm.activations.read import Activations
from hooked_vlm.activations.samples import read_samples
from hooked_vlm.activations.write import stream_activations
from hooked_vlm.loading.settings import as_dtype
from hooked_vlm.model.by_name import load
from hooked_vlm.runtime.files import writable_folder


@dataclass(frozen=True)
class CacheConfig:
    """A data set, and what to keep of it."""

    data: Path
    """JSON lines (id, prompt, images, boxes, answer), or a folder of pictures (then --prompt)."""
    names: tuple[str, ...]
    """Hook points, wildcards allowed: --names 'blocks.*.hook_resid_post' hook_image_features"""
    out: Path
    """The folder; the same command goes on where it stopped."""
    model: str = "toy-qwen2-vl"
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-2B-Instruct."""
    prompt: str | None = None
    """Asked about every picture of a folder, and where a line has no prompt."""
    tokens: tuple[str, ...] = ("all",)
    """Tokens of the language model to keep: all, text, image, question, role, generated, final, evidence, or
    positions in the sample (--tokens=-1 is its last)."""
    tokens_per_batch: int = 2048
    """So many tokens run together at most."""
    shard_megabytes: int = 64
    """Size of a file; memory grows with it."""
    min_overlap: float = 0.0
    """A token lies in a box if more than this share of the box lies in it."""
    max_pixels: int | None = None
    """Bound on the area of a resized picture (Qwen2-VL); the checkpoint's by default."""
    max_tiles: int | None = None
    """How many tiles a picture is cut into at most (InternVL); the checkpoint's by default."""
    keep_as: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What is written; the model's own by default."""
    device: str | None = None
    """CUDA if present by default; "auto" spreads the model over what there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The checkpoint's own by default."""
    quiet: Suppress[bool] = False
    """No progress bar."""


def cache(config: CacheConfig) -> Activations:
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
    """What there is, in a few lines."""
    counts = ", ".join(f"{n:,} rows of {kind.replace('_', ' ')}" for kind, n in activations.n_rows.items() if n)
    size = sum(path.stat().st_size for shard in activations.shards for path in (shard.data, shard.index))
    return (
        f"{activations.n_samples:,} samples, {len(activations.names)} hook points, {counts or 'no rows'}, "
        f"{size / 1e6:,.1f} MB\nactivations: {activations.folder}"
    )
