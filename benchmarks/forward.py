"""Forward passes, caching and generation beside `transformers` (sdpa), on a random model of middle size.

python benchmarks/forward.py [--device cuda] [--dtype bfloat16] [--rounds 9]
"""

import argparse
import warnings
from typing import Any

import torch
from interleaved import ratios, show

from hooked_vlm import HookedVLM, VLMInputs
from hooked_vlm.attention_rows import attention_rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    hf = middle_size_model(arguments.device, getattr(torch, arguments.dtype))
    ours = HookedVLM.from_hf(hf)
    one = [(32, 32)]
    mixed = [(32, 32), (24, 32), (32, 24), (16, 32), (32, 16), (24, 24), (20, 32), (32, 20)]
    for title, grids in (("one image, 256 image tokens", one), ("8 prompts, images of mixed sizes", mixed)):
        batch = batch_of(grids, arguments.device)
        inputs = ours.inputs_from_hf(batch)
        difference = (hf(**batch).logits - ours(inputs)).abs()[batch["attention_mask"].bool()].max().item()
        measured = ratios(
            {
                "transformers, sdpa": lambda batch=batch: hf(**batch),
                "hooked_vlm": lambda inputs=inputs: ours(inputs),
                "hooked_vlm, logits_at='last'": lambda inputs=inputs: ours(inputs, logits_at="last"),
                "hooked_vlm, run_with_cache": lambda inputs=inputs: ours.run_with_cache(inputs),
            },
            arguments.rounds,
        )
        show(f"{title} (logits differ by {difference:.1e})", measured)
    generation(hf, ours, batch_of(one, arguments.device), arguments.rounds)


def generation(hf: Any, ours: HookedVLM, batch: dict[str, torch.Tensor], rounds: int) -> None:
    inputs = ours.inputs_from_hf(batch)
    hooks = [(f"blocks.{layer}.attn.hook_z", lambda z, hook: z) for layer in range(ours.cfg.n_layers)]
    settings = {"max_new_tokens": 32, "do_sample": False}

    def rows_of_answer(inputs: VLMInputs = inputs) -> None:
        tokens = ours.generate(inputs, 32, stop_at_eos=False)
        continued = inputs.append(tokens[:, inputs.shape[1] :])
        n = inputs.shape[1]
        attention_rows(ours, continued, torch.arange(n - 1, n + 31)[None])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = ratios(
            {
                "transformers, sdpa, cached": lambda: hf.generate(**batch, **settings, min_new_tokens=32),
                "hooked_vlm": lambda: ours.generate(inputs, 32, stop_at_eos=False),
                "hooked_vlm, a hook on every hook_z": lambda: ours.generate(
                    inputs, 32, stop_at_eos=False, fwd_hooks=hooks
                ),
                "hooked_vlm, then every head's row for each token": rows_of_answer,
            },
            max(3, rounds // 2),
        )
    show("32 tokens generated after one image", measured)


if __name__ == "__main__":
    main()
