"""Renaming the tensors of Qwen2-VL: views of the right numbers, bit-exact both ways, or one error for all."""

import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from hooked_vlm.converters import open_tensors, qwen2_vl
from hooked_vlm.errors import CheckpointError

Form = Callable[[dict[str, Any]], dict[str, Any]]
Names = Literal["published", "in_memory"]


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("names", ["published", "in_memory"])
def test_names_and_config_form_are_independent(tiny: Any, form: Form, names: Names) -> None:
    ours = qwen2_vl.from_hf(getattr(tiny, names), form(tiny.config))
    assert equal(ours, qwen2_vl.from_hf(tiny.published, tiny.config))


@pytest.mark.parametrize("names", ["published", "in_memory"])
def test_the_round_trip_is_bit_exact(tiny: Any, form: Form, names: Names) -> None:
    config = form(tiny.config)
    back = qwen2_vl.to_hf(qwen2_vl.from_hf(getattr(tiny, names), config), config, names)
    assert equal(back, getattr(tiny, names))
    assert all(tensor.is_contiguous() for tensor in back.values()), "safetensors wants them contiguous"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_kept(make: Callable[..., Any], tmp_path: Any, dtype: torch.dtype) -> None:
    tiny = make(tmp_path, tied=True, dtype=dtype)
    ours = qwen2_vl.from_hf(open_tensors(tmp_path), tiny.config)
    assert {tensor.dtype for tensor in ours.values()} == {dtype} == {qwen2_vl.dtype(tiny.config)}
    assert equal(qwen2_vl.to_hf(ours, tiny.config), tiny.published)


def test_every_tensor_is_where_the_forward_pass_needs_it(untied: Any) -> None:
    """Against the modules of the reference, by what they are for, not by what they are called."""
    ours = qwen2_vl.from_hf(untied.published, untied.config)
    text, visual = untied.model.model.language_model, untied.model.model.visual

    def check(prefix: str, module: torch.nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            assert torch.equal(ours.pop(f"{prefix}.{name}"), parameter), prefix

    for layer, block in enumerate(text.layers):
        check(f"blocks.{layer}.ln1", block.input_layernorm)
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            check(f"blocks.{layer}.attn.{part}", getattr(block.self_attn, part))
        check(f"blocks.{layer}.ln2", block.post_attention_layernorm)
        check(f"blocks.{layer}.mlp.gate_proj", block.mlp.gate_proj)
        check(f"blocks.{layer}.mlp.in_proj", block.mlp.up_proj)
        check(f"blocks.{layer}.mlp.out_proj", block.mlp.down_proj)
    check("embed", text.embed_tokens)
    check("ln_final", text.norm)
    check("unembed", untied.model.lm_head)
    for layer, block in enumerate(visual.blocks):
        prefix = f"vision.blocks.{layer}"
        check(f"{prefix}.ln1", block.norm1)
        check(f"{prefix}.attn.o_proj", block.attn.proj)
        check(f"{prefix}.ln2", block.norm2)
        check(f"{prefix}.mlp.in_proj", block.mlp.fc1)
        check(f"{prefix}.mlp.out_proj", block.mlp.fc2)
        patches = torch.randn(5, 24)
        q, k, v = block.attn.qkv(patches).reshape(5, 3, -1).permute(1, 0, 2)  # VisionAttention.forward
        for part, expected in zip("qkv", (q, k, v), strict=True):
            weight, bias = (ours.pop(f"{prefix}.attn.{part}_proj.{kind}") for kind in ("weight", "bias"))
            torch.testing.assert_close(patches @ weight.T + bias, expected)
    check("projector.ln", visual.merger.ln_q)
    check("projector.in_proj", visual.merger.mlp[0])
    check("projector.out_proj", visual.merger.mlp[2])
    patches = torch.randn(5, 3 * 2 * 4 * 4)
    weight = ours.pop("vision.patch_embed.proj.weight")
    torch.testing.assert_close(patches @ weight.T, visual.patch_embed(patches))
    assert not ours, "and nothing else"


def test_everything_is_a_view_of_what_was_given(tiny: Any) -> None:
    for given in (tiny.published, tiny.in_memory):
        starts = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
        ours = qwen2_vl.from_hf(given, tiny.config)
        assert all(tensor.untyped_storage().data_ptr() in starts for tensor in ours.values())
        assert not any(tensor.requires_grad for tensor in ours.values())


def test_parameters_that_require_grad_can_be_given(untied: Any) -> None:
    ours = qwen2_vl.from_hf(dict(untied.model.named_parameters()), untied.config)
    assert equal(ours, qwen2_vl.from_hf(untied.published, untied.config))
    assert not any(tensor.requires_grad for tensor in ours.values())


def test_only_the_fused_projections_are_copied_on_the_way_back(untied: Any) -> None:
    ours = qwen2_vl.from_hf(untied.published, untied.config)
    starts = {tensor.untyped_storage().data_ptr() for tensor in ours.values()}
    back = qwen2_vl.to_hf(ours, untied.config)
    copied = {name for name, tensor in back.items() if tensor.untyped_storage().data_ptr() not in starts}
    assert copied == {name for name in back if ".attn.qkv." in name}


# ---------------------------------------------------------------- tied embeddings


def test_tied_embeddings_are_one_object(tied: Any, untied: Any) -> None:
    ours = qwen2_vl.from_hf(tied.published, tied.config)
    assert ours["unembed.weight"] is ours["embed.weight"]
    assert "lm_head.weight" not in qwen2_vl.to_hf(ours, tied.config)
    in_memory = qwen2_vl.to_hf(ours, tied.config, names="in_memory")
    assert in_memory["lm_head.weight"] is in_memory["model.language_model.embed_tokens.weight"]
    ours = qwen2_vl.from_hf(untied.published, untied.config)
    assert ours["unembed.weight"].data_ptr() != ours["embed.weight"].data_ptr()


def test_a_tied_checkpoint_may_hold_an_equal_head(tied: Any) -> None:
    given = tied.published | {"lm_head.weight": tied.published["model.embed_tokens.weight"].clone()}
    ours = qwen2_vl.from_hf(given, tied.config)
    assert ours["unembed.weight"] is ours["embed.weight"]


@pytest.mark.parametrize("change", [lambda t: t + 1, lambda t: t[:-1], lambda t: t.bfloat16()])
def test_a_tied_checkpoint_with_another_head_is_refused(tied: Any, change: Callable[[Tensor], Tensor]) -> None:
    given = tied.published | {"lm_head.weight": change(tied.published["model.embed_tokens.weight"])}
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings.*lm_head\.weight"):
        qwen2_vl.from_hf(given, tied.config)
    ours = qwen2_vl.from_hf(tied.published, tied.config)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings.*unembed\.weight"):
        qwen2_vl.to_hf(ours | {"unembed.weight": change(ours["embed.weight"])}, tied.config)


def test_a_tied_model_may_be_given_without_its_alias(tied: Any) -> None:
    ours = qwen2_vl.from_hf(tied.published, tied.config)
    del ours["unembed.weight"]
    assert equal(qwen2_vl.to_hf(ours, tied.config), tied.published)


def test_an_untied_checkpoint_needs_its_head(tied: Any, untied: Any) -> None:
    with pytest.raises(CheckpointError, match=r"missing.*lm_head\.weight.*tie_word_embeddings"):
        qwen2_vl.from_hf(tied.published, untied.config)


# ---------------------------------------------------------------- what is refused


def test_one_error_lists_everything_wrong(untied: Any) -> None:
    given = dict(untied.published)
    del given["model.norm.weight"], given["visual.merger.mlp.0.bias"]
    given["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
    given["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 31)
    given["visual.blocks.1.attn.qkv.weight"] = torch.zeros(72, 24, dtype=torch.int8)
    with pytest.raises(CheckpointError) as caught:
        qwen2_vl.from_hf(given, untied.config)
    message = str(caught.value)
    assert re.search(r"missing\W+model\.norm\.weight, visual\.merger\.mlp\.0\.bias;", message)
    assert re.search(r"unexpected\W+model\.layers\.2\.mlp\.up_proj\.weight;", message)
    assert re.search(r"model\.layers\.0\.mlp\.up_proj\.weight.*\[48, 32\].*\[48, 31\]", message)
    assert re.search(r"visual\.blocks\.1\.attn\.qkv\.weight.*float32", message)


def test_long_lists_are_cut(untied: Any) -> None:
    given = untied.published | {f"adapter.{number}": torch.zeros(1) for number in range(31)}
    with pytest.raises(CheckpointError, match=r"adapter\.19\D+11\D*$"):
        qwen2_vl.from_hf(given, untied.config)


def test_a_tensor_under_both_names(untied: Any) -> None:
    given = untied.published | {"model.language_model.norm.weight": torch.zeros(32)}
    with pytest.raises(CheckpointError, match=r"\bmodel\.norm\.weight"):
        qwen2_vl.from_hf(given, untied.config)


def test_buffers_of_old_files_are_ignored(untied: Any) -> None:
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
        "visual.rotary_pos_emb.inv_freq": torch.ones(3),
    }
    assert equal(
        qwen2_vl.from_hf(untied.published | buffers, untied.config),
        qwen2_vl.from_hf(untied.published, untied.config),
    )


def test_the_way_back_checks_as_well(untied: Any) -> None:
    ours = qwen2_vl.from_hf(untied.published, untied.config)
    ours["blocks.0.ln1.weight"] = ours["blocks.0.ln1.weight"][:5]
    del ours["vision.blocks.0.attn.k_proj.weight"], ours["unembed.weight"]
    ours["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        qwen2_vl.to_hf(ours, untied.config)
    message = str(caught.value)
    assert re.search(r"missing\W+unembed\.weight.*tie_word_embeddings.*vision\.blocks\.0", message)
    assert re.search(r"unexpected\W+extra\b", message)
    assert re.search(r"blocks\.0\.ln1\.weight.*\[32\].*\[5\]", message)
