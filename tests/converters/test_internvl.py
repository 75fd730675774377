"""InternVL's two checkpoint layouts and the five dialects of language models: there and back, bit for bit."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_internvl import CASES, IMAGE, KINDS, by_hand, for_hf, hf_batch, original_config, tiny_config, tiny_hf

from hooked_vlm import CheckpointError, HookedVLM
from hooked_vlm.config import VLMConfig
from hooked_vlm.converters import KNOWN_MODELS, converter_for, internvl
from hooked_vlm.inputs.tiles import TileProcessor
from hooked_vlm.loading.settings import with_tokens
from hooked_vlm.vision_config import VisionConfig


@pytest.fixture(params=KINDS)
def original(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A checkpoint folder in the published layout."""
    save_file({k: v.contiguous() for k, v in by_hand(request.param).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(original_config(request.param)))
    return request.param, tmp_path


@lru_cache
@torch.no_grad()
def reference(kind: str) -> torch.Tensor:
    return tiny_hf(kind)(**for_hf(hf_batch(CASES["one-image"]))).logits


@torch.no_grad()
def logits(model: HookedVLM) -> torch.Tensor:
    return model(model.inputs_from_hf(hf_batch(CASES["one-image"])))


def test_the_published_layout_gives_the_references_numbers(original: tuple[str, Path]) -> None:
    kind, folder = original
    model = HookedVLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model), reference(kind), atol=2e-5, rtol=0)
    assert model.cfg.image_token_id == IMAGE == 200 - 7
    assert isinstance(model.image_processor, TileProcessor) and model.image_processor.max_tiles == 6


def test_saving_in_the_published_layout_is_bit_exact(original: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = original
    HookedVLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "auto_map" not in config
    assert config == {k: v for k, v in original_config(kind).items() if k != "auto_map"}


def test_saving_for_transformers_and_loading_it_there(original: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = original
    HookedVLM.from_pretrained(folder).save_pretrained(tmp_path / "hf", layout="hf")
    hf = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        theirs = hf(**for_hf(hf_batch(CASES["one-image"]))).logits
    torch.testing.assert_close(theirs, reference(kind), atol=2e-5, rtol=0)
    names = load_file(tmp_path / "hf" / "model.safetensors").keys()
    assert all(n.startswith(("language_model.", "vision_tower.", "multi_modal_projector.")) for n in names)
    again = HookedVLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(again), logits(HookedVLM.from_pretrained(folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_own_layout_there_and_back(kind: str, tmp_path: Path) -> None:
    tiny_hf(kind).save_pretrained(tmp_path / "hf")
    model = HookedVLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(model), reference(kind), atol=2e-5, rtol=0)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model.save_pretrained(tmp_path / "original", layout="original")
    assert torch.equal(logits(HookedVLM.from_pretrained(tmp_path / "original")), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_names_in_memory_are_those_of_transformers(kind: str) -> None:
    hf = tiny_hf(kind)
    ours = HookedVLM.from_hf(hf).to_hf_state_dict("in_memory")
    theirs = hf.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_only_checkpoint_of_the_language_model(kind: str, tmp_path: Path) -> None:
    weights = by_hand(kind)
    prefix = "language_model."
    text = {k.removeprefix(prefix): v.contiguous() for k, v in weights.items() if k.startswith(prefix)}
    save_file(text, tmp_path / "model.safetensors")
    config = original_config(kind)["llm_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, tokens = HookedVLM.from_pretrained(tmp_path), torch.arange(4, 30)[None]
    assert model.cfg.vision is None and model.cfg.image_token_id is None
    with torch.no_grad():
        ours, theirs = model(tokens), tiny_hf(kind)(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    model.save_pretrained(tmp_path / "again")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert after.keys() == text.keys() and all(torch.equal(after[name], text[name]) for name in text)


@pytest.mark.parametrize("tied", [False, True])
def test_a_text_only_checkpoint_that_transformers_wrote(tied: bool, tmp_path: Path) -> None:
    config: Any = tiny_config("qwen2").text_config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    hf.save_pretrained(tmp_path / "qwen2")
    model, tokens = HookedVLM.from_pretrained(tmp_path / "qwen2"), torch.arange(4, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf(input_ids=tokens).logits, atol=2e-5, rtol=0)
    assert model.cfg.tie_word_embeddings is tied


# ---------------------------------------------------------------- configurations


def test_a_padded_vocabulary_leaves_the_placeholder_to_the_tokenizer() -> None:
    config = KNOWN_MODELS["OpenGVLab/InternVL3_5-8B"].config
    assert internvl.config_kwargs(config)["image_token_id"] is None
    assert internvl.config_kwargs({**config, "img_context_token_id": 151671})["image_token_id"] == 151671
    kwargs = internvl.config_kwargs(config)
    cfg = VLMConfig(**{**kwargs, "vision": VisionConfig(**kwargs["vision"])})

    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"<IMG_CONTEXT>": 151671, "<img>": 151669, "</img>": 151670, "<|im_end|>": 151645}

    assert with_tokens(cfg, Tokenizer()).image_token_id == 151671


@pytest.mark.parametrize("name", [name for name in KNOWN_MODELS if "InternVL" in name])
def test_known_sizes(name: str) -> None:
    """Against the reference implementation, without memory for the numbers."""
    known = KNOWN_MODELS[name]
    config = transformers.InternVLConfig(**internvl.published_config(known.config, layout="hf"))
    with torch.device("meta"):
        model = transformers.InternVLForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == known.n_params
    in_original = set(internvl._table(*_parts(known.config), "original"))
    assert all(entry.theirs.startswith(("language_model.", "vision_model.", "mlp1.")) for entry in in_original)


def _parts(config: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    return internvl.config_kwargs(config), internvl._dialect(config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"llm_config": {"architectures": ["MixtralForCausalLM"]}},
            "MixtralForCausalLM.*Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM",
        ),
        ({"llm_config": {"architectures": ["Qwen3MoeForCausalLM"]}}, "Qwen3Moe.*mixture of experts.*dense size"),
        ({"llm_config": {"architectures": ["GptOssForCausalLM"]}}, "GptOss.*mixture of experts.*dense size"),
        ({"flash_relative_threshold": 0.5}, "flash_relative_threshold.*without -Flash"),
        ({"llm_config": {"bias": True}}, r"llm_config.*\bbias\b"),
        ({"llm_config": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}, "rope_scaling.*'yarn'"),
        ({"llm_config": {"rope_scaling": {"type": "su", "short_factor": [1.0]}}}, "short_factor.*8"),
        ({"llm_config": {"quantization_config": {}}}, "quantization_config"),
        ({"llm_config": {"hidden_size": None}}, "llm_config.*hidden_size"),
        ({"vision_config": {"norm_type": "batch_norm"}}, "vision_config.*norm_type"),
        ({"vision_config": {"num_attention_heads": 5}}, "vision_config.*hidden_size"),
        ({"downsample_ratio": 0.3}, "downsample_ratio"),
        ({"force_image_size": 30}, "force_image_size"),
        ({"select_layer": -9}, "select_layer.*-2.*2"),
        ({"ps_version": "v3"}, "ps_version"),
        ({"template": 5}, "template"),
    ],
)
def test_a_configuration_that_is_not_supported(changes: dict[str, Any], says: str) -> None:
    config = original_config("llama-dynamic")
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    if config["llm_config"].get("quantization_config") == {}:
        config["llm_config"]["quantization_config"] = {"quant_method": "awq"}
    with pytest.raises(CheckpointError, match=says):
        converter_for(config).config_kwargs(config)


def text_config(kind: str, layout: str, **changes: Any) -> dict[str, Any]:
    """The decoder's settings after a configuration was saved in a layout and read again."""
    config = original_config(kind)
    config["llm_config"] = {**config["llm_config"], **changes}
    written = internvl.published_config(config, layout=layout)  # pyright: ignore[reportArgumentType]
    return internvl.config_kwargs(written)


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_a_longrope_scaling_survives_the_other_layout(layout: str) -> None:
    scaling = {**original_config("phi3")["llm_config"]["rope_scaling"], "attention_factor": 1.7}
    scaling["original_max_position_embeddings"] = 16
    kept = text_config("phi3", layout, rope_scaling=scaling)["rope_scaling"]
    assert (kept["attention_factor"], kept["n_ctx_trained"]) == (1.7, 16)


def test_a_dynamic_scaling_begins_at_the_context_as_in_transformers() -> None:
    scaling = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    assert text_config("llama-dynamic", "original", rope_scaling=scaling)["rope_scaling"]["n_ctx_trained"] == 128


def test_transformers_has_no_tiles_without_a_thumbnail() -> None:
    config = {**original_config("qwen2"), "use_thumbnail": False}
    assert internvl.published_config(config)["use_thumbnail"] is False
    with pytest.raises(CheckpointError, match="thumbnail"):
        internvl.published_config(config, layout="hf")


@pytest.mark.parametrize("layout", [None, "original", "hf"])
def test_the_token_of_images_that_the_tokenizer_named_is_saved(layout: Any) -> None:
    config = {**original_config("qwen2"), "img_context_token_id": 5}
    assert internvl.config_kwargs(config)["image_token_id"] == 5
    written = internvl.published_config(config, layout=layout, image_token_id=9)
    assert internvl.config_kwargs(written)["image_token_id"] == 9


@pytest.mark.parametrize(("root", "text", "tied"), [(False, True, False), (None, True, True), (True, False, True)])
def test_the_root_says_whether_transformers_model_is_tied(root: bool | None, text: bool, tied: bool) -> None:
    config = tiny_config("qwen2").to_dict()
    config["tie_word_embeddings"] = root
    config["text_config"]["tie_word_embeddings"] = text
    assert internvl.config_kwargs({**config, "architectures": [internvl.HF]})["tie_word_embeddings"] is tied


def test_pixel_shuffle_v1_transposes_the_tokens_of_a_tile() -> None:
    config = {**original_config("qwen2"), "ps_version": "v1"}
    v2 = HookedVLM.from_hf(tiny_hf("qwen2"))
    v1 = HookedVLM(v2.cfg.with_(vision=VisionConfig(**internvl.config_kwargs(config)["vision"])))
    v1.load_state_dict(v2.state_dict())
    with torch.no_grad():
        batch = hf_batch(CASES["one-image"])
        row_by_row, column_by_column = (m.encode_images(m.inputs_from_hf(batch)).view(4, 4, -1) for m in (v2, v1))
    assert torch.equal(row_by_row, column_by_column.transpose(0, 1))
    with pytest.raises(CheckpointError, match="v1"):
        internvl.published_config(config, layout="hf")
