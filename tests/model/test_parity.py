"""Every number of a forward pass against `transformers`, in the same process, on the same weights.

Only positions with attention_mask 1 are compared. `transformers` is given the published position ids
(`tiny.published_positions`), since its own release 5 ignores the length of a video.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    CASES,
    LONG_VIDEO,
    PADDED,
    hf_batch,
    inputs,
    published_positions,
    tiny_hf,
    tiny_model,
)
from torch import Tensor

from hooked_vlm import VLMInputs
from hooked_vlm.model.cache import VLMCache

LAYERS, VISION_LAYERS, HEADS, D_HEAD = 3, 2, 4, 16
IDS_NOT_PREDICTED = (100, 101)


def close(ours: Tensor, theirs: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=atol, rtol=0)


@dataclass(frozen=True, eq=False)
class Both:
    """One forward pass of each."""

    batch: dict[str, Tensor]
    inputs: Any
    theirs: Any
    vision: dict[str, Tensor]
    """Theirs: block outputs and inputs of attention by name, packed; images first, then videos."""
    logits: Tensor
    cache: VLMCache

    @property
    def real(self) -> Tensor:
        return self.batch["attention_mask"].bool()

    def packed(self, name: str) -> Tensor:
        """Ours at an image-side hook point, without the padding between images."""
        padded = self.cache[name]
        rows = [h * w for t, h, w in self.inputs.grids for _ in range(t)]
        share = padded.shape[1] / max(rows)  # tokens have a quarter of the patches
        return torch.cat([image[: int(n * share)] for image, n in zip(padded, rows, strict=True)])


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=CASES)
def both(request: pytest.FixtureRequest, tied: bool) -> Both:
    return run_both(request.param, tied)


@pytest.fixture(params=[case for case in CASES if case != "text"])
def seen(request: pytest.FixtureRequest, tied: bool) -> Both:
    """Cases with something to see."""
    return run_both(request.param, tied)


@cache
@torch.no_grad()
def run_both(case: str, tied: bool) -> Both:
    batch, hf = hf_batch(CASES[case]), tiny_hf(tied)
    parts = {f"block.{i}": block for i, block in enumerate(hf.model.visual.blocks)}
    vision: dict[str, list[Tensor]] = {}
    handles = [
        part.register_forward_hook(lambda _m, _i, out, name=name: vision.setdefault(name, []).append(out))
        for name, part in (*parts.items(), ("projector", hf.model.visual.merger))
    ]
    handles += [
        part.norm1.register_forward_hook(lambda _m, _i, out, name=name: vision.setdefault(f"{name}.in", []).append(out))
        for name, part in parts.items()
    ]
    theirs = hf(**batch, position_ids=published_positions(batch), output_hidden_states=True, output_attentions=True)
    for handle in handles:
        handle.remove()
    ours = inputs(CASES[case], tied=tied)
    logits, cache = tiny_model(tied).run_with_cache(ours)
    return Both(batch, ours, theirs, {name: torch.cat(parts) for name, parts in vision.items()}, logits, cache)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("case", CASES)
def test_positions_follow_the_published_rule(case: str) -> None:
    batch = hf_batch(CASES[case])
    assert torch.equal(inputs(CASES[case]).position_ids, published_positions(batch))


@pytest.mark.parametrize("case", ["one-image", "images-of-two-sizes", "left-padded", "video-and-image"])
def test_positions_are_those_of_transformers_where_its_versions_agree(case: str) -> None:
    batch = hf_batch(CASES[case])
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    theirs, deltas = tiny_hf().model.get_rope_index(**{name: batch.get(name) for name in names})
    ours = inputs(CASES[case])
    real = batch["attention_mask"].bool()
    assert torch.equal(ours.position_ids[:, real], theirs[:, real])
    assert torch.equal(ours.next_position, batch["attention_mask"].sum(1) + deltas[:, 0])


def test_text_after_a_long_video_is_beyond_the_videos_last_frame() -> None:
    ids = inputs(LONG_VIDEO).position_ids
    assert ids[0, 0, 2:30].max() == 8 and ids[0, 0, 30] == 9  # 7 temporal patches from position 2 on


# ---------------------------------------------------------------- the vision tower


@pytest.mark.parametrize("layer", range(VISION_LAYERS))
def test_vision_residuals_equal_the_references(seen: Both, layer: int) -> None:
    close(seen.packed(f"vision.blocks.{layer}.hook_resid_post"), seen.vision[f"block.{layer}"])


def test_image_features_equal_the_references(seen: Both) -> None:
    close(seen.cache["hook_image_features"].flatten(0, -2), seen.vision["projector"])
    close(tiny_model().encode_images(seen.inputs), seen.vision["projector"])


@pytest.mark.parametrize("layer", range(VISION_LAYERS))
@pytest.mark.parametrize("case", ["images-of-two-sizes", "padded-videos"])
def test_vision_patterns_equal_attention_within_every_image_and_frame(case: str, layer: int) -> None:
    """Written out image by image: merge-block order, rotation by row and column, softmax over one image."""
    run, attention = run_both(case, False), tiny_hf().model.visual.blocks[layer].attn
    name = f"vision.blocks.{layer}.attn.hook_pattern"
    _, cache = tiny_model().run_with_cache(run.inputs, names_filter=name)
    qkv = attention.qkv(run.vision[f"block.{layer}.in"]).view(-1, 3, 2, 16)
    at = image = 0
    for t, h, w in run.inputs.grids:
        order = [(y + dy, x + dx) for y in range(0, h, 2) for x in range(0, w, 2) for dy in (0, 1) for dx in (0, 1)]
        turns = torch.tensor([1e4 ** (-i / 4) for i in range(4)])
        angles = torch.stack([torch.cat((y * turns, x * turns)) for y, x in order])[:, None]
        for _ in range(t):
            q, k, _ = qkv[at : at + h * w].unbind(1)
            q, k = (torch.view_as_complex(torch.stack((a[..., :8], a[..., 8:]), -1)) for a in (q, k))
            q, k = (a * torch.polar(torch.ones_like(angles), angles) for a in (q, k))
            scores = torch.einsum("qhd,khd->hqk", q, k.conj()).real / 4
            close(cache[name][image, :, : h * w, : h * w], scores.softmax(-1))
            assert not cache[name][image, :, h * w :].any() and not cache[name][image, ..., h * w :].any()
            at, image = at + h * w, image + 1


# ---------------------------------------------------------------- the language model


@pytest.mark.parametrize("layer", range(LAYERS))
def test_residual_streams_equal_the_references(both: Both, layer: int) -> None:
    close(both.cache["resid_pre", layer][both.real], both.theirs.hidden_states[layer][both.real])


def test_the_final_norm_equals_the_references(both: Both) -> None:
    close(both.cache["ln_final.hook_out"][both.real], both.theirs.hidden_states[-1][both.real])


def test_logits_equal_the_references(both: Both) -> None:
    close(both.logits[both.real], both.theirs.logits[both.real])


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("stored", [False, True], ids=["derived", "stored"])
def test_patterns_equal_the_references(both: Both, layer: int, stored: bool, tied: bool) -> None:
    name, cache = f"blocks.{layer}.attn.hook_pattern", both.cache
    if stored:
        _, cache = tiny_model(tied).run_with_cache(both.inputs, names_filter=name)
    ours, theirs = (x.transpose(1, 2)[both.real] for x in (cache[name], both.theirs.attentions[layer]))
    close(ours, theirs)
    padding = ~both.real
    assert not cache[name].transpose(1, 2)[padding].any()


def test_loss_equals_the_references_over_text_tokens(both: Both, tied: bool) -> None:
    labels = both.batch["input_ids"].clone()
    labels[~both.real] = -100
    for placeholder in IDS_NOT_PREDICTED:
        labels[labels == placeholder] = -100
    for row, first in enumerate(both.inputs.first):
        labels[row, first] = -100  # nothing real predicts it
    theirs = tiny_hf(tied)(**both.batch, position_ids=published_positions(both.batch), labels=labels).loss
    model = tiny_model(tied)
    logits, loss = model(both.inputs, return_type="both")
    close(loss, theirs, 1e-5)
    assert torch.equal(logits, both.logits) and torch.equal(loss, model(both.inputs, return_type="loss"))


@pytest.mark.parametrize("split", [False, True], ids=["", "split-qkv-input"])
@pytest.mark.parametrize("result", [False, True], ids=["", "attn-result"])
def test_optional_hook_points_leave_the_numbers_alone(split: bool, result: bool) -> None:
    model, run = tiny_model(), run_both("left-padded", False)
    cfg = model.cfg
    try:
        model.set_use_split_qkv_input(split)
        model.set_use_attn_result(result)
        model.set_use_hook_mlp_in(split)
        close(model(run.inputs)[run.real], run.logits[run.real], 1e-5)
    finally:
        model.cfg = cfg


# ---------------------------------------------------------------- edits and gradients


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("head", [0, 3])
def test_zeroing_a_head_equals_the_same_edit_of_the_reference(layer: int, head: int) -> None:
    run, hf = run_both("left-padded", False), tiny_hf()

    def zero_theirs(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[..., head * D_HEAD : (head + 1) * D_HEAD] = 0
        return (z,)

    def zero_ours(z: Tensor, hook: Any) -> None:
        z[:, :, head] = 0

    o_proj = hf.model.language_model.layers[layer].self_attn.o_proj
    handle = o_proj.register_forward_pre_hook(zero_theirs)
    theirs = hf(**run.batch, position_ids=published_positions(run.batch)).logits
    handle.remove()
    ours = tiny_model().run_with_hooks(run.inputs, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero_ours)])
    close(ours[run.real], theirs[run.real])
    assert (ours - run.logits)[run.real].abs().max() > 0.01


def reference_gradients(run: Both, scalar: Any) -> dict[str, Tensor]:
    """d scalar(output) / d (input of every text block, output of the first vision block)."""
    hf = tiny_hf()
    tensors: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs, i=i: tensors.update({f"text.{i}": (*args, *kwargs.values())[0]}), with_kwargs=True
        )
        for i, layer in enumerate(hf.model.language_model.layers)
    ]
    handles.append(hf.model.visual.blocks[0].register_forward_hook(lambda _m, _a, out: tensors.update(vision=out)))
    out = hf(**run.batch, position_ids=published_positions(run.batch))
    for handle in handles:
        handle.remove()
    return dict(zip(tensors, torch.autograd.grad(scalar(out.logits), list(tensors.values())), strict=True))


def test_gradient_of_a_logit_through_a_hook_equals_the_references() -> None:
    run = run_both("images-of-two-sizes", False)
    theirs = reference_gradients(run, lambda logits: logits[0, -1, 7])
    ours: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda x, hook: ours.update({name: x}) or x

    hooks = [(f"blocks.{i}.hook_resid_pre", keep(f"text.{i}")) for i in range(LAYERS)]
    logits = tiny_model().run_with_hooks(run.inputs, fwd_hooks=hooks)
    for name, gradient in zip(ours, torch.autograd.grad(logits[0, -1, 7], list(ours.values())), strict=True):
        close(gradient, theirs[name])


def test_cached_gradients_of_the_loss_equal_the_references() -> None:
    run, model = run_both("left-padded", False), tiny_model()

    def loss(logits: Tensor) -> Tensor:
        targets, counted = run.inputs.tokens[:, 1:], run.real[:, 1:] & run.real[:, :-1]
        for placeholder in IDS_NOT_PREDICTED:
            counted = counted & (targets != placeholder)
        return torch.nn.functional.cross_entropy(logits[:, :-1][counted], targets[counted])

    theirs = reference_gradients(run, loss)
    _, cache = model.run_with_cache(run.inputs, return_type="loss", incl_bwd=True)
    model.zero_grad()
    for layer in range(LAYERS):
        close(cache[f"blocks.{layer}.hook_resid_pre_grad"][run.real], theirs[f"text.{layer}"][run.real], 1e-5)
    grads = cache["vision.blocks.0.hook_resid_post_grad"]
    patches = [h * w for _, h, w in run.inputs.grids]
    close(torch.cat([g[:n] for g, n in zip(grads, patches, strict=True)]), theirs["vision"], 1e-5)


# ---------------------------------------------------------------- parts of a forward pass


@pytest.mark.parametrize("case", ["left-padded", "video-and-image"])
@pytest.mark.parametrize("layer", [*range(LAYERS), *range(-LAYERS, 0)])
def test_a_pass_cut_at_any_layer_equals_the_whole(case: str, layer: int) -> None:
    run, model = run_both(case, False), tiny_model()
    resid = model(run.inputs, stop_at_layer=layer)
    close(resid, run.cache["resid_pre", layer % LAYERS], 1e-6)
    close(model(run.inputs, start_at_layer=layer, resid=resid), run.logits, 1e-6)


def test_stopping_after_the_last_layer_gives_the_final_residual() -> None:
    run = run_both("text", False)
    close(tiny_model()(run.inputs, stop_at_layer=LAYERS), run.cache["resid_post", LAYERS - 1], 1e-6)


def test_last_logits_are_those_of_each_rows_last_real_token() -> None:
    model, batch = tiny_model(), inputs(PADDED).append([[11, 12], [13], [14, 15, 16]])
    whole, last = model(batch), model(batch, logits_at="last")
    assert last.shape == (3, 1, 200)
    for row, stop in enumerate(batch.stop):
        close(last[row, 0], whole[row, stop - 1], 2e-6)  # sums over other numbers of rows round otherwise


def test_encoded_images_stand_in_for_pixels() -> None:
    for case in ("left-padded", "padded-videos"):
        run, model = run_both(case, False), tiny_model()
        encoded = run.inputs.with_image_features(model.encode_images(run.inputs))
        assert torch.equal(model(encoded), run.logits)
        assert torch.equal(
            model(encoded[[1]])[0, run.inputs.first[1] :], model(run.inputs[[1]])[0, run.inputs.first[1] :]
        )


ANSWERS = [[[11, 12, 13], [14], [15, 16]], [[11], [12], [13]], [[11, 12], [], [13]]]


@pytest.mark.parametrize("answers", ANSWERS, ids=["of-three-lengths", "of-one-token", "one-empty"])
def test_log_probs_equal_the_references_row_by_row(answers: list[list[int]]) -> None:
    ours = tiny_model().log_probs(inputs(PADDED), answers)
    assert ours.shape == (3, max(map(len, answers)))
    whole, patches = hf_batch(PADDED), 0
    for row, (prompt, answer) in enumerate(zip(PADDED, answers, strict=True)):
        batch = hf_batch([[*prompt, *answer]])
        if "pixel_values" in batch:  # the pixels are drawn for the batch as a whole
            n = len(batch["pixel_values"])
            batch["pixel_values"] = whole["pixel_values"][patches : patches + n]
            patches += n
        log_probs = tiny_hf()(**batch).logits[0].log_softmax(-1)
        for i, token in enumerate(reversed(answer)):
            close(ours[row, len(answer) - 1 - i], log_probs[-2 - i, token])
        assert not ours[row, len(answer) :].any()


# ---------------------------------------------------------------- batches

items = st.one_of(
    st.integers(5, 90),
    st.sampled_from([("image", (1, 2, 4)), ("image", (1, 4, 2)), ("image", (1, 4, 4)), ("video", (3, 2, 2))]),
)
rows = st.lists(st.lists(items, min_size=1, max_size=5), min_size=1, max_size=3)


@settings(max_examples=12)
@given(rows, st.data())
@torch.no_grad()
def test_rows_of_a_batch_run_alone_as_they_run_in_it(batch: list[list[Any]], data: st.DataObject) -> None:
    model, whole = tiny_model(), inputs(batch)
    chosen = data.draw(st.lists(st.integers(0, len(batch) - 1), min_size=1, max_size=3))
    logits, cut = model(whole), whole[chosen]
    real = cut.attention_mask.bool()
    assert torch.equal(cut.tokens, whole.tokens[chosen]) and torch.equal(real, whole.attention_mask[chosen].bool())
    close(model(cut)[real], logits[chosen][real], 1e-5)
    for i in range(cut.n_images):
        assert cut.tokens[cut.row_of_image(i), cut.image_tokens(i)].eq(100).all()


@settings(max_examples=10)
@given(rows, rows)
@torch.no_grad()
def test_concatenated_batches_run_as_each_alone(a: list[list[Any]], b: list[list[Any]]) -> None:
    model = tiny_model()
    parts = [inputs(a), inputs(b, seed=1).append(torch.tensor([50, 51]))]
    together = VLMInputs.concat(parts)
    real = together.attention_mask.bool()
    alone = torch.cat([model(part)[part.attention_mask.bool()] for part in parts])
    close(model(together)[real], alone, 1e-5)


def test_padding_at_either_end_leaves_the_numbers_alone() -> None:
    model, batch = tiny_model(), inputs(PADDED)
    answers = [[11, 12, 13], [14], [15, 16]]
    together = model(batch.append(answers))
    for row, answer in enumerate(answers):
        alone = batch[row].append([answer])
        real = alone.attention_mask[0].bool()
        close(together[row, : alone.shape[1]][real], model(alone)[0][real], 1e-5)


def test_rows_are_chosen_as_a_tensor_chooses_them() -> None:
    batch = inputs(PADDED)
    assert batch[-1].n_images == 2 and batch[1:].n_images == 2
    for mask in ([True, False, True], torch.tensor([True, False, True])):
        assert torch.equal(batch[mask].tokens, batch.tokens[[0, 2]])
    for bad in ((0, 1), 3, [5]):
        with pytest.raises((ValueError, IndexError)):
            batch[bad]
