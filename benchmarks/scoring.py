"""Attention of every head at every generated token: ours, and `generate(output_attentions=True)` with eager attention.

python benchmarks/scoring.py [--device cuda] [--dtype bfloat16] [--model 2b] [--rounds 7]
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from interleaved import measure, ratios, read_settings, save, show
from live import LiveTensors
from models import MODELS, batch_of

from hooked_vlm import HookedVLM
from hooked_vlm.analysis import attention_rows, generate_with_rows

NEW = 32


@torch.no_grad()
def main() -> None:
    settings = read_settings(__doc__)
    hf = MODELS[settings.model](settings.device, settings.torch_dtype)
    hf.set_attn_implementation("eager")
    ours = HookedVLM.from_hf(hf)
    batch = batch_of([(32, 32)], settings.device)
    inputs = ours.inputs_from_hf(batch)

    def reference() -> torch.Tensor:
        """Argmax [layer, head, token]."""
        settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        out = hf.generate(**batch, **settings, output_attentions=True, return_dict_in_generate=True)
        steps = [torch.stack([layer[0, :, -1].argmax(-1) for layer in step]) for step in out.attentions]
        return torch.stack(steps, dim=-1)

    def own() -> torch.Tensor:
        _, looks = generate_with_rows(ours, inputs, NEW, reduce=lambda rows: rows.argmax(-1), stop_at_eos=False)
        return looks[:, 0]

    n = inputs.shape[1]
    answer = ours.generate(inputs, NEW, stop_at_eos=False)[:, n:]

    def expected() -> torch.Tensor:
        """One pass over prompt and answer, as in the study if the model gives the expected answer."""
        predicted = []

        def predict(x: torch.Tensor, hook: Any) -> None:
            predicted.append(ours.unembed(x[:, n - 1 : -1]).argmax(-1))

        positions = torch.arange(n - 1, n + NEW - 1)[None]
        checked: Any = [("ln_final.hook_out", predict)]
        continued = inputs.append(answer)
        looks = attention_rows(ours, continued, positions, reduce=lambda rows: rows.argmax(-1), fwd_hooks=checked)
        assert predicted[0].equal(answer)
        return looks[:, 0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        differing = (reference() != own()).float().mean().item()
        ways = {
            "transformers, eager, output_attentions": reference,
            "hooked_vlm, rows while generating": own,
            "hooked_vlm, the answer as expected": expected,
        }
        measured = measure(ways, max(3, settings.rounds // 2), settings.device)
    show(f"one page of 256 image tokens, {NEW} tokens generated ({differing:.2%} of the argmaxes differ)", measured)
    hf.set_attn_implementation("sdpa")
    length: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    theirs = live_bytes(lambda: hf.generate(**batch, **length))
    plain = live_bytes(lambda: ours.generate(inputs, NEW, stop_at_eos=False))
    hf.set_attn_implementation("eager")
    beyond = {way: live_bytes(run) - (theirs if run is reference else plain) for way, run in ways.items()}
    print("tensors alive together, beyond those of plain generation")
    for way, extra in beyond.items():
        print(f"  {way:52s} {extra / 2**20:6.2f} MiB, {max(extra, 0) / beyond[next(iter(ways))]:.2f} of the first")
    save(settings, "scoring", {"one page": ratios(measured), "bytes beyond plain generation": beyond})


def live_bytes(run: Callable[[], Any]) -> int:
    """Peak memory of the tensors."""
    with LiveTensors() as alive:
        run()
    return alive.peak


if __name__ == "__main__":
    main()
