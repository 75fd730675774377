"""Checkpoints of Idefics3 and SmolVLM, there and back bit for bit; defaults that files leave out; what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from families import KINDS
from safetensors.torch import load_file
from tiny import randomise
from tiny_idefics3 import CLASSES, VISION, hf_batch, tiny_hf
from tiny_llava import for_hf
from transformers import AutoConfig

from hooked_vlm import CheckpointError, HookedVLM
from hooked_vlm.converters import KNOWN_MODELS, converter_for, idefics3
from hooked_vlm.converters.known_idefics3 import IDEFICS3

NAMES = ("idefics3", "smolvlm, tied")
ARCHITECTURES = {"idefics3": idefics3.ARCHITECTURES[0], "smolvlm": idefics3.ARCHITECTURES[1]}


@pytest.mark.parametrize("name", NAMES)
def test_published_names_are_those_in_memory_and_those_that_transformers_saves(name: str, tmp_path: Path) -> None:
    hf: Any = KINDS[name].hf()
    hf.save_pretrained(tmp_path / "hf")
    model = HookedVLM.from_pretrained(tmp_path / "hf")
    saved, state = load_file(tmp_path / "hf" / "model.safetensors"), hf.state_dict()
    published, in_memory = model.to_hf_state_dict(), model.to_hf_state_dict("in_memory")
    assert published.keys() == saved.keys() and in_memory.keys() == state.keys()
    assert all(torch.equal(t, saved[key]) for key, t in published.items())
    assert all(torch.equal(t, state[key]) for key, t in in_memory.items())
    assert ("lm_head.weight" in published) != ("tied" in name) and model.cfg.tie_word_embeddings == ("tied" in name)
    assert {
        "model.vision_model.embeddings.position_embedding.weight",
        "model.connector.modality_projection.proj.weight",
        "model.text_model.embed_tokens.weight",
    } <= published.keys()
    batch = hf_batch(KINDS[name].cases["one-image"])
    with torch.no_grad():
        ours, theirs = model(model.inputs_from_hf(batch)), hf(**for_hf(batch)).logits
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_saving_is_bit_exact_and_transformers_loads_it(name: str, tmp_path: Path) -> None:
    hf: Any = KINDS[name].hf()
    hf.save_pretrained(tmp_path / "hf")
    HookedVLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again, info = type(hf).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in hf.state_dict().items())
    assert HookedVLM.from_pretrained(tmp_path / "again").image_processor == HookedVLM.from_hf(hf).image_processor
    written = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert written["image_seq_len"] == 4  # with which the processor of transformers writes prompts


# ---------------------------------------------------------------- configurations

TEXT_FIELDS = {
    "hidden_size": "d_model", "intermediate_size": "d_mlp", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "num_key_value_heads": "n_key_value_heads", "vocab_size": "d_vocab",
    "max_position_embeddings": "n_ctx", "rms_norm_eps": "eps", "head_dim": "d_head", "pad_token_id": "pad_token_id",
}  # fmt: skip
VISION_FIELDS = {
    "hidden_size": "d_model", "intermediate_size": "d_mlp", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "image_size": "tile_size", "patch_size": "patch_size", "layer_norm_eps": "eps",
}  # fmt: skip
SILENT: list[dict[str, Any]] = [
    {"scale_factor": 7, **sections}
    for sections in (
        {},
        {"text_config": {}},
        {"text_config": {"hidden_size": 256, "num_attention_heads": 4}},
        {"text_config": {"model_type": "llama", "pad_token_id": 2}, "vision_config": {}},
        {"vision_config": {"image_size": 364, "patch_size": 14, "model_type": "idefics3"}, "scale_factor": 2},
        {"text_config": {"tie_word_embeddings": True}},
        {"tie_word_embeddings": True, "pad_token_id": 5},
    )
]


def matches(config: dict[str, Any]) -> None:
    """Every size equals that of transformers' configuration class."""
    ours = converter_for(config).config_kwargs(config)
    kind = next(name for name, stated in ARCHITECTURES.items() if stated in config["architectures"])
    theirs: Any = AutoConfig.for_model(kind, **{key: value for key, value in config.items() if key != "model_type"})
    text, vision = theirs.text_config, theirs.vision_config
    assert {own: ours[own] for own in TEXT_FIELDS.values()} == {
        own: getattr(text, hf) for hf, own in TEXT_FIELDS.items()
    }
    assert {own: ours["vision"][own] for own in VISION_FIELDS.values()} == {
        own: getattr(vision, hf) for hf, own in VISION_FIELDS.items()
    }
    assert ours["rope_theta"] == text.rope_parameters["rope_theta"]
    assert ours["vision"]["merge_size"] == theirs.scale_factor and ours["image_token_id"] == theirs.image_token_id
    assert ours["tie_word_embeddings"] == theirs.tie_word_embeddings
    assert ours["eos_token_ids"] == (text.eos_token_id,)


@pytest.mark.parametrize("architecture", idefics3.ARCHITECTURES)
@pytest.mark.parametrize("config", SILENT, ids=str)
def test_what_a_file_leaves_out_has_the_value_of_transformers_class(config: dict[str, Any], architecture: str) -> None:
    matches({**config, "architectures": [architecture]})


@pytest.mark.parametrize("name", IDEFICS3)
def test_known_configurations_have_the_sizes_that_transformers_reads(name: str) -> None:
    known = KNOWN_MODELS[name]
    matches(known.config)
    with init_empty_weights():
        hf = CLASSES[known.config["model_type"]][1](AutoConfig.for_model(**known.config))
    assert sum(parameter.numel() for parameter in hf.parameters()) == known.n_params


@pytest.mark.parametrize("tied_at", ["root", "text_config"])
def test_only_the_root_ties_the_embeddings_as_in_transformers(tied_at: str) -> None:
    config = tiny_hf("smolvlm").config.to_dict()
    section = config if tied_at == "root" else config["text_config"]
    section["tie_word_embeddings"] = True
    make, model_class = CLASSES["smolvlm"]
    hf: Any = model_class(make(**config))
    assert HookedVLM.from_hf(hf).cfg.tie_word_embeddings == (tied_at == "root")
    assert (hf.lm_head.weight is hf.model.text_model.embed_tokens.weight) == (tied_at == "root")


@pytest.mark.parametrize("n_patches", [7, 14, 16, 24, 26, 27, 32])
def test_positions_by_fractions_are_the_patches_own_in_towers_of_these_sizes(n_patches: int) -> None:
    assert idefics3.misplaced(n_patches) is None


@pytest.mark.parametrize(("n_patches", "first"), [(19, 12), (25, 5), (29, 3)])
def test_towers_in_which_rounding_moves_positions_are_refused(n_patches: int, first: int) -> None:
    assert idefics3.misplaced(n_patches) == first
    make, model_class = CLASSES["idefics3"]
    vision = {**VISION, "patch_size": 2, "image_size": 2 * n_patches}
    hf: Any = model_class(make(text_config={"model_type": "llama"} | _small(), vision_config=vision, scale_factor=1))
    embeddings = hf.model.vision_model.embeddings
    randomise(embeddings)
    with torch.no_grad():
        side = 2 * n_patches
        seen = embeddings(torch.zeros(1, 3, side, side), torch.ones(1, n_patches, n_patches, dtype=torch.bool))
    own = embeddings.position_embedding.weight + embeddings.patch_embedding.bias
    row = (seen[0] - own).abs().amax(1).unflatten(0, (n_patches, n_patches))[0] > 1e-3
    assert int(row.nonzero()[0]) == first  # as the reference really does
    with pytest.raises(CheckpointError, match=f"image_size must be another size: .* patch {first} the position"):
        HookedVLM.from_hf(hf)


def _small() -> dict[str, Any]:
    return {name: tiny_hf("idefics3").config.text_config.to_dict()[name] for name in (*TEXT_FIELDS,)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale_factor": 3}, "scale_factor must be a divisor of the 4 patches"),
        ({"scale_factor": 0}, "scale_factor"),
        ({"text_config": {"model_type": "mistral"}}, "text_config: model_type must be 'llama'"),
        ({"text_config": {"attention_bias": True}}, "attention_bias"),
        ({"text_config": {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}}, "rope_scaling: type"),
        ({"vision_config": {**VISION, "hidden_act": "relu"}}, "hidden_act"),
        ({"vision_config": {**VISION, "patch_size": 64}}, "divisor of the 0 patches"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"image_token_id": "<image>"}, "image_token_id"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(changes: dict[str, Any], says: str) -> None:
    config = {"architectures": [idefics3.ARCHITECTURES[0]], "vision_config": VISION, "scale_factor": 2, **changes}
    with pytest.raises(CheckpointError, match=says):
        converter_for(config).config_kwargs(config)
