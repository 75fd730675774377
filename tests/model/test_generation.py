"""Generation against `transformers` token for token, and its steps against one pass over prompt and answer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import PAD
from tiny_qwen2_vl import (
    LONG_VIDEO,
    ONE_IMAGE,
    PADDED,
    TEXT,
    TWO_IMAGES,
    VIDEO_CLIP,
    hf_batch,
    inputs,
    published_positions,
    tiny_hf,
    tiny_model,
)
from torch import Tensor

from hooked_vlm import HookedVLM, InputError, VLMInputs

N_NEW = 8
CASES = {
    "one-image": ONE_IMAGE,
    "images-of-two-sizes": TWO_IMAGES,
    "text": TEXT,
    "left-padded": PADDED,
    "video-and-image": VIDEO_CLIP,
}


def reference_tokens(rows: list[list[Any]], n: int = N_NEW, stop: int = -1, tied: bool = False) -> Tensor:
    """Prompt and new tokens, by `transformers`' own cached generation."""
    batch = hf_batch(rows)
    return tiny_hf(tied).generate(**batch, max_new_tokens=n, do_sample=False, eos_token_id=stop, pad_token_id=PAD)


def greedy_uncached(prompt: Any, n: int = N_NEW) -> Tensor:
    new = torch.zeros(len(prompt), 0, dtype=torch.long)
    for _ in range(n):
        logits = tiny_model()(prompt.append(new), logits_at="last")
        new = torch.cat((new, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return torch.cat((prompt.tokens, new), dim=1)


def with_stops(*stops: int) -> HookedVLM:
    model = HookedVLM.from_hf(tiny_hf())
    model.cfg = model.cfg.with_(eos_token_ids=stops)
    return model


# ---------------------------------------------------------------- greedy


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_greedy_tokens_equal_the_references(case: str, tied: bool) -> None:
    ours = tiny_model(tied).generate(inputs(CASES[case], tied=tied), N_NEW, stop_at_eos=False)
    assert torch.equal(ours, reference_tokens(CASES[case], tied=tied))


@pytest.mark.parametrize("case", [*CASES, "long-video"])
def test_the_cache_does_not_change_greedy_tokens(case: str) -> None:
    prompt = inputs({**CASES, "long-video": LONG_VIDEO}[case])
    assert torch.equal(tiny_model().generate(prompt, N_NEW, stop_at_eos=False), greedy_uncached(prompt))


@torch.no_grad()
def test_greedy_tokens_after_a_long_video_equal_the_references_at_the_published_positions() -> None:
    """Position ids are passed, since `transformers` 5 places text after a long video elsewhere."""
    batch = hf_batch(LONG_VIDEO)
    for _ in range(N_NEW):
        batch["mm_token_type_ids"] = 2 * (batch["input_ids"] == 101).int()
        new = tiny_hf()(**batch, position_ids=published_positions(batch)).logits[:, -1:].argmax(-1)
        batch["input_ids"] = torch.cat((batch["input_ids"], new), dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    ours = tiny_model().generate(inputs(LONG_VIDEO), N_NEW, stop_at_eos=False)
    assert torch.equal(ours, batch["input_ids"])


def test_encoded_images_generate_the_same_tokens() -> None:
    model, prompt = tiny_model(), inputs(PADDED)
    encoded = prompt.with_image_features(model.encode_images(prompt))
    assert torch.equal(model.generate(encoded, N_NEW), model.generate(prompt, N_NEW))


@pytest.mark.parametrize("row", range(3))
def test_a_row_generates_in_a_batch_what_it_generates_alone(row: int) -> None:
    model, batch = tiny_model(), inputs(PADDED)
    together = model.generate(batch, N_NEW, stop_at_eos=False)
    assert torch.equal(model.generate(batch[row], N_NEW, stop_at_eos=False)[0], together[row])


# ---------------------------------------------------------------- stopping


def test_rows_end_with_a_stop_token_and_are_padded_after_it_as_in_the_reference() -> None:
    free = reference_tokens(PADDED)[:, -N_NEW:]
    stop = int(free[0, 2])
    theirs = reference_tokens(PADDED, stop=stop)
    ours = with_stops(stop).generate(inputs(PADDED), N_NEW)
    assert torch.equal(ours, theirs)
    after = (ours[0, -N_NEW:] == stop).nonzero()[0] + 1
    assert ours[0, -N_NEW:][after:].eq(PAD).all()


def test_generation_ends_when_every_row_has_stopped() -> None:
    free = reference_tokens(PADDED)[:, -N_NEW:]
    model = with_stops(*free[:, 1].tolist())
    assert model.generate(inputs(PADDED), N_NEW).shape[1] <= inputs(PADDED).shape[1] + 2
    assert model.generate(inputs(PADDED), N_NEW, stop_at_eos=False).shape[1] == inputs(PADDED).shape[1] + N_NEW


def test_a_model_without_stop_tokens_generates_to_the_end() -> None:
    ours = with_stops().generate(inputs(ONE_IMAGE), N_NEW)
    assert torch.equal(ours, reference_tokens(ONE_IMAGE))


def test_generation_ends_with_the_context() -> None:
    model, prompt = with_stops(), inputs(TEXT)
    model.cfg = model.cfg.with_(n_ctx=prompt.shape[1] + 3)
    with pytest.warns(UserWarning, match=r"3.*context"):
        assert model.generate(prompt, N_NEW).shape[1] == prompt.shape[1] + 3
    model.cfg = model.cfg.with_(n_ctx=prompt.shape[1] - 1)
    with pytest.raises(InputError, match="context"):
        model.generate(prompt, N_NEW)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_p": 0.0},
        {"do_sample": True, "top_p": 1.5},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        tiny_model().generate(inputs(TEXT), **settings)


def test_rows_padded_at_the_end_are_refused() -> None:
    with pytest.raises(InputError, match="padded"):
        tiny_model().generate(inputs(PADDED).append([[5], [5, 6], [5]]))


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}], ids=str)
def test_sampling_from_the_likeliest_token_only_is_greedy(limit: dict[str, Any]) -> None:
    model, prompt = tiny_model(), inputs(PADDED)
    assert torch.equal(model.generate(prompt, N_NEW, do_sample=True, **limit), model.generate(prompt, N_NEW))


def test_a_seed_reproduces_the_sample() -> None:
    model, prompt = tiny_model(), inputs(ONE_IMAGE)

    def sample(seed: int) -> Tensor:
        return model.generate(prompt, N_NEW, do_sample=True, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(3), sample(3)) and not torch.equal(sample(3), sample(4))
    torch.manual_seed(5)
    first = model.generate(prompt, N_NEW, do_sample=True)
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompt, N_NEW, do_sample=True), first)


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [
        ({"top_k": 3}, lambda p: p.argsort(descending=True)[:3]),
        (
            {"top_p": 0.3},
            lambda p: p.argsort(descending=True)[: int((p.sort(descending=True).values.cumsum(0) < 0.3).sum()) + 1],
        ),
    ],
    ids=["top_k", "top_p"],
)
def test_samples_come_from_the_likeliest_tokens_in_their_proportions(limit: dict, allowed: Callable) -> None:
    model, prompt = tiny_model(), inputs(TEXT)
    probabilities = model(prompt)[0, -1].detach().softmax(-1)
    among = allowed(probabilities)
    repeated = VLMInputs(prompt.tokens.repeat(2000, 1), prompt.spec)
    drawn = model.generate(repeated, 1, do_sample=True, **limit)[:, -1]
    counts = torch.bincount(drawn, minlength=200) / 2000
    expected = torch.zeros(200).index_copy(0, among, probabilities[among] / probabilities[among].sum())
    assert counts[expected == 0].sum() == 0
    assert (counts - expected).abs().max() < 0.05  # four standard deviations


# ---------------------------------------------------------------- steps, hooks and the cache


@pytest.mark.parametrize("case", ["one-image", "left-padded", "video-and-image"])
def test_one_cached_run_over_prompt_and_answer_equals_the_steps_of_generation(case: str) -> None:
    model, prompt = tiny_model(), inputs(CASES[case])
    steps: dict[str, list[Tensor]] = {}

    def keep(x: Tensor, hook: Any) -> None:
        assert hook.ctx["step"] == len(steps.setdefault(hook.name, []))
        before = sum(s.shape[1] for s in steps[hook.name])
        assert hook.ctx["positions"].tolist() == list(range(before, before + x.shape[1]))
        steps[hook.name].append(x.clone())

    names = [f"blocks.{layer}.{name}" for layer in range(3) for name in ("attn.hook_z", "hook_resid_post")]
    tokens = model.generate(prompt, N_NEW, stop_at_eos=False, fwd_hooks=[(name, keep) for name in names])
    answered = prompt.append(tokens[:, prompt.shape[1] : -1])  # the last token was drawn, never run
    _, cache = model.run_with_cache(answered, names_filter=names)
    real = answered.attention_mask.bool()
    for name in names:
        at_once, in_steps = cache[name][real], torch.cat(steps[name], dim=1)[real]
        torch.testing.assert_close(in_steps, at_once, atol=1e-5, rtol=0)
    assert not any({"step", "positions"} & set(point.ctx) for point in model.hook_dict.values())


def test_an_edit_at_every_step_equals_the_same_edit_of_the_whole_pass() -> None:
    model, prompt = tiny_model(), inputs(PADDED)

    def zero(z: Tensor, hook: Any) -> None:
        z[:, :, 1] = 0

    hooks = [("blocks.1.attn.hook_z", zero)]
    tokens = model.generate(prompt, N_NEW, stop_at_eos=False, fwd_hooks=hooks)
    answered = prompt.append(tokens[:, prompt.shape[1] :])
    logits = model.run_with_hooks(answered, fwd_hooks=hooks)
    assert torch.equal(logits[:, -N_NEW - 1 : -1].argmax(-1), tokens[:, -N_NEW:])
    assert not torch.equal(tokens, model.generate(prompt, N_NEW, stop_at_eos=False))


def test_a_failing_hook_leaves_no_trace_of_the_step() -> None:
    model = tiny_model()

    def fail(x: Tensor, hook: Any) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        model.generate(inputs(TEXT), fwd_hooks=[("blocks.0.hook_resid_pre", fail)])
    assert not any(point.ctx or point._forward_hooks for point in model.hook_dict.values())


IN_CHUNKS = {
    "image-in-the-first": ([[5, ("image", (1, 4, 6)), 7, 8, 9, 10, 11]], 10),
    "image-in-the-second": ([[5, 6, 7, ("image", (1, 4, 4)), 8, 9]], 3),
    "padded-image-in-the-first": ([[5, ("image", (1, 4, 6)), 7, 8, 9], [("image", (1, 4, 4)), 11, 12, 13]], 9),
    "padded-image-in-the-second": ([[5, 6, 7, ("image", (1, 4, 4)), 8, 9], [7, 8, 9, ("video", (3, 2, 2)), 11]], 3),
}


def chunk(batch: dict[str, Tensor], start: int, stop: int) -> VLMInputs:
    cut = {name: batch[name][:, start:stop] for name in ("input_ids", "attention_mask")}
    for token, names in ((100, ("pixel_values", "image_grid_thw")), (101, ("pixel_values_videos", "video_grid_thw"))):
        if (cut["input_ids"] == token).any():
            cut |= {name: batch[name] for name in names}
    return tiny_model().inputs_from_hf(cut)


@pytest.mark.parametrize("case", IN_CHUNKS)
@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "explicit"])
def test_a_prompt_run_in_chunks_equals_the_prompt_run_at_once(case: str, hooked: bool) -> None:
    rows, cut = IN_CHUNKS[case]
    model, batch = tiny_model(), hf_batch(rows)
    width = batch["input_ids"].shape[1]
    whole = model(model.inputs_from_hf(batch))
    cache = model.new_kv_cache(len(rows), 2)  # too small: it has to grow
    hooks = [("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern)] if hooked else []
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        parts = [
            model(chunk(batch, a, b), past_kv_cache=cache) for a, b in ((0, cut), (cut, width - 1), (width - 1, width))
        ]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], atol=1e-5, rtol=0)
    assert cache.length == width


def test_a_chunk_that_begins_behind_the_token_that_opens_an_image_is_refused() -> None:
    """Alone it cannot tell whether its image was opened, which decides positions."""
    model, batch = tiny_model(), hf_batch([[5, 6, 7, ("image", (1, 4, 4)), 8, 9]])
    cache = model.new_kv_cache(1, 20)
    model(chunk(batch, 0, 4), past_kv_cache=cache)
    with pytest.raises(InputError, match="image"):
        model(chunk(batch, 4, batch["input_ids"].shape[1]), past_kv_cache=cache)


def test_a_key_value_cache_of_another_batch_is_refused() -> None:
    cache = tiny_model().new_kv_cache(2, 8)
    with pytest.raises(InputError, match="2 rows"):
        tiny_model()(inputs(TEXT), past_kv_cache=cache)
