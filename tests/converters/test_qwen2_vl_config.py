"""Every form of a Qwen2-VL `config.json` gives the same configuration; a bad one gives an error by name."""

import json
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hooked_vlm.config import VLMConfig
from hooked_vlm.converters import KNOWN_MODELS, converter_for, qwen2_vl
from hooked_vlm.errors import CheckpointError
from hooked_vlm.vision_config import VisionConfig

Form = Callable[[dict[str, Any]], dict[str, Any]]
KNOWN = {name: known for name, known in KNOWN_MODELS.items() if name.startswith("Qwen/Qwen2-VL")}
PUBLISHED = KNOWN["Qwen/Qwen2-VL-7B-Instruct"].config

# Verbatim from a fine-tune saved by transformers 4.46 (lightonai/MonoQwen2-VL-v0.1), a 2B model.
RESAVED_VISION = {"hidden_size": 1536, "in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14}
RESAVED_ROPE = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}


def reference(config: dict[str, Any]) -> Any:
    """As transformers reads it."""
    return transformers.Qwen2VLConfig(**deepcopy(config))


def test_every_form_gives_the_values_of_the_model(tiny: Any, form: Form) -> None:
    cfg = qwen2_vl.config_kwargs(form(tiny.config))
    text, vision = tiny.model.config.text_config, tiny.model.config.vision_config
    assert cfg["n_layers"] == text.num_hidden_layers
    assert cfg["d_model"] == text.hidden_size
    assert cfg["n_heads"] == text.num_attention_heads
    assert cfg["n_key_value_heads"] == text.num_key_value_heads
    assert cfg["d_head"] == 8
    assert cfg["d_mlp"] == text.intermediate_size
    assert cfg["d_vocab"] == text.vocab_size
    assert cfg["n_ctx"] == text.max_position_embeddings
    assert cfg["rope_theta"] == 5e5
    assert cfg["mrope_section"] == (2, 1, 1)
    assert cfg["eps"] == text.rms_norm_eps
    assert cfg["eos_token_ids"] == (2, 3)
    assert cfg["tie_word_embeddings"] == tiny.model.config.tie_word_embeddings
    placeholders = ("image", "video", "vision_start", "vision_end")
    assert [cfg[f"{name}_token_id"] for name in placeholders] == [50, 51, 52, 53]
    assert cfg["vision"]["n_layers"] == vision.depth
    assert cfg["vision"]["d_model"] == vision.embed_dim
    assert cfg["vision"]["n_heads"] == vision.num_heads
    assert cfg["vision"]["d_mlp"] == vision.embed_dim * vision.mlp_ratio
    assert cfg["vision"]["d_out"] == text.hidden_size
    assert cfg["vision"]["patch_size"] == vision.patch_size
    assert qwen2_vl.dtype(form(tiny.config)) == torch.float32
    VLMConfig(**{**cfg, "vision": VisionConfig(**cfg["vision"])})


def test_the_config_of_a_model_in_memory_is_one_more_form(tiny: Any) -> None:
    config = tiny.model.config.to_dict()
    assert converter_for(config | {"architectures": None}) is qwen2_vl, "null until a model was saved"
    assert qwen2_vl.config_kwargs(config) == qwen2_vl.config_kwargs(tiny.config)
    assert qwen2_vl.dtype(config) == torch.float32


def test_a_resaved_config_means_the_published_one() -> None:
    published = KNOWN_MODELS["Qwen/Qwen2-VL-2B-Instruct"].config
    resaved = published | {"vision_config": RESAVED_VISION, "rope_scaling": RESAVED_ROPE}
    assert qwen2_vl.config_kwargs(resaved) == qwen2_vl.config_kwargs(published)


def test_an_absent_vision_hidden_size_is_the_width_of_the_language_model() -> None:
    """A re-saved 7B drops it, because 3584 is the class default."""
    resaved = PUBLISHED | {"vision_config": {"in_chans": 3}}
    assert qwen2_vl.config_kwargs(resaved) == qwen2_vl.config_kwargs(PUBLISHED)
    wider = PUBLISHED | {"hidden_size": 7168, "vision_config": {}, "num_attention_heads": 56}
    assert qwen2_vl.config_kwargs(wider)["vision"]["d_out"] == 7168
    with pytest.raises(CheckpointError, match=r"vision_config.*hidden_size.*7168.*3584"):
        qwen2_vl.config_kwargs(wider | {"vision_config": {"hidden_size": 3584}})


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 3e5}, 3e5),
        ({"rope_scaling": {"mrope_section": [16, 24, 24], "rope_theta": 3e5}, "rope_theta": 7.0}, 3e5),
        ({"rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 3e5}}, 3e5),
        (
            {"rope_parameters": {"mrope_section": [16, 24, 24], "rope_type": "default"}, "rope_theta": 3e5},
            3e5,
        ),
        ({"rope_parameters": {"mrope_section": [16, 24, 24], "type": "anything"}}, 1e6),
        ({"rope_scaling": None, "rope_parameters": {"mrope_section": [16, 24, 24]}}, 1e6),
        ({}, 1e6),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_rope_settings_are_found_wherever_they_stand(rope: dict[str, Any], theta: float, nested: bool) -> None:
    config = {name: value for name, value in PUBLISHED.items() if not name.startswith("rope")} | rope
    if nested:
        config = {"vision_config": config.pop("vision_config"), "text_config": config}
    cfg = qwen2_vl.config_kwargs(config)
    assert (cfg["rope_theta"], cfg["mrope_section"]) == (theta, (16, 24, 24))
    assert reference(config).text_config.rope_parameters["rope_theta"] == theta


def test_nested_values_win_over_what_the_root_repeats() -> None:
    text = {name: value for name, value in PUBLISHED.items() if name != "vision_config"}
    config = PUBLISHED | {"text_config": text, "vocab_size": 5, "intermediate_size": 7}
    assert qwen2_vl.config_kwargs(config)["d_vocab"] == 152064
    assert reference(config).text_config.vocab_size == 152064


@pytest.mark.parametrize(("root", "text"), [(True, None), (None, True), (True, False), (False, True)])
def test_either_place_ties_the_embeddings(root: bool | None, text: bool | None) -> None:
    config = {"text_config": dict(PUBLISHED), "vision_config": PUBLISHED["vision_config"]}
    del config["text_config"]["tie_word_embeddings"]
    if text is not None:
        config["text_config"]["tie_word_embeddings"] = text
    if root is not None:
        config["tie_word_embeddings"] = root
    assert qwen2_vl.config_kwargs(config)["tie_word_embeddings"]
    assert reference(config).tie_word_embeddings


@pytest.mark.parametrize(
    ("eos", "expected"),
    [(5, (5,)), ([5, 6], (5, 6)), (None, ()), ([], ())],
    ids=["one", "two", "null", "none"],
)
def test_eos_token_ids(eos: Any, expected: tuple[int, ...]) -> None:
    assert qwen2_vl.config_kwargs(PUBLISHED | {"eos_token_id": eos})["eos_token_ids"] == expected


def test_null_key_value_heads_means_one_for_each_query_head() -> None:
    assert qwen2_vl.config_kwargs(PUBLISHED | {"num_key_value_heads": None})["n_key_value_heads"] == 28


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16", "torch_dtype": "float32"}, torch.float16),
        ({"dtype": "torch.float32"}, torch.float32),
        ({"text_config": {"torch_dtype": "bfloat16"}}, torch.bfloat16),
        ({"dtype": "auto"}, None),
        ({}, None),
    ],
)
def test_dtype(config: dict[str, Any], expected: torch.dtype | None) -> None:
    assert qwen2_vl.dtype(config) is expected


@pytest.mark.parametrize("value", ["int8", "float8_e4m3fn", 16, {"": "float32"}])
def test_a_dtype_that_is_none(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"dtype.*float32"):
        qwen2_vl.dtype({"dtype": value})


# ---------------------------------------------------------------- what is refused

REQUIRED = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_size(name: str) -> None:
    config = {key: value for key, value in PUBLISHED.items() if key != name}
    with pytest.raises(CheckpointError, match=rf"config\.json\W+{name}\b"):
        qwen2_vl.config_kwargs(config)


@pytest.mark.parametrize("value", [0, -1, 2.5, "28", True, [1, 2], float("nan"), float("inf"), 10**30, {}])
@pytest.mark.parametrize("name", REQUIRED)
def test_an_absurd_size(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json\W+{name}\b"):
        qwen2_vl.config_kwargs(PUBLISHED | {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": 27},
            "num_attention_heads.*27.*num_key_value_heads",
        ),
        (
            {"num_attention_heads": 24},
            "hidden_size.*3584.*num_attention_heads.*24",
        ),
        ({"hidden_size": 84, "rope_scaling": None}, "hidden_size.*84"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act.*'silu'"),
        ({"image_token_id": -1}, "image_token_id.*-1"),
        ({"image_token_id": [1, 2]}, r"image_token_id.*\[1, 2\]"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"vision_config": 3}, r"vision_config.*\b3\b"),
        ({"text_config": "flat"}, "text_config.*'flat'"),
        ({"rope_scaling": {"mrope_section": [16, 24]}}, r"mrope_section.*\[16, 24\]"),
        ({"rope_scaling": {"mrope_section": [16, 24, 25]}}, r"mrope_section.*64.*\[16, 24, 25\]"),
        ({"rope_scaling": {"mrope_section": [-1, 40, 25]}}, "mrope_section.*-1"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}}, "'yarn'"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"vision_config": {"depth": -3}}, "vision_config.*depth"),
        ({"vision_config": {"embed_dim": 1281}}, "vision_config.*embed_dim.*1281"),
        ({"vision_config": {"embed_dim": 32}}, "embed_dim.*4"),
        ({"vision_config": {"patch_size": [14, 16]}}, "patch_size"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act.*'quick_gelu'"),
        ({"vision_config": {"mlp_ratio": 0.5}}, "mlp_ratio"),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        qwen2_vl.config_kwargs(PUBLISHED | changes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(name=st.sampled_from(sorted({*PUBLISHED, "text_config", "rope_parameters", "layer_types"})), value=JSON)
def test_whatever_a_field_holds_the_error_is_ours(name: str, value: Any) -> None:
    with suppress(CheckpointError):
        qwen2_vl.published_config(PUBLISHED | {name: value})


# ---------------------------------------------------------------- the way back


def test_the_published_form_is_equivalent(tiny: Any, form: Form) -> None:
    published = qwen2_vl.published_config(form(tiny.config))
    assert qwen2_vl.config_kwargs(published) == qwen2_vl.config_kwargs(tiny.config)
    assert qwen2_vl.published_config(published) == published
    assert json.loads(json.dumps(published)) == published
    assert published["torch_dtype"] == "float32"
    assert qwen2_vl.published_config(tiny.config, torch.bfloat16)["torch_dtype"] == "bfloat16"


def test_the_published_form_of_a_published_config_is_itself() -> None:
    for known in KNOWN.values():
        ours = qwen2_vl.published_config(known.config)
        theirs = {name: value for name, value in known.config.items() if name != "transformers_version"}
        assert ours | {"vision_config": theirs["vision_config"]} == theirs
        assert ours["vision_config"].items() >= theirs["vision_config"].items()


def test_transformers_loads_the_published_form_with_equal_weights(tiny: Any, form: Form, tmp_path: Path) -> None:
    config = form(tiny.config)
    theirs = qwen2_vl.to_hf(qwen2_vl.from_hf(tiny.published, config), config)
    save_file(theirs, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(qwen2_vl.published_config(config)))
    loaded: Any
    loaded, report = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)  # pyright: ignore[reportGeneralTypeIssues]
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.state_dict().keys() == tiny.in_memory.keys()
    assert all(torch.equal(tensor, tiny.in_memory[name]) for name, tensor in loaded.state_dict().items())
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, tiny.model(tokens).logits)


# ---------------------------------------------------------------- families and known sizes


def test_the_family_is_found_by_architecture_or_model_type() -> None:
    assert converter_for(PUBLISHED) is qwen2_vl
    assert converter_for({"model_type": "qwen2_vl"}) is qwen2_vl
    assert converter_for({"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "other"}) is qwen2_vl


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"},
        {"architectures": ["MixtralForCausalLM"], "model_type": "qwen2_vl"},
        {"architectures": "MixtralForCausalLM"},
        {"architectures": [["nested"]]},
        {"model_type": "clip"},
        {"model_type": ["qwen2_vl"]},
        {},
    ],
)
def test_an_unsupported_architecture(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="Qwen2VLForConditionalGeneration"):
        converter_for(config)


def test_remote_code_is_never_looked_at(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    config = PUBLISHED | {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    family = converter_for(config)
    assert family.config_kwargs(config) == family.config_kwargs(PUBLISHED)
    assert "auto_map" not in family.published_config(config)


@pytest.mark.parametrize("name", KNOWN)
def test_known_sizes(name: str) -> None:
    """Against the reference implementation without memory for the numbers."""
    known = KNOWN[name]
    with torch.device("meta"):
        model = transformers.Qwen2VLForConditionalGeneration(reference(known.config))
    assert sum(parameter.numel() for parameter in model.parameters()) == known.n_params
    ours = qwen2_vl.from_hf(model.state_dict(), known.config)
    assert sum({id(tensor): tensor.numel() for tensor in ours.values()}.values()) == known.n_params
    back = qwen2_vl.to_hf(ours, known.config, names="in_memory")
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
