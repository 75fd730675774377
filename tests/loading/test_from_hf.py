"""Models of `transformers` in memory: adapters, wrappers and weights that are not plain are refused with what to do."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_qwen2_vl import PADDED, hf_batch, tiny_hf
from torch import nn

from hooked_vlm import CheckpointError, HookedVLM
from hooked_vlm.errors import CheckpointWarning

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore:The PEFT config:UserWarning"
)

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "qkv", "up_proj"], init_lora_weights=False)
"""In both towers."""


def fresh_hf() -> Any:
    return deepcopy(tiny_hf())


def with_adapter() -> Any:
    torch.manual_seed(0)
    return get_peft_model(fresh_hf(), LORA)


def by_hand(peft_model: Any) -> Any:
    """The same function: W + (alpha / r) B A in every adapted matrix."""
    plain = fresh_hf()
    for name, module in peft_model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            plain.get_submodule(name).weight.data += 2.0 * (b @ a).detach()
    return plain


def logits(model: HookedVLM) -> torch.Tensor:
    with torch.no_grad():
        return model(model.inputs_from_hf(hf_batch(PADDED)))


def test_a_merged_adapter_is_the_one_computed_by_hand(tmp_path: Path) -> None:
    adapted = with_adapter()
    expected = logits(HookedVLM.from_hf(by_hand(adapted)))
    merged = HookedVLM.from_hf(adapted.merge_and_unload())
    assert (
        (logits(merged) - expected).abs().max() < 1e-4 < (logits(HookedVLM.from_hf(fresh_hf())) - expected).abs().max()
    )
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(HookedVLM.from_pretrained(tmp_path / "merged")), logits(merged))


def added_in_place() -> Any:
    model = fresh_hf()
    model.add_adapter(LORA)
    return model


class TwoModels(nn.Module):
    """A module that is no model of transformers."""


def offloaded() -> Any:
    return cpu_offload(fresh_hf(), torch.device("cpu"))


REFUSED = {
    "peft": (with_adapter, r"PeftModel.*merge_and_unload"),
    "an adapter added in place": (added_in_place, r"adapter.*merge_and_unload"),
    "data parallel": (lambda: nn.DataParallel(fresh_hf()), r"DataParallel.*\.module"),
    "compiled": (lambda: torch.compile(fresh_hf()), r"OptimizedModule.*_orig_mod"),
    "a module of another kind": (TwoModels, "transformers.*TwoModels"),
    "nothing": (lambda: None, "transformers.*NoneType"),
    "offloaded": (offloaded, r"offloaded.*device_map"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_a_plain_model_is_refused_with_what_to_do(kind: str) -> None:
    make, says = REFUSED[kind]
    with pytest.raises(CheckpointError, match=says) as caught:
        HookedVLM.from_hf(make())
    assert "\n" not in str(caught.value)


def test_a_model_quantised_by_torchao_is_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = fresh_hf()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    with pytest.raises(CheckpointError, match=r"weight is a .*quantize="):
        HookedVLM.from_hf(model)


def test_a_value_head_is_left_out_with_one_warning() -> None:
    model = fresh_hf()
    model.v_head = nn.Linear(4, 1)
    with pytest.warns(CheckpointWarning, match=r"v_head\.weight") as warned:
        ours = HookedVLM.from_hf(model)
    assert len(warned) == 1
    assert torch.equal(logits(ours), logits(HookedVLM.from_hf(tiny_hf())))


def test_adapter_folders_say_what_to_do(tmp_path: Path) -> None:
    with_adapter().save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"adapter.*merge_and_unload") as caught:
        HookedVLM.from_pretrained(tmp_path / "adapter")
    HookedVLM.from_hf(fresh_hf()).save_pretrained(tmp_path / "both")
    HookedVLM.from_pretrained(tmp_path / "both")
    for file in (tmp_path / "adapter").glob("adapter_*"):
        file.rename(tmp_path / "both" / file.name)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors.*merge_and_unload") as beside:
        HookedVLM.from_pretrained(tmp_path / "both")
    assert "\n" not in f"{caught.value}{beside.value}"


def test_one_warning_lists_everything_that_cannot_change_a_number(tmp_path: Path) -> None:
    HookedVLM.from_hf(fresh_hf()).save_pretrained(tmp_path / "plain")
    expected = logits(HookedVLM.from_pretrained(tmp_path / "plain"))
    weights = load_file(tmp_path / "plain/model.safetensors")
    (tmp_path / "plain/model.safetensors").unlink()
    names = sorted(weights)
    shards = [{n: weights[n] for n in names[i::2]} for i in range(2)]
    shards[1] |= {"v_head.summary.weight": torch.ones(1), "model.rotary_emb.inv_freq": torch.ones(4),
                  names[0]: weights[names[0]].clone()}  # fmt: skip
    index = {name: f"model-{i + 1}.safetensors" for i, shard in enumerate(shards) for name in shard}
    index |= {names[2]: "model-2.safetensors", "model.layers.9.mlp.gone": "model-1.safetensors"}
    for i, shard in enumerate(shards):
        save_file(shard, tmp_path / f"plain/model-{i + 1}.safetensors")
    (tmp_path / "plain/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.warns(CheckpointWarning) as warned:
        model = HookedVLM.from_pretrained(tmp_path / "plain")
    assert len(warned) == 1
    said = str(warned[0].message)
    assert all(part in said for part in ("v_head", "inv_freq", names[0], names[2], "layers.9")) and "\n" not in said
    assert torch.equal(logits(model), expected)
