"""Steering vectors are what they say: mean differences, interventions, files that come back or are refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import model_and_inputs
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_vlm import HookedVLM, InputError, VLMInputs, sweep
from hooked_vlm.data import Sample
from hooked_vlm.metrics import logit_difference
from hooked_vlm.steering import HOOKS, SteeringVectors, mean_streams, steering_vectors
from hooked_vlm.steering.contrast import FIT, REPORT, split_parts
from hooked_vlm.steering.files import write_file
from hooked_vlm.toys import NAMING_PROMPT, naming_sample

HOOK = "blocks.{}.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")


def drawings(name: str, n: int, seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample(f"{name} {i}", NAMING_PROMPT, [naming_sample(rng, name=name).image]) for i in range(n)]


@pytest.fixture(scope="module")
def sets() -> tuple[list[Sample], list[Sample]]:
    return drawings("circle", 10, 0), drawings("square", 9, 1)


@pytest.fixture(scope="module")
def vectors(model: HookedVLM, sets: Any) -> SteeringVectors:
    return steering_vectors(model, *sets, seed=3)


@pytest.fixture(scope="module")
def square(model: HookedVLM) -> VLMInputs:
    return drawings("square", 1, 7)[0].inputs(model)


@pytest.fixture(scope="module")
def digests(model: HookedVLM, sets: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    ours, theirs = (mean_streams(model, own, [HOOK.format(0)]).digests for own in sets)
    return ours, theirs


def means_by_hand(model: HookedVLM, samples: Sequence[Sample], names: Sequence[str], columns: str) -> list[Tensor]:
    """Of each name the mean over samples of the mean over columns."""
    totals = [torch.zeros(model.cfg.d_model) for _ in names]
    for sample in samples:
        inputs = sample.inputs(model)
        _, cache = model.run_with_cache(inputs)
        chosen = {"final": [inputs.shape[1] - 1], "image": inputs.image_tokens(0).tolist()}[columns]
        for total, name in zip(totals, names, strict=True):
            total += torch.stack([cache[name][0, column] for column in chosen]).mean(0)
    return [total / len(samples) for total in totals]


@pytest.mark.repeats_shapes
@pytest.mark.parametrize(("hook", "positions"), [("hook_resid_post", "final"), ("hook_resid_mid", "image")])
def test_vectors_are_the_mean_difference_of_the_items_that_fit_them(
    hook: Any, positions: str, model: HookedVLM, sets: Any, digests: Any
) -> None:
    layers = (0, 2)
    found = steering_vectors(model, *sets, hook=hook, positions=positions, layers=layers, seed=5)
    parts = split_parts(digests[0], digests[1], 5)
    fit = ([s for s, part in zip(own, ps, strict=True) if part == FIT] for own, ps in zip(sets, parts, strict=True))
    means = [means_by_hand(model, samples, [found.name(layer) for layer in layers], positions) for samples in fit]
    for layer, ours, theirs in zip(layers, *means, strict=True):
        torch.testing.assert_close(found.vector(layer), ours - theirs, rtol=1e-4, atol=1e-4)
    assert found.held_out == tuple(tuple(i for i, part in enumerate(ps) if part == REPORT) for ps in parts)


def test_norms_are_those_of_single_positions(model: HookedVLM, square: VLMInputs) -> None:
    name = HOOK.format(1)
    found = mean_streams(model, [square], [name], "image")
    _, cache = model.run_with_cache(square)
    by_hand = sum(cache[name][0, column].norm() for column in square.image_tokens(0).tolist()) / square.n_images
    assert found.norms[0, 0].item() == pytest.approx(float(by_hand) / len(square.image_tokens(0)), rel=1e-5)


def test_samples_and_inputs_of_many_rows_are_the_same_items(model: HookedVLM, sets: Any) -> None:
    batch = VLMInputs.concat([sample.inputs(model) for sample in sets[0]])
    of_samples, of_rows = (mean_streams(model, own, [HOOK.format(2)]) for own in (sets[0], [batch]))
    assert of_samples.digests == of_rows.digests
    assert torch.equal(of_samples.means, of_rows.means)


@pytest.mark.parametrize("positions", ["final", "final+generated", None])
@pytest.mark.parametrize("cached", [True, False])
def test_steered_generation_is_that_of_a_hook_written_by_hand(
    positions: Any, cached: bool, model: HookedVLM, vectors: SteeringVectors, square: VLMInputs
) -> None:
    n, stop = 4, square.shape[1]
    first = 0 if positions is None else stop - 1
    last = stop if positions == "final" else stop + n

    def add(x: Tensor, hook: Any) -> Tensor:
        columns = hook.ctx["positions"] if cached else torch.arange(x.shape[1])
        here = (columns >= first) & (columns < last)
        return x + 1.5 * vectors.vector(2) * here[:, None]

    steer = vectors.at(2, 1.5, positions)
    own = steer.hooks(model, square)
    if cached:
        settings: Any = {"stop_at_eos": False, "output_logits": True}
        ours = model.generate(square, n, fwd_hooks=own, **settings)
        by_hand = model.generate(square, n, fwd_hooks=[(HOOK.format(2), add)], **settings)
        assert torch.equal(ours[0], by_hand[0])
        torch.testing.assert_close(ours[1], by_hand[1])
        assert not torch.equal(ours[1], model.generate(square, n, **settings)[1])
        return
    inputs = square
    for _ in range(n):  # without a cache: the whole prompt again at every step
        logits = model.run_with_hooks(inputs, fwd_hooks=own)
        torch.testing.assert_close(logits, model.run_with_hooks(inputs, fwd_hooks=[(HOOK.format(2), add)]))
        inputs = inputs.append([int(logits[0, -1].argmax())])
    generated = model.generate(square, n, fwd_hooks=own, stop_at_eos=False)
    assert generated[0, stop:].tolist() == inputs.tokens[0, stop:].tolist()


@torch.no_grad()
def test_a_sweep_over_layers_and_scales_is_the_loop(
    model: HookedVLM, vectors: SteeringVectors, square: VLMInputs
) -> None:
    runs = [vectors.at(layer, scale) for layer in vectors.layers for scale in (-1, 2)]
    runs.append(vectors.at_layers({1: 0.5, 3: 0.5}))  # pyright: ignore[reportArgumentType]
    circle, other = (model.to_tokens(word)[0, 0].item() for word in ("circle", "square"))
    metric = logit_difference(int(circle), int(other))
    found = sweep(model, square, runs, metric)
    for run, value in zip(runs, found.values[:, 0], strict=True):
        logits = model.run_with_hooks(square, fwd_hooks=run.hooks(model, square))
        assert float(value) == pytest.approx(float(logits[0, -1, circle] - logits[0, -1, other]), abs=1e-3)


def test_a_scale_of_one_moves_the_mean_negative_item_onto_the_mean_positive_one(
    model: HookedVLM, sets: Any, digests: Any, vectors: SteeringVectors
) -> None:
    parts = split_parts(digests[0], digests[1], 3)
    ours, theirs = ([s for s, p in zip(own, ps, strict=True) if p == FIT] for own, ps in zip(sets, parts, strict=True))
    moved = []
    for sample in theirs:
        inputs, kept = sample.inputs(model), {}
        hooks = [*vectors.at(1).hooks(model, inputs), (HOOK.format(1), partial(keep_last, kept))]
        model.run_with_hooks(inputs, fwd_hooks=hooks)
        moved.append(kept["x"])
    (expected,) = means_by_hand(model, ours, [HOOK.format(1)], "final")
    torch.testing.assert_close(torch.stack(moved).mean(0), expected, rtol=1e-4, atol=1e-3)


def keep_last(kept: dict[str, Tensor], x: Tensor, hook: Any) -> None:
    kept["x"] = x[0, -1]


def test_a_control_has_the_norm_and_another_direction_each_time(vectors: SteeringVectors) -> None:
    drawn = [vectors.control(2, seed).vector for seed in range(20)]
    norm = vectors.vector(2).norm()
    assert all(abs(vector.norm() / norm - 1) < 1e-5 for vector in drawn)
    cosines = torch.stack(drawn) @ torch.stack(drawn).T / norm**2
    assert (cosines - torch.eye(20)).abs().max() < 0.5
    assert torch.equal(drawn[3], vectors.control(2, 3).vector)


# ---------------------------------------------------------------- files


def test_a_file_gives_everything_back(model: HookedVLM, vectors: SteeringVectors, tmp_path: Path) -> None:
    path = vectors.save(tmp_path / "a" / "steering.safetensors")
    found = SteeringVectors.load(path, model)
    assert torch.equal(found.vectors, vectors.vectors) and torch.equal(found.stream_norms, vectors.stream_norms)
    for name in ("hook", "layers", "positions", "best", "held_out"):
        assert getattr(found, name) == getattr(vectors, name), name
    assert found.provenance == json.loads(json.dumps(vectors.provenance))
    assert found.separability.columns.tolist() == vectors.separability.columns.tolist()
    np.testing.assert_allclose(found.separability.to_numpy(), vectors.separability.to_numpy(), atol=1e-12)
    placed = replace(vectors, positions=((3, 4), (1,)))
    assert SteeringVectors.load(placed.save(path)).positions == ((3, 4), (1,))


def test_the_file_says_where_it_comes_from(vectors: SteeringVectors, tmp_path: Path) -> None:
    with safe_open(vectors.save(tmp_path / "v.safetensors"), "pt") as file:
        header = json.loads(file.metadata()["hooked_vlm.steering"])
    made = header["provenance"]
    assert made["model"] == "toy-qwen2-vl" and made["data"]["positive"]["items"] == 10 and made["seed"] == 3
    assert {"weights", "tokenizer", "code", "versions", "dtype"} <= set(made)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda whole: whole[: len(whole) // 2], "damaged"),
        (lambda whole: b"", "damaged"),
        (lambda whole: b"\x80\x04K\x01.", "damaged"),  # a pickle
        (lambda whole: whole.replace(b"hook_resid_post", b"hook_resid_pots"), "damaged"),
        (lambda whole: whole.replace(b'\\"best\\": ', b'\\"bets\\": '), "best"),
        (lambda whole: whole.replace(b'\\"format\\": 1', b'\\"format\\": 7'), "format 7"),
        (lambda whole: whole.replace(b"hooked_vlm.steering", b"hooked_vlm.steerinG"), "no steering vectors"),
    ],
)
def test_a_damaged_file_is_refused_by_name(damage: Any, word: str, vectors: SteeringVectors, tmp_path: Path) -> None:
    path = vectors.save(tmp_path / "v.safetensors")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    with pytest.raises(InputError, match=word) as found:
        SteeringVectors.load(path)
    assert "v.safetensors" in str(found.value) and "\n" not in str(found.value)


def test_numbers_that_are_none_and_files_that_are_not_there_are_refused(
    vectors: SteeringVectors, tmp_path: Path
) -> None:
    bad = replace(vectors, vectors=vectors.vectors * float("nan"))
    with pytest.raises(InputError, match="not finite"):
        SteeringVectors.load(bad.save(tmp_path / "v.safetensors"))
    with pytest.raises(InputError, match="there is no file"):
        SteeringVectors.load(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="do not fit"):
        header = {"hook": "hook_resid_post", "layers": [0, 1], "best": 1}
        write_file(tmp_path / "v.safetensors", {"vectors": torch.zeros(3, 4), "stream_norms": torch.ones(2)}, header)
        SteeringVectors.load(tmp_path / "v.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no steering vectors"):
        SteeringVectors.load(tmp_path / "other.safetensors")


def test_another_model_is_refused_and_another_fine_tune_only_on_request(
    vectors: SteeringVectors, tmp_path: Path
) -> None:
    path = vectors.save(tmp_path / "v.safetensors")
    sibling = HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")
    with torch.no_grad():
        sibling.blocks[0].mlp.out_proj.weight[0, 0] += 1e-3
    with pytest.raises(InputError, match="other_weights"):
        SteeringVectors.load(path, sibling)
    assert SteeringVectors.load(path, sibling, other_weights=True).best == vectors.best
    with pytest.raises(InputError, match="d_model"):
        too_wide = replace(vectors, vectors=torch.zeros(4, 7))
        SteeringVectors.load(too_wide.save(path), sibling, other_weights=True)


# ---------------------------------------------------------------- refusals


@pytest.mark.repeats_shapes
def test_what_cannot_be_a_contrast_is_refused(model: HookedVLM, sets: Any) -> None:
    ours, theirs = sets
    with pytest.raises(InputError, match="at least 8"):
        steering_vectors(model, ours[:7], theirs)
    with pytest.raises(InputError, match="at least 8"):  # copies of an item are one
        steering_vectors(model, [*ours[:7], ours[0], ours[0]], theirs)
    with pytest.raises(InputError, match="item 2 of the positive set is item 9"):
        steering_vectors(model, ours, [*theirs, ours[2]])
    with pytest.raises(InputError, match="positive set is empty"):
        steering_vectors(model, [], theirs)
    with pytest.raises(InputError, match="layer 9"):
        steering_vectors(model, ours, theirs, layers=[9])
    with pytest.raises(InputError, match="twice"):
        steering_vectors(model, ours, theirs, layers=[1, 1])
    with pytest.raises(InputError, match="hook_resid_pre"):
        steering_vectors(model, ours, theirs, hook="attn.hook_z")
    with pytest.raises(InputError, match="item 0 of the positive set"):
        steering_vectors(model, ours, theirs, positions="generated")
    with pytest.raises(InputError, match="names of units"):
        steering_vectors(model, ours, theirs, units=(["a"], ["b"]))


def test_hooks_left_on_the_model_are_refused(model: HookedVLM, sets: Any) -> None:
    model.add_hook(HOOK.format(0), lambda x, hook: x * 2)
    try:
        with pytest.raises(InputError, match=r"blocks\.0\.hook_resid_post"):
            steering_vectors(model, *sets)
    finally:
        model.reset_hooks()


def test_layers_without_a_vector_are_refused(model: HookedVLM, sets: Any, vectors: SteeringVectors) -> None:
    few = steering_vectors(model, *sets, layers=[1], seed=3)
    assert torch.equal(few.vector(1), vectors.vector(1)) and few.best == 1
    with pytest.raises(InputError, match="layer 2"):
        few.at(2)


@pytest.mark.repeats_shapes
def test_every_hook_of_the_stream_gives_vectors(model: HookedVLM, sets: Any) -> None:
    found = {hook: steering_vectors(model, *sets, hook=hook, layers=(1, 2), seed=3) for hook in HOOKS}
    torch.testing.assert_close(found["hook_resid_post"].vector(1), found["hook_resid_pre"].vector(2))


@torch.no_grad()
def test_every_family_gives_streams_and_takes_vectors(family: str) -> None:
    model, inputs = model_and_inputs(family, "padded")
    layers = tuple(range(model.cfg.n_layers))
    names = [HOOK.format(layer) for layer in layers]
    found = mean_streams(model, [inputs], names)
    for row in range(len(inputs)):
        _, own = model.run_with_cache(inputs[row])
        for layer, name in enumerate(names):
            torch.testing.assert_close(found.means[row, layer], own[name][0, -1].float())
    vector = torch.randn(len(layers), model.cfg.d_model)
    vectors = SteeringVectors(
        "hook_resid_post", layers, vector, vector.norm(dim=-1), "final", 0, pd.DataFrame(), ((), ()), {}
    )
    hooks = vectors.at(layers[-1], 0.7).hooks(model, inputs)
    steered = model.run_with_hooks(inputs, fwd_hooks=hooks)

    def add(x: Tensor, hook: Any) -> None:
        x[:, -1] += 0.7 * vector[-1]

    torch.testing.assert_close(steered, model.run_with_hooks(inputs, fwd_hooks=[(names[-1], add)]))
    assert not torch.equal(steered, model(inputs))
