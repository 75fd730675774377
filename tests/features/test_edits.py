"""Edits of features do what a hook written out does, in runs, in generation and in sweeps, and keep the error."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import ROWS, model_and_inputs
from jaxtyping import TypeCheckError
from planted import PLACES, RESID, dictionary_at, random_dictionary
from sweeps_by_hand import agrees, naive
from torch import Tensor

from hooked_vlm import sweep
from hooked_vlm.errors import FeatureError, InputError
from hooked_vlm.features import Dictionary, EditFeatures
from hooked_vlm.interventions import AddVector, Compose, ZeroHeads
from hooked_vlm.metrics import log_prob, logit
from hooked_vlm.runtime.digests import digest

POSITIONS: dict[str, Any] = {"everywhere": None, "image": "image", "question": "question", "some": "final+question"}


def edits_at(model: Any, place: str, positions: Any = None) -> list[EditFeatures]:
    own = dictionary_at(model, place)
    return [
        EditFeatures(own, (0, 1, 2, 3), positions=positions),
        EditFeatures(own, (5,), add=6.0, positions=positions),
        EditFeatures(own, (4, 7, 9, 11), scale=-3.0, positions=positions),
    ]


def edited(model: Any, batch: Any, edit: EditFeatures) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(batch, fwd_hooks=edit.hooks(model, batch))


def literal(model: Any, batch: Any, own: Dictionary, edit: EditFeatures, chosen: Any) -> Tensor:
    """The edit as two hooks: vector by vector, reconstruction by reconstruction."""
    kept: dict[str, Tensor] = {}

    def read(x: Tensor, hook: Any) -> None:
        kept["x"] = x.clone()

    def write(y: Tensor, hook: Any) -> Tensor:
        y = y.clone()
        for row, position in chosen:
            x = kept["x"][row, position].flatten()
            f = own.encode(x)
            new = f.clone()
            for feature in edit.features:
                new[feature] = edit.scale * f[feature] + edit.add
            change = own.decode(new, x) - own.decode(f, x)
            y[row, position] += change.view(y.shape[2:])
        return y

    with torch.no_grad():
        return model.run_with_hooks(batch, fwd_hooks=[(own.hook_name, read), (own.out_hook_name, write)])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("place", [place for place in PLACES if "vision" not in place and "image" not in place])
def test_an_edit_equals_a_hook_written_out(family: str, place: str, where: str, rows: str) -> None:
    model, batch = model_and_inputs(family, rows)
    groups = batch.positions
    for edit in edits_at(model, place, POSITIONS[where]):
        chosen = [
            (row, int(p))
            for row in range(len(batch))
            for p in {
                "everywhere": range(batch.first[row], batch.stop[row]),
                "image": groups.image[row].tolist(),
                "question": groups.question[row].tolist(),
                "some": {*groups.question[row].tolist(), *groups.final[row].tolist()},
            }[where]
        ]
        expected = literal(model, batch, dictionary_at(model, place), edit, chosen)
        real = batch.attention_mask.bool()
        torch.testing.assert_close(edited(model, batch, edit)[real], expected[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("place", ["vision stream", "vision transcoder"])
def test_patches_of_the_vision_tower(family: str, place: str) -> None:
    model, batch = model_and_inputs(family, "two images")
    own, plain = dictionary_at(model, place), model(batch).detach()
    edit = EditFeatures(own, (5,), add=6.0, positions=(1, 3))
    expected = literal(
        model, batch, own, edit, [(image, patch) for image in range(_n_images(batch)) for patch in (1, 3)]
    )
    found = edited(model, batch, edit)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-4)
    with pytest.raises(InputError, match="patches have numbers"):
        EditFeatures(own, (5,), positions="image").hooks(model, batch)


def _n_images(batch: Any) -> int:
    return sum(t for t, _, _ in batch.grids)


@pytest.mark.parametrize("rows", ["one image", "padded"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.repeats_shapes
def test_a_sweep_equals_the_loop(family: str, place: str, rows: str) -> None:
    model, batch = model_and_inputs(family, rows)
    wheres = (
        [None] if place in ("vision stream", "vision transcoder", "image features") else ["question", "final", None]
    )
    edits = [edit for where in wheres for edit in edits_at(model, place, where)]
    mixed = [*edits, ZeroHeads(((1, 0),)), Compose((edits[0], ZeroHeads(((2, 1),))))]
    result = agrees(model, batch, mixed, log_prob(7))
    assert bool((result.effects.abs().amax(1)[: len(edits)] > 1e-5).any())


@pytest.mark.parametrize("place", ["transcoder", "skip transcoder across blocks"])
@pytest.mark.repeats_shapes
def test_a_transcoder_has_read_what_later_hooks_change(family: str, place: str) -> None:
    """In runs and in sweeps, whose hooks write into the tensor of all runs."""
    model, batch = model_and_inputs(family, "padded")
    edit = edits_at(model, place)[1]
    name = edit.dictionary.hook_name
    agrees(model, batch, [Compose((edit, AddVector(name, 2 * torch.randn(model.cfg.d_model)))), edit], log_prob(7))

    def returned(x: Tensor, hook: Any) -> Tensor:
        return 2 * x

    def in_place(x: Tensor, hook: Any) -> None:
        x *= 2

    hooks = edit.hooks(model, batch)
    with torch.no_grad():
        found, expected = (
            model.run_with_hooks(batch, fwd_hooks=[*hooks, (name, double)]) for double in (in_place, returned)
        )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.repeats_shapes
def test_a_sweep_over_all_logits_and_rows_of_several_ends(family: str, place: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    batch = batch.append([[7 + i] * (1 + i % 3) for i in range(len(batch))])
    edits = edits_at(model, place)
    agrees(model, batch, edits, logit(9))

    def all_logits(logits: Tensor) -> Tensor:
        return (logits * batch.attention_mask[..., None]).sum((1, 2))

    found = sweep(model, batch, edits, all_logits, logits_at="all").values
    torch.testing.assert_close(found, naive(model, batch, edits, all_logits, "all"), atol=3e-3, rtol=1e-4)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("positions", [None, "final+generated"])
@pytest.mark.repeats_shapes
def test_generation_equals_passes_without_a_cache(family: str, place: str, positions: Any) -> None:
    model, batch = model_and_inputs(family, "padded")
    on_image = place in ("vision stream", "vision transcoder", "image features")
    edit = edits_at(model, place, None if on_image else positions)[1]
    tokens = model.generate(batch, 3, stop_at_eos=False, fwd_hooks=edit.hooks(model, batch))
    new = tokens[:, batch.shape[1] :]
    placeholders = torch.tensor(batch.spec.placeholder_ids)
    for step in range(3):
        if torch.isin(new[:, :step], placeholders).any():
            break
        continued = batch.append(new[:, :step]) if step else batch
        with torch.no_grad():
            logits = model.run_with_hooks(continued, fwd_hooks=edit.hooks(model, batch))
        assert logits[:, -1].argmax(-1).tolist() == new[:, step].tolist()


def test_an_edit_that_changes_nothing_changes_no_bit(family: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    for place in PLACES:
        edit = EditFeatures(dictionary_at(model, place), (1, 2), scale=1.0)
        with torch.no_grad():
            assert torch.equal(edited(model, batch, edit), model(batch)), place


def test_what_the_dictionary_does_not_reconstruct_stays(family: str) -> None:
    """Ablating a feature whose direction is orthonormal to all others removes it from the stream, and nothing else."""
    model, batch = model_and_inputs(family, "one image")
    d = model.cfg.d_model
    directions = torch.linalg.qr(torch.randn(d, d))[0][:3]
    own = Dictionary(RESID, directions.T.contiguous(), torch.zeros(3), directions, torch.zeros(d))
    with torch.no_grad():
        _, plain = model.run_with_cache(batch, names_filter=RESID)
        with model.hooks(EditFeatures(own, (1,)).hooks(model, batch)):
            _, after = model.run_with_cache(batch, names_filter=RESID)
    x = plain[RESID]
    expected = x - (x @ directions[1]).relu()[..., None] * directions[1]
    torch.testing.assert_close(after[RESID], expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    own = random_dictionary(6)
    with pytest.raises(FeatureError, match="no feature 24"):
        EditFeatures(own, (3, 24))
    with pytest.raises(FeatureError, match="no feature -1"):
        EditFeatures(own, (-1,))
    with pytest.raises(FeatureError, match="no feature is chosen"):
        EditFeatures(own, ())
    numbers: Any
    for numbers in (3, 0, None, torch.tensor([1, 2]), (3.0,), (True, False)):
        with pytest.raises(
            (FeatureError, TypeCheckError), match="features"
        ):  # the second where annotations are executed
            EditFeatures(own, numbers)
    model, batch = model_and_inputs("qwen3-vl", "one image")
    with pytest.raises(FeatureError, match="has 6 numbers"):
        edited(model, batch, EditFeatures(own, (3,)))
    d = model.cfg.d_model
    backwards = random_dictionary(d, hook_name="blocks.2.hook_resid_post", d_out=d, out_hook_name=RESID)
    with pytest.raises(FeatureError, match="reads before it writes"):
        edited(model, batch, EditFeatures(backwards, (3,)))


def test_results_are_stored_under_the_numbers_of_the_dictionary() -> None:
    own = random_dictionary(6)
    edit = EditFeatures(own, (3,), add=1.0)
    assert digest(edit) == digest(replace(edit, dictionary=replace(own, metadata={"seen": "elsewhere"})))
    others = (replace(edit, add=2.0), replace(edit, dictionary=replace(own, b_enc=own.b_enc + 1)))
    assert len({digest(each) for each in (edit, *others)}) == 3
    assert str(edit) == "EditFeatures 3 to 0 f + 1 at blocks.1.hook_resid_post, all positions"
