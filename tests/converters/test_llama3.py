"""Llama 3.1's scaling of rotary positions: logits of the reference, each parameter, both spellings, what is refused."""

from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import LANGUAGE_MODEL, reference
from tiny_idefics3 import IMAGE, VISION
from transformers import LlamaConfig, LlamaForCausalLM

from hooked_vlm import CheckpointError, HookedVLM
from hooked_vlm.config import RopeScaling
from hooked_vlm.converters import KNOWN_MODELS, converter_for, language_models

TRAINED, LONG = 16, 60
"""Context that the scaling starts from, and tokens of a prompt."""
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}
"""Of the eight frequencies of a head, at a base of 100, one stays, three are mixed and four are divided by 8."""
TEXT = {**LANGUAGE_MODEL, "max_position_embeddings": 128}
TOKENS = torch.randint(4, 190, (2, LONG), generator=torch.Generator().manual_seed(0))
OURS = RopeScaling("llama3", 8.0, TRAINED, low_freq_factor=1.0, high_freq_factor=4.0)


@lru_cache(maxsize=1)
def tiny() -> Any:
    """The reference. Shared: tests must not change its weights."""
    return reference(LlamaForCausalLM, LlamaConfig(**TEXT, rope_parameters={**SCALING, "rope_theta": 100.0}))


@torch.no_grad()
def test_logits_equal_the_references_from_memory_and_from_folders(tmp_path: Path) -> None:
    hf = tiny()
    theirs = hf(TOKENS).logits
    model = HookedVLM.from_hf(hf)
    assert model.cfg.rope_scaling == OURS and model.cfg.n_ctx_limit == 128
    torch.testing.assert_close(model(TOKENS), theirs, atol=2e-5, rtol=0)
    hf.save_pretrained(tmp_path / "hf")
    HookedVLM.from_pretrained(tmp_path / "hf", device="cpu").save_pretrained(tmp_path / "again")
    for folder in ("hf", "again"):
        loaded = HookedVLM.from_pretrained(tmp_path / folder, device="cpu")
        assert torch.equal(loaded(TOKENS), model(TOKENS)) and loaded.cfg.kinds == model.cfg.kinds
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
    assert torch.equal(again(TOKENS).logits, theirs)


@torch.no_grad()
def test_greedy_tokens_equal_the_references_across_the_trained_length() -> None:
    prompt = TOKENS[:, : TRAINED - 4]
    theirs = tiny().generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    ours = HookedVLM.from_hf(tiny()).generate(prompt, max_new_tokens=12, stop_at_eos=False)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "other",
    [
        None,
        replace(OURS, factor=7.0),
        replace(OURS, n_ctx_trained=TRAINED + 4),
        replace(OURS, low_freq_factor=0.5),
        replace(OURS, high_freq_factor=5.0),
        RopeScaling("linear", 8.0),
    ],
    ids=str,
)
@torch.no_grad()
def test_each_parameter_taken_away_moves_the_logits(other: RopeScaling | None) -> None:
    model = HookedVLM.from_hf(tiny())
    changed = HookedVLM(model.cfg.with_(rope_scaling=other))
    changed.load_state_dict(model.state_dict())
    assert (changed(TOKENS) - model(TOKENS)).abs().max() > 1e-2


OLD = {"rope_theta": 100.0, "rope_scaling": SCALING}
WITHOUT = {name: value for name, value in SCALING.items() if name != "original_max_position_embeddings"}


def read(**rope: Any) -> dict[str, Any]:
    kwargs = language_models.config_kwargs({"architectures": ["LlamaForCausalLM"], **TEXT, **rope})
    return {"rope_theta": kwargs["rope_theta"], **kwargs["rope_scaling"]}


@pytest.mark.parametrize(
    ("spelled", "trained"),
    [
        (OLD, TRAINED),
        ({"rope_theta": 100.0, "rope_scaling": {**WITHOUT, "type": "llama3"}}, 128),
        ({"rope_parameters": {**SCALING, "rope_theta": 100.0}}, TRAINED),
        ({"rope_theta": 1e6, "rope_parameters": {**SCALING, "rope_theta": 100.0}}, TRAINED),
        ({**OLD, "original_max_position_embeddings": 24}, 24),
    ],
)
def test_spellings_are_read_as_transformers_reads_them(spelled: dict[str, Any], trained: int) -> None:
    assert read(**spelled) == {
        "rope_theta": 100.0, "kind": "llama3", "factor": 8.0, "n_ctx_trained": trained, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }  # fmt: skip
    theirs: Any = LlamaConfig(**{**TEXT, **deepcopy(spelled)})  # it writes into them
    theirs.standardize_rope_params()  # as its rotary embedding does
    rope = theirs.rope_parameters
    assert (rope["rope_theta"], rope["original_max_position_embeddings"]) == (100.0, trained)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"factor": None}, "rope_scaling: factor is missing"),
        ({"low_freq_factor": None}, "rope_scaling: low_freq_factor is missing"),
        ({"high_freq_factor": None}, "rope_scaling: high_freq_factor is missing"),
        ({"high_freq_factor": 1.0}, "high_freq_factor must be more than low_freq_factor, 1.0, got 1.0"),
        ({"original_max_position_embeddings": 0.5}, "original_max_position_embeddings"),
        ({"rope_type": "llama4"}, "'longrope' or 'llama3' .*got 'llama4'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read(rope_theta=100.0, rope_scaling={**SCALING, **changes})


@torch.no_grad()
def test_idefics3_scales_the_positions_of_its_text_model() -> None:
    text = {"model_type": "llama", **TEXT, "rope_parameters": {**SCALING, "rope_theta": 100.0}}
    config = transformers.Idefics3Config(text_config=text, vision_config=VISION, scale_factor=2, image_token_id=IMAGE)
    hf = reference(transformers.Idefics3ForConditionalGeneration, config)
    model = HookedVLM.from_hf(hf)
    assert model.cfg.rope_scaling == OURS
    torch.testing.assert_close(model(TOKENS), hf(TOKENS).logits, atol=2e-5, rtol=0)


def test_the_published_idefics3_has_it() -> None:
    config = KNOWN_MODELS["HuggingFaceM4/Idefics3-8B-Llama3"].config
    found = converter_for(config).config_kwargs(config)
    assert RopeScaling(**found["rope_scaling"]) == replace(OURS, n_ctx_trained=8192) and found["n_ctx"] == 131072
