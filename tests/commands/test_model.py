"""The model of a command: by name, device and dtype, as the command line gives them."""

import pytest
import torch

from hooked_vlm import CheckpointError, HookedVLM
from hooked_vlm.model.by_name import load


def test_dtypes_go_by_their_names() -> None:
    assert load("toy-qwen2-vl", "cpu", "bfloat16").cfg.dtype == torch.bfloat16
    assert load("toy-qwen2-vl", "cpu", "auto").cfg.dtype == torch.float32
    assert HookedVLM.from_pretrained("toy-qwen2-vl", dtype="float64").embed.weight.dtype == torch.float64
    for wrong in ("float8", torch.int8):
        with pytest.raises(CheckpointError, match=r"dtype.*float32"):
            HookedVLM.from_pretrained("toy-qwen2-vl", dtype=wrong)


def test_a_spread_model_is_the_same_model() -> None:
    spread, whole = load("toy-qwen2-vl", "auto", "auto"), load("toy-qwen2-vl", "cpu", "auto")
    tokens = whole.to_inputs("What is 2 + 2?")
    with torch.no_grad():
        assert torch.equal(spread(tokens).cpu(), whole(tokens))
