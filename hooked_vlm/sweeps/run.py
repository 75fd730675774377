"""Many interventions on the same inputs, at the cost of a few forward passes.

    result = sweep(model, inputs, [ZeroHeads(((layer, head),)) for layer, head in heads], log_prob(answer))
    result.to_dataframe()

The numbers are those of a loop over `run_with_hooks`. The vision tower runs once; a run begins at the first layer it
changes, and reuses keys and values of the positions before its first change; many runs share a batch; the last block
computes queries of the last position only, if the metric reads nothing else. `result.plan.describe()` prints the plan.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import EMBEDDING, Hooks, Intervention, on_own_rows
from hooked_vlm.interventions.heads import joint_edits
from hooked_vlm.metrics import Metric
from hooked_vlm.model.finite import check_finite, described
from hooked_vlm.nn.forward_pass import DeepStack, ForwardPass, are_finite, inputs_masks, inputs_rotations, last_of_rows
from hooked_vlm.nn.hooks import hooked_module, running
from hooked_vlm.nn.kv_cache import KVCache, SharedPrefix
from hooked_vlm.nn.masks import AttentionMask
from hooked_vlm.nn.rotary import Rotations
from hooked_vlm.sweeps.encoder import PlainEncoding, encoded
from hooked_vlm.sweeps.plan import Batch, SweepPlan, make_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True, eq=False)
class SweepResult:
    """The metric of every run on every row."""

    values: Float[Tensor, "run batch"]
    baseline: Float[Tensor, "batch"]
    """The metric without intervention."""
    interventions: tuple[Intervention, ...]
    plan: SweepPlan

    @property
    def effects(self) -> Float[Tensor, "run batch"]:
        """Change of the metric by each intervention."""
        return self.values - self.baseline

    def to_dataframe(self) -> pd.DataFrame:
        """One line for each run and row: `run`, `intervention`, `row`, `value`, `baseline`, `effect`."""
        n_runs, n_rows = self.values.shape
        return pd.DataFrame(
            {
                "run": torch.arange(n_runs).repeat_interleave(n_rows),
                "intervention": [str(iv) for iv in self.interventions for _ in range(n_rows)],
                "row": torch.arange(n_rows).repeat(n_runs),
                "value": self.values.flatten(),
                "baseline": self.baseline.repeat(n_runs),
                "effect": self.effects.flatten(),
            }
        )

    def show(self, title: str = "") -> "Figure":
        """Draw the effects, averaged over rows: by layer and head, or by layer and position, where each run edits one
        of these; otherwise run by run. A notebook shows the figure."""
        from hooked_vlm.sweeps.figure import effects_figure  # drawing is imported when it is asked for

        return effects_figure(self, title)


@torch.no_grad()
def sweep(
    model: "HookedVLM",
    inputs: VLMInputs | Any,
    interventions: Sequence[Intervention],
    metric: Metric,
    *,
    logits_at: Literal["last", "all"] = "last",
    max_runs: int | None = None,
    progress: bool = False,
) -> SweepResult:
    """Measure the metric under every intervention, and without any.

    Args:
        inputs: as for `forward`; all rows go through every run. For many images call it once per image (or for a
            few at a time): work is shared within a call only.
        metric: given logits [batch, d_vocab] of each row's last token, one number per row (`hooked_vlm.metrics`);
            with `logits_at="all"` it is given [batch, pos, d_vocab].
        max_runs: largest number of runs in a batch. By default chosen from free memory; a batch that does not fit
            after all is halved.
        progress: show a bar.

    Raises:
        InputError: hooks are set on the model already, an intervention does not fit, or the metric gives something
            else than one number per row.
        NotFiniteError: logits without intervention are infinite or not numbers.
    """
    inputs = model.as_inputs(inputs)
    interventions = tuple(interventions)
    if hooked := hooked_module(model):
        raise InputError(
            f"a sweep needs a model without hooks of its own, but {hooked} has one: remove it "
            "(from hook points with model.reset_hooks(including_permanent=True))"
        )
    if logits_at not in ("last", "all"):
        raise InputError(f'logits_at must be "last" or "all", got {logits_at!r}')
    plan = make_plan(model, inputs, interventions, logits_at, max_runs)
    given, encoding = inputs, None
    if plan.encoder_runs:
        layers = {layer for batch in plan.batches for layer in batch.vision_layers}
        encoding = PlainEncoding.of(model, inputs, layers)
        inputs = inputs.with_image_features(encoding.features)
    else:
        inputs = with_features(model, inputs)
    plain = PlainRun.of(model, inputs, plan, logits_at)
    if not are_finite(plain.logits):
        check_finite(model, given, plain.logits)
    baseline = measure(metric, plain.logits, logits_at).cpu()
    values = baseline.new_full((len(interventions), len(inputs)), torch.nan)
    with tqdm(total=plan.n_runs, disable=not progress, desc="sweep", unit="run") as bar:
        waiting = list(reversed(plan.batches))
        while waiting:
            batch = waiting.pop()
            try:
                runs: Sequence[Intervention] = [interventions[i] for i in batch.runs]
                if batch.encodes and encoding is not None:
                    runs = encoded(model, given, encoding, runs, batch.vision_layers)
                logits = batch_logits(model, plain, batch, runs, plan, logits_at)
                rows = [measure(metric, _with_prefix(own, plain, logits_at), logits_at) for own in logits]
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error) or len(batch.runs) == 1:
                    raise
                waiting += _halves(batch)
                continue
            values[list(batch.runs)] = torch.stack(rows).cpu()
            bar.update(len(batch.runs))
    _warn_of_nan(model, given, interventions, values)
    return SweepResult(values, baseline, interventions, plan)


def _warn_of_nan(
    model: "HookedVLM", inputs: VLMInputs, interventions: Sequence[Intervention], values: Float[Tensor, "run batch"]
) -> None:
    """Say which values are not numbers, and where the first of their runs has the first such activation."""
    bad = values.isnan()
    if not bool(bad.any()):
        return
    run = int(bad.any(1).nonzero()[0])
    with model.hooks(fwd_hooks=interventions[run].hooks(model, inputs)):
        what = described(model, inputs, f"{int(bad.sum())} of {values.numel()} values, the first of run {run},")
    warnings.warn(f"{what}; they are kept as such (NaN)", stacklevel=3)


def with_features(model: "HookedVLM", inputs: VLMInputs) -> VLMInputs:
    """Encode the images of the inputs, unless they are encoded already or there are none."""
    if not inputs.has_visuals or inputs.image_features is not None:
        return inputs
    return inputs.with_image_features(model.encode_images(inputs))


def _with_prefix(
    own: Float[Tensor, "batch out d_vocab"], plain: "PlainRun", logits_at: str
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of all positions, if the metric reads them: those before the run's own come from the plain run."""
    if logits_at == "last" or own.shape == plain.logits.shape:
        return own
    return torch.cat((plain.logits[:, : plain.logits.shape[1] - own.shape[1]], own), dim=1)


def measure(metric: Metric, logits: Float[Tensor, "batch out d_vocab"], logits_at: str) -> Float[Tensor, "batch"]:
    """Values of a metric, in float32 at least.

    Raises:
        InputError: not one number for each row.
    """
    values = metric(logits[:, 0] if logits_at == "last" else logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"the metric must give one number for each of {len(logits)} rows, a tensor; it gave {got}")
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator, C++, Python or torch's CPU allocator (which has no error class) ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _halves(batch: Batch) -> list[Batch]:
    """The second half, then the first (they are taken from the end)."""
    middle = len(batch.runs) // 2
    return [
        replace(batch, runs=batch.runs[part], layers=batch.layers[part], vision_layers=batch.vision_layers[part])
        for part in (slice(middle, None), slice(None, middle))
    ]


# ---------------------------------------------------------------- the plain run, and batches that diverge from it


@dataclass(frozen=True, eq=False)
class PlainRun:
    """The run without any intervention, with the tensors that other runs reuse."""

    inputs: VLMInputs
    logits: Float[Tensor, "batch out d_vocab"]
    streams: dict[int, Float[Tensor, "batch pos d_model"]]
    """Inputs of layers, of `EMBEDDING` (block 0 before `hook_embed`) and of the final norm (number of layers)."""
    cache: KVCache
    masks: tuple[AttentionMask, ...]
    rotations: Rotations

    @classmethod
    def of(cls, model: "HookedVLM", inputs: VLMInputs, plan: SweepPlan, logits_at: str) -> "PlainRun":
        streams: dict[int, Tensor] = {}
        n_layers = model.cfg.n_layers
        wanted = {layer for batch in plan.batches for layer in batch.layers}

        def keep(layer: int) -> Callable[[Tensor, Any], None]:
            return lambda x, hook: streams.__setitem__(layer, x.detach())

        def name(layer: int) -> str:
            if layer == EMBEDDING:
                return "hook_embed"
            last = layer == n_layers
            return f"blocks.{n_layers - 1}.hook_resid_post" if last else f"blocks.{layer}.hook_resid_pre"

        cache = model.new_kv_cache(len(inputs), inputs.shape[1])
        with model.hooks(fwd_hooks=[(name(layer), keep(layer)) for layer in sorted(wanted)]):
            logits = model(inputs, past_kv_cache=cache, logits_at=logits_at)
        rotations = inputs_rotations(model.cfg, inputs, model.cfg.dtype)
        return cls(inputs, logits, streams, cache, inputs_masks(model.cfg, inputs, None), rotations)

    def pass_over(self, model: "HookedVLM", first: int, n: int) -> ForwardPass:
        """A pass of `n` runs over the positions from `first` on."""
        masks = tuple(mask.repeat(n) for mask in self.masks)
        if first:
            masks = tuple(replace(mask, uncached_left_padding=None) for mask in masks)
        positions = torch.arange(first, self.inputs.shape[1], device=self.inputs.device)
        features, entering = self.inputs.image_features, None
        if features is not None and model.cfg.n_deepstack:
            entering = DeepStack(features[:, 1:], self.inputs.feature_slots, self.inputs.shape, first, n)
        return ForwardPass(
            model.cfg,
            self.inputs.device,
            masks,
            self.rotations.then(lambda rotate: rotate.positions(slice(first, None)).repeat(n)),
            SharedPrefix(self.cache, first) if first else None,
            {"inputs": self.inputs, "positions": positions, "first_position": first},
            kind_of=model.cfg.layer_kind_of,
            deepstack=entering,
        )


def batch_logits(
    model: "HookedVLM", plain: PlainRun, batch: Batch, runs: Sequence[Intervention], plan: SweepPlan, logits_at: str
) -> Float[Tensor, "run batch out d_vocab"]:
    """Logits of a batch's `runs`, of each row's last position or of those the batch computes."""
    first, n_layers, n_rows = batch.first_position, model.cfg.n_layers, len(plain.inputs)
    n_out = 1 if plan.narrow_end else None
    stream = plain.logits.new_empty(0, plain.inputs.shape[1] - first, model.cfg.d_model)
    n_runs = 0
    here = plain.pass_over(model, first, 1)
    joining = sorted(set(batch.layers) - {n_layers})
    with model.hooks(fwd_hooks=batch_hooks(model, plain.inputs, runs)):
        for layer, until in pairwise([*joining, n_layers]):
            n = batch.layers.count(layer)
            shared, n_runs = plain.streams[layer][:, first:], n_runs + n
            stream = torch.cat((stream.to(shared.device), shared.repeat(n, 1, 1)))
            here = plain.pass_over(model, first, n_runs)
            if layer == EMBEDDING:
                with running(here):
                    stream = model.hook_embed(stream)  # [run and row, pos, d_model]
            stream = model.run_layers(stream, here, max(layer, 0), until, n_out)
        if n := batch.layers.count(n_layers):
            shared = plain.streams[n_layers][:, first:]
            if len(stream):  # behind a last block that may have computed the last position only
                shared = shared[:, -stream.shape[1] :]
            stream, n_runs = torch.cat((stream.to(shared.device), shared.repeat(n, 1, 1))), n_runs + n
            here = plain.pass_over(model, first, n_runs)
        stream = stream.to(plain.inputs.device)
        if logits_at == "last" and plan.find_positions:
            stream, here = last_of_rows(stream, here, plain.inputs, first)
        with running(here):
            normalized = model.ln_final(stream)
        if logits_at == "last" and not plan.find_positions:  # hooks on the final norm saw all of it
            normalized, _ = last_of_rows(normalized, here, plain.inputs, first)
        logits = model.unembed(normalized)
    return logits.unflatten(0, (len(batch.runs), n_rows))


def batch_hooks(model: "HookedVLM", inputs: VLMInputs, runs: Sequence[Intervention]) -> Hooks:
    """One hook for each point that any of the runs touches; each run's edits see its own rows only."""
    return [(name, on_own_rows(own, len(inputs))) for name, own in joint_edits(model, inputs, runs).items()]
