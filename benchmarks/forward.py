"""Forward passes, caching and generation beside `transformers` (sdpa).

python benchmarks/forward.py [--device cuda] [--dtype bfloat16] [--model 2b] [--rounds 7]
"""

import warnings
from functools import partial
from typing import Any

import torch
from interleaved import Settings, Timing, measure, ratios, read_settings, save, show
from models import MODELS, batch_of

from hooked_vlm import HookedVLM

GRIDS = {
    "one image, 256 image tokens": [(32, 32)],
    "8 prompts, images of mixed sizes": [
        (32, 32), (24, 32), (32, 24), (16, 32), (32, 16), (24, 24), (20, 32), (32, 20),
    ],
}  # fmt: skip


@torch.no_grad()
def main() -> None:
    settings = read_settings(__doc__)
    hf = MODELS[settings.model](settings.device, settings.torch_dtype)
    ours = HookedVLM.from_hf(hf)
    tables = {}
    for title, grids in GRIDS.items():
        batch = batch_of(grids, settings.device)
        inputs = ours.inputs_from_hf(batch)
        difference = (hf(**batch).logits - ours(inputs)).abs()[batch["attention_mask"].bool()].max().item()
        measured = measure(
            {
                "transformers, sdpa": partial(hf, **batch),
                "hooked_vlm": partial(ours, inputs),
                "hooked_vlm, logits_at='last'": partial(ours, inputs, logits_at="last"),
                "hooked_vlm, run_with_cache": partial(ours.run_with_cache, inputs),
            },
            settings.rounds,
            settings.device,
        )
        show(f"{title} (logits differ by {difference:.1e})", measured)
        tables[title] = ratios(measured)
    tables["32 tokens generated after one image"] = ratios(generation(hf, ours, settings))
    save(settings, "forward", tables)


def generation(hf: Any, ours: HookedVLM, settings: Settings) -> dict[str, Timing]:
    batch = batch_of([(32, 32)], settings.device)
    inputs = ours.inputs_from_hf(batch)
    hooks = [(f"blocks.{layer}.attn.hook_z", lambda z, hook: z) for layer in range(ours.cfg.n_layers)]
    reference = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = measure(
            {
                "transformers, sdpa, cached": partial(hf.generate, **batch, **reference),
                "hooked_vlm": partial(ours.generate, inputs, 32, stop_at_eos=False),
                "hooked_vlm, a hook on every hook_z": partial(
                    ours.generate, inputs, 32, stop_at_eos=False, fwd_hooks=hooks
                ),
            },
            max(3, settings.rounds // 2),
            settings.device,
        )
    show("32 tokens generated after one image", measured)
    return measured


if __name__ == "__main__":
    main()
