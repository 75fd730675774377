"""Forward passes of every family beside `transformers` (sdpa, or eager where it refuses that), and sweeps over heads in
plain forwards.

python benchmarks/families.py [--device cuda] [--dtype bfloat16] [--rounds 15]
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from family_models import CONFIGS, model_of, prompt_of
from interleaved import measure, ratios, read_settings, save, show
from sweeps import against_forward

from hooked_vlm import HookedVLM
from hooked_vlm.interventions import Intervention, ReplaceImageKV, all_heads

SWEPT = ("Qwen3-VL", "LLaVA-OneVision")


@torch.no_grad()
def main() -> None:
    settings = read_settings(__doc__, rounds=15)
    tables: dict[str, Any] = {}
    for family in CONFIGS:
        hf = model_of(family, settings.device, settings.torch_dtype)
        ours = HookedVLM.from_hf(hf)
        batch = prompt_of(family, ours, settings.device)
        inputs = ours.inputs_from_hf(batch)
        difference = (hf(**batch).logits - ours(inputs)).abs().max().item()
        measured = measure(
            {
                f"transformers, {hf.config._attn_implementation}": partial(hf, **batch),
                "hooked_vlm": partial(ours, inputs),
            },
            settings.rounds,
            settings.device,
            warmup=2,
            memory=False,
        )
        title = f"{family}, {inputs.shape[1]} tokens"
        show(f"{title} (logits differ by {difference:.1e})", measured)
        tables[title] = ratios(measured)
        if family in SWEPT:
            one_each: list[Intervention] = [ReplaceImageKV((head,)) for head in all_heads(ours)]
            found = against_forward(ours, inputs, one_each, replace(settings, rounds=max(3, settings.rounds // 3)))
            tables[f"{family}, {len(one_each)} single-head image-to-text ablations"] = found
    save(settings, "families", tables)


if __name__ == "__main__":
    main()
