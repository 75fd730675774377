"""Plan of a sweep: the runs that share a batch, where each begins, and the part of the plain run they reuse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import EMBEDDING, ENCODER, Intervention, first_image_position, n_patches
from hooked_vlm.nn.forward_pass import block_spans
from hooked_vlm.nn.hooks import foreign_module, is_vision

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

SLACK = 1.1
"""Runs share a batch if it makes none of them compute more than this many times its own positions."""
MEMORY_SHARE = 0.5
"""Share of the free memory that a batch may take."""
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 65536}
"""Above this size, larger batches are no faster."""
PATCHES_PER_BATCH = {"cpu": 2048, "cuda": 65536}
"""The same in the vision tower (`benchmarks/sweeps.py`)."""


@dataclass(frozen=True)
class Batch:
    """Runs that go through the decoder together, in the order of the layers at which they join."""

    runs: tuple[int, ...]
    """Indices into the sweep's interventions."""
    layers: tuple[int, ...]
    """The first layer of each run."""
    first_position: int
    """Positions before it are the plain run's, whose keys and values stand in for them."""
    vision_layers: tuple[int, ...] = ()
    """The first layer of the vision tower of each run, where the runs change the image side; they then go through the
    tower together first."""

    @property
    def encodes(self) -> bool:
        """Whether the runs change the image side."""
        return bool(self.vision_layers)


@dataclass(frozen=True)
class SweepPlan:
    """Batches of runs, and the amount of work they save."""

    batches: tuple[Batch, ...]
    n_rows: int
    n_positions: int
    n_layers: int
    narrow_end: bool
    """Whether the last block computes queries of the last position only."""
    find_positions: bool
    """Whether all interventions read the positions in their hook context."""
    encodes: bool
    """Whether there are images that are not encoded yet."""
    n_patches: int
    """Patches of all images of the inputs, class tokens included."""
    n_vision_layers: int
    """Layers of the vision tower that run."""
    earlier: int = 0
    """Number of runs that begin before their first change, where tokens before it see it."""

    @property
    def encoder_runs(self) -> tuple[int, ...]:
        """Interventions on the image side."""
        return tuple(sorted(i for batch in self.batches if batch.encodes for i in batch.runs))

    @property
    def n_runs(self) -> int:
        return sum(len(batch.runs) for batch in self.batches)

    @property
    def naive_work(self) -> int:
        """Positions times layers of the decoder that a loop over `run_with_hooks` computes."""
        return self.n_runs * self.n_rows * self.n_positions * self.n_layers

    @property
    def work(self) -> int:
        """Positions times layers of the decoder that the plan computes, the plain run included."""
        whole = self.n_rows * self.n_positions * self.n_layers
        return whole + sum(self._work(batch) for batch in self.batches)

    @property
    def vision_layers(self) -> tuple[int, ...]:
        """The first layer of the vision tower of each run that changes the image side."""
        return tuple(layer for batch in self.batches for layer in batch.vision_layers)

    @property
    def naive_vision_work(self) -> int:
        """Patches times layers of the vision tower that a loop over `run_with_hooks` computes."""
        return self.n_runs * self.n_patches * self.n_vision_layers if self.encodes else 0

    @property
    def vision_work(self) -> int:
        """Patches times layers of the vision tower that the plan computes, the plain run included."""
        if not self.encodes:
            return 0
        n_layers = self.n_vision_layers
        return self.n_patches * (n_layers + sum(n_layers - max(layer, 0) for layer in self.vision_layers))

    def _work(self, batch: Batch) -> int:
        width = self.n_positions - batch.first_position
        n_layers = [self.n_layers - max(layer, 0) for layer in batch.layers]
        whole_blocks = sum(n - 1 if self.narrow_end and n else n for n in n_layers)
        ends = sum(n > 0 for n in n_layers) if self.narrow_end else 0
        return self.n_rows * (whole_blocks * width + ends)

    def describe(self) -> str:
        """The plan in words and numbers."""
        lines = [f"{self.n_runs} runs on {self.n_rows} x {self.n_positions} tokens, {self.n_layers} layers"]
        n_text = self.n_runs - len(self.encoder_runs)
        if self.encodes and n_text:
            lines.append(f"vision tower: 1 pass instead of {n_text}")
        if self.encoder_runs:
            n = sum(batch.encodes for batch in self.batches)
            lines.append(
                f"{len(self.encoder_runs)} runs change the image side: through the vision tower in "
                f"{n} {'batch' if n == 1 else 'batches'}, {_joining(self.vision_layers, self.n_vision_layers, TOWER)}"
            )
        for batch in self.batches:
            reused = f"reuse keys and values of positions 0 to {batch.first_position - 1}, "
            lines.append(
                f"{len(batch.runs)} runs in one batch: {reused if batch.first_position else ''}"
                f"{_joining(batch.layers, self.n_layers, DECODER)}"
            )
        if self.earlier:
            lines.append(
                f"{self.earlier} runs begin before their first change, at the first of the tokens that see each other "
                "both ways"
            )
        if self.narrow_end:
            lines.append("last block: queries of the last position only")
        if self.encodes:
            lines.append(_compared("patches x layers of the vision tower", self.vision_work, self.naive_vision_work))
        lines.append(_compared("positions x layers", self.work, self.naive_work))
        return "\n".join(lines)


DECODER, TOWER = ("the embedding", "the final norm"), ("the patch embedding", "behind its last layer")
"""Where runs join before the first layer, and behind the last."""


def _compared(what: str, work: int, naive_work: int) -> str:
    share = naive_work / work if work else 1.0
    return f"{what}: {work:,} (the plain run included) instead of {naive_work:,}, {share:.1f} times fewer"


def _joining(layers: Sequence[int], n_layers: int, ends: tuple[str, str]) -> str:
    names = [ends[0] if x < 0 else ends[1] if x == n_layers else f"layer {x}" for x in layers]
    counted = ", ".join(f"{names.count(name)} from {name}" for name in dict.fromkeys(names))
    return f"{counted} on"


def make_plan(
    model: "HookedVLM",
    inputs: VLMInputs,
    interventions: Sequence[Intervention],
    logits_at: str,
    max_runs: int | None = None,
) -> SweepPlan:
    """Group runs into batches with nearly the same first position, each in the order of first layers.

    Args:
        logits_at: "last", or "all".
        max_runs: largest number of runs in a batch; by default chosen from free memory and speed.

    Raises:
        InputError: `max_runs` below 1, or an intervention that does not fit.
    """
    if max_runs is not None and max_runs < 1:
        raise InputError(f"max_runs, the number of runs in a batch, must be at least 1, got {max_runs}")
    n_positions, n_layers = inputs.shape[1], model.cfg.n_layers
    foreign = bool(foreign_module(model))  # an adapter or an SAE, which may look at all positions of a row
    spans = block_spans(model.cfg, inputs)
    changes = [(iv.first_layer(model, inputs), iv.first_position(model, inputs)) for iv in interventions]
    begins = [(layer, 0 if foreign else first_seen(position, spans)) for layer, position in changes]
    earlier = sum(layer != ENCODER and first_seen(position, spans) < position for layer, position in changes)
    end = min(inputs.stop) - 1  # every row's last position is computed
    rest = sorted((min(p, end), layer, i) for i, (layer, p) in enumerate(begins) if layer != ENCODER)
    groups: list[list[tuple[int, int, int]]] = []
    for item in rest:
        fits = groups and n_positions - groups[-1][0][0] <= SLACK * (n_positions - item[0])
        if fits:
            groups[-1].append(item)
        else:
            groups.append([item])
    batches = _encoder_batches(model, inputs, interventions, begins, logits_at, max_runs, foreign)
    for group in groups:
        first = group[0][0]
        most = max_runs or runs_that_fit(model, inputs, n_positions - first, logits_at)
        ordered = sorted((layer, i) for _, layer, i in group)
        for start in range(0, len(ordered), most):
            part = ordered[start : start + most]
            batches.append(Batch(tuple(i for _, i in part), tuple(layer for layer, _ in part), first))
    find_positions = all(iv.position_aware for iv in interventions)
    narrow = logits_at == "last" and find_positions and not foreign and min(inputs.stop) == n_positions
    encodes = inputs.has_visuals and inputs.image_features is None
    tower = (sum(n_patches(inputs)), model.vision.n_layers_run) if inputs.has_visuals else (0, 0)
    shape = (len(inputs), n_positions, n_layers)
    return SweepPlan(tuple(batches), *shape, narrow, find_positions, encodes, *tower, earlier)


def _encoder_batches(
    model: "HookedVLM",
    inputs: VLMInputs,
    interventions: Sequence[Intervention],
    begins: Sequence[tuple[int, int]],
    logits_at: str,
    max_runs: int | None,
    foreign: bool,
) -> list[Batch]:
    """Runs that change the image side, in the order of the layers of the vision tower at which they join."""
    encoder = [i for i, (layer, _) in enumerate(begins) if layer == ENCODER]
    if not encoder:
        return []
    names = {i: [name for name, _ in interventions[i].hooks(model, inputs)] for i in encoder}
    model.check_reachable(list({name: None for own in names.values() for name in own}), inputs, {})
    layers = {i: first_vision_layer(own, model.vision.n_layers_run) for i, own in names.items()}
    encoder.sort(key=layers.__getitem__)
    n_positions = inputs.shape[1]
    end = min(inputs.stop) - 1
    spans = block_spans(model.cfg, inputs)
    reached = [first_image_position(inputs)]
    reached += [interventions[i].first_position(model, inputs) for i in encoder if not all(map(is_vision, names[i]))]
    first = 0 if foreign else min(end, *(first_seen(position, spans) for position in reached))
    most = max_runs or min(
        runs_that_fit(model, inputs, n_positions - first, logits_at), _runs_that_encode(model, inputs)
    )
    parts = [tuple(encoder[start : start + most]) for start in range(0, len(encoder), most)]
    return [Batch(part, (EMBEDDING,) * len(part), first, tuple(layers[i] for i in part)) for part in parts]


def first_seen(position: int, spans: Sequence[tuple[int, int, int]]) -> int:
    """The first position from which a change at `position`, or behind it, is seen in any row: the beginning of a block
    of tokens that see each other both ways, if it lies in one. `spans` as of `block_spans`."""
    return min([start for _, start, stop in spans if start <= position < stop], default=position)


def first_vision_layer(names: Sequence[str], n_layers: int) -> int:
    """The first of the vision tower's `n_layers` that hooks on these points change; `EMBEDDING`, or `n_layers` behind
    the last."""
    return min(_layer(name, n_layers) for name in names if is_vision(name))


def _layer(name: str, n_layers: int) -> int:
    if name.startswith(("vision.hook_embed", "vision.ln_pre.")):
        return EMBEDDING
    return int(name.split(".")[2]) if name.startswith("vision.blocks.") else n_layers


def runs_that_fit(model: "HookedVLM", inputs: VLMInputs, width: int, logits_at: str) -> int:
    """Number of runs over the last `width` positions that fit into a batch."""
    cfg, n_keys = model.cfg, inputs.shape[1]
    size = torch.finfo(cfg.dtype).bits // 8
    activations = width * (6 * cfg.d_model + 3 * cfg.d_mlp + 4 * cfg.n_heads * cfg.d_head) * size
    keys = 6 * n_keys * cfg.n_key_value_heads * cfg.d_head * size
    scores = 3 * cfg.n_heads * width * n_keys * 4
    logits = cfg.d_vocab * 4 * (1 if logits_at == "last" else 2 * width)
    n_bytes = len(inputs) * (activations + keys + scores + logits)
    return _batch_size(n_bytes, len(inputs) * width, TOKENS_PER_BATCH, cfg.device)


def _runs_that_encode(model: "HookedVLM", inputs: VLMInputs) -> int:
    """Number of runs that fit into a pass of the vision tower."""
    cfg = model.cfg.vision
    assert cfg is not None  # some runs change the vision tower
    counts = n_patches(inputs)
    size = torch.finfo(model.cfg.dtype).bits // 8
    per_patch = (8 * cfg.d_model + 3 * cfg.d_mlp + 4 * cfg.n_heads * cfg.d_head) * size
    scores = 3 * cfg.n_heads * len(counts) * max(counts) ** 2 * 4
    return _batch_size(sum(counts) * per_patch + scores, sum(counts), PATCHES_PER_BATCH, model.cfg.device)


def _batch_size(n_bytes: int, n_tokens: int, fast: Mapping[str, int], device: torch.device) -> int:
    """Number of runs in a batch, from the bytes and tokens (patches) of one run, and how many of these are `fast`."""
    by_memory = int(MEMORY_SHARE * free_memory(device)) // n_bytes
    by_speed = fast.get(device.type, fast["cpu"]) // n_tokens
    return max(1, min(by_memory, by_speed))


def free_memory(device: torch.device) -> int:
    """Free memory of a device in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available
