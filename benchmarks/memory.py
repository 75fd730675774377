"""Memory of a forward pass on long image sequences, with hooks on every residual: it grows linearly.

python benchmarks/memory.py [--device cuda] [--dtype bfloat16] [--model 2b]
"""

from functools import partial
from typing import Any

import torch
from interleaved import read_settings, save
from live import LiveTensors
from models import MODELS, batch_of

from hooked_vlm import HookedVLM


@torch.no_grad()
def main() -> None:
    settings = read_settings(__doc__)
    hf = MODELS[settings.model](settings.device, settings.torch_dtype)
    ours = HookedVLM.from_hf(hf)
    hooks = [(f"blocks.{layer}.hook_resid_post", lambda x, hook: None) for layer in range(ours.cfg.n_layers)]
    tables: dict[str, Any] = {}
    for side in (88, 126, 180):  # patches; four to a token
        inputs = ours.inputs_from_hf(batch_of([(side, side)], settings.device))
        features = torch.randn(side * side // 4, ours.cfg.d_model, device=settings.device, dtype=settings.torch_dtype)
        inputs = inputs.with_image_features(features)  # the tower has a square of its own
        run = partial(ours.run_with_hooks, inputs, fwd_hooks=hooks, logits_at="last")
        with LiveTensors() as live:
            run()
        title = f"{inputs.shape[1]:,} tokens"
        print(
            f"{title}: {live.peak / 2**20:.0f} MiB, {live.peak / inputs.shape[1] / 2**10:.1f} KiB a token", flush=True
        )
        tables[title] = {"residual hooks": {"extra_bytes": live.peak}}
    save(settings, "memory", tables)


if __name__ == "__main__":
    main()
