"""Training of a sparse dictionary on stored activations.

    trained = train_dictionary(Activations("acts"), "blocks.1.hook_resid_post", TrainingConfig(), "out")
    trained.dictionary, trained.measured

A training that was interrupted is repeated to go on: the order of the tokens follows from the seed and the number of
the step, all else is in the checkpoint, and so the weights end bit-equal to those of one that was not interrupted.
Several processes take equal parts of each batch and average their gradients.
"""

import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.activations.read import Activations
from hooked_vlm.errors import HookedVLMError, InputError, WorkerError
from hooked_vlm.features.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from hooked_vlm.features.config import TrainingConfig
from hooked_vlm.features.dictionary import Dictionary
from hooked_vlm.features.learner import Learner, Scale
from hooked_vlm.features.token_stream import Share, TokenStream, open_stream
from hooked_vlm.runtime.digests import digest
from hooked_vlm.runtime.files import atomic_write, writable_folder
from hooked_vlm.runtime.progress import Progress, recorded

CHECKPOINT, CURVE = "checkpoint.safetensors", "training.csv"
ROWS = 2048
"""Rows measured at a time."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A dictionary, and how it came to be."""

    dictionary: Dictionary
    measured: pd.DataFrame
    """training.csv: one row per measurement on held-out tokens."""
    stream: TokenStream


def train_dictionary(
    activations: Activations,
    hook_name: str,
    config: TrainingConfig,
    out: str | Path,
    *,
    processes: int = 1,
    device: str | None = None,
    progress: bool = False,
) -> Trained:
    """Train a dictionary; training.csv and the checkpoint are written to `out` on the way.

    Args:
        processes: how many work on each batch, on the CPU of this machine; weights are those of one process up to
            rounding.
        device: CUDA if present by default, for one process. Bits are promised on the CPU only.

    Raises:
        InputError: settings out of range, a hook point that was not stored, too few samples, a folder with another
            training.
        ActivationsError: a damaged file of activations.
        OutputError: `out` cannot be written.
        WorkerError: a process ended.
    """
    config.check_training()
    if processes < 1:
        raise InputError(f"processes must be at least 1, got {processes}")
    if processes > 1 and device not in (None, "cpu"):
        raise InputError(f"several processes share the CPU, got device={device}: leave out one of the two")
    place = device or ("cuda" if torch.cuda.is_available() and processes == 1 else "cpu")
    folder = writable_folder(Path(out))
    stream = open_stream(activations, hook_name, config, Share(0, processes))
    run = _Run(activations.folder, hook_name, config, folder, place, progress)
    read_checkpoint(folder / CHECKPOINT, run.key(stream))  # refuses another training before processes start
    if processes == 1:
        run.steps(stream)
    else:
        _in_processes(run, processes)
    done = read_checkpoint(folder / CHECKPOINT, run.key(stream))
    assert done is not None
    learner = Learner.restored(config, done.state, done.step)
    return Trained(learner.dictionary(hook_name), pd.DataFrame(done.measured), stream)


@dataclass(frozen=True)
class _Run:
    """One process's work."""

    activations: Path
    hook_name: str
    config: TrainingConfig
    out: Path
    device: str
    progress: bool

    def key(self, stream: TokenStream) -> str:
        """Digest of the settings and of the activations."""
        source = stream.values.activations
        shards = [shard.samples for shard in source.shards]
        return digest([asdict(self.config), self.hook_name, source.manifest["key"], shards])

    def steps(self, stream: TokenStream) -> None:
        """Take all steps that are left."""
        config, first, path = self.config, stream.share.rank == 0, self.out / CHECKPOINT
        found = read_checkpoint(path, key := self.key(stream))
        if dist.is_initialized():
            dist.barrier()  # nobody writes before all have read
        step, measured = (0, []) if found is None else (found.step, found.measured)
        if found is None:
            learner = Learner(config, Scale.of(next(stream.batches())), self.device)
        else:
            learner = Learner.restored(config, found.state, step, self.device)
        held_out = stream.sample(config.held_out_tokens) if first else None
        bar = Progress("training", "token", config.n_steps * config.batch, quiet=not (self.progress and first))
        with recorded(self.out), bar:
            bar.found(step * config.batch)
            for batch in stream.batches(step):
                if learner.step >= config.n_steps:
                    break
                learner.update(batch)
                bar.update(config.batch)
                due = learner.step % config.measure_every == 0 or learner.step == config.n_steps
                if held_out is not None and due:
                    measured.append(self._measured(learner, held_out))
                    write_checkpoint(path, Checkpoint(key, learner.step, measured, learner.state()))
                    atomic_write(self.out / CURVE, partial(pd.DataFrame(measured).to_csv, index=False))

    def _measured(self, learner: Learner, x: Float[Tensor, "row d_in"]) -> dict[str, int | float]:
        """A line of training.csv."""
        about = {"step": learner.step, "tokens": learner.step * self.config.batch}
        dead = learner.dead.double().mean().item()
        return {**about, **reconstruction(learner.dictionary(self.hook_name), x), "dead": dead}


@torch.no_grad()
def reconstruction(dictionary: Dictionary, x: Float[Tensor, "row d_in"]) -> dict[str, int | float]:
    """How well a dictionary reconstructs rows, and with how much.

    `mean squared error` is per number, in the units of the stream; `explained variance` is 1 - sum |x - x̂|² /
    sum |x - mean|²; `active` counts features of a row, on average.
    """
    mean = x.double().mean(0)
    error = total = active = 0.0
    for rows in x.to(dictionary.W_enc).split(ROWS):
        f = dictionary.encode(rows)
        error += (rows - dictionary.decode(f)).double().square().sum().item()
        total += (rows.double() - mean.to(rows.device)).square().sum().item()
        active += int((f > 0).sum())
    explained = 1 - error / total if total else float("nan")
    return {"mean squared error": error / x.numel(), "explained variance": explained, "active": active / len(x)}


# ---------------------------------------------------------------- several processes


def _in_processes(run: _Run, n: int) -> None:
    """Take the steps in `n` processes of this machine.

    Raises:
        WorkerError: one of them ended; its last words are given.
    """
    threads = max(1, torch.get_num_threads() // n)
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_process, (n, run, Path(folder), threads), nprocs=n)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            said = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("error-*"))]
            last = said[0] if said else str(error).strip().splitlines()[-1]
            raise WorkerError(f"a process of the training ended: {last}; run it again to go on") from error


def _process(rank: int, n: int, run: _Run, folder: Path, threads: int) -> None:
    """One of `n` processes; they meet in `folder`, where an error that a user can mend is left: the others fail too,
    and only say that they lost a connection."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n)
    try:
        run.steps(open_stream(Activations(run.activations), run.hook_name, run.config, Share(rank, n)))
    except HookedVLMError as error:
        (folder / f"error-{rank}").write_text(str(error), encoding="utf-8")
        raise
    finally:
        dist.destroy_process_group()
