"""The same head ablations with other libraries, in one process: nnsight, and TransformerLens' bridge.

Zeroing every head of one layer, one after the other, and reading the last token's logits. nnsight wraps the same
Qwen2-VL; the bridge does not support it, so there a LLaVA of the same sizes is taken and compared with its own plain
forward. nnsight is left out where it is not installed (`pip install nnsight`).

python benchmarks/peers.py [--device cuda] [--rounds 5]
"""

import copy
import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from interleaved import Settings, measure, ratios, read_settings, save, show
from models import IMAGE, MODELS, batch_of

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
    tables["bridge"] = bridge(settings)
    save(settings, "peers", tables)


def prehook_loop(hf: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Baseline without a library: zero a head's slice of the input of o_proj."""
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
    """TransformerLens' bridge on a LLaVA of the same sizes, against that model's own forward."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources.transformers import helpers
    from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

    from tools.toy_training.tokenizer import END_OF_TEXT, save_tokenizer

    config: Any = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 1100,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16384,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 320,
            "intermediate_size": 1280,
            "num_hidden_layers": 5,  # the last is not used
            "num_attention_heads": 4,
            "image_size": 224,
            "patch_size": 14,
            "projection_dim": 512,
        },
        image_token_index=IMAGE,
        image_seq_length=256,
        architectures=["LlavaForConditionalGeneration"],
    )
    torch.manual_seed(0)
    kind: Any = LlavaForConditionalGeneration
    hf = kind(config).to(settings.device, settings.torch_dtype).eval()
    own = copy.deepcopy(hf)
    # where torchvision is missing the bridge would install it, and with it another PyTorch, into this environment
    helpers._ensure_torchvision = lambda: False
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), (END_OF_TEXT, "<|im_start|>", "<|im_end|>"))
        config.save_pretrained(folder)
        bridged: Any = TransformerBridge.boot_transformers(
            folder,
            hf_model=hf,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            device=settings.device,
            dtype=settings.torch_dtype,
        )
    text = torch.randint(10, 900, (34,))
    tokens = torch.cat((text[:2], torch.full((256,), IMAGE), text[2:]))[None].to(settings.device)
    pixels = torch.randn(1, 3, 224, 224, device=settings.device, dtype=settings.torch_dtype)

    def loop() -> torch.Tensor:
        values = []
        for head in range(8):

            def zero(z: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:
                z = z.clone()
                z.view(*z.shape[:2], 8, -1)[:, :, head] = 0
                return z

            hooks = [(f"blocks.{LAYER}.attn.hook_z", zero)]
            values.append(bridged.run_with_hooks(tokens, pixel_values=pixels, fwd_hooks=hooks)[:, -1, TOKEN])
        return torch.stack(values)

    difference = (loop() - prehook_loop(own, {"input_ids": tokens, "pixel_values": pixels})).abs().max().item()
    measured = measure(
        {
            "transformers, sdpa (LLaVA): one plain forward": partial(own, input_ids=tokens, pixel_values=pixels),
            "TransformerLens' bridge: one plain forward": partial(bridged, tokens, pixel_values=pixels),
            "TransformerLens' bridge: loop over run_with_hooks": loop,
        },
        max(3, settings.rounds // 2),
        settings.device,
    )
    show(f"TransformerLens' bridge (differs by {difference:.1e} from pre-hooks)", measured)
    return ratios(measured)


if __name__ == "__main__":
    main()
