"""Every number of a forward pass against `transformers`, in the same process, on the same weights, in every family.

Only positions with attention_mask 1 are compared. What one family alone has: test_qwen2_vl_parity.py,
test_internvl_parity.py. InternLM2, which `transformers` does not have, is compared through Llama with the equivalent
weights (tests/converters/test_internvl.py shows that they are equivalent).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from families import FAMILIES, KINDS, Kind, plain_first, tiny_model
from family_names import ONE_OF_EACH_KIND
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.model.cache import VLMCache

LAYERS, VISION_LAYERS = 3, 2


def close(ours: Tensor, theirs: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=atol, rtol=0)


@dataclass(frozen=True, eq=False)
class Both:
    """One forward pass of each."""

    kind: Kind
    model: Any
    batch: dict[str, Tensor]
    inputs: Any
    theirs: Any
    vision: dict[str, Tensor]
    """Theirs, at the hook points of `Kind.vision`: images one after the other, without padding."""
    logits: Tensor
    cache: VLMCache

    @property
    def real(self) -> Tensor:
        return self.batch["attention_mask"].bool()

    def without_padding(self, padded: Tensor) -> Tensor:
        """[image, patch, ...] in the vision tower as [patch, ...] of all images."""
        rows = [h * w for t, h, w in self.inputs.grids for _ in range(t)]
        share = padded.shape[1] / max(rows)  # tiles have a class token more
        return torch.cat([image[: int(n * share)] for image, n in zip(padded, rows, strict=True)])


@contextmanager
def watched(kind: Kind) -> Iterator[dict[str, list[Tensor]]]:
    """What the reference's modules give at the hook points of `Kind.vision`, pass by pass."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            seen.setdefault(name, []).append(out[name.endswith("pattern")] if isinstance(out, tuple) else out)

        return hook

    handles = [
        kind.hf().get_submodule(module.format(l=layer)).register_forward_hook(keep(name.format(l=layer)))
        for name, module in kind.vision.items()
        for layer in range(VISION_LAYERS if "{l}" in name else 1)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@cache
@torch.no_grad()
def run_both(name: str, case: str) -> Both:
    kind, model = KINDS[name], tiny_model(name)
    batch = kind.batch(kind.cases[case])
    with watched(kind) as vision:
        theirs = kind.hf()(**kind.for_hf(batch), output_hidden_states=True, output_attentions=True)
    inputs = model.inputs_from_hf(batch)
    found = {hook: kind.in_order(hook, torch.cat(parts), inputs.grids) for hook, parts in vision.items()}
    return Both(kind, model, batch, inputs, theirs, found, *model.run_with_cache(inputs))


def runs(text: bool) -> list[Any]:
    """Every case of one family of each kind, and of the others one in a plain run."""
    found = []
    for name, kind in KINDS.items():
        cases = [case for case in kind.cases if text or case != "text"]
        if not kind.mixed:
            cases.remove("left-padded")
        plain = cases if name in ONE_OF_EACH_KIND else cases[-1:]
        found += [
            pytest.param((name, case), id=f"{name}-{case}", marks=() if case in plain else pytest.mark.full)
            for case in cases
        ]
    return found


@pytest.fixture(params=runs(text=True))
def both(request: pytest.FixtureRequest) -> Both:
    return run_both(*request.param)


@pytest.fixture(params=runs(text=False))
def seen(request: pytest.FixtureRequest) -> Both:
    """Cases with something to see."""
    return run_both(*request.param)


@pytest.fixture(params=plain_first(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


MIXED = [name for name, kind in KINDS.items() if kind.mixed]


@pytest.fixture(params=plain_first(FAMILIES))
def padded(request: pytest.FixtureRequest) -> Both:
    """A padded batch of the first kind of a family."""
    return run_both(request.param, "left-padded")


# ---------------------------------------------------------------- the vision tower


def test_the_vision_tower_and_image_features_equal_the_references(seen: Both) -> None:
    assert len(seen.vision) >= VISION_LAYERS + 2
    for name, theirs in seen.vision.items():
        ours = seen.cache[name]
        if name.endswith("pattern"):
            close(ours, theirs, 5e-6)
        elif name.startswith("vision."):
            close(seen.without_padding(ours), theirs.flatten(0, -2))
        elif name.endswith("hook_deepstack"):
            close(ours.flatten(0, 1)[seen.inputs.feature_slots], theirs)
        else:
            close(ours.flatten(0, -2), theirs.flatten(0, -2))
    features = seen.model.encode_images(seen.inputs)
    close(features[:, 0] if seen.model.cfg.n_deepstack else features, seen.cache["hook_image_features"])


# ---------------------------------------------------------------- the language model


def test_residual_streams_and_the_final_norm_equal_the_references(both: Both) -> None:
    for layer in range(LAYERS):
        stream, entered = both.cache["resid_pre", layer], f"blocks.{layer - 1}.hook_deepstack"
        if entered in both.cache:  # the reference keeps what leaves a layer before image features enter there
            stream = stream - both.cache[entered]
        close(stream[both.real], both.theirs.hidden_states[layer][both.real])
    close(both.cache["ln_final.hook_out"][both.real], both.theirs.hidden_states[-1][both.real])


def test_logits_equal_the_references(both: Both) -> None:
    close(both.logits[both.real], both.theirs.logits[both.real])


@pytest.mark.parametrize("stored", [False, True], ids=["derived", "stored"])
def test_patterns_equal_the_references(both: Both, stored: bool) -> None:
    names, found = [f"blocks.{layer}.attn.hook_pattern" for layer in range(LAYERS)], both.cache
    if stored:
        _, found = both.model.run_with_cache(both.inputs, names_filter=names)
    for name, attention in zip(names, both.theirs.attentions, strict=True):
        ours = found[name].transpose(1, 2)
        close(ours[both.real], attention.transpose(1, 2)[both.real], 5e-6)
        assert not ours[~both.real].any()


def test_loss_equals_the_references_over_text_tokens(both: Both) -> None:
    if both.model.cfg.bidirectional == "prompt":  # every token of a prompt sees its target
        with pytest.raises(InputError, match="both ways"):
            both.model(both.inputs, return_type="loss")
        return
    labels = both.batch["input_ids"].clone()
    labels[~both.real] = -100
    for placeholder in both.kind.placeholders:
        labels[labels == placeholder] = -100
    for row, first in enumerate(both.inputs.first):
        labels[row, first] = -100  # nothing real predicts it
    theirs = both.kind.hf()(**both.kind.for_hf(both.batch), labels=labels).loss
    logits, loss = both.model(both.inputs, return_type="both")
    close(loss, theirs, 1e-5)
    assert torch.equal(logits, both.logits) and torch.equal(loss, both.model(both.inputs, return_type="loss"))


@pytest.mark.parametrize("split", [False, True], ids=["", "split-qkv-input"])
@pytest.mark.parametrize("result", [False, True], ids=["", "attn-result"])
def test_optional_hook_points_leave_the_numbers_alone(padded: Both, split: bool, result: bool) -> None:
    model, cfg = padded.model, padded.model.cfg
    try:
        model.set_use_split_qkv_input(split)
        model.set_use_attn_result(result)
        model.set_use_hook_mlp_in(split)
        close(model(padded.inputs)[padded.real], padded.logits[padded.real], 1e-5)
    finally:
        model.cfg = cfg


# ---------------------------------------------------------------- edits and gradients


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("head", [0, 3])
@torch.no_grad()
def test_zeroing_a_head_equals_the_same_edit_of_the_reference(kind: str, layer: int, head: int) -> None:
    run = run_both(kind, "left-padded" if kind in MIXED else "one-image")
    width = run.model.cfg.d_head

    def zero_theirs(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[..., head * width : (head + 1) * width] = 0
        return (z,)

    def zero_ours(z: Tensor, hook: Any) -> None:
        z[:, :, head] = 0

    hf = run.kind.hf()
    handle = hf.get_decoder().layers[layer].self_attn.o_proj.register_forward_pre_hook(zero_theirs)
    try:
        theirs = hf(**run.kind.for_hf(run.batch)).logits
    finally:
        handle.remove()
    ours = run.model.run_with_hooks(run.inputs, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero_ours)])
    close(ours[run.real], theirs[run.real])
    assert (ours - run.logits)[run.real].abs().max() > 0.01


def reference_gradients(run: Both, scalar: Any) -> dict[str, Tensor]:
    """d scalar(output) / d (input of every text block, output of the first vision block)."""
    hf, first = run.kind.hf(), run.kind.vision["vision.blocks.{l}.hook_resid_post"].format(l=0)
    tensors: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs, i=i: tensors.update({f"text.{i}": (*args, *kwargs.values())[0]}), with_kwargs=True
        )
        for i, layer in enumerate(hf.get_decoder().layers)
    ]

    def keep(_module: Any, _args: Any, out: Any) -> None:
        tensors["vision"] = out[0] if isinstance(out, tuple) else out

    handles.append(hf.get_submodule(first).register_forward_hook(keep))
    out = hf(**run.kind.for_hf(run.batch))
    for handle in handles:
        handle.remove()
    found = dict(zip(tensors, torch.autograd.grad(scalar(out.logits), list(tensors.values())), strict=True))
    return found | {"vision": run.kind.in_order("vision.blocks.0.hook_resid_post", found["vision"], run.inputs.grids)}


@pytest.mark.parametrize("family", plain_first(FAMILIES))
def test_gradient_of_a_logit_through_a_hook_equals_the_references(family: str) -> None:
    run = run_both(family, "images-of-two-sizes")
    theirs = reference_gradients(run, lambda logits: logits[0, -1, 7])
    ours: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda x, hook: ours.update({name: x}) or x

    hooks = [(f"blocks.{i}.hook_resid_pre", keep(f"text.{i}")) for i in range(LAYERS)]
    logits = run.model.run_with_hooks(run.inputs, fwd_hooks=hooks)
    for name, gradient in zip(ours, torch.autograd.grad(logits[0, -1, 7], list(ours.values())), strict=True):
        close(gradient, theirs[name])


def test_cached_gradients_of_the_loss_equal_the_references(padded: Both) -> None:
    run = padded
    if run.model.cfg.bidirectional == "prompt":
        pytest.skip("a prompt whose tokens see their targets has no loss")

    def loss(logits: Tensor) -> Tensor:
        targets, counted = run.inputs.tokens[:, 1:], run.real[:, 1:] & run.real[:, :-1]
        for placeholder in run.kind.placeholders:
            counted = counted & (targets != placeholder)
        return torch.nn.functional.cross_entropy(logits[:, :-1][counted], targets[counted])

    theirs = reference_gradients(run, loss)
    _, cache = run.model.run_with_cache(run.inputs, return_type="loss", incl_bwd=True)
    run.model.zero_grad()
    for layer in range(LAYERS):
        close(cache[f"blocks.{layer}.hook_resid_pre_grad"][run.real], theirs[f"text.{layer}"][run.real], 1e-5)
    grads, whole = cache["vision.blocks.0.hook_resid_post_grad"], theirs["vision"].flatten(0, -2)
    close(run.without_padding(grads), whole, 1e-5)


# ---------------------------------------------------------------- parts of a forward pass


@pytest.mark.parametrize("layer", [*range(LAYERS), *range(-LAYERS, 0)])
def test_a_pass_cut_at_any_layer_equals_the_whole(padded: Both, layer: int) -> None:
    resid = padded.model(padded.inputs, stop_at_layer=layer)
    close(resid, padded.cache["resid_pre", layer % LAYERS], 1e-6)
    close(padded.model(padded.inputs, start_at_layer=layer, resid=resid), padded.logits, 1e-6)


@pytest.mark.parametrize("family", plain_first(FAMILIES))
def test_stopping_after_the_last_layer_gives_the_final_residual(family: str) -> None:
    run = run_both(family, "text")
    close(run.model(run.inputs, stop_at_layer=LAYERS), run.cache["resid_post", LAYERS - 1], 1e-6)


def test_last_logits_are_those_of_each_rows_last_real_token(padded: Both) -> None:
    batch = padded.inputs.append([[11, 12], [13], [14, 15, 16]])
    whole, last = padded.model(batch), padded.model(batch, logits_at="last")
    assert last.shape == (3, 1, 200)
    for row, stop in enumerate(batch.stop):
        close(last[row, 0], whole[row, stop - 1], 2e-6)  # sums over other numbers of rows round otherwise


def test_encoded_images_stand_in_for_pixels(seen: Both) -> None:
    model, inputs = seen.model, seen.inputs
    encoded = inputs.with_image_features(model.encode_images(inputs))
    assert torch.equal(model(encoded), seen.logits)
    last, first = len(inputs) - 1, inputs.first[-1]
    close(model(encoded[[last]])[0, first:], model(inputs[[last]])[0, first:], 2e-6)  # encoded alone or with others


ANSWERS = [[[11, 12, 13], [14], [15, 16]], [[11], [12], [13]], [[11, 12], [], [13]]]


@pytest.mark.parametrize("answers", ANSWERS, ids=["of-three-lengths", "of-one-token", "one-empty"])
@torch.no_grad()
def test_log_probs_equal_the_references_row_by_row(padded: Both, answers: list[list[int]]) -> None:
    kind, rows = padded.kind, padded.kind.cases["left-padded"]
    ours = padded.model.log_probs(padded.inputs, answers)
    assert ours.shape == (3, max(map(len, answers)))
    done = 0
    for row, (prompt, answer) in enumerate(zip(rows, answers, strict=True)):
        batch = kind.batch([[*prompt, *answer]])
        if "pixel_values" in batch:  # the pixels are drawn for the batch as a whole
            n = len(batch["pixel_values"])
            batch["pixel_values"] = padded.batch["pixel_values"][done : done + n]
            done += n
        given = kind.for_hf(batch)
        if padded.model.cfg.bidirectional == "prompt" and answer:
            given["token_type_ids"][:, -len(answer) :] = 1  # the suffix
        log_probs = kind.hf()(**given).logits[0].log_softmax(-1)
        for i, token in enumerate(reversed(answer)):
            close(ours[row, len(answer) - 1 - i], log_probs[-2 - i, token])
        assert not ours[row, len(answer) :].any()


@pytest.mark.parametrize("case", ["one-image", "images-of-two-sizes"])
def test_greedy_generation_equals_the_references(kind: str, case: str) -> None:
    run = run_both(kind, case)
    given = {name: value for name, value in run.kind.for_hf(run.batch).items() if name != "position_ids"}
    theirs = run.kind.hf().generate(**given, max_new_tokens=run.kind.n_new, do_sample=False)
    ours = run.model.generate(run.inputs, max_new_tokens=run.kind.n_new)
    n = min(ours.shape[1], theirs.shape[1])
    assert torch.equal(ours[:, :n], theirs[:, :n])
    assert (ours == 3).any() or ours.shape[1] == theirs.shape[1]


# ---------------------------------------------------------------- batches


@lru_cache
@torch.no_grad()
def padded_logits(kind: str) -> tuple[Any, Tensor]:
    inputs = tiny_model(kind).inputs_from_hf(KINDS[kind].batch(KINDS[kind].cases["left-padded"]))
    return inputs, tiny_model(kind)(inputs)


@torch.no_grad()
def test_a_row_of_a_batch_is_what_it_is_alone(kind: str) -> None:
    inputs, together = padded_logits(kind)
    for row in range(len(inputs)):
        alone = inputs[row]
        width = alone.stop[0] - alone.first[0]
        close(together[row, -width:], tiny_model(kind)(alone)[0, -width:])


@torch.no_grad()
def test_padding_at_either_end_leaves_the_numbers_alone(padded: Both) -> None:
    answers = [[11, 12, 13], [14], [15, 16]]
    together = padded.model(padded.inputs.append(answers))
    for row, answer in enumerate(answers):
        alone = padded.inputs[row].append([answer])
        real = alone.attention_mask[0].bool()
        close(together[row, : alone.shape[1]][real], padded.model(alone)[0][real], 1e-5)


def test_rows_are_chosen_as_a_tensor_chooses_them(padded: Both) -> None:
    batch = padded.inputs
    assert batch[-1].n_images == 2 and batch[1:].n_images == 2
    for mask in ([True, False, True], torch.tensor([True, False, True])):
        assert torch.equal(batch[mask].tokens, batch.tokens[[0, 2]])
    for bad in ((0, 1), 3, [5]):
        with pytest.raises((ValueError, IndexError)):
            batch[bad]
