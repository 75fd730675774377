"""Settings of generation against `transformers`' own `generate`, draw for draw under the same seed."""

import json
from typing import Any

import numpy as np
import pytest
import tiny_qwen2_vl as tiny
import torch
from families import bundled
from tiny import PAD, STOP
from tiny_qwen2_vl import ONE_IMAGE, PADDED, TEXT, hf_batch, inputs, tiny_hf, tiny_model

from hooked_vlm import HookedVLM, HookError, InputError
from hooked_vlm.errors import NotFiniteError
from hooked_vlm.model.finite import first_not_finite
from hooked_vlm.model.sampling import checkpoint_settings

N_NEW = 8
SETTINGS = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"min_new_tokens": 6},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7},
    {"do_sample": True, "temperature": 1.5, "top_k": 5},
    {"do_sample": True, "top_p": 0.6},
    {"do_sample": True, "temperature": 1.2, "top_k": 20, "top_p": 0.7, "repetition_penalty": 1.2},
]


def theirs(rows: list[list[Any]], **settings: Any) -> torch.Tensor:
    """`transformers`' tokens; settings that are not given are neutral."""
    torch.manual_seed(0)
    neutral = {"do_sample": False, "top_k": 0, "pad_token_id": PAD, "eos_token_id": STOP}
    return tiny_hf().generate(**hf_batch(rows), max_new_tokens=N_NEW, **{**neutral, **settings})


def ours(rows: list[list[Any]], model: Any = None, **settings: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return (model or tiny_model()).generate(inputs(rows), N_NEW, **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("rows", [TEXT, ONE_IMAGE, PADDED], ids=["text", "one image", "padded"])
def test_tokens_are_those_of_the_reference(rows: list, settings: dict[str, Any]) -> None:
    assert ours(rows, **settings).tolist() == theirs(rows, **settings).tolist()


def test_settings_change_tokens() -> None:
    """Otherwise the comparison above would show nothing."""
    found = {str(ours(PADDED, **settings).tolist()) for settings in [{}, *SETTINGS]}
    assert len(found) >= len(SETTINGS) - 1


@pytest.mark.parametrize(
    "file",
    [
        {},
        {"repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": True, "top_k": 0, "top_p": 0.5, "transformers_version": "4.45.0", "max_length": 5},
        {"temperature": 0.5},
    ],
    ids=str,
)
@pytest.mark.repeats_shapes
def test_the_checkpoints_settings_act_on_request_only(file: dict[str, Any]) -> None:
    """A plain greedy `generate` of `transformers` keeps the file's penalty; here the logits are the model's own."""
    hf = tiny_hf()
    saved, hf.generation_config = hf.generation_config, type(hf.generation_config)(**file, eos_token_id=STOP)
    try:
        torch.manual_seed(0)
        expected = hf.generate(**hf_batch(PADDED), max_new_tokens=N_NEW, pad_token_id=PAD)
        model = HookedVLM.from_hf(hf)
        assert ours(PADDED, model, settings="checkpoint").tolist() == expected.tolist()
        assert ours(PADDED, model).tolist() == ours(PADDED).tolist()
        greedy = hf.generate(**hf_batch(PADDED), max_new_tokens=N_NEW, pad_token_id=PAD, do_sample=False)
        assert ours(PADDED, model, settings="checkpoint", do_sample=False).tolist() == greedy.tolist()
    finally:
        hf.generation_config = saved


def test_the_checkpoints_settings_are_loaded_saved_and_overridden(tmp_path: Any) -> None:
    model = HookedVLM.from_hf(tiny_hf())
    model.generation_config |= {"do_sample": True, "temperature": 0.3, "repetition_penalty": 1.2}
    model.save_pretrained(tmp_path / "saved")
    again = HookedVLM.from_pretrained(tmp_path / "saved")
    assert again.generation_config["temperature"] == 0.3
    expected = ours(PADDED, do_sample=True, temperature=2.0, top_k=50, repetition_penalty=1.2)
    assert ours(PADDED, again, settings="checkpoint", temperature=2.0).tolist() == expected.tolist()
    path = tmp_path / "saved" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_beams": 4}))
    beams = HookedVLM.from_pretrained(tmp_path / "saved")
    assert ours(TEXT, beams).tolist() == ours(TEXT).tolist()
    with pytest.raises(InputError, match="num_beams=4"):
        ours(TEXT, beams, settings="checkpoint")


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"num_return_sequences": 3}, {"temperature": 1.0},
        {"repetition_penalty": 0.0}, {"min_new_tokens": -1}, {"do_sample": True, "num_return_sequences": 0},
        {"eos_token_id": 5, "stop_at_eos": False}, {"eos_token_id": 5000}, {"stop_strings": "x"},
        {"do_sample": True, "num_return_sequences": 2, "return_cache": True},
        {"do_sample": True, "top_k": 5.0}, {"do_sample": True, "top_k": True}, {"do_sample": True, "top_p": "much"},
        {"min_new_tokens": 2.0}, {"min_new_tokens": 99}, {"stop_at_eos": False, "min_new_tokens": 2},
        {"eos_token_id": 2.5}, {"eos_token_id": "x"}, {"eos_token_id": [1.5]}, {"eos_token_id": []},
        {"stop_strings": 3}, {"names_filter": "blocks.0.hook_resid_post"},
        pytest.param({"generator": torch.Generator()}, id="generator"),
        {"return_cache": True, "names_filter": "blocks.0.hook_resid_past"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_change_nothing_or_do_not_fit_are_refused(settings: dict[str, Any]) -> None:
    named = next(name for name in reversed(settings) if name not in ("do_sample", "stop_at_eos"))
    with pytest.raises((InputError, HookError), match="resid_past" if "resid_past" in str(settings) else named):
        ours(TEXT, **settings)


@pytest.mark.parametrize("wrong", [0, 2.5, "3", True])
def test_the_number_of_tokens_is_a_whole_number(wrong: Any) -> None:
    with pytest.raises(InputError, match="max_new_tokens"):
        tiny_model().generate(inputs(TEXT), wrong)


@pytest.mark.parametrize("number", [np.int64(5), np.int32(5)])
def test_numbers_of_numpy_are_numbers(number: Any) -> None:
    settings = {"do_sample": True, "temperature": np.float32(0.7)}
    assert (
        ours(TEXT, top_k=number, **settings).tolist() == theirs(TEXT, do_sample=True, temperature=0.7, top_k=5).tolist()
    )


@pytest.mark.parametrize(
    "file",
    [
        {"no_repeat_ngram_size": 1}, {"forced_eos_token_id": 0}, {"token_healing": True}, {"min_length": 1},
        {"min_p": 1.0}, {"stop_strings": ["x"]}, {"forced_decoder_ids": [[1, 2]]}, {"num_beams": 2},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_a_checkpoint_that_are_not_supported_are_refused_by_name(file: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(file))):
        checkpoint_settings(file)
    neutral = {"num_beams": 1, "typical_p": 1.0, "min_length": 0, "bad_words_ids": [], "token_healing": False}
    assert checkpoint_settings({**neutral, "repetition_penalty": 1.1}) == {"repetition_penalty": 1.1}


# ---------------------------------------------------------------- where rows end


@pytest.mark.parametrize("several", [False, True])
def test_stop_tokens_of_ones_own(several: bool) -> None:
    free = ours(PADDED, stop_at_eos=False)[:, -N_NEW:]
    stops = [int(free[0, 2]), int(free[1, 4])] if several else int(free[0, 2])
    assert ours(PADDED, eos_token_id=stops).tolist() == theirs(PADDED, eos_token_id=stops).tolist()


def test_stop_texts_end_a_row_and_stay_in_it() -> None:
    model = bundled("toy-qwen2-vl")
    prompt = model.to_inputs(["What is this?", "Name a colour please."])
    free = model.generate(prompt, 12, stop_at_eos=False)[:, prompt.shape[1] :]
    text = str(model.to_string(free[0, 3:4]))
    settings = {"stop_strings": [text, "never"], "stop_at_eos": False}
    tokens, cache = model.generate(prompt, 12, **settings, return_cache=True)
    answers = model.generate(prompt, 12, **settings, return_type="str")
    for row, answer in enumerate(answers):
        whole = str(model.to_string(free[row]))
        assert answer == (whole[: whole.index(text) + len(text)] if text in whole else whole)
        n = len(model.tokenizer.encode(answer, add_special_tokens=False))
        assert tokens[row, prompt.shape[1] : prompt.shape[1] + n].tolist() == free[row, :n].tolist()
        assert cache.inputs.n_generated[row] == n


# ---------------------------------------------------------------- what comes back


def test_text_is_answered_with_text() -> None:
    model = bundled("toy-qwen2-vl")
    assert isinstance(model.generate("What is this?", 3), str)
    assert [type(answer) for answer in model.generate(["What is this?", "A"], 3)] == [str, str]
    assert torch.is_tensor(model.generate("What is this?", 3, return_type="tokens"))
    assert torch.is_tensor(model.generate(model.to_inputs("What is this?"), 3))


@pytest.mark.parametrize("rows", [ONE_IMAGE, PADDED], ids=["one image", "padded"])
def test_several_samples_of_each_prompt(rows: list) -> None:
    model, prompt = tiny_model(), inputs(rows)
    found = ours(rows, do_sample=True, num_return_sequences=3)
    if len(prompt) == 1:  # with several rows `transformers` pads the prompts' copies, but draws the same
        assert found.tolist() == theirs(rows, do_sample=True, num_return_sequences=3).tolist()
    assert found.shape[0] == 3 * len(prompt) and len({str(row) for row in found.tolist()}) == len(found)
    for i, row in enumerate(found):
        assert row[: prompt.shape[1]].tolist() == prompt.tokens[i // 3].tolist()
    # every sample's logits are those of its own row
    tokens, logits = model.generate(
        prompt, 5, do_sample=True, num_return_sequences=2, stop_at_eos=False, output_logits=True
    )
    for i, row in enumerate(tokens):
        new = row[prompt.shape[1] :]
        whole = model(prompt[i // 2].append(new[None]))[0, -len(new) - 1 : -1]
        torch.testing.assert_close(logits[i], whole, atol=2e-5, rtol=1e-4)


def test_an_intervention_acts_on_every_sample_of_its_row() -> None:
    from hooked_vlm.interventions import AddVector

    model, prompt = tiny_model(), inputs(PADDED)
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0)) * 5
    positions = ((4, 5), (10,), (0, 1))
    hooks = AddVector("blocks.1.hook_resid_post", vector, positions=positions).hooks(model, prompt)
    hooks += AddVector("blocks.2.hook_resid_post", vector, positions="generated").hooks(model, prompt)
    tokens, logits = model.generate(
        prompt, 3, do_sample=True, num_return_sequences=2, stop_at_eos=False, output_logits=True, fwd_hooks=hooks
    )
    for i, row in enumerate(tokens):
        answered = prompt.append([row[prompt.shape[1] :]] * 3)
        whole = model.run_with_hooks(answered, fwd_hooks=hooks)[i // 2, -4:-1]
        torch.testing.assert_close(logits[i], whole, atol=2e-5, rtol=1e-4)


def test_logits_and_activations_of_an_answer() -> None:
    model, prompt = tiny_model(), inputs(PADDED)
    halve = [("blocks.1.attn.hook_z", lambda z, hook: z * 0.5)]
    settings = {
        "fwd_hooks": halve,
        "output_logits": True,
        "return_cache": True,
        "names_filter": "ln_final.hook_normalized",
    }
    tokens, logits, cache = model.generate(prompt, N_NEW, **settings)
    assert tokens.tolist() == model.generate(prompt, N_NEW, fwd_hooks=halve).tolist()
    assert logits.shape == (3, tokens.shape[1] - prompt.shape[1], model.cfg.d_vocab)
    assert list(cache) == ["ln_final.hook_normalized"]
    for row, n in enumerate(cache.inputs.n_generated):
        assert logits[row, :n].argmax(-1).tolist() == tokens[row, prompt.shape[1] :][:n].tolist()
        normalized = cache["ln_final.hook_normalized"][row, prompt.shape[1] - 1 :][:n]
        again = (model.ln_final.w * normalized) @ model.W_U
        torch.testing.assert_close(again, logits[row, :n], atol=2e-5, rtol=1e-4)
    text, only = model.generate(prompt, 2, output_logits=True, return_type="tokens")
    assert text.shape[1] - prompt.shape[1] == only.shape[1]


def test_hooks_that_ask_for_the_step_find_it_in_the_pass_over_answers_too() -> None:
    model, steps = tiny_model(), []

    def watch(x: torch.Tensor, hook: Any) -> None:
        steps.append(hook.ctx["step"])

    _, cache = model.generate(inputs(PADDED), 2, return_cache=True, fwd_hooks=[("blocks.0.hook_resid_post", watch)])
    assert steps == [0, 1, 0] and cache["pattern", 1].shape[2] == cache.inputs.shape[1]


# ---------------------------------------------------------------- numbers that overflow


def overflowing(dtype: torch.dtype) -> Any:
    """One MLP unit's input is too large for float16, the same function in exact arithmetic."""
    model = HookedVLM.from_hf(tiny_hf().__class__(tiny_hf().config)).eval()
    model.load_state_dict(tiny_model().state_dict())
    with torch.no_grad():
        model.blocks[1].mlp.in_proj.weight *= 3e6
        model.blocks[1].mlp.out_proj.weight /= 3e6
    return model.to(dtype)


def test_logits_that_overflow_say_where_and_what_to_do() -> None:
    model, prompt = overflowing(torch.float16), inputs(ONE_IMAGE)
    name = first_not_finite(model, prompt)
    assert name.startswith("blocks.1.mlp.")
    for call in (
        lambda: model.generate(prompt, 3),
        lambda: model.generate(prompt, 3, do_sample=True, generator=torch.Generator()),
        lambda: model.log_probs(prompt, [5, 6]),
    ):
        with pytest.raises(NotFiniteError, match=rf"{name}.*bfloat16"):
            call()
    sound = overflowing(torch.bfloat16)
    assert first_not_finite(sound, prompt) == ""
    sound.generate(prompt, 3)


def test_numbers_that_overflow_in_a_later_step_are_noticed() -> None:
    model, prompt = tiny_model(), inputs(ONE_IMAGE)

    def spoil(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x / 0 if x.shape[1] == 1 or x.shape[1] > prompt.shape[1] else x

    with pytest.raises(NotFiniteError, match=r"blocks\.1\.hook_mlp_out"):
        model.generate(prompt, 3, stop_at_eos=False, fwd_hooks=[("blocks.1.hook_mlp_out", spoil)])
    assert not model.hook_dict["blocks.1.hook_mlp_out"].fwd_hooks
    assert tiny.tiny_model().generate(prompt, 1).shape[1] == prompt.shape[1] + 1
