"""Matrices in 8 and 4 bits: rounded to the nearest step, hooks as ever, weights that read but refuse edits."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, model_and_inputs, plain_first
from torch import Tensor, nn

from hooked_vlm import HookedVLM
from hooked_vlm.errors import CheckpointError, InputError
from hooked_vlm.loading.quantisation import QUANTISED
from hooked_vlm.model.fingerprints import weights_hash
from hooked_vlm.model.weight_processing import center_unembed, fold_ln, fold_value_biases
from hooked_vlm.nn.weight_access import is_quantised, values_of

pytest.importorskip("torchao")
GROUP = 16
"""Weights that share a scale in the 4-bit case; divides every width of the tiny models."""


def four_bits() -> Any:
    """Values of 4 bits, one byte each: what there is for the CPU."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    int4: Any = vars(torch)["int4"]  # which the stubs lack
    return IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(GROUP))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp("checkpoints") / family for family in FAMILIES}
    for family, folder in made.items():
        model_and_inputs(family, "padded")[0].save_pretrained(folder)
    return made


@pytest.fixture(scope="module", params=[*plain_first(FAMILIES, "{}: int8"), *plain_first(FAMILIES, "{}: 4 bits")])
def models(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    """The kind of quantisation, the model in float32, the same quantised, inputs with padding and about one image."""
    family, bits = request.param.split(": ")
    how = four_bits() if bits == "4 bits" else bits
    quantised = HookedVLM.from_pretrained(folders[family], device="cpu", quantize=how)
    return (
        bits,
        HookedVLM.from_pretrained(folders[family], device="cpu"),
        quantised,
        *(model_and_inputs(family, rows)[1] for rows in ("padded", "one image")),
    )


def matrices(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(QUANTISED)}


def with_rounded_weights(plain: Any, quantised: Any) -> Any:
    """A float model whose matrices are what the quantised ones stand for."""
    reference = deepcopy(plain)
    with torch.no_grad():
        for name, linear in matrices(reference).items():
            linear.weight.copy_(values_of(quantised.get_submodule(name)).as_subclass(Tensor))
    return reference


def test_just_the_matrices_of_the_towers_and_the_projector_are_quantised(models: Any) -> None:
    _, plain, quantised, *_ = models
    small = {name for name, p in quantised.named_parameters() if is_quantised(p)}
    assert small == {f"{name}.weight" for name in matrices(plain)}
    per_block = [name for name in small if name.startswith("blocks.1.")]
    assert len(per_block) == 7 and any("vision.blocks.1.mlp" in name for name in small)
    for name, parameter in quantised.named_parameters():
        if name not in small:
            assert torch.equal(parameter, plain.get_parameter(name)), name


def test_weights_are_those_of_rounding_to_the_nearest_step(models: Any) -> None:
    """Symmetric steps: 255 from the largest weight of a row to its opposite, or 15 for a group."""
    bits, plain, quantised, *_ = models
    for name, linear in matrices(plain).items():
        weight, found = linear.weight.detach(), values_of(quantised.get_submodule(name)).as_subclass(Tensor)
        groups = weight.unflatten(1, (-1, GROUP)) if bits == "4 bits" else weight[:, None]
        step = groups.abs().amax(-1, keepdim=True) / (7.5 if bits == "4 bits" else 127.5)
        error = (found.view_as(groups) - groups).abs()
        assert (error <= step * 0.5001 + 1e-7).all(), name
        assert torch.allclose(found.view_as(groups) / step, (found.view_as(groups) / step).round(), atol=1e-3), name
        assert error.max() > 0


@torch.no_grad()
def test_logits_are_those_of_a_float_model_with_the_rounded_weights(models: Any) -> None:
    bits, plain, quantised, inputs, _ = models
    reference = with_rounded_weights(plain, quantised)
    real = inputs.attention_mask.bool()
    ours, rounded, exact = (model(inputs)[real] for model in (quantised, reference, plain))
    torch.testing.assert_close(ours, rounded, atol=2e-5, rtol=1e-5)
    error, size = (ours - exact).pow(2).mean().sqrt(), exact.pow(2).mean().sqrt()
    print(f"\n{bits}: logits off by {float(error / size):.2%} of their size")
    assert error > 1000 * (ours - rounded).pow(2).mean().sqrt()  # the rounding of weights, not that of arithmetic
    new = quantised.generate(inputs, 3, stop_at_eos=False)
    assert torch.equal(new, reference.generate(inputs, 3, stop_at_eos=False))


@pytest.mark.repeats_shapes
@torch.no_grad()
def test_every_hook_fires_an_identity_changes_nothing_and_an_edit_something(models: Any) -> None:
    _, plain, quantised, _, inputs = models
    for model in (plain, quantised):
        for switch in (model.set_use_attn_result, model.set_use_split_qkv_input, model.set_use_hook_mlp_in):
            switch(True)
    logits, fired = quantised(inputs), []
    names = [name for name in quantised.hook_dict if not quantised.why_silent(name, inputs, {})]
    identity = [(name, lambda x, hook: fired.append(hook.name)) for name in names]
    explicit = [(name, lambda x, hook: x) for name in names if name.endswith(("scores", "pattern"))]
    same = quantised.run_with_hooks(inputs, fwd_hooks=identity)
    assert set(fired) == set(names) == {n for n in plain.hook_dict if not plain.why_silent(n, inputs, {})}
    assert torch.equal(same, quantised.run_with_hooks(inputs, fwd_hooks=explicit))
    for name in names[::12]:
        edited = quantised.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: x * torch.rand_like(x) * 0.5)])
        assert not torch.equal(edited, logits), name
    for model in (plain, quantised):
        for switch in (model.set_use_attn_result, model.set_use_split_qkv_input, model.set_use_hook_mlp_in):
            switch(False)


@torch.no_grad()
def test_views_read_rounded_weights_and_refuse_edits(models: Any) -> None:
    _, plain, quantised, *_ = models
    attn, mlp = quantised.blocks[1].attn, quantised.blocks[0].mlp
    reference = with_rounded_weights(plain, quantised)
    like_attn, like_mlp = reference.blocks[1].attn, reference.blocks[0].mlp
    views = ((attn.W_Q, like_attn.W_Q), (attn.W_O, like_attn.W_O), (mlp.W_out, like_mlp.W_out))
    for view, like in views:
        assert view.dtype is torch.float32 and torch.equal(view, like)
        for edit in (
            lambda w: w.mul_(2),
            lambda w: w.__setitem__(0, 0),
            lambda w: w[0].zero_(),
            lambda w: w.data.add_(1),
        ):
            with pytest.raises(RuntimeError, match="copy"):
                edit(view)
    with pytest.raises(RuntimeError, match="copy"):
        attn.W_V *= 2
    with pytest.raises((NotImplementedError, RuntimeError)):
        attn.q_proj.weight.mul_(2)
    assert quantised.W_Q.shape == plain.W_Q.shape and torch.equal(quantised.W_E, plain.W_E)
    assert weights_hash(quantised) != weights_hash(plain)


def test_what_a_quantised_model_cannot_do_is_refused(models: Any, tmp_path: Path) -> None:
    bits, _, quantised, *_ = models
    with pytest.raises(CheckpointError, match="quantised"):
        quantised.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    for move in (quantised.double, quantised.half, lambda: quantised.to("cpu")):
        with pytest.raises(InputError, match=str(quantised.cfg.quantize)):
            move()
    for rewrite in (fold_ln, center_unembed, fold_value_biases):
        with pytest.raises(InputError, match="quantised"):
            rewrite(quantised)
    assert quantised.cfg.quantize == ("int8" if bits == "int8" else "IntxWeightOnlyConfig")


def test_what_cannot_be_quantised_says_why(folders: dict[str, Path]) -> None:
    from torchao.quantization import Int4WeightOnlyConfig

    folder = folders["qwen2-vl"]
    with pytest.raises(CheckpointError, match="CUDA"):
        HookedVLM.from_pretrained(folder, device="cpu", quantize="int4")
    with pytest.raises(CheckpointError, match=r"Int4WeightOnlyConfig.*on cpu"):
        HookedVLM.from_pretrained(folder, device="cpu", quantize=Int4WeightOnlyConfig(group_size=16))
    with pytest.raises(CheckpointError, match="'int2'"):
        HookedVLM.from_pretrained(folder, device="cpu", quantize="int2")
    with pytest.raises(CheckpointError, match=r"quantize.*device_map"):
        HookedVLM.from_pretrained(folder, device_map="auto", quantize="int8")


def test_quantised_weights_take_a_quarter_of_the_memory(models: Any) -> None:
    _, plain, quantised, *_ = models
    for name, linear in matrices(plain).items():
        weight: Any = quantised.get_submodule(name).weight
        n_bytes = weight.qdata.numel() * weight.qdata.element_size()
        assert n_bytes * 4 == linear.weight.numel() * linear.weight.element_size()


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_weights_on_an_accelerator(bits: str, tmp_path: Path) -> None:
    import tiny
    import tiny_qwen2_vl
    import transformers

    config = tiny_qwen2_vl.tiny_config(hidden_size=256, intermediate_size=512)
    wide: Any = transformers.Qwen2VLForConditionalGeneration(config)
    tiny.randomise(wide)
    HookedVLM.from_hf(wide.to(torch.bfloat16)).save_pretrained(tmp_path / "model")
    plain = HookedVLM.from_pretrained(tmp_path / "model", device="cuda")
    quantised = HookedVLM.from_pretrained(tmp_path / "model", device="cuda", quantize=bits)
    tokens = torch.arange(4, 60)[None]
    rounded = with_rounded_weights(plain, quantised)
    exact = deepcopy(rounded).double()
    truth = exact(tokens)
    errors = [(model(tokens) - truth).pow(2).mean().sqrt() for model in (quantised, rounded)]
    assert 0 < errors[0] < 2 * errors[1]  # both round to bfloat16, in other places
