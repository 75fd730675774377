"""Memory of a forward pass on long image sequences, with hooks on every residual: it grows linearly.

python benchmarks/memory.py [--device cuda] [--dtype bfloat16] [--model 2b]
"""

from functools import partial
from typing import Any

import torch
from interleaved import measure, ratios, read_settings, save, show
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
        inputs = inputs.with_image_features(ours.encode_images(inputs))  # the tower has its own square
        run = partial(ours.run_with_hooks, inputs, fwd_hooks=hooks, logits_at="last")
        title = f"{inputs.shape[1]:,} tokens"
        measured = measure({"residual hooks": run}, rounds=2, device=settings.device)
        show(title, measured)
        tables[title] = ratios(measured)
    save(settings, "memory", tables)


if __name__ == "__main__":
    main()
