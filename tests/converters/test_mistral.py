"""Text-only Mistral checkpoints: logits with and without a window, and what a file leaves out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LANGUAGE_MODEL, reference
from transformers import MistralConfig, MistralForCausalLM

from hooked_vlm import CheckpointError, HookedVLM
from hooked_vlm.converters import language_models

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13]])


def tiny(window: int | None) -> Any:
    config = MistralConfig(**LANGUAGE_MODEL, max_position_embeddings=64, sliding_window=window)
    return reference(MistralForCausalLM, config)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4])
def test_logits_equal_the_references(window: int | None, tmp_path: Path) -> None:
    hf = tiny(window)
    hf.save_pretrained(tmp_path / "hf")
    for model in (HookedVLM.from_hf(hf), HookedVLM.from_pretrained(tmp_path / "hf")):
        assert model.cfg.sliding_window == window
        torch.testing.assert_close(model(TOKENS), hf(TOKENS).logits, atol=2e-5, rtol=0)
    model.save_pretrained(tmp_path / "again")
    assert HookedVLM.from_pretrained(tmp_path / "again").cfg.sliding_window == window


@torch.no_grad()
def test_a_window_moves_the_numbers() -> None:
    assert not torch.allclose(HookedVLM.from_hf(tiny(None))(TOKENS), HookedVLM.from_hf(tiny(4))(TOKENS))


def test_silent_files_have_the_window_of_the_class_and_must_state_their_heads() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = {"architectures": ["MistralForCausalLM"], "vocab_size": 200, "num_key_value_heads": 2, **sizes}
    assert language_models.config_kwargs(config)["sliding_window"] == MistralConfig().sliding_window
    assert language_models.config_kwargs({**config, "sliding_window": None})["sliding_window"] is None
    del config["num_key_value_heads"]
    with pytest.raises(CheckpointError, match="num_key_value_heads"):
        language_models.config_kwargs(config)
