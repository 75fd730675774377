"""Load a checkpoint here and in `transformers`, compare, and record the result."""

import copy
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from hooked_vlm.analysis.text_tables import size
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.loading.folders import find_checkpoint
from hooked_vlm.model.fingerprints import provenance
from hooked_vlm.model.hook_shapes import prompt_with_picture
from hooked_vlm.model.memory import memory_plan
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.files import atomic_write, writable_folder
from hooked_vlm.sweeps.plan import free_memory
from hooked_vlm.verify.compare import cost, differences, equal_tokens, pixels, prompt_tokens, rounding_errors
from hooked_vlm.verify.config import VerifyConfig
from hooked_vlm.verify.prompt_suite import bounded_processor, inputs_for, prompts
from hooked_vlm.verify.reference import Reference, reference_for, reference_processor, reference_prompt
from hooked_vlm.verify.result import Row, Verification

LONGEST_PROMPT = 2048
"""Tokens assumed for the memory estimate before loading."""
OLDEST_REFERENCE = (5, 23)
"""Release of `transformers` from which on it agrees; before, see docs/references.md."""


def verify(config: VerifyConfig) -> Verification:
    """Load the checkpoint twice, compare, and write `config.out`.

    Raises:
        InputError: `transformers` is too old, there is nothing to compare with, or both models do not fit into memory.
        CheckpointError, OutputError: the checkpoint cannot be loaded, the file not written.
    """
    if config.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, got {config.max_new_tokens}")
    check_release(transformers.__version__)
    writable_folder(config.out.parent)
    _say(config, room_for_both(config))
    folder = find_checkpoint(config.model)
    dtype: torch.dtype = getattr(torch, config.dtype)
    model = HookedVLM.from_pretrained(config.model, device=config.device, dtype=dtype)
    if model.tokenizer is None:
        raise InputError(f"{config.model} has no tokenizer, which the prompts need: verify a folder with a tokenizer")
    reference = reference_for(model, folder)
    _say(config, f"reference: {reference.description}\n")
    found = compare(model, reference, folder, config)
    atomic_write(
        config.out, lambda path: path.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
    )
    return found


def check_release(release: str) -> None:
    """Refuse a release of `transformers` that is no reference: its numbers differ from those of the published models.

    Raises:
        InputError: it is older than `OLDEST_REFERENCE`.
    """
    if tuple(map(int, release.split(".")[:2])) < OLDEST_REFERENCE:
        oldest = ".".join(map(str, OLDEST_REFERENCE))
        raise InputError(
            f"the comparison needs transformers {oldest} or newer, found {release}, whose transparent "
            "pictures and numbers of Gemma 3 and PaliGemma 2 differ (docs/references.md): pip install -U transformers"
        )


def compare(model: HookedVLM, reference: Reference, folder: Path, config: VerifyConfig) -> Verification:
    """Run all comparisons of two loaded models; `folder` has the checkpoint's image settings and chat template."""
    asked = prompts(config.seed, config.quick)
    if model.cfg.vision is None:
        asked = [prompt for prompt in asked if not prompt.pictures]
    inputs = [inputs_for(model, prompt).to(model.cfg.device) for prompt in asked]
    exact_dtype = None
    rows: list[Row] = []
    if model.cfg.vision is not None:
        rows.append(pixels(model, reference_processor(model, folder), asked))
    if (render := reference_prompt(model, folder)) is not None:
        rows.append(prompt_tokens(model, render, asked, inputs))
    if config.dtype == "float32":
        rows += differences(model, reference, _bar(config, inputs, "tensors"))
    else:
        exact_dtype = _exact_dtype(model)
        exact = replace(reference, model=copy.deepcopy(reference.model).to(exact_dtype))
        rows += rounding_errors(model, reference, exact, _bar(config, inputs, "rounding errors"))
        del exact
    must = config.dtype == "float32"
    answers = _bar(config, inputs, "greedy tokens")
    rows.append(equal_tokens(model, reference, answers, config.max_new_tokens, must))
    if not config.quick:
        rows += cost(model, reference, inputs[-1])
    record = {
        **provenance(model),
        "seed": config.seed,
        "matmul precision": torch.get_float32_matmul_precision(),
        "errors against": None if exact_dtype is None else str(exact_dtype).removeprefix("torch."),
        "prompts": {prompt.name: own.shape[1] for prompt, own in zip(asked, inputs, strict=True)},
        "max_new_tokens": config.max_new_tokens,
    }
    return Verification(config.model, reference.description, config.dtype, tuple(rows), record)


def room_for_both(config: VerifyConfig) -> str:
    """Memory that both models need, reported before loading.

    Raises:
        InputError: it is more than is free.
    """
    model = HookedVLM.without_weights(config.model)
    dtype: torch.dtype = getattr(torch, config.dtype)
    if model.image_processor is not None:
        model.image_processor = bounded_processor(model)
    prompt = prompt_with_picture(model, min(LONGEST_PROMPT, model.cfg.n_ctx_limit))
    plan = memory_plan(model, prompt, dtype)
    # the reference keeps every residual stream and pattern, this library every activation
    patterns = model.cfg.n_layers * model.cfg.n_heads * prompt.n_tokens**2 * dtype.itemsize
    exact = 0 if config.dtype == "float32" else _bytes_in(model, torch.float32)
    needed = 2 * (plan.weights + plan.kv_cache + plan.activations) + plan.full_cache + patterns + exact
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    free = free_memory(device)
    said = f"both models need up to {size(needed)} on {device}, {size(free)} are free"
    if needed > free:
        hint = "" if config.dtype != "float32" else ": try --dtype bfloat16, or another --device"
        raise InputError(said + hint)
    return said


def _exact_dtype(model: HookedVLM) -> torch.dtype:
    """Highest precision in which a third copy of the model fits."""
    fits = 1.2 * _bytes_in(model, torch.float64) < free_memory(model.cfg.device)
    return torch.float64 if fits else torch.float32


def _bytes_in(model: torch.nn.Module, dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())


def _bar(config: VerifyConfig, inputs: list[VLMInputs], name: str) -> Iterable[VLMInputs]:
    """The inputs, with a bar on stderr that counts them and goes away."""
    return tqdm(inputs, name, leave=False, unit="prompt", disable=config.quiet)


def _say(config: VerifyConfig, text: str) -> None:
    if not config.quiet:
        print(text)
