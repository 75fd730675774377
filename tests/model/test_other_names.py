"""What users of TransformerLens and `transformers` try works as there, or is refused with what it is called here."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import bundled, inputs_of, tiny_model
from tiny_qwen2_vl import PADDED, TEXT, inputs
from tiny_qwen2_vl import tiny_model as tiny_qwen

from hooked_vlm import CheckpointError, HookedVLM, InputError
from hooked_vlm.inputs.other_names import ARGUMENTS, ATTRIBUTES, LOADING

TEXTS = ["What is this?", "Name a colour."]


@pytest.fixture
def toy() -> HookedVLM:
    return bundled("toy-qwen2-vl")


def test_device_and_dtype(toy: HookedVLM) -> None:
    assert toy.device == torch.device("cpu") and toy.dtype == torch.float32
    assert copy.deepcopy(tiny_qwen()).to(torch.bfloat16).dtype == torch.bfloat16


def test_tokens_as_text(toy: HookedVLM) -> None:
    assert toy.to_str_tokens(TEXTS) == [toy.to_str_tokens(text) for text in TEXTS]
    first = toy.to_tokens(TEXTS[0])[0]
    assert [toy.to_single_str_token(int(token)) for token in first] == toy.to_str_tokens(TEXTS[0])
    text = str(toy.to_str_tokens(TEXTS[0])[2])
    at = [i for i, token in enumerate(first.tolist()) if token == int(first[2])]
    for wanted in (text, int(first[2])):
        assert toy.get_token_position(wanted, TEXTS[0]) == at[0]
        assert toy.get_token_position(wanted, first[None], mode="last") == at[-1]
    absent = next(i for i in range(toy.cfg.d_vocab) if i not in first.tolist())
    with pytest.raises(InputError, match="occur"):
        toy.get_token_position(absent, TEXTS[0])
    with pytest.raises(InputError, match="2"):
        toy.get_token_position(text, toy.to_tokens(TEXTS))


def test_heads_and_their_matrices(family: str) -> None:
    model = tiny_model(family)
    cfg = model.cfg
    assert model.all_head_labels[cfg.n_heads] == "L1H0" and len(model.all_head_labels) == cfg.n_layers * cfg.n_heads
    for layer, head in ((0, 1), (2, 3)):
        attn = model.blocks[layer].attn
        group = head // (cfg.n_heads // cfg.n_key_value_heads)
        torch.testing.assert_close(model.OV.AB[layer, head], attn.W_V[group] @ attn.W_O[head])
        torch.testing.assert_close(model.QK.AB[layer, head], attn.W_Q[head] @ attn.W_K[group].T)


def test_the_loss_of_each_token(family: str) -> None:
    model = tiny_model(family)
    batch = inputs_of(family, [[5, 6, "small", 7, 8], [11, 12, 13]])
    if model.cfg.bidirectional == "prompt":
        for return_type in ("loss", "both"):
            with pytest.raises(InputError, match="see each other both ways"):
                model(batch, return_type=return_type)
        return
    with torch.no_grad():
        logits = model(batch)
        each = model(batch, return_type="loss", loss_per_token=True)
        mean = model(batch, return_type="loss")
        both = model(batch, return_type="both", loss_per_token=True)[1]
    expected = torch.zeros_like(each)
    placeholders = {p for v in batch.visuals for p in v.positions.tolist()}
    counted = []
    for row in range(2):
        for position in range(batch.first[row] + 1, batch.stop[row]):
            if row == 0 and position in placeholders:
                continue
            own = F.cross_entropy(logits[row, position - 1], batch.tokens[row, position])
            expected[row, position - 1] = own
            counted.append(own)
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(mean, torch.stack(counted).mean())
    assert both.equal(each) and model.loss_fn(logits, batch, per_token=True).equal(each)


def test_a_loss_of_bare_ids_with_their_mask() -> None:
    model, batch = tiny_qwen(), inputs([[5, 6, 7, 8], [9, 10]])
    logits = model(batch)
    found = model.loss_fn(logits, batch.tokens, attention_mask=batch.attention_mask)
    torch.testing.assert_close(found, model(batch, return_type="loss"))
    with pytest.raises(InputError, match="attention_mask"):
        model.loss_fn(logits, batch, attention_mask=batch.attention_mask)
    with pytest.raises(InputError, match="loss_per_token"):
        model(batch, loss_per_token=True)
    with pytest.raises(InputError, match="logits"):
        model(batch, return_type="loss", logits_at="last")


def test_no_first_layer_is_the_first() -> None:
    model, batch = tiny_qwen(), inputs(TEXT)
    assert model(batch, start_at_layer=None).equal(model(batch))
    assert model.run_with_cache(batch, start_at_layer=None, stop_at_layer=1)[0].equal(model(batch, stop_at_layer=1))


def test_a_cache_as_a_dictionary() -> None:
    model, batch = tiny_qwen(), inputs(PADDED)
    _, plain = model.run_with_cache(batch, return_cache_object=False)
    _, cache = model.run_with_cache(batch)
    assert type(plain) is dict and set(plain) == set(cache)
    assert all(plain[name].equal(x) for name, x in cache.items())


@torch.no_grad()
def test_a_frozen_key_value_cache_serves_many_continuations() -> None:
    model, batch = tiny_qwen(), inputs(PADDED)
    cache = model.new_kv_cache(3, 32)
    model(batch, past_kv_cache=cache)
    length = cache.length
    cache.freeze()
    for answer in ([[7]] * 3, [[8, 9]] * 3):
        found = model(torch.tensor(answer), past_kv_cache=cache)
        expected = model(batch.append(answer))[:, -len(answer[0]) :]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert cache.length == length
    with pytest.raises(InputError, match="frozen"):
        model.next_logits(torch.tensor([7] * 3), cache)
    other = cache.repeat(1)
    model.next_logits(torch.tensor([7] * 3), other)
    assert (other.length, cache.length) == (length + 1, length)
    cache.unfreeze()
    model(torch.tensor([[7]] * 3), past_kv_cache=cache)
    assert cache.length == length + 1


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_are_called_otherwise_are_refused(name: str) -> None:
    model, batch = tiny_qwen(), inputs(TEXT)
    for call in (model, model.run_with_cache, model.run_with_hooks, model.generate):
        with pytest.raises(InputError, match=name):
            call(batch, **{name: None})


@pytest.mark.parametrize("name", LOADING)
def test_arguments_of_loading_that_are_called_otherwise_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        HookedVLM.from_pretrained("toy-qwen2-vl", **{name: None})  # pyright: ignore[reportArgumentType]


def test_a_device_map_for_one_device_is_a_device() -> None:
    with pytest.raises(CheckpointError, match="device="):
        HookedVLM.from_pretrained("toy-qwen2-vl", device_map="cuda")
    with pytest.raises(TypeError, match="colour"):
        HookedVLM.from_pretrained("toy-qwen2-vl", colour="red")


def test_arguments_that_nobody_knows_are_pythons_business() -> None:
    for call in (tiny_qwen(), tiny_qwen().generate):
        with pytest.raises(TypeError, match="colour"):
            call(inputs(TEXT), colour="red")


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_that_are_called_otherwise_name_ours(name: str) -> None:
    model: Any = tiny_qwen()
    with pytest.raises(AttributeError, match=name):
        getattr(model, name)
    assert not hasattr(model, name)
    place = ATTRIBUTES[name].split(",")[0].split(" ")[0].split("(")[0]
    if place.startswith("model.") and "=" not in ATTRIBUTES[name]:
        part = model
        for step in place.removeprefix("model.").split("."):
            part = getattr(part, step)
