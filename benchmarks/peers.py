"""The same head ablations with other libraries, in one process: nnsight, and TransformerLens' bridge.

Zeroing every head of one layer, one after the other, and reading the last token's logits. nnsight wraps the same
Qwen2-VL; the bridge supports Qwen2.5-VL, so there a model of the same sizes is taken and compared with its own plain
forward. What is not installed is left out (`pip install nnsight`).

python benchmarks/peers.py [--device cuda] [--rounds 5]
"""

import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from interleaved import Settings, measure, ratios, read_settings, save, show
from models import END, IMAGE, MODELS, START, batch_of

from hooked_vlm import HookedVLM, sweep
from hooked_vlm.interventions import ZeroHeads
from hooked_vlm.metrics import logit

LAYER, TOKEN = 3, 5


@torch.no_grad()
def main() -> None:
    settings = read_settings(__doc__)
    hf = MODELS[settings.model](settings.device, settings.torch_dtype)
    ours = HookedVLM.from_hf(hf)
    batch = batch_of([(32, 32)], settings.device)
    inputs = ours.inputs_from_hf(batch)
    runs = [ZeroHeads(((LAYER, head),)) for head in range(ours.cfg.n_heads)]

    def loop() -> torch.Tensor:
        logits = [ours.run_with_hooks(inputs, fwd_hooks=run.hooks(ours, inputs)) for run in runs]
        return torch.stack([x[:, -1, TOKEN] for x in logits])

    ways: dict[str, Any] = {
        "transformers, sdpa: one plain forward": partial(hf, **batch),
        "hooked_vlm: sweep": lambda: sweep(ours, inputs, runs, logit(TOKEN)).values,
        "hooked_vlm: loop over run_with_hooks": loop,
        "transformers: loop with pre-hooks": partial(prehook_loop, hf, batch),
    }
    if importlib.util.find_spec("nnsight"):
        ways["nnsight: loop over traces"] = partial(nnsight_loop, hf, batch)
    expected = ways["hooked_vlm: sweep"]()
    for name, way in list(ways.items())[2:]:
        print(f"{name} differs by {(way() - expected).abs().max().item():.1e}")
    measured = measure(ways, max(3, settings.rounds // 2), settings.device)
    show(f"zeroing each of the {len(runs)} heads of layer {LAYER}", measured)
    tables = {"heads of one layer": ratios(measured)}
    if importlib.util.find_spec("torchvision"):
        tables["bridge"] = bridge(settings)
    else:
        print("TransformerLens' bridge is left out: for Qwen2.5-VL it needs torchvision")
    save(settings, "peers", tables)


def prehook_loop(hf: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What is done without a library: a head's slice of what o_proj reads is zeroed."""
    o_proj, values = hf.model.language_model.layers[LAYER].self_attn.o_proj, []
    d_head = o_proj.in_features // 8
    for head in range(8):

        def zero(module: Any, args: tuple, head: int = head) -> tuple:
            z = args[0].clone()
            z[..., head * d_head : (head + 1) * d_head] = 0
            return (z,)

        handle = o_proj.register_forward_pre_hook(zero)
        values.append(hf(**batch).logits[:, -1, TOKEN])
        handle.remove()
    return torch.stack(values)


def nnsight_loop(hf: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    from nnsight import NNsight  # pyright: ignore[reportMissingImports]

    model, values = NNsight(hf), []
    d_head = hf.model.language_model.layers[LAYER].self_attn.o_proj.in_features // 8
    for head in range(8):
        part = slice(head * d_head, (head + 1) * d_head)
        with model.trace(**batch):
            model.model.language_model.layers[LAYER].self_attn.o_proj.input[..., part] = 0
            logits = model.output.logits[:, -1, TOKEN].save()
        values.append(logits)
    return torch.stack(values)


def bridge(settings: Settings) -> dict[str, Any]:
    """TransformerLens' bridge on a Qwen2.5-VL of the same sizes, against that model's own forward."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from hooked_vlm.experiments.toy.tokenizer import END_OF_TEXT, save_tokenizer

    config: Any = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 1100,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16384,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        vision_config={
            "depth": 4,
            "hidden_size": 320,
            "intermediate_size": 1280,
            "num_heads": 4,
            "out_hidden_size": 512,
            "fullatt_block_indexes": [0, 1, 2, 3],
        },
        image_token_id=IMAGE,
        video_token_id=1001,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    kind: Any = Qwen2_5_VLForConditionalGeneration
    hf = kind(config).to(settings.device, settings.torch_dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), (END_OF_TEXT, "<|im_start|>", "<|im_end|>"))
        config.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        bridged: Any = TransformerBridge.boot_transformers(
            folder, hf_model=hf, tokenizer=tokenizer, device=settings.device, dtype=settings.torch_dtype
        )
    batch = batch_of([(32, 32)], settings.device)
    more = {name: batch[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
    tokens = batch["input_ids"]
    own = kind(config).to(settings.device, settings.torch_dtype).eval()
    measured = measure(
        {
            "transformers, sdpa (Qwen2.5-VL)": partial(own, **batch),
            "TransformerLens' bridge": partial(bridged, tokens, **more),
            "TransformerLens' bridge, run_with_cache": partial(bridged.run_with_cache, tokens, **more),
        },
        max(3, settings.rounds // 2),
        settings.device,
    )
    show("TransformerLens' bridge", measured)
    return ratios(measured)


if __name__ == "__main__":
    main()
