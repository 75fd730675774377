"""Ablation sweeps against plain forward passes and the naive loop over `run_with_hooks`.

python benchmarks/sweeps.py [--device cuda] [--dtype bfloat16] [--model 2b] [--rounds 5]
"""

from functools import partial
from typing import Any

import torch
from interleaved import Settings, measure, read_settings, save, show
from models import MODELS, batch_of

from hooked_vlm import HookedVLM, sweep
from hooked_vlm.interventions import Intervention, ReplaceImageKV, ZeroHeads, all_heads
from hooked_vlm.metrics import logit
from hooked_vlm.sweeps.plan import make_plan

METRIC = logit(5)


def naive(model: Any, inputs: Any, interventions: list[Intervention]) -> torch.Tensor:
    """One forward pass per intervention."""
    values = [model.run_with_hooks(inputs, fwd_hooks=iv.hooks(model, inputs))[:, -1] for iv in interventions]
    return torch.stack([METRIC(value) for value in values])


def random_masks(model: Any, n: int, seed: int = 0) -> list[Intervention]:
    """A new random half of all heads for each run (arXiv 2509.17588)."""
    generator = torch.Generator().manual_seed(seed)
    heads = all_heads(model)
    return [
        ReplaceImageKV(tuple(heads[i] for i in torch.randperm(len(heads), generator=generator)[: len(heads) // 2]))
        for _ in range(n)
    ]


@torch.no_grad()
def main() -> None:
    settings = read_settings(__doc__)
    model = HookedVLM.from_hf(MODELS[settings.model](settings.device, settings.torch_dtype))
    tables = {}
    for grid in ((32, 32), (64, 64)):
        inputs = model.inputs_from_hf(batch_of([grid], settings.device))
        n_image = grid[0] * grid[1] // 4
        one_each: list[Intervention] = [ReplaceImageKV((head,)) for head in all_heads(model)]
        title = f"{len(one_each)} single-head image-to-text ablations, {n_image} image tokens"
        tables[title] = against_forward(model, inputs, one_each, settings)
        zeros: list[Intervention] = [ZeroHeads((head,)) for head in all_heads(model)]
        title = f"{len(zeros)} single-head zero ablations at all positions, {n_image} image tokens"
        tables[title] = against_forward(model, inputs, zeros, settings, naive_share=8)
    inputs = model.inputs_from_hf(batch_of([(32, 32)], settings.device))
    of_tower: list[Intervention] = [ZeroHeads((head,), tower="vision") for head in all_heads(model, tower="vision")]
    title = f"{len(of_tower)} single-head zero ablations in the vision tower, 256 image tokens"
    tables[title] = against_forward(model, inputs, of_tower, settings, naive_share=4)
    tables["1,000 random masks of half the heads, 256 image tokens"] = against_forward(
        model, inputs, random_masks(model, 1000), settings, naive_share=100
    )
    save(settings, "sweeps", tables)


def against_forward(
    model: Any, inputs: Any, interventions: list[Intervention], settings: Settings, naive_share: int = 8
) -> dict[str, Any]:
    """Times of a plain forward, the sweep, and the naive loop over every `naive_share`-th intervention."""
    some = interventions[::naive_share]
    found = sweep(model, inputs, interventions, METRIC)
    error = (found.values[::naive_share] - naive(model, inputs, some).cpu()).abs().max().item()
    scale = len(interventions) / len(some)
    plan = make_plan(model, inputs, interventions, logits_at="last")
    measured = measure(
        {
            "plain forward": partial(model, inputs),
            "sweep": partial(sweep, model, inputs, interventions, METRIC),
            f"naive loop over {len(some)}": partial(naive, model, inputs, some),
        },
        settings.rounds,
        settings.device,
    )
    names = list(measured)
    forward, swept, loop = (measured[name].seconds for name in names)
    n_layers, (_, n) = model.cfg.n_layers, inputs.shape
    title = f"{len(interventions)} runs on {n} tokens: {swept / forward:.2f} plain forwards"
    show(f"{title}; values differ from the loop's by {error:.1e}", measured)
    faster, fewer = loop * scale / swept, plan.naive_work / plan.work
    print(f"  the whole loop would take {scale:.0f} times as long: the sweep is {faster:.1f} times faster;")
    print(
        f"  positions x layers: {plan.work / (n * n_layers):.2f} plain forwards' (the loop: {fewer:.1f} times more)\n"
    )
    return {
        "forwards": swept / forward,
        "times faster than the loop": faster,
        "decoder work in forwards": plan.work / (n * n_layers),
        "largest difference": error,
        "seconds": {name: timing.seconds for name, timing in measured.items()},
        "extra bytes": {name: timing.extra_bytes for name, timing in measured.items()},
    }


if __name__ == "__main__":
    main()
