"""Forward passes, caching and generation beside `transformers` (sdpa), on a random model of middle size.

python benchmarks/forward.py [--device cuda] [--dtype bfloat16] [--rounds 9]
"""

import argparse
import warnings
from typing import Any

import torch
from interleaved import ratios, show
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from hooked_vlm import HookedVLM, VLMInputs
from hooked_vlm.attention_rows import attention_rows

IMAGE, START, END = 1000, 1002, 1003


def middle_size_model(device: str, dtype: torch.dtype) -> Any:
    """8 layers, 8 heads (2 key-value heads), d_model 512; a vision tower of 4 layers."""
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 1100,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16384,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": 1,
            "eos_token_id": 1099,
            "pad_token_id": 0,
        },
        vision_config={"depth": 4, "embed_dim": 320, "hidden_size": 512, "num_heads": 4},
        image_token_id=IMAGE,
        video_token_id=1001,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    model: Any = Qwen2VLForConditionalGeneration(config)
    return model.to(device, dtype).eval()


def batch_of(grids: list[tuple[int, int]], device: str, n_text: int = 32) -> dict[str, torch.Tensor]:
    """One prompt for each grid of patches (rows, columns), as a Hugging Face processor returns it."""
    rows = [[START, *[IMAGE] * (h * w // 4), END, *range(2, 2 + n_text)] for h, w in grids]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    pixels = torch.randn(sum(h * w for h, w in grids), 1176, generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([(1, h, w) for h, w in grids]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


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
