"""Tensors that a model has no place for: refused by the name of their kind, or left out with a note."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_internvl
import tiny_qwen2_vl as tiny
import torch
from torch import Tensor

from hooked_vlm.converters import internvl, qwen2_vl
from hooked_vlm.errors import CheckpointError

Tensors = dict[str, Tensor]
Q = "layers.0.self_attn.q_proj"


def qwen() -> tuple[Any, Tensors, dict[str, Any]]:
    model = tiny.tiny_model()
    return qwen2_vl, model.to_hf_state_dict(), model.hf_config


def hf_internvl() -> tuple[Any, Tensors, dict[str, Any]]:
    model = tiny_internvl.tiny_model("qwen2")
    config = internvl.published_config(model.hf_config, None, "hf", model.cfg.image_token_id)
    return internvl, model.to_hf_state_dict("hf"), config


def original_internvl() -> tuple[Any, Tensors, dict[str, Any]]:
    model = tiny_internvl.tiny_model("qwen2")
    config = internvl.published_config(model.hf_config, None, "original", model.cfg.image_token_id)
    return internvl, model.to_hf_state_dict("original"), config


FAMILIES = {"qwen2-vl": qwen, "internvl-hf": hf_internvl, "internvl-original": original_internvl}


def adapted(tensors: Tensors, prefix: str = "") -> Tensors:
    """As a state dict of a model with a LoRA adapter on its query projections."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            stem = prefix + name.removesuffix(".weight")
            found[f"{stem}.base_layer.weight"] = tensor
            found[f"{stem}.lora_A.default.weight"] = tensor[:2]
            found[f"{stem}.lora_B.default.weight"] = tensor[:, :2]
        else:
            found[prefix + name] = tensor
    return found


def packed(tensors: Tensors, *names: str) -> Tensors:
    """Matrices of the blocks in pieces: each under these endings instead of `.weight`."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("up_proj.weight"):
            found |= {name.removesuffix("weight") + end: torch.zeros(3, dtype=torch.int32) for end in names}
        else:
            found[name] = tensor
    return found


def inside(tensors: Tensors, part: str) -> Tensors:
    """A wrapper around every block rather than around the model."""
    return {name.replace(".layers.0.", f".layers.0.{part}"): tensor for name, tensor in tensors.items()}


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "data parallel": (lambda t: prefixed(t, "module."), r"'module\.'.*DataParallel.*model\.module"),
    "compiled": (lambda t: prefixed(t, "_orig_mod."), r"'_orig_mod\.'.*compile"),
    "both": (lambda t: prefixed(t, "module._orig_mod."), r"'_orig_mod\.'.*'module\.'"),
    "peft, nothing left to merge": (lambda t: prefixed(t, "base_model.model."), r"'base_model\.model\.'.*merge_and_un"),
    "peft": (lambda t: adapted(t, "base_model.model."), r"adapter.*lora_A.*merge_and_unload"),
    "an adapter added in place": (adapted, r"adapter.*base_layer.*merge_and_unload"),
    "fsdp": (lambda t: inside(t, "_fsdp_wrapped_module."), r"'_fsdp_wrapped_module\.'.*FSDP"),
    "checkpointed": (lambda t: inside(t, "_checkpoint_wrapped_module."), r"'_checkpoint_wrapped_module\.'"),
    "compiled blocks": (lambda t: inside(t, "_orig_mod."), r"'_orig_mod\.'.*compile"),
    "trl": (lambda t: prefixed(t, "pretrained_model."), r"'pretrained_model\.'.*TRL"),
    "a policy of another trainer": (lambda t: prefixed(t, "actor.policy."), r"'actor\.policy\.'"),
    "gptq": (lambda t: packed(t, "qweight", "qzeros", "scales", "g_idx"), r"quantised \(GPTQ or AWQ.*qweight"),
    "bitsandbytes, 4 bits": (
        lambda t: packed(t, "weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
        "quantised .bitsandbytes",
    ),
    "bitsandbytes, 8 bits": (lambda t: packed(t, "weight", "SCB", "weight_format"), "quantised .bitsandbytes.*SCB"),
    "compressed": (lambda t: packed(t, "weight_packed", "weight_shape", "weight_scale"), "compressed-tensors"),
    "fp8": (lambda t: packed(t, "weight", "weight_scale_inv"), "quantised .FP8"),
    "hqq": (lambda t: packed(t, "W_q", "meta"), "quantised .HQQ"),
    "aqlm": (lambda t: packed(t, "codes", "codebooks", "scales"), "AQLM"),
    "quanto": (lambda t: packed(t, "weight._data", "weight._scale"), "quantised .quanto"),
    "a dtype of packed numbers": (
        lambda t: {n: v.to(torch.float8_e4m3fn) if n.endswith("up_proj.weight") else v for n, v in t.items()},
        "up_proj.*float8_e4m3fn.*quantised",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_change_the_numbers_is_refused_by_name(kind: str, family: str) -> None:
    converter, tensors, config = FAMILIES[family]()
    change, says = REFUSED[kind]
    with pytest.raises(CheckpointError, match=says) as caught:
        converter.from_hf(change(tensors), config)
    assert kind == "a dtype of packed numbers" or "missing" not in str(caught.value)


NEEDLESS = {
    "v_head.summary.weight": "value head",
    "value_head.weight": "value head",
    "score.weight": "value head",
    "model.rotary_emb.inv_freq": "old buffer",
    "model.layers.0.self_attn.rotary_emb.inv_freq": "old buffer",
    "language_model.model.layers.1.self_attn.rotary_emb.cos_cached": "old buffer",
    "vision_model.embeddings.position_ids": "old buffer",
    "model.layers.0.self_attn.masked_bias": "old buffer",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NEEDLESS)
def test_what_cannot_change_a_number_is_left_out_with_a_note(name: str, family: str) -> None:
    converter, tensors, config = FAMILIES[family]()
    notes: list[str] = []
    ours = converter.from_hf(tensors | {name: torch.full((2,), 9.0)}, config, notes)
    expected = converter.from_hf(tensors, config)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[n], t) for n, t in expected.items())
    assert len(notes) == 1 and name in notes[0] and NEEDLESS[name] in notes[0]


@pytest.mark.parametrize("equal", [True, False])
def test_a_tensor_under_both_names(equal: bool) -> None:
    converter, tensors, config = qwen()
    twin = tensors["model.norm.weight"].clone() + (0 if equal else 1)
    notes: list[str] = []
    if equal:
        converter.from_hf(tensors | {"model.language_model.norm.weight": twin}, config, notes)
        assert len(notes) == 1 and "model.language_model.norm.weight" in notes[0]
    else:
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*two names"):
            converter.from_hf(tensors | {"model.language_model.norm.weight": twin}, config, notes)


CONFIGS = [
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config"),
    ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "text_config.*fp8"),
    ({"llm_config": {"quantization_config": {"quant_method": "awq"}}}, "llm_config.*awq"),
    ({"vision_config": {"quantization_config": {}}}, "vision_config.*quantization_config"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("stated", "says"), CONFIGS, ids=[says for _, says in CONFIGS])
def test_a_configuration_that_states_quantised_weights(stated: dict[str, Any], says: str, family: str) -> None:
    converter, _, config = FAMILIES[family]()
    merged = {k: {**config.get(k, {}), **v} if k.endswith(("text_config", "llm_config", "vision_config")) else v
              for k, v in stated.items()}  # fmt: skip
    with pytest.raises(CheckpointError, match=rf"{says}.*quantised"):
        converter.config_kwargs({**config, **merged})
