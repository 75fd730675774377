"""Tiny Qwen2-VL checkpoints, written by transformers itself."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 1, 1]},
}
# Every size differs from every other and from its default, so that no two can be mixed up.
VISION = {
    "depth": 3,
    "embed_dim": 24,
    "num_heads": 2,
    "mlp_ratio": 3,
    "hidden_size": 32,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
IDS: dict[str, Any] = {
    "image_token_id": 50,
    "video_token_id": 51,
    "vision_start_token_id": 52,
    "vision_end_token_id": 53,
}


@dataclass
class Tiny:
    """A model, the folder transformers saved it in, and what is in there."""

    model: Any
    folder: Path
    config: dict[str, Any]
    """As saved by transformers 5: nested."""
    published: dict[str, torch.Tensor]
    """Tensors by their names in the file."""
    in_memory: dict[str, torch.Tensor]
    """The model's state dict."""


def make_tiny(folder: Path, tied: bool, dtype: torch.dtype = torch.float32) -> Tiny:
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config=deepcopy(TEXT), vision_config=dict(VISION), tie_word_embeddings=tied, **IDS
    )
    model: Any = transformers.Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as constants: a mix-up would not show
            parameter.normal_()
    model = model.to(dtype)
    model.save_pretrained(folder)
    return Tiny(
        model=model,
        folder=folder,
        config=json.loads((folder / "config.json").read_text()),
        published=load_file(folder / "model.safetensors"),
        in_memory=dict(model.state_dict()),
    )


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture
def folder(untied: Tiny, tmp_path: Path) -> Path:
    """A copy of the untied checkpoint, to be damaged."""
    return Path(shutil.copytree(untied.folder, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(untied: Tiny, tmp_path: Path) -> Path:
    """The untied checkpoint in several files, in the shape of transformers' own."""
    folder = tmp_path / "sharded"
    untied.model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="session")
def make() -> Callable[..., Tiny]:
    return make_tiny


def flat(nested: dict[str, Any], rope_type: str | None) -> dict[str, Any]:
    """The published form, written by hand from the nested one."""
    config = {name: value for name, value in nested.items() if name not in ("text_config", "dtype")}
    config |= {name: value for name, value in nested["text_config"].items() if name != "rope_parameters"}
    rope = nested["text_config"]["rope_parameters"]
    config["model_type"] = "qwen2_vl"
    config["tie_word_embeddings"] = nested["tie_word_embeddings"]
    config["torch_dtype"] = nested["dtype"]
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"mrope_section": rope["mrope_section"]}
    if rope_type is not None:
        config["rope_scaling"]["type"] = rope_type
    config["vision_config"] = dict(VISION) | {"in_chans": 3, "spatial_patch_size": 14}
    return config


def nested_without_root(nested: dict[str, Any]) -> dict[str, Any]:
    """As some releases before 5 wrote it: `tie_word_embeddings` and the dtype only inside `text_config`."""
    config = deepcopy(nested)
    config["text_config"]["tie_word_embeddings"] = config.pop("tie_word_embeddings")
    config["text_config"]["torch_dtype"] = config.pop("dtype")
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope | {"type": "default"}
    return config


FORMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "nested": deepcopy,
    "nested before 5": nested_without_root,
    "flat, mrope": lambda config: flat(config, "mrope"),
    "flat, default": lambda config: flat(config, "default"),
    "flat, no type": lambda config: flat(config, None),
}


@pytest.fixture(params=FORMS, ids=lambda name: name.replace(" ", "-"))
def form(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Rewrites the nested configuration into one of the forms in circulation."""
    return FORMS[request.param]


@pytest.fixture(params=["tied", "untied"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.getfixturevalue(request.param)
