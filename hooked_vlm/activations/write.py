"""Streaming the activations of a data set to disk: bounded memory, any number of interruptions, the same bytes.

Batches run under `no_grad`, as far as the last layer that is asked for. What a shard holds follows from its first
sample alone, so a stream that was interrupted begins again at the first shard that is missing. One process writes a
folder at a time.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.activations.index import Indexer, TokenChoice, checked_choice, take_rows
from hooked_vlm.activations.names import Kind, NamesFilter, kind_of, resolve_names, row_shapes
from hooked_vlm.activations.read import Activations
from hooked_vlm.activations.shards import (
    Shard,
    claim,
    clear_leftovers,
    key_of,
    read_shard,
    shard_path,
    write_manifest,
    write_shard,
)
from hooked_vlm.data.samples import Sample
from hooked_vlm.data.skipped import report_skipped
from hooked_vlm.data.sources import Samples
from hooked_vlm.errors import ActivationsError, InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import layer_of
from hooked_vlm.model.fingerprints import provenance
from hooked_vlm.nn.hooks import HookPoint, hooked_module
from hooked_vlm.runtime.files import writable_folder
from hooked_vlm.runtime.progress import Progress, recorded
from hooked_vlm.runtime.tasks import SKIPPED

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

_SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")


def stream_activations(
    model: "HookedVLM",
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
    on_error: Literal["stop", "skip"] = "stop",
    progress: bool = False,
) -> Activations:
    """Write chosen activations of every sample to `folder`, and open it.

    An interrupted call is repeated to go on; it ends with the same bytes as one that was not interrupted. More
    samples than before are added behind those that are there. At no time is more held than a shard (`shard_bytes`),
    one name's share of it again, and what the forward pass itself needs.

    Args:
        samples: taken one by one, at most one ahead of the batch that runs; their order must not change.
        names_filter: of wildcards and predicates, what fires and has no [pos, pos] plane.
        tokens: which tokens of the language model to keep (`TokenChoice`). Of images all patches and image tokens
            are kept, if image-side names are asked for.
        tokens_per_batch: largest number of tokens, padding included, in a batch; a longer sample runs alone. 1: every
            sample runs alone, with the numbers of `run_with_cache` bit for bit; batches differ by rounding.
        dtype: what is written; the model's own by default.
        shard_bytes: largest size of a shard in bytes; a larger sample has its own shard.
        min_overlap: a token or patch lies in a named box if more than this share of the box lies in it.
        max_pixels, max_tiles: bounds on pictures, as in `model.to_inputs`.
        on_error: "skip" leaves out samples that cannot be used (a broken picture, a prompt that does not fit), with a
            warning; `skipped.csv` lists them.
        progress: show a bar. `progress.jsonl` in the folder is written either way.

    Raises:
        HookError: names that match nothing or would not fire.
        InputError: a sample that cannot be used (it is named; shards before it are kept), hooks left on the model, a
            folder with activations of other settings or samples.
        GeometryError: a box that does not lie in its picture.
        OutputError: the disk is full or cannot be written; call again when there is room.
        ActivationsError: the folder's `activations.json` is damaged.
    """
    if min(tokens_per_batch, shard_bytes) < 1:
        raise InputError(f"tokens_per_batch and shard_bytes must be at least 1, got {tokens_per_batch}, {shard_bytes}")
    if not 0 <= min_overlap < 1:
        raise InputError(f"min_overlap is a share of a box, at least 0 and less than 1, got {min_overlap}")
    if hooked := hooked_module(model):
        raise InputError(
            f"the model has a hook at {hooked!r}, which may change activations: remove it "
            "(from hook points with model.reset_hooks(including_permanent=True))"
        )
    plan = _Plan(
        model,
        tuple(resolve_names(model, names_filter)),
        tuple(checked_choice(tokens)),
        model.cfg.dtype if dtype is None else dtype,
        tokens_per_batch,
        shard_bytes,
        float(min_overlap),
        {"max_pixels": max_pixels, "max_tiles": max_tiles},
        on_error == "skip",
    )
    made, folder = plan.record(), writable_folder(Path(folder))
    claim(folder, made)
    clear_leftovers(folder)
    queue, start = _Queue(samples, plan), 0
    total = len(samples) if isinstance(samples, Sized) else None
    with recorded(folder), Progress("activations", "sample", total, quiet=not progress) as bar:
        while queue.following is not None:
            path = shard_path(folder, key_of(made), start)
            if (shard := _kept(path, queue)) is not None:
                bar.found(shard.stop - start)
            elif (shard := _make(path, key_of(made), start, queue, plan, bar)) is None:
                break  # none of those that are left can be used
            start = shard.stop
    if shard_path(folder, key_of(made), start).with_suffix(".parquet").exists():
        raise InputError(f"{folder} holds more than the {start} samples that came: choose another folder")
    report_skipped(folder, {own.id: own.reason for own in queue.skipped}, stacklevel=3)
    whole = {}
    if isinstance(samples, Samples):
        whole = {"range": [samples.start, samples.stop], "divided": list(samples.divided or ())}
    write_manifest(folder, made, Activations(folder).summary() | {"skipped": len(queue.skipped)} | whole)
    return Activations(folder)


def _kept(path: Path, queue: "_Queue") -> Shard | None:
    """Pass over the samples of a shard that is complete."""
    try:
        shard = read_shard(path)
    except (FileNotFoundError, ActivationsError):
        return None
    digests = []
    for place in range(shard.stop - shard.start):
        if queue.following is None:
            break
        turn = queue.take()
        if str(place) in shard.skipped:
            id, reason = shard.skipped[str(place)]
            queue.skipped.append(_Skipped(shard.start + place, id, reason))
        else:
            digests.append(turn.digest)
    if _together(digests) != shard.samples:
        raise InputError(
            f"the samples from number {shard.start} on are not those that {shard.index} was made of: choose another "
            "folder"
        )
    return shard


def _make(path: Path, key: str, start: int, queue: "_Queue", plan: "_Plan", bar: Progress) -> Shard | None:
    """Write the shard of the next samples: all batches that fit, or one sample that does not fit. None if no sample
    that is left can be used."""
    pieces: dict[str, list[Tensor]] = defaultdict(list)
    tables: dict[Kind, list[pa.Table]] = {kind: [] for kind in plan.kinds}
    digests: list[str] = []
    n_bytes, first, n_skipped = 0, queue.n_taken, len(queue.skipped)
    while batch := queue.take_batch(plan.shard_bytes - n_bytes, may_exceed=not n_bytes):
        for name, tensor in plan.run(batch).items():
            pieces[name].append(tensor)
        for turn in batch:
            for kind, table in turn.tables.items():
                tables[kind].append(table)
            digests.append(turn.digest)
            n_bytes += turn.n_bytes
        bar.update(len(batch))
    bar.update(len(queue.skipped) - n_skipped)
    if not digests:
        return None
    joined = {kind: pa.concat_tables(own) for kind, own in tables.items()}
    rows = {kind: len(table) for kind, table in joined.items()}
    skipped = {str(own.number - first): (own.id, own.reason) for own in queue.skipped[n_skipped:]}
    shard = Shard(path, key, start, len(digests), _together(digests), rows, skipped)
    write_shard(shard, pieces, list(joined.values()))
    return shard


def _together(digests: list[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class _Turn:
    """A sample being processed."""

    sample: Sample
    plan: "_Plan"

    @cached_property
    def inputs(self) -> VLMInputs:
        return self.sample.inputs(self.plan.model, **self.plan.bounds)

    @cached_property
    def tables(self) -> dict[Kind, pa.Table]:
        return self.plan.indexer.tables(self.sample, self.inputs)

    @cached_property
    def n_bytes(self) -> int:
        """Bytes of its rows."""
        return sum(len(table) * self.plan.row_bytes[kind] for kind, table in self.tables.items())

    @cached_property
    def digest(self) -> str:
        return self.sample.digest()


class _Skipped(NamedTuple):
    """A sample that could not be used."""

    number: int
    id: str
    reason: str


class _Queue:
    """The remaining samples, read one ahead."""

    def __init__(self, samples: Iterable[Sample], plan: "_Plan") -> None:
        self._samples, self._plan = iter(samples), plan
        self._ahead: _Turn | None = None
        self.n_taken = 0
        """Samples taken so far, skipped ones included."""
        self.skipped: list[_Skipped] = []
        """Samples that could not be used."""

    @property
    def following(self) -> _Turn | None:
        """The next sample, whether it can be used or not."""
        if self._ahead is None and (sample := next(self._samples, None)) is not None:
            self._ahead = _Turn(sample, self._plan)
        return self._ahead

    @property
    def usable(self) -> _Turn | None:
        """The next sample that can be used; those before it are skipped, if the plan says so."""
        while (turn := self.following) is not None:
            if not self._plan.skips:
                return turn
            try:
                _ = turn.tables, turn.digest
                return turn
            except SKIPPED as error:
                self.skipped.append(_Skipped(self.n_taken, turn.sample.id, str(error)))
                self.take()
        return None

    def take(self) -> _Turn:
        taken, self._ahead = self.following, None
        assert taken is not None
        self.n_taken += 1
        return taken

    def take_batch(self, n_bytes: int, may_exceed: bool) -> list[_Turn]:
        """Take samples for one batch whose rows fit into `n_bytes`; the first may exceed them if `may_exceed`."""
        batch: list[_Turn] = []
        longest = 0
        while (turn := self.usable) is not None:
            longest, n_bytes = max(longest, turn.inputs.shape[1]), n_bytes - turn.n_bytes
            too_many = (len(batch) + 1) * longest > self._plan.tokens_per_batch
            if (batch and too_many) or (n_bytes < 0 and (batch or not may_exceed)):
                break
            batch.append(self.take())
        return batch


@dataclass(frozen=True, eq=False)
class _Plan:
    """Runs batches and collects their rows."""

    model: "HookedVLM"
    names: tuple[str, ...]
    choice: tuple[str | int, ...]
    dtype: torch.dtype
    tokens_per_batch: int
    shard_bytes: int
    min_overlap: float
    bounds: dict[str, int | None]
    skips: bool
    """Whether samples that cannot be used are left out."""

    def record(self) -> dict[str, Any]:
        """Everything that decides the activations except the samples, for `activations.json`."""
        cfg = self.model.cfg
        return {
            **provenance(self.model),
            "names": {
                name: {"rows": kind_of(name, cfg), "shape": list(shape)} for name, shape in self.row_shapes.items()
            },
            "tokens": list(self.choice),
            "written_as": str(self.dtype).removeprefix("torch."),
            "tokens_per_batch": self.tokens_per_batch,
            "shard_bytes": self.shard_bytes,
            "min_overlap": self.min_overlap,
            **self.bounds,
            **{flag: getattr(cfg, flag) for flag in _SWITCHES},
        }

    @cached_property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        return row_shapes(self.model, list(self.names))

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(sorted({kind_of(name, self.model.cfg) for name in self.names}))

    @cached_property
    def row_bytes(self) -> dict[Kind, int]:
        """Bytes of a row of each kind, summed over names."""
        sizes = dict.fromkeys(self.kinds, 0)
        for name, shape in self.row_shapes.items():
            sizes[kind_of(name, self.model.cfg)] += math.prod(shape) * self.dtype.itemsize
        return sizes

    @cached_property
    def indexer(self) -> Indexer:
        text_of = lru_cache(maxsize=None)(lambda token: str(self.model.to_string([token])))
        return Indexer(self.model.cfg, self.kinds, self.choice, self.min_overlap, text_of)

    @torch.no_grad()
    def run(self, batch: list[_Turn]) -> dict[str, Float[Tensor, "row *rest"]]:
        """The activations of a batch by name, cut to their rows."""
        inputs = VLMInputs.concat([turn.inputs for turn in batch])
        slots = {kind: self.indexer.slots(kind, [turn.tables[kind] for turn in batch], inputs) for kind in self.kinds}
        kept: dict[str, Tensor] = {}

        def keep(tensor: Tensor, hook: HookPoint, at: Tensor) -> None:
            name = str(hook.name)
            kept[name] = take_rows(name, tensor, at).to("cpu", self.dtype)

        of_name = {name: slots[kind_of(name, self.model.cfg)] for name in self.names}
        hooks = [(name, partial(keep, at=at)) for name, at in of_name.items() if len(at)]
        if hooks:
            with self.model.hooks(hooks):
                self.model(inputs, return_type=None, stop_at_layer=self._stop_at_layer([name for name, _ in hooks]))
        return kept

    def _stop_at_layer(self, names: list[str]) -> int | None:
        """The layer after the last requested one; None for all layers and the final norm."""
        n = self.model.cfg.n_layers
        last = max(layer_of(name, n) for name in names)
        return None if last == n else max(last + 1, 0)
