"""Text-only Gemma, Gemma 2 and 3: logits of the reference from memory and from folders; caps, windows, prompts."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from prompt_templates import GEMMA3
from reading_gemma import tokenizer
from tiny import reference
from tiny_gemma3 import TEXT, with_offsets
from tiny_paligemma import TEXTS

from hooked_vlm import HookedVLM

CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gemma": (transformers.GemmaForCausalLM, transformers.GemmaConfig, TEXTS["gemma"]),
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, TEXTS["gemma2"]),
    "gemma3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, TEXT),
}
TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]])
"""More than windows hold."""


@lru_cache
def tiny(name: str, **changes: Any) -> Any:
    """Shared."""
    model_class, config_class, text = CLASSES[name]
    return with_offsets(reference(model_class, config_class(**{**text, **changes})))


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gemma", {}),
    ("gemma", {"tie_word_embeddings": False}),
    ("gemma2", {}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    ("gemma3", {}),
    ("gemma3", {"final_logit_softcapping": 3.0}),
    ("gemma3", {"tie_word_embeddings": False, "sliding_window_pattern": 3}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
@torch.no_grad()
def test_logits_equal_the_references_from_memory_and_from_folders(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    hf = tiny(name, **changes)
    theirs = hf(TOKENS).logits
    hf.save_pretrained(tmp_path / "hf")
    model = HookedVLM.from_hf(hf)
    torch.testing.assert_close(model(TOKENS), theirs, atol=2e-5, rtol=0)
    HookedVLM.from_pretrained(tmp_path / "hf", device="cpu").save_pretrained(tmp_path / "again")
    for folder in ("hf", "again"):
        loaded = HookedVLM.from_pretrained(tmp_path / folder, device="cpu")
        assert torch.equal(loaded(TOKENS), model(TOKENS)) and loaded.cfg.kinds == model.cfg.kinds
    again, info = type(hf).from_pretrained(tmp_path / "again", output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again(TOKENS).logits, theirs)


@torch.no_grad()
def test_caps_move_the_numbers() -> None:
    first, second = (HookedVLM.from_hf(tiny(name, **changes))(TOKENS) for name, changes in VARIANTS[3:5])
    assert (first - second).abs().max() > 0.1 and second.abs().max() < 3


@torch.no_grad()
def test_greedy_tokens_equal_the_references() -> None:
    for name in CLASSES:
        theirs = tiny(name).generate(TOKENS, max_new_tokens=8, do_sample=False)
        assert torch.equal(HookedVLM.from_hf(tiny(name)).generate(TOKENS, max_new_tokens=8), theirs)


def test_a_chat_is_that_of_the_tokenizers_template_and_its_parts_are_found() -> None:
    known = tokenizer("<image_soft_token>")
    known.chat_template = GEMMA3
    model: Any = HookedVLM.from_hf(tiny("gemma3"), known)
    inputs = model.to_inputs("what is <start_of_image>?")  # text, in a model without a tower
    assert model.to_string(inputs)[0] == (
        "<bos><start_of_turn>user\nwhat is <start_of_image>?<end_of_turn>\n<start_of_turn>model\n"
    )
    question = model.to_string(inputs.tokens[0, inputs.positions.question[0]])
    assert question == "what is <start_of_image>?"
