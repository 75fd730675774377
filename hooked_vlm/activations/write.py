"""Streaming the activations of a data set to disk: bounded memory, any number of interruptions, the same bytes.

Batches run under `no_grad`, as far as the last layer that is asked for. What a shard holds follows from its first
sample alone, so a stream that was interrupted begins again at the first shard that is missing. One process writes a
folder at a time.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.activations.index import Kind, Rows, TokenChoice, checked_choice, kind_of, rows_of_batch
from hooked_vlm.activations.read import Activations
from hooked_vlm.activations.samples import Sample
from hooked_vlm.activations.shards import (
    ActivationsError,
    Shard,
    claim,
    clear_leftovers,
    key_of,
    read_shard,
    shard_path,
    write_manifest,
    write_shard,
)
from hooked_vlm.experiments.common.provenance import provenance
from hooked_vlm.files import writable_folder
from hooked_vlm.hooks import HookError, HookPoint, is_hooked, is_quadratic
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.interventions.base import layer_of
from hooked_vlm.token_layout import InputError

_SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
NamesFilter = str | list[str] | tuple[str, ...] | Callable[[str], bool]
"""Hook names, names with wildcards ("blocks.*.hook_resid_post"), or a predicate."""


def stream_activations(
    model: Any,
    samples: Iterable[Sample],
    names_filter: NamesFilter,
    folder: str | Path,
    *,
    tokens: TokenChoice = "all",
    tokens_per_batch: int = 2048,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 2**26,
    min_overlap: float | int = 0.0,
    max_pixels: int | None = None,
    max_tiles: int | None = None,
    progress: bool = False,
) -> Activations:
    """Write chosen activations of every sample to `folder`, and open it.

    An interrupted call is repeated to go on; it ends with the same bytes as one that was not interrupted. More
    samples than before are added behind those that are there. At no time is more held than a batch, a shard, and one
    name's share of it.

    Args:
        samples: taken one by one, at most one ahead of the batch that runs; their order must not change.
        names_filter: of wildcards and predicates, what fires and has no [pos, pos] plane.
        tokens: which tokens of the language model to keep (`TokenChoice`). Of images all patches and image tokens
            are kept, if image-side names are asked for.
        tokens_per_batch: so many, with padding, run together at most; a longer sample runs alone. 1: every sample
            runs alone, which gives the numbers of `run_with_cache` bit for bit; in batches they differ by rounding.
        dtype: what is written; the model's own by default.
        shard_bytes: a shard is closed by the batch that brings it to so many bytes.
        min_overlap: a token or patch lies in a named box if more than this share of the box lies in it.
        max_pixels, max_tiles: bounds on pictures, as in `model.to_inputs`.
        progress: show a bar.

    Raises:
        HookError: names that match nothing or would not fire.
        InputError: a sample that cannot be used (it is named; what came before is kept), hooks left on the model, a
            folder with activations of other settings or samples.
        OutputError: the disk is full or cannot be written; call again when there is room.
        ActivationsError: the folder's `activations.json` is damaged.
    """
    if min(tokens_per_batch, shard_bytes) < 1:
        raise InputError(f"tokens_per_batch and shard_bytes must be at least 1, got {tokens_per_batch}, {shard_bytes}")
    if not 0 <= min_overlap < 1:
        raise InputError(f"min_overlap is a share of a box, at least 0 and less than 1, got {min_overlap}")
    if left := [name for name, point in model.hook_dict.items() if is_hooked(point)]:
        raise InputError(
            f"the model has a hook at {left[0]!r}, which may change activations: model.reset_hooks() first"
        )
    plan = _Plan(
        model,
        tuple(_names(model, names_filter)),
        tuple(checked_choice(tokens)),
        tokens_per_batch,
        model.cfg.dtype if dtype is None else dtype,
        shard_bytes,
        min_overlap,
        {"max_pixels": max_pixels, "max_tiles": max_tiles},
    )
    made, folder = plan.record(), writable_folder(Path(folder))
    claim(folder, made)
    clear_leftovers(folder)
    queue, start = _Queue(samples, plan), 0
    total = len(samples) if isinstance(samples, Sized) else None
    with tqdm(total=total, disable=not progress, desc="activations", unit="sample") as bar:
        while queue.next is not None:
            path = shard_path(folder, key_of(made), start)
            shard = _kept(path, queue) or _make(path, key_of(made), start, queue, plan)
            start += shard.n_samples
            bar.update(shard.n_samples)
    if shard_path(folder, key_of(made), start).with_suffix(".parquet").exists():
        raise InputError(f"{folder} holds more than the {start} samples that came: choose another folder")
    write_manifest(folder, made, Activations(folder).summary())
    return Activations(folder)


def _kept(path: Path, queue: "_Queue") -> Shard | None:
    """A shard that is there whole; its samples are passed over."""
    try:
        shard = read_shard(path)
    except (FileNotFoundError, ActivationsError):
        return None
    passed = [turn for turn in (queue.take() for _ in range(shard.n_samples)) if turn is not None]
    if _digest(passed) != shard.samples:
        raise InputError(
            f"the samples from number {shard.start} on are not those that {shard.index} was made of: choose another folder"
        )
    return shard


def _make(path: Path, key: str, start: int, queue: "_Queue", plan: "_Plan") -> Shard:
    """A shard of the next samples."""
    pieces: dict[str, list[Tensor]] = defaultdict(list)
    tables: list[pa.Table] = []
    done: list[str] = []
    rows: dict[str, int] = dict.fromkeys(plan.kinds, 0)
    n_bytes = 0
    while n_bytes < plan.shard_bytes and (batch := queue.take_batch()):
        kept, activations = plan.run(batch)
        for name, tensor in activations.items():
            pieces[name].append(tensor)
            n_bytes += tensor.nbytes
        for kind, own in kept.items():
            rows[kind] += len(own.table)
        tables += [own.table for own in kept.values()]
        done += [turn.digest for turn in batch]
    shard = Shard(path, key, start, len(done), _together(done), rows)
    write_shard(shard, pieces, tables)
    return shard


def _digest(turns: "list[_Turn]") -> str:
    return _together([turn.digest for turn in turns])


def _together(digests: list[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class _Turn:
    """A sample whose turn has come."""

    sample: Sample
    plan: "_Plan"

    @cached_property
    def inputs(self) -> VLMInputs:
        return self.sample.inputs(self.plan.model, **self.plan.bounds)

    @cached_property
    def digest(self) -> str:
        return self.sample.digest()


class _Queue:
    """The samples that are yet to come, of which only the next is known."""

    def __init__(self, samples: Iterable[Sample], plan: "_Plan") -> None:
        self._samples, self._plan = iter(samples), plan
        self.next = self._following()

    def _following(self) -> _Turn | None:
        sample = next(self._samples, None)
        return None if sample is None else _Turn(sample, self._plan)

    def take(self) -> _Turn | None:
        taken, self.next = self.next, None if self.next is None else self._following()
        return taken

    def take_batch(self) -> list[_Turn]:
        """As many samples as may run together."""
        batch: list[_Turn] = []
        longest = 0
        while self.next is not None:
            longest = max(longest, self.next.inputs.shape[1])
            if batch and (len(batch) + 1) * longest > self._plan.tokens_per_batch:
                break
            batch += [turn for turn in [self.take()] if turn is not None]
        return batch


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is done with every batch."""

    model: Any
    names: tuple[str, ...]
    choice: tuple[str | int, ...]
    tokens_per_batch: int
    dtype: torch.dtype
    shard_bytes: int
    min_overlap: float | int
    bounds: dict[str, int | None]

    def record(self) -> dict[str, Any]:
        """Everything that decides the activations but the samples, for `activations.json`."""
        cfg = self.model.cfg
        return {
            **provenance(self.model),
            "names": {name: kind_of(name, cfg) for name in self.names},
            "tokens": list(self.choice),
            "tokens_per_batch": self.tokens_per_batch,
            "written as": str(self.dtype).removeprefix("torch."),
            "shard_bytes": self.shard_bytes,
            "min_overlap": self.min_overlap,
            **self.bounds,
            **{flag: getattr(cfg, flag) for flag in _SWITCHES},
        }

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        present = {kind_of(name, self.model.cfg) for name in self.names}
        return tuple(sorted(present))

    @torch.no_grad()
    def run(self, batch: list[_Turn]) -> tuple[dict[Kind, Rows], dict[str, Tensor]]:
        """The rows of a batch, and their activations by name."""
        inputs = VLMInputs.concat([turn.inputs for turn in batch])
        samples = [turn.sample for turn in batch]
        kept = rows_of_batch(inputs, samples, self.kinds, self.choice, self.min_overlap, self.model.cfg, self._text_of)
        store: dict[str, Tensor] = {}

        def keep(tensor: Tensor, hook: HookPoint, rows: Rows) -> None:
            store[str(hook.name)] = rows.take(str(hook.name), tensor).to("cpu", self.dtype)

        of_name = {name: kept[kind_of(name, self.model.cfg)] for name in self.names}
        hooks = [(name, partial(keep, rows=rows)) for name, rows in of_name.items() if len(rows.table)]
        if hooks:
            with self.model.hooks(hooks):
                self.model(inputs, return_type=None, stop_at_layer=self._stop_at_layer([name for name, _ in hooks]))
        return kept, store

    def _stop_at_layer(self, names: list[str]) -> int | None:
        """The layer behind the last that is asked for; None: all, and the final norm."""
        n = self.model.cfg.n_layers
        last = max(layer_of(name, n) for name in names)
        return None if last == n else max(last + 1, 0)

    @cached_property
    def _text_of(self) -> Callable[[int], str]:
        return lru_cache(maxsize=None)(lambda token: str(self.model.to_string([token])))


def _names(model: Any, names_filter: NamesFilter) -> list[str]:
    """The hook points that are meant, in the order of the model's.

    Raises:
        HookError: nothing is meant, a name is unknown or switched off, or its tensor has a [pos, pos] plane.
    """
    asked = list(names_filter) if isinstance(names_filter, list | tuple) else [names_filter]
    if not asked:
        raise HookError("no hook points are asked for")
    wanted: set[str] = set()
    for name in asked:
        if isinstance(name, str) and not set(name) & set("*?["):
            model.check_hook_name(name)
            if is_quadratic(name):
                raise HookError(
                    f"{name!r} has a [pos, pos] plane and no rows of one width: keep q and k, or run_with_cache"
                )
            wanted.add(name)
            continue
        matches = name if not isinstance(name, str) else partial(_matches, name)
        found = [n for n in model.hook_dict if matches(n) and not is_quadratic(n) and _can_fire(model, n)]
        if not found:
            raise HookError(f"{name if isinstance(name, str) else 'this filter'!r} matches no hook point that fires")
        wanted.update(found)
    return [name for name in model.hook_dict if name in wanted]


def _can_fire(model: Any, name: str) -> bool:
    try:
        model.check_hook_name(name)
    except HookError:
        return False
    return True


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern)
