"""Overhead of hooks where Python dominates the time: 28 layers of width 64, against `transformers`.

python benchmarks/overhead.py [--device cuda] [--dtype bfloat16] [--rounds 41]

A GPU at batch 1 waits for Python in the same way. Ratios are medians over rounds of the ratio within a round, in which
all ways take turns.
"""

import warnings
from functools import partial

import torch
from interleaved import Settings, measure, ratios, read_settings, save, show
from models import deep_model

from hooked_vlm import HookedVLM

N_TOKENS, N_NEW = 32, 24


@torch.no_grad()
def main() -> None:
    settings = read_settings(__doc__, rounds=41)
    hf = deep_model(settings.device, settings.torch_dtype)
    ours = HookedVLM.from_hf(hf)
    ids = torch.arange(2, 2 + N_TOKENS, device=settings.device)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = ours.inputs_from_hf(batch)
    hooks = [(f"blocks.{layer}.attn.hook_z", lambda z, hook: z) for layer in range(ours.cfg.n_layers)]
    difference = (hf(**batch).logits - ours(inputs)).abs().max().item()
    forward = {
        "transformers, sdpa": partial(hf, **batch),
        "hooked_vlm": partial(ours, inputs),
        "hooked_vlm, a hook on every hook_z": partial(ours.run_with_hooks, inputs, fwd_hooks=hooks),
        "hooked_vlm, run_with_cache": partial(ours.run_with_cache, inputs),
    }
    settled = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW, "do_sample": False}
    generation = {
        "transformers, sdpa, cached": partial(hf.generate, **batch, **settled),
        "hooked_vlm": partial(ours.generate, inputs, N_NEW, stop_at_eos=False),
        "hooked_vlm, a hook on every hook_z": partial(ours.generate, inputs, N_NEW, stop_at_eos=False, fwd_hooks=hooks),
    }
    run(settings, f"{N_TOKENS} tokens through 28 layers (logits differ by {difference:.1e})", forward, generation)


def run(settings: Settings, title: str, forward: dict, generation: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        passes = measure(forward, settings.rounds, settings.device, warmup=3, memory=False)
        steps = measure(generation, max(5, settings.rounds // 4), settings.device, memory=False)
    show(title, passes)
    show(f"{N_NEW} tokens generated", steps)
    save(settings, "overhead", {"forward": ratios(passes), "generation": ratios(steps)})


if __name__ == "__main__":
    main()
