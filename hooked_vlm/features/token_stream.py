"""Stored activations as batches in a shuffled order that follows from a seed and the number of the step alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.activations.read import Activations, Rows
from hooked_vlm.errors import InputError
from hooked_vlm.features.config import TrainingConfig
from hooked_vlm.nn.hooks import nearest_names

ORDER, SPLIT = 1, 2
"""Purposes of random numbers, beside the seed."""


@dataclass(frozen=True)
class Share:
    """The part of every batch that one of several processes takes."""

    rank: int = 0
    of: int = 1


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Tokens of one hook point: some samples to train on, the others held out.

    In each pass the shards are put in a new order, neighbours are read together as far as they fit into the buffer, and
    their rows are shuffled. Tokens that do not fill a last batch wait for the next pass.
    """

    values: Rows
    held_out: Bool[np.ndarray, "row"]
    training: Bool[np.ndarray, "row"]
    config: TrainingConfig
    share: Share = Share()

    @cached_property
    def d_in(self) -> int:
        return int(np.prod(self.values.shape[1:]))

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """First row of each shard, and first one behind it."""
        counts = np.array([shard.rows.get(self.values.kind, 0) for shard in self.values.activations.shards])
        stops = counts.cumsum()
        return list(zip((stops - counts).tolist(), stops.tolist(), strict=True))

    @cached_property
    def shards(self) -> list[Int[np.ndarray, "row"]]:
        """Numbers of the training rows of each shard."""
        return [start + np.flatnonzero(self.training[start:stop]) for start, stop in self.bounds]

    @property
    def n_rows(self) -> int:
        """Tokens to train on."""
        return int(self.training.sum())

    def batches(self, step: int = 0) -> Iterator[Float[Tensor, "row d_in"]]:
        """This process's rows of the batches from a step on, without end."""
        per_pass = self.n_rows // self.config.batch
        while True:
            number, first = divmod(step, per_pass)
            for batch in self._pass(number, first * self.config.batch, per_pass * self.config.batch):
                yield batch
                step += 1

    def sample(self, n: int) -> Float[Tensor, "row d_in"]:
        """At most `n` held-out rows, chosen at random."""
        numbers = np.flatnonzero(self.held_out)
        chosen = np.random.default_rng([self.config.seed, SPLIT, 1]).permutation(numbers)[:n]
        return self._read(np.sort(chosen))

    def _pass(self, number: int, start: int, stop: int) -> Iterator[Float[Tensor, "row d_in"]]:
        """Batches of a pass that consist of its rows `start` to `stop`."""
        own, at = self.config.batch // self.share.of, 0
        waiting = torch.empty((0, self.d_in))
        for rows in self._blocks(number):
            places = np.arange(at, at + len(rows))
            mine = (places % self.share.of == self.share.rank) & (places >= start) & (places < stop)
            at += len(rows)
            if not mine.any():
                continue
            block = self._read(rows[mine])
            head, rest = block[: own - len(waiting)], block[own - len(waiting) :]
            waiting = torch.cat([waiting, head])
            if len(waiting) == own:
                yield waiting
                parts = rest.split(own)
                whole = len(rest) // own
                yield from parts[:whole]
                waiting = rest[whole * own :].clone()  # which does not hold the block

    def _blocks(self, number: int) -> Iterator[Int[np.ndarray, "row"]]:
        """Numbers of the rows of a pass in their order, as many at a time as fit into the buffer."""
        rng = np.random.default_rng([self.config.seed, ORDER, number])
        room = self.config.buffer_megabytes * 2**20 // (4 * self.d_in)
        block: list[Int[np.ndarray, "row"]] = []
        for shard in rng.permutation(len(self.shards)):
            if block and sum(map(len, block)) + len(self.shards[shard]) > room:
                yield rng.permutation(np.concatenate(block))
                block = []
            block.append(self.shards[shard])
        yield rng.permutation(np.concatenate(block))

    def _read(self, rows: Int[np.ndarray, "row"]) -> Float[Tensor, "row d_in"]:
        """Rows in the order asked for; their shards are read one at a time, each as a whole.

        Raises:
            ActivationsError: a damaged file.
            InputError: numbers that are not finite.
        """
        found = torch.empty((len(rows), self.d_in))
        of_shard = np.searchsorted([stop for _, stop in self.bounds], rows, side="right")
        for shard in np.unique(of_shard):
            here = np.flatnonzero(of_shard == shard)
            start, stop = self.bounds[shard]
            found[here] = self.values[start:stop].flatten(1)[rows[here] - start].float()
        if not bool(torch.isfinite(found).all()):
            row = int(rows[int((~torch.isfinite(found)).any(1).nonzero()[0])])
            raise InputError(
                f"row {row} of {self.values.name} holds numbers that are not finite: stream the activations again in "
                "a dtype that holds them (float32)"
            )
        return found


def open_stream(
    activations: Activations, hook_name: str, config: TrainingConfig, share: Share = Share()
) -> TokenStream:
    """The tokens of a hook point, divided by samples.

    Raises:
        InputError: the hook point was not stored, the stream is unfinished, or there are too few samples or tokens.
        ActivationsError: a damaged file.
    """
    if not activations.finished:
        raise InputError(f"{activations.folder} is unfinished: run its stream again first")
    if hook_name not in activations.names:
        raise InputError(
            f"{hook_name!r} was not stored in {activations.folder}.{nearest_names(hook_name, activations.names)}"
        )
    if config.batch % share.of:
        raise InputError(f"batch must be a multiple of the {share.of} processes, got {config.batch}")
    values = activations[hook_name]
    if config.group == "text" and values.kind != "tokens":
        raise InputError(f"{hook_name} belongs to the pictures and has no tokens of text: train on group all or image")
    table = activations.table(values.kind, ["sample", "group"] if values.kind == "tokens" else ["sample"])
    wanted = np.ones(len(table), dtype=bool)
    if values.kind == "tokens" and config.group != "all":
        wanted = (table["group"].to_numpy() == "image") == (config.group == "image")
    samples, of_row = np.unique(table["sample"].to_numpy(dtype=str)[wanted], return_inverse=True)
    n_held_out = max(1, round(config.held_out * len(samples)))
    if len(samples) < 2:
        raise InputError(f"samples are divided into those trained on and those held out, and {len(samples)} came with "
                         f"tokens of group {config.group}: stream more")  # fmt: skip
    chosen = np.random.default_rng([config.seed, SPLIT]).permutation(len(samples))[:n_held_out]
    held_out = np.zeros(len(table), dtype=bool)
    held_out[np.flatnonzero(wanted)] = np.isin(of_row, chosen)
    stream = TokenStream(values, held_out, wanted & ~held_out, config, share)
    if stream.n_rows < config.batch:
        raise InputError(f"{stream.n_rows} tokens came to train on, less than one batch ({config.batch}): stream more "
                         "samples, or make the batch smaller")  # fmt: skip
    return stream
