"""Sections of benchmarks/device.py: what is measured on each model."""

import cProfile
import pstats
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from interleaved import Timing, measure, ratios
from models import batch_of
from transformers.utils import is_flash_attn_2_available

from hooked_vlm import HookedVLM, sweep
from hooked_vlm.interventions import Intervention, ReplaceImageKV, all_heads
from hooked_vlm.metrics import logit

ONE_IMAGE = [(32, 32)]
MIXED = [(32, 32), (24, 32), (32, 24), (16, 32), (32, 16), (24, 24), (20, 32), (32, 20)]
SWEPT, LOOPED = 64, 4
"""Interventions of the sweep, and how many of them the loop runs."""
NEW_TOKENS = 32
LARGE = {"cuda": 128, "cpu": 48}
"""Patches along a side of the picture of the memory section, four to a token."""
FUNCTIONS = 12
"""Functions shown of the host's profile."""

Ways = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Bench:
    """One model in both libraries."""

    hf: Any
    ours: HookedVLM
    device: str
    kernels: tuple[str, ...]
    """Attention implementations of `transformers` that are here."""
    lacking: dict[str, str]
    """Name of one that is not -> why."""

    @classmethod
    def of(cls, hf: Any, device: str) -> "Bench":
        flash = device.startswith("cuda") and is_flash_attn_2_available()
        lacking = (
            {} if flash else {"transformers, flash_attention_2": "flash-attn is not installed, or there is no GPU"}
        )
        kernels = ("sdpa", "flash_attention_2") if flash else ("sdpa",)
        return cls(hf, HookedVLM.from_hf(hf), device, kernels, lacking)

    def reference(self, work: Callable[..., object], *arguments: Any, **named: Any) -> dict[str, Callable[[], object]]:
        """`transformers` with each kernel."""

        def with_kernel(kernel: str) -> object:
            self.hf.set_attn_implementation(kernel)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return work(*arguments, **named)

        return {f"transformers, {kernel}": partial(with_kernel, kernel) for kernel in self.kernels}


@dataclass
class Prepared:
    """A section that is ready to be timed."""

    bench: Bench
    ways: Ways
    numbers: dict[str, float] = field(default_factory=dict)
    """Numbers beside the times: differences, counts."""
    after: Callable[[Mapping[str, Timing]], dict[str, Any]] = lambda timings: {}
    """What follows from the times."""
    timings: Mapping[str, Timing] = field(default_factory=dict)

    def first_seconds(self) -> float:
        """Time of one more round: the second call of every method, since the first loads kernels."""
        total = 0.0
        for work in self.ways.values():
            work()
            _synchronise(self.bench.device)
            start = time.perf_counter()
            work()
            _synchronise(self.bench.device)
            total += time.perf_counter() - start
        return total

    def measured(self, rounds: int) -> dict[str, Any]:
        self.timings = measure(self.ways, rounds, self.bench.device)
        more = self.after(self.timings)
        numbers = {**self.numbers, **more.pop("numbers", {})}
        return {"methods": ratios(self.timings), "numbers": numbers, "rounds": rounds, **more}


def forward_one(bench: Bench) -> Prepared:
    return _forward(bench, ONE_IMAGE)


def forward_mixed(bench: Bench) -> Prepared:
    return _forward(bench, MIXED)


def _forward(bench: Bench, grids: list[tuple[int, int]]) -> Prepared:
    """Forward passes, and how far logits are from those of `transformers`, as a share of their largest."""
    batch = batch_of(grids, bench.device)
    inputs = bench.ours.inputs_from_hf(batch)
    reference = bench.hf(**batch).logits.float()
    real = batch["attention_mask"].bool()
    difference = (reference - bench.ours(inputs).float()).abs()[real].max() / reference[real].abs().max()
    ways = {
        **bench.reference(bench.hf, **batch),
        "hooked_vlm": partial(bench.ours, inputs),
        "hooked_vlm, logits_at='last'": partial(bench.ours, inputs, logits_at="last"),
    }
    return Prepared(bench, ways, {"largest difference of logits, share of the largest": difference.item()})


def hooks(bench: Bench) -> Prepared:
    """Hooks, and caching, beside a plain forward of our own."""
    inputs = bench.ours.inputs_from_hf(batch_of(ONE_IMAGE, bench.device))
    layers = range(bench.ours.cfg.n_layers)

    def hooked(name: str) -> Callable[[], object]:
        pairs = [(f"blocks.{layer}.{name}", lambda x, hook: x) for layer in layers]
        return partial(bench.ours.run_with_hooks, inputs, fwd_hooks=pairs)

    ways = {
        "hooked_vlm": partial(bench.ours, inputs),
        "a hook on every hook_resid_post": hooked("hook_resid_post"),
        "a hook on every hook_z": hooked("attn.hook_z"),
        "run_with_cache": partial(bench.ours.run_with_cache, inputs),
        "run_with_cache of residual streams": partial(
            bench.ours.run_with_cache, inputs, names_filter=lambda name: name.endswith("hook_resid_post")
        ),
    }
    return Prepared(bench, ways)


def swept(bench: Bench) -> Prepared:
    """Single-head image-to-text ablations: the sweep, and the loop over some of them."""
    inputs = bench.ours.inputs_from_hf(batch_of(ONE_IMAGE, bench.device))
    heads = all_heads(bench.ours)
    step = max(1, len(heads) // SWEPT)
    runs: list[Intervention] = [ReplaceImageKV((head,)) for head in heads[::step][:SWEPT]]
    some, metric = runs[:: max(1, len(runs) // LOOPED)], logit(5)

    def loop() -> torch.Tensor:
        outputs = [bench.ours.run_with_hooks(inputs, fwd_hooks=run.hooks(bench.ours, inputs)) for run in some]
        return torch.stack([metric(logits[:, -1]) for logits in outputs])

    values = sweep(bench.ours, inputs, runs, metric).values[:: max(1, len(runs) // LOOPED)]
    difference = (values.float().cpu() - loop().float().cpu()).abs().max().item()
    ways = {
        "a plain forward": partial(bench.ours, inputs, logits_at="last"),
        f"sweep of {len(runs)}": partial(sweep, bench.ours, inputs, runs, metric),
        f"loop over {len(some)} of them": loop,
    }

    def after(timings: Mapping[str, Timing]) -> dict[str, Any]:
        _, ours, theirs = (timings[name].seconds for name in ways)
        return {"numbers": {"times faster than the loop over all": theirs * len(runs) / len(some) / ours}}

    return Prepared(bench, ways, {"largest difference of the metric from the loop's": difference}, after)


def generation(bench: Bench) -> Prepared:
    batch = batch_of(ONE_IMAGE, bench.device)
    inputs = bench.ours.inputs_from_hf(batch)
    pairs = [(f"blocks.{layer}.attn.hook_z", lambda z, hook: z) for layer in range(bench.ours.cfg.n_layers)]
    fixed = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    ways = {
        **bench.reference(bench.hf.generate, **batch, **fixed),
        "hooked_vlm": partial(bench.ours.generate, inputs, NEW_TOKENS, stop_at_eos=False),
        "hooked_vlm, a hook on every hook_z": partial(
            bench.ours.generate, inputs, NEW_TOKENS, stop_at_eos=False, fwd_hooks=pairs
        ),
    }
    return Prepared(bench, ways)


def memory(bench: Bench) -> Prepared:
    """Peak memory of a long prompt, beyond the weights."""
    side = LARGE[bench.device.partition(":")[0]]
    batch = batch_of([(side, side)], bench.device)
    inputs = bench.ours.inputs_from_hf(batch)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(bench.ours.cfg.n_layers)]
    ways = {
        **bench.reference(bench.hf, **batch, logits_to_keep=1),
        "hooked_vlm, logits_at='last'": partial(bench.ours, inputs, logits_at="last"),
        "hooked_vlm, a hook on every hook_resid_post": partial(
            bench.ours.run_with_hooks, inputs, fwd_hooks=[(name, lambda x, hook: None) for name in names],
            logits_at="last",
        ),
    }  # fmt: skip
    return Prepared(bench, ways, {"tokens": inputs.shape[1]})


def host(bench: Bench) -> Prepared:
    """A short prompt: time until the call returns, before the device has finished, as a share of the whole."""
    batch = batch_of([(8, 8)], bench.device, n_text=16)
    inputs = bench.ours.inputs_from_hf(batch)
    ways = {**bench.reference(bench.hf, **batch), "hooked_vlm": partial(bench.ours, inputs)}

    def after(timings: Mapping[str, Timing]) -> dict[str, Any]:
        shares = {f"host's share, {name}": _host_share(work, bench.device) for name, work in ways.items()}
        return {"numbers": shares, "functions": _functions(ways["hooked_vlm"])}

    return Prepared(bench, ways, after=after)


def _host_share(work: Callable[[], object], device: str, times: int = 5) -> float:
    """Median share of a call's time after which it returns: near 1 where the device waits for the host."""
    found = []
    for _ in range(times):
        _synchronise(device)
        start = time.perf_counter()
        work()
        returned = time.perf_counter()
        _synchronise(device)
        found.append((returned - start) / (time.perf_counter() - start))
    return sorted(found)[times // 2]


def _functions(work: Callable[[], object]) -> list[dict[str, Any]]:
    """Python functions of a forward that take most time themselves, under the profiler."""
    profile = cProfile.Profile()
    profile.runcall(work)
    rows = [
        {"function": f"{file.rpartition('/')[2]}:{line} {name}", "calls": calls, "seconds": own}
        for (file, line, name), (_, calls, own, _, _) in pstats.Stats(profile).stats.items()  # pyright: ignore
    ]
    return sorted(rows, key=lambda row: -row["seconds"])[:FUNCTIONS]


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


SECTIONS: dict[str, Callable[[Bench], Prepared]] = {
    "forward, one image of 256 tokens": forward_one,
    "forward, 8 prompts with images of mixed sizes": forward_mixed,
    "hooks and caching": hooks,
    "single-head image-to-text ablations": swept,
    f"{NEW_TOKENS} tokens generated after one image": generation,
    "memory, one large image": memory,
    "the host's share, one prompt of 34 tokens": host,
}
"""In order of importance."""
