"""Rounding: in low precision no worse than the reference, in float32 the same whichever kernel runs."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, KINDS, tiny_model
from family_names import ONE_OF_EACH_KIND
from references import KV_CACHE, with_cache
from tiny import in_dtype, randomise
from tiny_gemma3 import with_offsets
from tiny_qwen2_vl import published_positions
from torch import Tensor

from hooked_vlm import HookedVLM
from hooked_vlm.converters import KNOWN_MODELS
from hooked_vlm.errors import PrecisionWarning

DRAWS = {"qwen3-vl": 24}
"""Draws of pictures and words where not 6 are enough: its ratios have a standard error of 0.02 over 6."""
EVERY_CASE = [
    pytest.param(name, case, marks=() if name in ONE_OF_EACH_KIND else pytest.mark.full, id=f"{name}-{case}")
    for name in FAMILIES
    for case in KINDS[name].cases
]

pytestmark = pytest.mark.filterwarnings("ignore::hooked_vlm.errors.PrecisionWarning")


def explicit(model: Any, inputs: Any) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks that leave every pattern as it is, in whose presence attention is written out."""
    names = [name for name in model.hook_dict if name.endswith("attn.hook_pattern")]
    return [(name, lambda pattern, hook: pattern) for name in names if not model.why_silent(name, inputs, {})]


def fused_attention_of(reference: Any) -> str:
    """The fused attention of a reference, or the written-out one where it has none (soft caps on scores)."""
    return "sdpa" if reference.get_decoder()._supports_sdpa else "eager"


@lru_cache(maxsize=2)
def rounded(kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The reference in `dtype`, and in float64 with the same rounded weights."""
    low = in_dtype(KINDS[kind].hf(), dtype)
    return low, deepcopy(low).double()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).pow(2).mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kind", "case"),
    [("qwen2-vl", "long-video"), *((kind, "images-of-two-sizes") for kind in KINDS if "tied" not in kind)],
)
@pytest.mark.parametrize("kernel", ["fused", "explicit"])
@torch.no_grad()
def test_rounding_errors_are_no_larger_than_the_references(
    kind: str, case: str, dtype: torch.dtype, kernel: str
) -> None:
    (low, exact), family = rounded(kind, dtype), KINDS[kind]
    low.set_attn_implementation("eager" if kernel == "explicit" else fused_attention_of(low))
    model = HookedVLM.from_hf(low)
    ours, theirs = [], []
    for seed in range(DRAWS.get(kind, 6)):
        batch = family.batch(family.cases[case], seed)
        ids = batch["input_ids"]
        batch["input_ids"] = torch.where(ids < 100, ids + 10 * (seed % 9), ids)
        given = family.for_hf(batch)
        truth = exact(**given).logits
        inputs = model.inputs_from_hf(batch)
        logits = model.run_with_hooks(inputs, fwd_hooks=explicit(model, inputs) if kernel == "explicit" else [])
        assert logits.dtype is dtype
        ours.append(difference(logits, truth))
        theirs.append(difference(low(**given).logits, truth))
    assert 0 < sum(ours) <= 1.03 * sum(theirs)


@pytest.mark.parametrize(("name", "case"), EVERY_CASE)
@torch.no_grad()
def test_float64_runs_in_float64(name: str, case: str) -> None:
    """`transformers` keeps its norms in float32 then, hence the 1e-6 and not 1e-12."""
    exact, batch = deepcopy(KINDS[name].hf()).double(), KINDS[name].batch(KINDS[name].cases[case])
    exact.set_attn_implementation(fused_attention_of(exact))  # its own mask of a padded row is infinite in float64
    model, real = HookedVLM.from_hf(exact), batch["attention_mask"].bool()
    inputs = model.inputs_from_hf(batch)
    fused = model(inputs)
    assert fused.dtype is torch.float64
    if model.cfg.bidirectional != "prompt":  # which has no loss over its prompt
        assert model(inputs, return_type="loss").dtype is torch.float64
    written_out = model.run_with_hooks(inputs, fwd_hooks=explicit(model, inputs))
    torch.testing.assert_close(fused[real], written_out[real], atol=1e-12, rtol=0)
    theirs = exact(**KINDS[name].for_hf(batch)).logits
    torch.testing.assert_close(fused[real], theirs[real], atol=5e-6, rtol=0)


@pytest.mark.parametrize(("name", "case"), EVERY_CASE)
@torch.no_grad()
def test_the_two_kernels_agree_in_float32(name: str, case: str) -> None:
    model, batch = tiny_model(name), KINDS[name].batch(KINDS[name].cases[case])
    inputs, real = model.inputs_from_hf(batch), batch["attention_mask"].bool()
    written_out = model.run_with_hooks(inputs, fwd_hooks=explicit(model, inputs))
    torch.testing.assert_close(written_out[real], model(inputs)[real], atol=1e-5, rtol=0)


# ---------------------------------------------------------------- every family, long texts, the cache, the towers

LONG, STEPS = 320, 24
"""Tokens of the long texts, an image among them; the last so many also go one by one through a key-value cache."""

PICTURES = {
    "qwen2-vl": ("image", (1, 8, 6)),
    "qwen2.5-vl": ("image", (1, 8, 6)),
    "qwen3-vl": ("image", (1, 16, 12)),
}
"""Of the long texts, where "large" is few tokens."""
LEAST = {"made-up": 0.85}
"""Smallest ratio, where not 0.9: the made-up reference pools patches otherwise, with larger errors."""


@lru_cache(maxsize=4)
def long_family(family: str, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """The reference in `dtype`, in float64 with the same rounded weights, and ours in `dtype`; room for long texts."""
    shared = KINDS[family].hf()
    config = deepcopy(shared.config)
    config.text_config.max_position_embeddings = 512
    hf = type(shared)._from_config(config, attn_implementation="eager").eval()
    randomise(hf)
    low = in_dtype(with_offsets(hf), dtype)
    return low, deepcopy(low).double(), HookedVLM.from_hf(low)


def long_batch(family: str, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A long text about an image, and what the reference takes."""
    kind, generator = KINDS[family], torch.Generator().manual_seed(seed)
    words = torch.randint(4, 99, (LONG,), generator=generator).tolist()
    picture = PICTURES.get(family, kind.images["large"])
    batch = kind.batch([[*words[:40], picture, *words[40:]]], seed)
    given = kind.for_hf(batch)
    if "image_grid_thw" in batch:  # the reference's own, which it would count anew in each step
        given = {**given, "position_ids": published_positions(batch)}
    return batch, given


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
@pytest.mark.repeats_shapes
@torch.no_grad()
def test_over_long_texts_and_through_the_cache_errors_are_no_larger_than_the_references(
    family: str, dtype: torch.dtype
) -> None:
    """Like against like: either kernel, the last tokens through either's own cache, the vision tower.

    Both round in the same places, so what is left is chance: over these texts the ratios' standard errors are below
    0.02. Rotary frequencies rounded on one side alone make 1.04 to 1.1, through the cache 1.06 to 1.2.
    """
    low, exact, model = long_family(family, dtype)
    ours: dict[str, float] = dict.fromkeys(("fused", "explicit", "cache", "vision tower"), 0.0)
    theirs = dict.fromkeys(ours, 0.0)
    for seed in range(6):
        batch, for_reference = long_batch(family, seed)
        truth = exact(**for_reference).logits
        truths = {"fused": truth, "explicit": truth, "cache": truth[:, -STEPS:]}
        truths["vision tower"] = image_features(exact, for_reference)
        for total, found in ((ours, our_logits(model, batch)), (theirs, their_logits(low, for_reference))):
            for name, value in found.items():
                total[name] += difference(value, truths[name])
    ratios = {name: ours[name] / theirs[name] for name in ours}
    print(f"\n{family}, {dtype}:", {name: round(ratio, 4) for name, ratio in ratios.items()})
    assert all(LEAST.get(family, 0.9) < ratio <= 1.03 for ratio in ratios.values()), ratios


def our_logits(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    prompt = model.inputs_from_hf(batch)
    fused, cache = model.run_with_cache(prompt, names_filter="hook_image_features")
    n = prompt.shape[1] - STEPS
    past = model.new_kv_cache(1, prompt.shape[1])
    model(replace(prompt, tokens=prompt.tokens[:, :n], attention_mask=prompt.attention_mask[:, :n]), past_kv_cache=past)
    steps = [model.next_logits(prompt.tokens[:, at], past) for at in range(n, n + STEPS)]
    return {
        "fused": fused,
        "explicit": model.run_with_hooks(prompt, fwd_hooks=explicit(model, prompt)),
        "cache": torch.stack(steps, 1),
        "vision tower": cache["hook_image_features"],
    }


def their_logits(low: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    low.set_attn_implementation("eager")
    found = {"explicit": low(**batch).logits}
    low.set_attn_implementation(fused_attention_of(low))
    found |= {"fused": low(**batch).logits, "vision tower": image_features(low, batch)}
    n = batch["input_ids"].shape[1] - STEPS
    of_tokens = ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids")
    begun = low(**{k: v[..., :n] if k in of_tokens else v for k, v in batch.items()}, **with_cache(None))
    past = getattr(begun, KV_CACHE)
    steps = []
    for at in range(n, n + STEPS):
        here = {k: batch[k][..., at : at + 1] for k in ("input_ids", "position_ids") if k in batch}
        seen = batch["attention_mask"][:, : at + 1]
        steps.append(low(**here, attention_mask=seen, **with_cache(past)).logits)
    return {**found, "cache": torch.cat(steps, 1)}


def image_features(reference: Any, batch: dict[str, Tensor]) -> Tensor:
    others = {name: batch[name] for name in ("image_grid_thw", "image_sizes", "batch_num_images") if name in batch}
    pictures = reference.model.get_image_features(batch["pixel_values"].to(reference.dtype), **others).pooler_output
    return torch.cat([features.flatten(0, -2) for features in pictures])


@pytest.mark.slow
@torch.no_grad()
def test_the_real_shape_of_qwen2_vl_2b_equals_the_reference() -> None:
    """Random weights in float32 (9 GB, shared by both): logits, every layer, the vision tower, greedy tokens."""
    config = transformers.Qwen2VLConfig(**KNOWN_MODELS["Qwen/Qwen2-VL-2B-Instruct"].config)
    config.dtype = torch.float32
    hf: Any = transformers.Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in hf.parameters():  # biases and norm weights start as zeros and ones
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model = HookedVLM.from_hf(hf)
    grid = torch.tensor([[1, 8, 12], [1, 6, 6]])
    ids = [151644, 872, 198, 151652, *[151655] * 24, 151653, 151652, *[151655] * 9, 151653, 3838, 374, 419, 30, 151645]
    batch = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(132, 1176, generator=generator),
        "image_grid_thw": grid,
    }
    batch["mm_token_type_ids"] = (batch["input_ids"] == 151655).int()
    theirs = hf(**batch, output_hidden_states=True)
    prompt = model.inputs_from_hf(batch)
    logits, cache = model.run_with_cache(
        prompt, names_filter=lambda name: name.endswith(("hook_resid_pre", "hook_image_features"))
    )
    features = hf.model.visual(batch["pixel_values"], grid_thw=grid).pooler_output
    errors = {
        "logits": logits - theirs.logits,
        "image features": cache["hook_image_features"].flatten(0, -2) - features,
    }
    errors |= {f"layer {i}": cache["resid_pre", i] - theirs.hidden_states[i] for i in range(28)}
    largest = {name: float(error.abs().max()) for name, error in errors.items()}
    print("\nlargest absolute differences:", largest)
    print(
        "largest logit:",
        float(theirs.logits.abs().max()),
        "largest residual:",
        float(theirs.hidden_states[27].abs().max()),
    )
    assert max(largest.values()) < 1e-4
    new = hf.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(prompt, 4), new)


@pytest.mark.parametrize("kind", ["gemma3", "paligemma2"])
def test_float16_is_warned_of_where_activations_exceed_it(kind: str) -> None:
    model = deepcopy(tiny_model(kind))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.to(torch.bfloat16)
        assert not said
        model.half()
        HookedVLM.from_hf(in_dtype(KINDS[kind].hf(), torch.float16))
    warned = [str(one.message) for one in said if issubclass(one.category, PrecisionWarning)]
    assert len(warned) == (2 if kind == "gemma3" else 0)
    assert all("bfloat16" in text for text in warned)
