"""Interventions on heads of the vision tower do what literal hooks do, picture by picture, in every family."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from every_kind import VISION_KINDS, of_every_vision_kind
from families import ROWS, inputs_of, model_and_inputs, tiny_model
from torch import Tensor
from towers import places_of

from hooked_vlm import HookedVLM, HookError, InputError
from hooked_vlm.interventions import (
    BlockAttention,
    Compose,
    Intervention,
    MeanHeads,
    ScaleHeads,
    UniformAttention,
    ZeroHeads,
    all_heads,
    mean_head_outputs,
)
from hooked_vlm.interventions.base import n_patches

Images = list[list[tuple[int, ...]]]
"""Of each image, tile or frame, the window of each patch in a block with windows; () for all in other blocks."""


@pytest.fixture(params=list(ROWS))
def case(request: pytest.FixtureRequest, family: str) -> tuple[Any, Any]:
    return model_and_inputs(family, request.param)


def images_of(model: Any, batch: Any, layer: int) -> Images:
    """The patches of every image in the tower's order, by the window that they lie in."""
    cfg, found = model.cfg.vision, []
    for frames, rows, cols in batch.grids:
        side = None if cfg.window is None or layer in cfg.full_layers else cfg.window
        places = places_of(cfg, rows, cols)
        own = [() if side is None else (row // side, col // side) for row, col in places]
        found += [[(), *own] if cfg.class_token else own] * frames
    return found


def same(model: Any, batch: Any, intervention: Intervention, hooks: list, acts: bool = True) -> None:
    real = batch.attention_mask.bool()
    with torch.no_grad():
        plain = model(batch)[real]
        found = model.run_with_hooks(batch, fwd_hooks=intervention.hooks(model, batch))[real]
        expected = model.run_with_hooks(batch, fwd_hooks=hooks)[real]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.allclose(found, plain, atol=1e-5) != acts


def test_zeroed_and_scaled_heads(case: tuple[Any, Any]) -> None:
    model, batch = case

    def zero(z: Tensor, hook: Any) -> None:
        z[:, :, 1] = 0

    literal = [(f"vision.blocks.{layer}.attn.hook_z", zero) for layer in (0, 1)]
    same(model, batch, ZeroHeads(((0, 1), (1, 1)), tower="vision"), literal)

    def scale(z: Tensor, hook: Any) -> None:
        for image in range(len(z)):
            for patch in (0, 3):
                z[image, patch, 1] *= -2

    literal = [("vision.blocks.1.attn.hook_z", scale)]
    same(model, batch, ScaleHeads(((1, 1),), -2.0, (0, 3), tower="vision"), literal)


def test_patches_of_each_image(case: tuple[Any, Any]) -> None:
    model, batch = case
    last = [len(own) - 1 for own in images_of(model, batch, 1)]
    assert tuple(n - 1 for n in n_patches(batch)) == tuple(last)
    chosen = tuple((patch, 0) if image % 2 else (patch,) for image, patch in enumerate(last))

    def zero(z: Tensor, hook: Any) -> None:
        for image, patches in enumerate(chosen):
            for patch in patches:
                z[image, patch, 0] = 0

    same(model, batch, ZeroHeads(((1, 0),), chosen, tower="vision"), [("vision.blocks.1.attn.hook_z", zero)])


@pytest.mark.parametrize("rows", ROWS)
def test_mean_heads_write_their_mean_over_the_patches_of_all_images(family: str, rows: str) -> None:
    model, batch = model_and_inputs(family, rows)
    other, text = inputs_of(family, [[5, "small", 7]], seed=3), inputs_of(family, [[5, 6, 7]])
    means = mean_head_outputs(model, [batch, text, other], tower="vision")
    assert means.shape == (model.cfg.vision.n_layers_run, model.cfg.vision.n_heads, model.cfg.vision.d_head)
    seen = []
    for inputs in (batch, other):
        _, cache = model.run_with_cache(inputs)
        for image, patches in enumerate(images_of(model, inputs, 1)):
            seen += [cache["vision.blocks.1.attn.hook_z"][image, patch, 1] for patch in range(len(patches))]
    torch.testing.assert_close(means[1, 1], torch.stack(seen).mean(0), atol=1e-6, rtol=1e-5)

    def write(z: Tensor, hook: Any) -> None:
        z[:, :, 1] = means[1, 1]

    literal = [("vision.blocks.1.attn.hook_z", write)]
    same(model, batch, MeanHeads(((1, 1),), means, tower="vision"), literal)


@pytest.mark.parametrize("some", [False, True], ids=["all patches", "some"])
def test_uniform_attention_stays_in_the_picture_and_in_its_window(case: tuple[Any, Any], some: bool) -> None:
    model, batch = case
    layers = range(model.cfg.vision.n_layers_run)

    def literal(pattern: Tensor, hook: Any) -> Tensor:
        new = pattern.clone()
        for image, patches in enumerate(images_of(model, batch, hook.layer())):
            for query in (1, 3) if some else range(len(patches)):
                seen = torch.tensor([patches[query] == key for key in patches], dtype=torch.float32)
                new[image, 1, query] = 0
                new[image, 1, query, : len(patches)] = seen / seen.sum()
        return new

    hooks = [(f"vision.blocks.{layer}.attn.hook_pattern", literal) for layer in layers]
    heads = tuple((layer, 1) for layer in layers)
    same(model, batch, UniformAttention(heads, (1, 3) if some else None, tower="vision"), hooks)


def test_blocked_edges_between_patches(case: tuple[Any, Any]) -> None:
    model, batch = case

    def block(scores: Tensor, hook: Any) -> None:
        for image in range(len(scores)):
            for query in (0, 2):
                for key in (1, 2, 3):
                    scores[image, 0, query, key] = -torch.inf

    literal = [("vision.blocks.1.attn.hook_attn_scores", block)]
    same(model, batch, BlockAttention(((1, 0),), (0, 2), (1, 2, 3), tower="vision"), literal)


def test_a_head_that_attends_to_nothing_writes_nothing(case: tuple[Any, Any]) -> None:
    model, batch = case
    blocked = BlockAttention.in_layers(model, range(1, 2), tower="vision")
    zeroed = ZeroHeads(all_heads(model, range(1, 2), "vision"), tower="vision")
    same(model, batch, blocked, zeroed.hooks(model, batch))


def test_padding_gets_no_attention_and_writes_nothing() -> None:
    """Pictures of several sizes: what a head writes at padding stays zero, whatever is done to it."""
    model, batch = model_and_inputs("qwen2-vl", "padded")
    n = n_patches(batch)
    assert min(n) < max(n)
    means = torch.ones(3, model.cfg.vision.n_heads, model.cfg.vision.d_head)[: model.cfg.vision.n_layers_run]
    name = "vision.blocks.1.attn.hook_z"
    for iv in (
        UniformAttention(((1, 0),), tower="vision"),
        MeanHeads(((1, 0),), means, tower="vision"),
        BlockAttention(((1, 0),), (0,), (1,), tower="vision"),
    ):
        with torch.no_grad(), model.hooks(fwd_hooks=iv.hooks(model, batch)):
            _, cache = model.run_with_cache(batch, names_filter=name)
        for image, own in enumerate(n):
            assert cache[name][image, own:].eq(0).all() and cache[name][image, :own].any()


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_generation_under_an_intervention_equals_passes_without_a_cache(family: str, kind: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    hooks = of_every_vision_kind(model, batch)[kind].hooks(model, batch)
    tokens = model.generate(batch, 3, stop_at_eos=False, fwd_hooks=hooks)
    new = tokens[:, batch.shape[1] :]
    for step in range(3):
        if torch.isin(new[:, :step], torch.tensor(batch.spec.placeholder_ids)).any():
            assert step > 1  # random weights may write a placeholder; a prompt cannot hold it
            break
        with torch.no_grad():
            continued = batch.append(new[:, :step]) if step else batch
            logits = model.run_with_hooks(continued, fwd_hooks=hooks)
        assert logits[:, -1].argmax(-1).tolist() == new[:, step].tolist()


# ---- names, and what cannot be done ----


def test_names_tell_the_towers_apart() -> None:
    for make in (ZeroHeads, BlockAttention, UniformAttention):
        text, vision = make(((0, 1), (1, 2))), make(((0, 1), (1, 2)), tower="vision")
        assert str(text) == f"{make.__name__} 0.1 1.2" and str(vision) == f"{make.__name__} vision 0.1 1.2"
        assert text != vision and repr(text) != repr(vision) and text.kind != vision.kind


def test_the_same_numbers_in_both_towers_are_different_heads() -> None:
    model, batch = model_and_inputs("qwen2-vl", "padded")
    head = ((1, 1),)
    both = Compose((UniformAttention(head), UniformAttention(head, tower="vision")))
    assert len(both.hooks(model, batch)) == 2
    for parts in (
        (UniformAttention(head, tower="vision"),) * 2,
        (UniformAttention(head, tower="vision"), BlockAttention(head, tower="vision")),
    ):
        with pytest.raises(InputError, match=r"1\.1 of the vision tower.*recomputed"):
            Compose(parts).hooks(model, batch)


def without_tower() -> Any:
    return HookedVLM(replace(tiny_model("qwen2-vl").cfg, vision=None, image_token_id=None, video_token_id=None))


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (ZeroHeads(((9, 0),), tower="vision"), r"no head 9\.0: the vision tower has layers 0 to \d+ with heads 0 to"),
        (ZeroHeads(((0, 99),), tower="vision"), r"no head 0\.99: the vision tower"),
        (ZeroHeads(((0, 0),), "image", tower="vision"), "numbers, not groups like 'image'"),
        (ZeroHeads(((0, 0),), (999,), tower="vision"), r"image 0 has no patch 999.*0 to \d+"),
        (ZeroHeads(((0, 0),), ((0,),), tower="vision"), "positions for 1 images, but the inputs have"),
        (MeanHeads(((0, 0),), torch.zeros(1, 1, 1), tower="vision"), "means of the vision tower"),
    ],
    ids=["layer", "head", "group", "patch", "images", "means"],
)
def test_what_the_tower_does_not_have_is_refused(intervention: Intervention, message: str) -> None:
    model, batch = model_and_inputs("qwen2-vl", "padded")
    with pytest.raises(InputError, match=message):
        intervention.hooks(model, batch)


def test_without_images_or_a_tower_it_is_refused() -> None:
    model, text = tiny_model("qwen2-vl"), inputs_of("qwen2-vl", [[5, 6, 7]])
    own = ZeroHeads(((0, 0),), tower="vision")
    with pytest.raises(InputError, match="no image in these inputs"):
        own.hooks(model, text)
    with pytest.raises(InputError, match="no such positions"):
        mean_head_outputs(model, [text], tower="vision")
    batch = inputs_of("qwen2-vl", ROWS["one image"])
    encoded = batch.with_image_features(model.encode_images(batch))
    with pytest.raises(HookError, match="computed before"):
        model.run_with_hooks(encoded, fwd_hooks=own.hooks(model, encoded))
    with pytest.raises(InputError, match="without a vision tower"):
        own.hooks(without_tower(), text)
