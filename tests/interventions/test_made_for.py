"""Hooks run on the token layout that they were made for, and are refused elsewhere."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from every_kind import KINDS, of_every_kind
from families import KINDS as KINDS_OF_MODELS
from families import inputs_of, tiny_model
from tiny_qwen2_vl import inputs as tiny_inputs

from hooked_vlm import InputError
from hooked_vlm.interventions import AddVector, PatchActivation, ZeroHeads
from hooked_vlm.interventions.base import position_table

ROW = [5, 6, "small", 7, 8, 9, 10]
OTHERS = {
    "another length": [[5, 6, "small", 7, 8, 9]],
    "the image elsewhere": [[5, "small", 6, 7, 8, 9, 10]],
    "another image size": [[5, 6, "large", 7, 8, 9, 10]],
    "one more row": [ROW, ROW],
}


@pytest.fixture
def model(family: str) -> Any:
    return tiny_model(family)


@lru_cache
@torch.no_grad()
def kinds_of(family: str) -> tuple[Any, dict[str, Any]]:
    own = inputs_of(family, [ROW])
    return own, of_every_kind(tiny_model(family), own)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", OTHERS)
def test_hooks_of_other_inputs_are_refused(model: Any, family: str, kind: str, other: str) -> None:
    own, kinds = kinds_of(family)
    if other == "another image size" and len(set(KINDS_OF_MODELS[family].images.values())) == 1:
        pytest.skip("this family sees every picture in one size")
    hooks = kinds[kind].hooks(model, own)
    with pytest.raises(InputError, match="made for"):
        model.run_with_hooks(inputs_of(family, OTHERS[other]), fwd_hooks=hooks)
    assert not model.hook_dict["blocks.1.attn.hook_z"].fwd_hooks  # and none is left behind


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.repeats_shapes
def test_hooks_run_on_equal_layouts_and_on_rows_with_tokens_appended(model: Any, family: str, kind: str) -> None:
    own, kinds = kinds_of(family)
    intervention = kinds[kind]
    hooks = intervention.hooks(model, own)
    alike = {
        "moved": own.to("cpu"),
        "encoded": own.with_image_features(model.encode_images(own)),
        "another picture": inputs_of(family, [ROW], seed=1),
        "other words": inputs_of(family, [[6, 5, "small", 8, 7, 9, 11]]),
        "longer": own.append([[12, 13, 14]]),
    }
    for name, given in alike.items():
        theirs = intervention.hooks(model, given) if name != "longer" or kind != "patch" else hooks
        found, expected = (model.run_with_hooks(given, fwd_hooks=pairs) for pairs in (hooks, theirs))
        torch.testing.assert_close(found, expected, msg=name)
    tokens = model.generate(own, 2, fwd_hooks=hooks, stop_at_eos=False)
    again = model.generate(alike["moved"], 2, fwd_hooks=hooks, stop_at_eos=False)
    assert tokens.tolist() == again.tolist()


@torch.no_grad()
def test_a_row_of_a_batch_is_not_the_batch(model: Any, family: str) -> None:
    batch = inputs_of(family, [ROW, [11, 12, 13]])
    hooks = AddVector("blocks.1.hook_resid_post", torch.ones(model.cfg.d_model), positions="final").hooks(model, batch)
    for row in (0, 1):
        with pytest.raises(InputError, match="made for"):
            model.run_with_hooks(batch[row], fwd_hooks=hooks)


@torch.no_grad()
def test_tokens_that_an_intervention_took_for_padding_are_refused(model: Any, family: str) -> None:
    batch = inputs_of(family, [ROW, ROW]).append([[12], [12, 13]])  # the first row is padded at its end
    hooks = ZeroHeads(((1, 0),)).hooks(model, batch)
    model.run_with_hooks(batch, fwd_hooks=hooks)
    with pytest.raises(InputError, match="made for"):
        model.run_with_hooks(batch.append([[14], [14]]), fwd_hooks=hooks)


@torch.no_grad()
def test_hooks_for_whole_inputs_act_in_each_pass_of_a_key_value_cache(model: Any, family: str) -> None:
    begin = inputs_of(family, [ROW])
    whole = begin.append([[12, 13, 14]])
    hooks = ZeroHeads(((1, 0),), positions="final+generated").hooks(model, whole)
    expected = model.run_with_hooks(whole, fwd_hooks=hooks)
    cache = model.new_kv_cache(1, 8)
    answer = inputs_of(family, [[12]]).append([[13, 14]])
    answer = replace(answer, n_generated=(3,))  # no part of a prompt, whose tokens may see each other both ways
    with model.hooks(fwd_hooks=hooks):
        parts = [model(begin, past_kv_cache=cache), model(answer, past_kv_cache=cache)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hooks_in_a_key_value_cache_are_for_all_of_it(model: Any, family: str) -> None:
    begin = inputs_of(family, [[5, 6]])
    chunk, other = (replace(inputs_of(family, [row]), n_generated=(2,)) for row in ([7, 8], [9, 10]))

    def run(hooks: list, continued: Any) -> torch.Tensor:
        cache = model.new_kv_cache(1, 8)
        model(begin, past_kv_cache=cache)
        with model.hooks(fwd_hooks=hooks):
            return model(continued, past_kv_cache=cache)

    whole = begin.append(chunk.tokens)
    hooks = ZeroHeads(((1, 0),), positions=(2, 3)).hooks(model, whole)
    expected = model.run_with_hooks(whole, fwd_hooks=hooks)[:, 2:]
    torch.testing.assert_close(run(hooks, chunk), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="all of them"):
        run(hooks, other)  # other tokens behind the same beginning
    for made_for in (chunk, inputs_of(family, [[7, 8, 9]])):
        with pytest.raises(InputError, match="all of them"):
            run(ZeroHeads(((1, 0),)).hooks(model, made_for), chunk)


@torch.no_grad()
def test_an_image_of_another_shape_with_as_many_tokens_is_another() -> None:
    """Its tokens have other rotary positions."""
    wide, tall = (tiny_inputs([[5, ("image", grid), 7]]) for grid in ((1, 4, 6), (1, 6, 4)))
    hooks = ZeroHeads(((1, 0),)).hooks(tiny_model("qwen2-vl"), wide)
    with pytest.raises(InputError, match="made for"):
        tiny_model("qwen2-vl").run_with_hooks(tall, fwd_hooks=hooks)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.repeats_shapes
def test_interventions_act_on_every_sample_of_every_row(model: Any, family: str, kind: str) -> None:
    batch = inputs_of(family, [ROW, [11, 12, 13]])
    intervention = of_every_kind(model, batch)[kind]
    hooks = intervention.hooks(model, batch)
    settings = {"do_sample": True, "num_return_sequences": 2, "stop_at_eos": False, "output_logits": True}
    tokens, logits = model.generate(batch, 2, fwd_hooks=hooks, **settings)
    for i, row in enumerate(tokens):
        answered = batch.append([row[batch.shape[1] :]] * 2)
        whole = model.run_with_hooks(answered, fwd_hooks=hooks)[i // 2, -3:-1]
        torch.testing.assert_close(logits[i], whole, atol=5e-5, rtol=1e-3)


@torch.no_grad()
def test_the_vision_tower_knows_its_inputs(model: Any, family: str) -> None:
    own, other = inputs_of(family, [ROW]), inputs_of(family, [[5, 6, "small", 7]])
    name = "hook_image_features"
    source = torch.zeros(len(own.feature_slots), model.cfg.d_model)
    hooks = PatchActivation(name, source).hooks(model, own)
    model.run_with_hooks(own, fwd_hooks=hooks)
    with pytest.raises(InputError, match="made for"):
        model.run_with_hooks(other, fwd_hooks=hooks)
    inside = PatchActivation("vision.blocks.0.hook_resid_post", model.run_with_cache(own)[1].vision["resid_post", 0])
    with model.hooks(fwd_hooks=inside.hooks(model, own)):
        model.encode_images(own)
        with pytest.raises(InputError, match="made for"):
            model.encode_images(other)


def test_sums_of_groups(model: Any, family: str) -> None:
    inputs = inputs_of(family, [ROW, [11, 12, 13]]).append([[12, 13], [14]])
    for parts in (("final", "generated"), ("image", "final"), ("text", "image"), ("question", "video")):
        expected = torch.stack([_table(name, inputs) for name in parts]).any(0)
        assert position_table("+".join(parts), inputs).tolist() == expected.tolist()
        assert position_table(" + ".join(parts), inputs).tolist() == expected.tolist()
    with pytest.raises(InputError, match=r"'finale'.*final"):
        position_table("finale+generated", inputs)
    with pytest.raises(InputError, match="video"):
        position_table("video", inputs)


def _table(name: str, inputs: Any) -> torch.Tensor:
    """A group's columns, empty where the inputs have none."""
    if name == "video":
        return torch.zeros(len(inputs), inputs.shape[1] + 1, dtype=torch.bool)
    return position_table(name, inputs)
