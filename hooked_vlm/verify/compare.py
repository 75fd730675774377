"""Forward passes of both models over the same inputs, and their differences."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.hooks import deepstack_points
from hooked_vlm.verify.allocation import Allocations
from hooked_vlm.verify.prompt_suite import Prompt
from hooked_vlm.verify.reference import Reference
from hooked_vlm.verify.result import Row

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

TOLERANCE = 1e-4
"""Logits, residual streams and image features, in float32, up to values of size 10; beyond, 1e-5 of the largest."""
PATTERN_TOLERANCE = 2e-5
PIXEL_TOLERANCE = 1e-6
RATIO = 1.1
"""Largest accepted ratio of our error to the reference's, in low precision."""
REPEATS = 3

Key = tuple[str, int | None]
"""Compared quantity and layer."""


def our_tensors(model: "HookedVLM", inputs: VLMInputs) -> Iterator[tuple[Key, Tensor]]:
    """Logits, residual streams, patterns, and the image side, named as `their_tensors` names them."""
    logits, cache = model.run_with_cache(inputs)
    yield ("logits", None), logits
    for layer in range(model.cfg.n_layers):
        yield ("residual stream", layer), cache["resid_pre", layer]
        yield ("attention pattern", layer), cache["pattern", layer]
    yield ("residual stream", model.cfg.n_layers), cache["ln_final.hook_out"]
    vision = model.cfg.vision
    if vision is None or not inputs.has_visuals:
        return
    yield ("image features", None), cache["hook_image_features"]
    for block, name in enumerate(deepstack_points(model.cfg.n_deepstack)):
        yield ("DeepStack features", block), cache[name].flatten(0, 1)[inputs.feature_slots]
    extra = inputs.spec.class_tokens
    lengths = [extra + h * w for t, h, w in inputs.grids for _ in range(t)]
    for layer in range(vision.n_layers_run):
        padded = cache[f"vision.blocks.{layer}.hook_resid_post"]
        yield ("vision residual stream", layer), torch.cat([p[:n] for p, n in zip(padded, lengths, strict=True)])


def their_tensors(reference: Reference, inputs: VLMInputs, attentions: bool) -> dict[Key, Tensor]:
    """The same of the reference; the last residual stream is the normalised one, as `transformers` has it."""
    seen: dict[Key, Tensor] = {}

    def keep(key: Key) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            tensor = out[0] if isinstance(out, tuple) else out
            seen[key] = reference.in_order(tensor.flatten(0, -2), inputs.grids)

        return hook

    def keep_embedded(_module: Any, _args: Any, kwargs: dict[str, Tensor]) -> None:
        seen["image features", None] = kwargs["inputs_embeds"].flatten(0, 1)[inputs.feature_slots]

    parts = [(("vision residual stream", i), block) for i, block in enumerate(reference.vision_blocks)]
    parts += [(("DeepStack features", i), projector) for i, projector in enumerate(reference.deepstack)]
    handles = [part.register_forward_hook(keep(key)) for key, part in parts]
    if reference.projector is not None:
        handles.append(reference.projector.register_forward_hook(keep(("image features", None))))
    if reference.packs:  # no module shows what is arranged, but it enters the language model
        language_model = reference.model.model.language_model
        handles.append(language_model.register_forward_pre_hook(keep_embedded, with_kwargs=True))
    try:
        batch = reference.batch(inputs)
        out = reference.model(**batch, output_hidden_states=True, output_attentions=attentions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    seen["logits", None] = out.logits
    for i, hidden in enumerate(out.hidden_states):  # kept before DeepStack's features enter
        entering = seen.get(("DeepStack features", i - 1))
        if entering is not None:
            hidden = hidden.flatten(0, 1).index_add(0, inputs.feature_slots, entering).view_as(hidden)
        seen["residual stream", i] = hidden
    seen |= {("attention pattern", i): p for i, p in enumerate(out.attentions or ())}
    return seen


@torch.no_grad()
def differences(model: "HookedVLM", reference: Reference, asked: Iterable[VLMInputs]) -> list[Row]:
    """Largest absolute difference of each tensor over all inputs, in the order of the forward pass."""
    worst: dict[Key, tuple[float, float]] = {}
    for inputs in asked:
        theirs = their_tensors(reference, inputs, attentions=True)
        for key, tensor in our_tensors(model, inputs):
            other = theirs[key].reshape(tensor.shape)
            largest, apart = float(other.abs().max()), float((tensor - other).abs().max())
            before = worst.get(key, (0.0, 0.0))
            apart = apart if apart == apart else float("inf")  # a difference that is no number is the worst there is
            worst[key] = (max(before[0], apart), max(before[1], largest))
    return [
        Row(name, apart, _tolerance(name, largest), layer=layer, largest=largest)
        for (name, layer), (apart, largest) in sorted(worst.items(), key=lambda item: (item[0][0], item[0][1] or 0))
    ]


def _tolerance(name: str, largest: float) -> float:
    return PATTERN_TOLERANCE if name == "attention pattern" else TOLERANCE * max(1.0, largest / 10)


@torch.no_grad()
def rounding_errors(
    model: "HookedVLM", reference: Reference, exact: Reference, asked: Iterable[VLMInputs]
) -> list[Row]:
    """Root mean squares of both models' errors against `exact`, summed over the inputs, as ratios.

    Both run their fused kernels.
    """
    sums: dict[Key, list[float]] = {}
    for inputs in asked:
        truth = their_tensors(exact, inputs, attentions=False)
        with attention(reference, "sdpa"):
            theirs = their_tensors(reference, inputs, attentions=False)
        for key, tensor in our_tensors(model, inputs):
            if key not in truth:
                continue  # patterns: the fused kernel has none
            both = sums.setdefault(key, [0.0, 0.0])
            both[0] += _rms(tensor.reshape(truth[key].shape), truth[key])
            both[1] += _rms(theirs[key], truth[key])
    rows = []
    for (name, layer), (ours, theirs) in sorted(sums.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        asked_of = RATIO if name in ("logits", "image features") else None
        rows.append(Row(name, ours / theirs if theirs else float(ours > 0), asked_of, "ratio", layer, reference=theirs))
    return rows


def _rms(tensor: Tensor, truth: Tensor) -> float:
    return float((tensor.double() - truth.double()).pow(2).mean().sqrt())


def equal_tokens(model: "HookedVLM", reference: Reference, asked: Iterable[VLMInputs], n_new: int, must: bool) -> Row:
    """Greedy tokens, counted up to the first that differs in each answer."""
    equal = total = 0
    stops = list(model.cfg.eos_token_ids)
    pad = model.input_spec().pad_token_id
    settings = GenerationConfig(max_new_tokens=n_new, do_sample=False, eos_token_id=stops or None, pad_token_id=pad)
    for inputs in asked:
        n = inputs.shape[1]
        ours = model.generate(inputs, n_new)[0, n:].tolist()
        out = reference.model.generate(**reference.batch(inputs), generation_config=settings)[0]
        theirs = out[n:].tolist()
        equal, total = equal + _n_same(ours, theirs), total + max(len(ours), len(theirs))
    return Row("greedy tokens", equal, total if must else None, "tokens", largest=total)


def _n_same(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Number of tokens before the first that differs."""
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def prompt_tokens(
    model: "HookedVLM", render: Callable[[Prompt], list[int]], asked: Sequence[Prompt], inputs: Sequence[VLMInputs]
) -> Row:
    """Tokens of the prompts, with one placeholder for each picture, up to the first that differs in each prompt."""
    equal = total = 0
    placeholder = model.cfg.image_token_id
    for prompt, own in zip(asked, inputs, strict=True):
        starts = {start for visual in own.visuals for start, _ in visual.runs}
        ours = [t for at, t in enumerate(own.tokens[0].tolist()) if t != placeholder or at in starts]
        theirs = render(prompt)
        equal, total = equal + _n_same(ours, theirs), total + max(len(ours), len(theirs))
    return Row("prompts", equal, total, "tokens", largest=total)


def pixels(model: "HookedVLM", processor: Callable[[Any], Any], asked: Sequence[Prompt]) -> Row:
    """Prepared pictures, under the checkpoint's own settings."""
    apart = 0.0
    for picture in {id(p): p for prompt in asked for p in prompt.pictures}.values():
        ours, grid, _ = model.image_processor([picture])
        theirs = processor(picture)
        same_grid = "image_grid_thw" not in theirs or torch.equal(grid, theirs["image_grid_thw"])
        if not same_grid or ours.shape != theirs["pixel_values"].shape:
            return Row("image preprocessing", float("inf"), PIXEL_TOLERANCE)
        apart = max(apart, float((ours - theirs["pixel_values"]).abs().max()))
    return Row("image preprocessing", apart, PIXEL_TOLERANCE)


# ---------------------------------------------------------------- cost


@contextmanager
def attention(reference: Reference, kernel: str) -> Iterator[None]:
    """Switch the reference's attention implementation within a `with` block, if every part of it has this one."""
    if all(getattr(part, "_supports_sdpa", True) for part in reference.model.modules()):
        reference.model.set_attn_implementation(kernel)
    try:
        yield
    finally:
        reference.model.set_attn_implementation("eager")


@torch.no_grad()
def cost(model: "HookedVLM", reference: Reference, inputs: VLMInputs) -> list[Row]:
    """Time (best of three) and peak memory beyond the weights of a forward pass, fused kernels if there are any."""
    batch = reference.batch(inputs)

    def ours() -> Tensor:
        return model(inputs)

    def theirs() -> Tensor:
        return reference.model(**batch, use_cache=False).logits

    with attention(reference, "sdpa"):
        seconds = [_seconds(run, inputs.device) for run in (ours, theirs)]
        peaks = [_peak(run) for run in (ours, theirs)]
    return [
        Row("time of a forward pass", seconds[0], None, "s", reference=seconds[1]),
        Row("peak memory of a forward pass", peaks[0], None, "bytes", reference=peaks[1]),
    ]


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    times = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _peak(run: Callable[[], Tensor]) -> int:
    with Allocations() as made:
        run()
    return made.peak
