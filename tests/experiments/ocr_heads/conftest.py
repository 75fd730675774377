"""The bundled models, and examples for them."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from families import bundled
from safetensors.torch import save_file

from hooked_vlm import HookedVLM
from hooked_vlm.converters import dialects, language_models
from hooked_vlm.inputs.templates import template_named
from tools.toy_training.families import FAMILIES


@pytest.fixture(params=FAMILIES)
def toy(request: pytest.FixtureRequest) -> HookedVLM:
    """The bundled models, one after the other."""
    return bundled(request.param)


@pytest.fixture
def qwen() -> HookedVLM:
    return bundled("toy-qwen2-vl")


@pytest.fixture
def text_only() -> Callable[[HookedVLM, Path], Path]:
    return save_text_only


def save_text_only(model: HookedVLM, folder: Path) -> Path:
    """The model's decoder as a checkpoint of its own, with the tokenizer and no eyes."""
    dialect = next(d for d in dialects.DIALECTS if d.qkv_bias == model.cfg.qkv_bias)
    config = language_models.decoder_config(asdict(model.cfg), dialect)
    own = ("embed.", "blocks.", "ln_final.", "unembed.")
    decoder = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(own)}
    folder.mkdir()
    theirs = language_models.to_hf(decoder, config)
    save_file({name: tensor.contiguous().clone() for name, tensor in theirs.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = copy.deepcopy(model.tokenizer)
    if model.cfg.chat_template is not None:
        tokenizer.chat_template = template_named(model.cfg.chat_template).jinja(model.cfg.system_message)
    tokenizer.save_pretrained(folder)
    return folder
