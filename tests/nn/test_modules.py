"""What other people's tools do to modules: hooks on any of them, wrapped layers, modules in a hook point's place."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch
from families import FAMILIES, model_and_inputs, own_copy, plain_first
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformer_lens import hook_points

from hooked_vlm import HookedVLM, HookError, InputError, SweepCase, VLMInputs, sweep, sweep_many
from hooked_vlm.activations import stream_activations
from hooked_vlm.interventions import CustomHooks, ZeroHeads
from hooked_vlm.lens import head_lens, logit_attribution, logit_lens
from hooked_vlm.metrics import logit
from hooked_vlm.model.weight_processing import fold_ln
from hooked_vlm.nn.hooks import is_quadratic, is_vision, shows_modules, silent_hook_points
from hooked_vlm.patching import Pair, patch_paths

ROWS = ["one image", "two images", "padded"]


@torch.no_grad()
def logits(model: HookedVLM, inputs: VLMInputs, *hooks: tuple[Any, Callable]) -> Tensor:
    """Of the positions that are not padding."""
    return model.run_with_hooks(inputs, fwd_hooks=list(hooks))[inputs.attention_mask.bool()]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.detach().abs().max())), rtol=1e-4)


def reached(model: HookedVLM, inputs: VLMInputs) -> list[str]:
    """Hook points that a pass over `inputs` calls."""
    return [name for name in model.hook_dict if not model.why_silent(name, inputs, {})]


@contextmanager
def hooked(module: nn.Module, fn: Callable, pre: bool = False) -> Iterator[None]:
    handle = module.register_forward_pre_hook(fn) if pre else module.register_forward_hook(fn)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------- plain PyTorch hooks on modules


def modules_of(model: Any) -> dict[str, nn.Module]:
    """Modules that are called with a tensor and give one, hook points and containers aside."""
    return {
        name: module
        for name, module in model.named_modules()
        if "hook_" not in name
        and name.startswith(("blocks", "vision.blocks", "ln_final", "unembed"))
        and not isinstance(module, nn.ModuleList)
        and not (name.startswith("vision.blocks.") and int(name.split(".")[2]) >= model.cfg.vision.n_layers_run)
        and not name.endswith(("act", "q_norm", "k_norm"))
    }


@pytest.mark.parametrize("rows", ROWS)
def test_hooks_on_modules_see_batch_and_positions_and_change_nothing_by_looking(family: str, rows: str) -> None:
    model, inputs = model_and_inputs(family, rows)
    plain = logits(model, inputs)
    seen: dict[str, tuple[torch.Size, torch.Size]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, out: seen.__setitem__(name, (args[0].shape, out.shape))

    handles = [module.register_forward_hook(note(name)) for name, module in modules_of(model).items()]
    try:
        close(logits(model, inputs), plain)
    finally:
        for handle in handles:
            handle.remove()
    _, cache = model.run_with_cache(inputs)
    images = cache["vision.blocks.0.hook_resid_pre"].shape[:2]
    assert set(seen) == set(modules_of(model))
    for name, (given, made) in seen.items():
        expected = images if name.startswith("vision.") else inputs.shape
        assert given[:2] == made[:2] == expected and len(given) == len(made) == 3, name


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("blocks.1", "blocks.1.hook_resid_post"),
        ("blocks.1.mlp", "blocks.1.hook_mlp_out"),
        ("blocks.1.attn", "blocks.1.hook_attn_out"),
        ("blocks.1.ln2", "blocks.1.ln2.hook_out"),
        ("blocks.2.mlp.gate_proj", "blocks.2.mlp.hook_pre"),
        ("vision.blocks.0", "vision.blocks.0.hook_resid_post"),
        ("vision.blocks.1.mlp.in_proj", "vision.blocks.1.mlp.hook_pre, or hook_pre_linear"),
    ],
)
def test_an_edit_of_the_last_position_by_a_module_hook_is_that_of_a_hook_point(
    family: str, rows: str, name: str, point: str
) -> None:
    model, inputs = model_and_inputs(family, rows)
    plain, _, gated = point.partition(", or ")
    point = f"{plain.rpartition('.')[0]}.{gated}" if gated and model.cfg.vision.gated_mlp else plain
    if f"{name}.hook_out" in model.hook_dict:  # a norm stands between the module and the stream
        point = f"{name}.hook_out"

    def steer(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return torch.cat((out[:, :-1], out[:, -1:] + 3), dim=1)

    def steer_there(x: Tensor, hook: Any) -> None:
        x[:, -1] += 3

    expected = logits(model, inputs, (point, steer_there))
    with hooked(model.get_submodule(name), steer):
        found = logits(model, inputs)
        with torch.no_grad():  # nor does the last block leave out what the hook would see
            last = model(inputs, logits_at="last")[:, 0]
    close(found, expected)
    stops = torch.tensor(inputs.stop) - 1
    with torch.no_grad(), model.hooks(fwd_hooks=[(point, steer_there)]):
        close(last, model(inputs)[torch.arange(len(inputs)), stops])


def test_global_module_hooks_see_batch_and_positions(family: str) -> None:
    model, inputs = model_and_inputs(family, "padded")
    plain, seen = logits(model, inputs), []

    def look(module: nn.Module, args: Any, out: Any) -> None:
        if module is model.blocks[1].mlp:
            seen.append(out.shape)

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        close(logits(model, inputs), plain)
    finally:
        handle.remove()
    assert seen == [(*inputs.shape, model.cfg.d_model)]


@pytest.mark.parametrize("rows", ["one image", "padded"])
def test_head_results_respect_a_hook_on_the_output_projection(family: str, rows: str) -> None:
    """Head 1.2 ablated before o_proj, with every head's own output made."""
    model, inputs = model_and_inputs(family, rows)
    model, d = own_copy(model), model.cfg.d_head
    expected = logits(model, inputs, *ZeroHeads(((1, 2),)).hooks(model, inputs))

    def ablate(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., 2 * d : 3 * d] = 0
        return (x,)

    model.set_use_attn_result(True)
    with hooked(model.blocks[1].attn.o_proj, ablate, pre=True):
        close(logits(model, inputs), expected)
        _, cache = model.run_with_cache(inputs, names_filter="blocks.1.attn.hook_result")
    assert not cache["result", 1][..., 2, :].any() and cache["result", 1][..., 1, :].any()


def test_an_affine_hook_on_the_output_projection_adds_up_over_heads_and_another_is_refused(family: str) -> None:
    model, inputs = model_and_inputs(family, "one image")
    model = own_copy(model)
    ramp = torch.arange(inputs.shape[1])[:, None] * 0.1
    with hooked(model.blocks[1].attn.o_proj, lambda m, args, out: 2 * out + ramp):
        expected = logits(model, inputs)
        model.set_use_attn_result(True)
        close(logits(model, inputs), expected)
    with hooked(model.blocks[1].attn.o_proj, lambda m, args, out: out.relu()), pytest.raises(HookError, match="o_proj"):
        model(inputs)


@pytest.mark.parametrize("rows", ["one image", "padded"])
@pytest.mark.parametrize("switch", ["use_split_qkv_input", "use_attn_in"])
@pytest.mark.parametrize("side", "qkv")
def test_inputs_of_heads_respect_a_hook_on_a_projection(family: str, rows: str, switch: str, side: str) -> None:
    model, inputs = model_and_inputs(family, rows)
    model = own_copy(model)
    linear = getattr(model.blocks[1].attn, f"{side}_proj")
    with hooked(linear, lambda m, args, out: out.cos()):
        expected = logits(model, inputs)
        getattr(model, f"set_{switch}")(True)
        close(logits(model, inputs), expected)


# ---------------------------------------------------------------- wrapped layers


class Adapter(nn.Module):
    """A low-rank change beside a linear layer, as adapters add it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.randn(base.out_features, rank))

    @property
    def weight(self) -> Tensor:  # what some libraries show, and not what is computed
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def with_adapters(model: HookedVLM, kind: str) -> tuple[HookedVLM, HookedVLM]:
    """A model with an adapter in every projection of the language model, and one with the same matrices in plain."""
    adapted, plain = own_copy(model), own_copy(model)
    torch.manual_seed(3)
    if kind == "peft":
        settings = LoraConfig(r=2, target_modules=r"blocks\..*_proj", init_lora_weights=False)
        inject_adapter_in_model(settings, adapted)
    else:
        for name, linear in list(adapted.blocks.named_modules()):
            if isinstance(linear, nn.Linear):
                of, _, own = name.rpartition(".")
                setattr(adapted.blocks.get_submodule(of), own, Adapter(linear))
    with torch.no_grad():
        for name, module in adapted.named_modules():
            if isinstance(module, Adapter):
                plain.get_submodule(name).weight += module.up @ module.down
            elif hasattr(module, "lora_A"):
                change = module.lora_B["default"].weight @ module.lora_A["default"].weight
                plain.get_submodule(name).weight += module.scaling["default"] * change
    return adapted, plain


@pytest.fixture(params=[*plain_first(FAMILIES, "{}-peft"), *plain_first(FAMILIES, "{}-by hand")])
def adapted(request: pytest.FixtureRequest) -> tuple[HookedVLM, HookedVLM, VLMInputs]:
    family, _, kind = request.param.rpartition("-")
    model, inputs = model_and_inputs(family, "padded")
    return (*with_adapters(model, kind), inputs)


SIDES: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


@pytest.mark.parametrize("switch", ["", *SWITCHES])
@pytest.mark.repeats_shapes
def test_an_adapter_takes_part_under_every_switch(adapted: tuple[Any, Any, Any], switch: str) -> None:
    model, plain, inputs = adapted
    for each in (model, plain) if switch else ():
        getattr(each, f"set_{switch}")(True)
    close(logits(model, inputs), logits(plain, inputs))
    _, cache = model.run_with_cache(inputs)
    _, expected = plain.run_with_cache(inputs)
    real = inputs.attention_mask.bool()
    for name in cache:
        if cache[name].shape[:2] == inputs.shape:
            close(cache[name][real], expected[name][real])


@pytest.mark.repeats_shapes
def test_lenses_head_results_and_paths_go_through_an_adapter(adapted: tuple[Any, Any, Any]) -> None:
    model, plain, inputs = adapted
    np.testing.assert_allclose(head_lens(model, inputs, 5), head_lens(plain, inputs, 5), atol=2e-5)
    lenses = [logit_lens(m, inputs, "final", targets=[5]).target_log_probs for m in (model, plain)]
    np.testing.assert_allclose(lenses[0], lenses[1], atol=2e-5)
    own, other = (logit_attribution(m, inputs, 5, unit="head") for m in (model, plain))
    np.testing.assert_allclose(own.values, other.values, atol=2e-5)
    np.testing.assert_allclose(own.values.sum(0), own.logit, atol=5e-5)
    results = [m.run_with_cache(inputs)[1].stack_head_results(2) for m in (model, plain)]
    real = inputs.attention_mask.bool()
    close(results[0][:, real], results[1][:, real])
    streams = [m.run_with_cache(inputs)[1].accumulated_resid(2, incl_mid=True) for m in (model, plain)]
    close(streams[0][:, real], streams[1][:, real])
    pair = Pair(inputs[0], replace(inputs[0], pixel_values=inputs[0].pixel_values.flip(0) * 0.5))
    heads, receivers = [(0, 1), (1, 1)], [(2, 1), (1, 0)]
    effects = [patch_paths(m, pair, heads, receivers, side, logit(5)).values for m in (model, plain) for side in SIDES]
    for own, other in zip(effects[:3], effects[3:], strict=True):
        np.testing.assert_allclose(own, other, atol=2e-5)
    assert np.ptp(effects[0]) > 1e-4


def test_what_needs_the_matrix_refuses_an_adapter_and_says_to_merge_it(adapted: tuple[Any, Any, Any]) -> None:
    model, _, inputs = adapted
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    needs: list[Callable[[], Any]] = [
        *(lambda name=name: getattr(attn, name) for name in ("W_Q", "W_K", "W_V", "W_O")),
        *(lambda name=name: getattr(mlp, name) for name in ("W_in", "W_out")),
        lambda: model.W_O,
        model.tl_state_dict,
        model.tl_parameters,
        lambda: fold_ln(model),
        lambda: model.run_with_cache(inputs)[1].stack_neuron_results(2),
    ]
    for reads in needs:
        with pytest.raises(InputError, match="merge"):
            reads()


def test_an_adapter_of_the_unembedding_takes_part_and_its_matrix_is_refused(family: str) -> None:
    model, inputs = model_and_inputs(family, "one image")
    model = own_copy(model)
    model.unembed = Adapter(model.unembed)  # type: ignore[assignment]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        expected = model.unembed(cache["ln_final.hook_out"])[0, -1].log_softmax(-1)[5]
    found = logit_lens(model, inputs, "final", targets=[5]).target_log_probs[-1].ravel()
    np.testing.assert_allclose(found, float(expected), atol=2e-5)
    for reads in (lambda: model.W_U, lambda: model.b_U, lambda: logit_attribution(model, inputs, 5)):
        with pytest.raises(InputError, match="merge"):
            reads()


@pytest.mark.repeats_shapes
def test_sweeps_with_an_adapter_equal_the_loop(adapted: tuple[Any, Any, Any]) -> None:
    model, _, inputs = adapted
    runs = [ZeroHeads(((layer, 1),)) for layer in range(3)]
    result = sweep(model, inputs, runs, logit(5))
    stops = torch.tensor(inputs.stop) - 1
    for run, values in zip(runs, result.values, strict=True):
        with torch.no_grad():
            whole = model.run_with_hooks(inputs, fwd_hooks=run.hooks(model, inputs))
        close(values, whole[torch.arange(len(inputs)), stops, 5])


# ---------------------------------------------------------------- modules in a hook point's place


class Halved(nn.Module):
    """Stands where a hook point was, as an SAE does."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        return x / 2


@contextmanager
def in_place_of(model: HookedVLM, name: str, module: nn.Module) -> Iterator[None]:
    of, _, own = name.rpartition(".")
    parent = model.get_submodule(of)
    point = getattr(parent, own)
    setattr(parent, own, module)
    model.setup()
    try:
        yield
    finally:
        setattr(parent, own, point)
        model.setup()


@pytest.mark.parametrize("rows", ["one image", "padded"])
@pytest.mark.repeats_shapes
def test_a_module_in_the_place_of_any_hook_point_acts_as_a_hook_there(family: str, rows: str) -> None:
    model, inputs = model_and_inputs(family, rows)
    model = own_copy(model)
    wrong = []
    for name in reached(model, inputs):
        seen: list[torch.Size] = []
        expected = logits(model, inputs, (name, lambda x, hook, seen=seen: seen.append(x.shape) or x / 2))
        halved = Halved()
        with in_place_of(model, name, halved):
            found = logits(model, inputs)
        if halved.shapes != seen or not torch.allclose(found, expected, atol=1e-4, rtol=1e-4):
            wrong.append((name, halved.shapes, seen))
    assert wrong == []


def test_a_module_in_a_hook_points_place_may_have_hooks_of_its_own(family: str) -> None:
    model, inputs = model_and_inputs(family, "padded")
    model = own_copy(model)
    for name in ("blocks.1.attn.hook_z", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_pattern"):
        expected = logits(model, inputs, (name, lambda x, hook: x / 4))
        halved = Halved()
        with in_place_of(model, name, halved), hooked(halved, lambda module, args, out: out / 2):
            close(logits(model, inputs), expected)


def test_a_hook_on_a_point_that_was_exchanged_is_refused(family: str) -> None:
    model, inputs = model_and_inputs(family, "one image")
    model = own_copy(model)
    model.blocks[1].hook_resid_post = Halved()  # and no setup()
    name = "blocks.1.hook_resid_post"
    for call in (
        lambda: model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: x)]),
        lambda: model.run_with_cache(inputs, names_filter=name),
        lambda: model.add_hook(name, lambda x, hook: x),
    ):
        with pytest.raises(HookError, match="Halved"):
            call()
    model.setup()
    with pytest.raises(HookError, match="Halved"):
        model.run_with_cache(inputs, names_filter=name)


def test_a_wrapped_block_keeps_its_hook_points(family: str) -> None:
    model, inputs = model_and_inputs(family, "padded")
    model = own_copy(model)
    expected = logits(model, inputs, ("blocks.1.attn.hook_z", lambda z, hook: z / 2))
    model.blocks[1] = nn.Sequential(model.blocks[1])
    close(logits(model, inputs, ("blocks.1.attn.hook_z", lambda z, hook: z / 2)), expected)


class Autoencoder(nn.Module):
    """In the layout of SAELens: hook points of TransformerLens' own class within."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_acts = hook_points.HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.hook_acts(x.relu())


@pytest.mark.parametrize("rows", ["one image", "padded"])
def test_hook_points_within_a_module_are_cached_and_hooked(family: str, rows: str) -> None:
    model, inputs = model_and_inputs(family, rows)
    model = own_copy(model)
    with in_place_of(model, "blocks.1.hook_resid_post", Autoencoder()):
        name, seen = "blocks.1.hook_resid_post.hook_acts", []
        logits(model, inputs, (name, lambda x, hook: seen.append(x)))
        for names in (None, name):
            with torch.no_grad():
                _, cache = model.run_with_cache(inputs, names_filter=names)
            assert cache[name].equal(seen[0]) and cache[name].shape[:2] == inputs.shape


@pytest.mark.parametrize("suffix", ["hook_pattern", "hook_attn_scores"])
@pytest.mark.parametrize("side", ["", "vision."])
def test_patterns_are_not_derived_where_another_module_stands(family: str, side: str, suffix: str) -> None:
    model, inputs = model_and_inputs(family, "one image")
    model = own_copy(model)
    with in_place_of(model, f"{side}blocks.1.attn.{suffix}", Halved()), torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        own = cache.vision if side else cache
        if suffix == "hook_pattern":
            with pytest.raises(KeyError, match="module"):
                own["pattern", 1]
        assert own["pattern", 0].sum(-1).allclose(torch.ones(()), atol=1e-5)
        model.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_attn_scores"), pos_slice=-1)


def test_a_cache_is_not_changed_by_modules_that_write_into_what_they_are_given(family: str) -> None:
    model, inputs = model_and_inputs(family, "one image")
    model = own_copy(model)

    class Writing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(0.5)

    with torch.no_grad():
        _, before = model.run_with_cache(inputs)
        encoded = inputs.with_image_features(model.encode_images(inputs))
        plain = model(encoded)
        with in_place_of(model, "blocks.1.hook_resid_pre", Writing()):
            _, cache = model.run_with_cache(inputs)
        assert cache["blocks.0.hook_resid_post"].equal(before["blocks.0.hook_resid_post"])
        with in_place_of(model, "hook_image_features", Writing()):
            model(encoded)
        _, cache = model.run_with_cache(encoded)
        cache["hook_image_features"].zero_()
        assert model(encoded).equal(plain)


def test_wrapped_attention_takes_part(family: str) -> None:
    model, inputs = model_and_inputs(family, "padded")
    expected = logits(model, inputs)
    for tower in ("", "vision."):
        wrapped = own_copy(model)
        block = wrapped.get_submodule(f"{tower}blocks.1")
        block.attn = nn.Sequential(block.attn)
        close(logits(wrapped, inputs), expected)
        with torch.no_grad():
            wrapped.generate(inputs, 2)
    wrapped = own_copy(model)
    wrapped.blocks[1].attn = nn.Sequential(wrapped.blocks[1].attn)
    wrapped.set_use_attn_in(True)
    with pytest.raises(HookError, match="Sequential"):
        wrapped(inputs)


def test_parametrised_weights_are_read_as_they_are_used(family: str) -> None:
    model = own_copy(model_and_inputs(family, "one image")[0])

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    plain = model.blocks[1].attn.W_Q.clone()
    nn.utils.parametrize.register_parametrization(model.blocks[1].attn.q_proj, "weight", Doubled())
    assert model.blocks[1].attn.W_Q.equal(2 * plain)
    with pytest.raises(RuntimeError, match="copy"):
        model.blocks[1].attn.W_Q[0] = 0


def test_a_class_of_the_users_own_is_no_other_module(family: str, tmp_path: Any) -> None:
    model, inputs = model_and_inputs(family, "padded")

    class Own(HookedVLM):
        pass

    own = own_copy(model)
    own.__class__ = Own
    assert not shows_modules(own) and logits(own, inputs).equal(logits(model, inputs))
    fold_ln(own)


# ---------------------------------------------------------------- shortcuts notice all of this


@pytest.mark.parametrize(
    "where", ["", "blocks.1", "blocks.2.attn.o_proj", "vision.blocks.0.mlp", "blocks.1.hook_mlp_out"]
)
@pytest.mark.parametrize("pre", [False, True])
def test_shortcuts_refuse_a_model_with_hooks_on_any_module(family: str, where: str, pre: bool, tmp_path: Any) -> None:
    model, inputs = model_and_inputs(family, "one image")
    hook = (lambda module, args: None) if pre else (lambda module, args, out: None)
    with hooked(model.get_submodule(where), hook, pre):
        for call in (
            lambda: sweep(model, inputs, [ZeroHeads(((0, 0),))], logit(5)),
            lambda: sweep_many(model, [SweepCase("a", inputs, [ZeroHeads(((0, 0),))], logit(5))], tmp_path / "many"),
            lambda: stream_activations(model, [], "blocks.1.hook_resid_post", tmp_path / "acts"),
        ):
            with pytest.raises(InputError, match=(where or "HookedVLM").replace(".", r"\.")):
                call()
    assert sweep(model, inputs, [ZeroHeads(((0, 0),))], logit(5)).values.shape == (1, 1)


def test_shortcuts_refuse_permanent_hooks(family: str) -> None:
    model, inputs = model_and_inputs(family, "one image")
    model = own_copy(model)
    model.add_perma_hook("blocks.1.hook_mlp_out", lambda x, hook: x * 0)
    model.reset_hooks()
    with pytest.raises(InputError, match="including_permanent"):
        sweep(model, inputs, [], logit(5))
    model.reset_hooks(including_permanent=True)


@pytest.mark.parametrize("rows", ["one image", "padded"])
@pytest.mark.repeats_shapes
def test_sweeps_over_someone_elses_module_equal_the_loop(family: str, rows: str) -> None:
    """One that looks at all positions of a row, in a middle and in the last block; and one in a hook point's place."""
    model, inputs = model_and_inputs(family, rows)
    stops, runs = torch.tensor(inputs.stop) - 1, [ZeroHeads(((layer, 1),), positions="final") for layer in range(3)]
    runs.append(ZeroHeads(((0, 2),)))
    for where in ("blocks.1.mlp", "blocks.2.mlp", "blocks.1.hook_resid_post", "vision.blocks.1.mlp"):
        exchanged = own_copy(model)
        of, _, own = where.rpartition(".")
        setattr(exchanged.get_submodule(of), own, Centred(exchanged.get_submodule(where)))
        exchanged.setup()
        with torch.no_grad():
            plain = exchanged(inputs)[torch.arange(len(inputs)), stops]
            close(exchanged(inputs, logits_at="last")[:, 0], plain)
            expected = [exchanged.run_with_hooks(inputs, fwd_hooks=run.hooks(exchanged, inputs)) for run in runs]
        values = sweep(exchanged, inputs, runs, logit(5)).values
        close(values, torch.stack([x[torch.arange(len(inputs)), stops, 5] for x in expected]))


class Centred(nn.Module):
    """Subtracts the mean over positions of what a module gives."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.of(*inputs)
        return out - 0.5 * out.mean(1, keepdim=True)


def test_layers_of_pytorch_that_mix_positions_see_rows(family: str) -> None:
    model, inputs = model_and_inputs(family, "padded")
    mixing = own_copy(model)
    mixing.blocks[1] = nn.Sequential(mixing.blocks[1], nn.Softmax(1))
    longest = max(range(len(inputs)), key=lambda row: inputs.stop[row] - inputs.first[row])
    with torch.no_grad():
        close(mixing(inputs)[longest], mixing(inputs[longest])[0])


def test_shortcuts_refuse_hooks_on_all_modules_of_the_process(family: str, tmp_path: Any) -> None:
    model, inputs = model_and_inputs(family, "one image")
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        with pytest.raises(InputError, match="process"):
            sweep(model, inputs, [], logit(5))
        with pytest.raises(InputError, match="process"):
            stream_activations(model, [], "blocks.1.hook_resid_post", tmp_path / "acts")
    finally:
        handle.remove()


def test_a_sweep_refuses_what_a_hook_may_not_return(family: str) -> None:
    model, inputs = model_and_inputs(family, "one image")
    for wrong in (lambda x, hook: x.norm(dim=-1, keepdim=True), lambda x, hook: 0.0, lambda x, hook: x.double()):
        with pytest.raises(HookError, match="hook_resid_post"):
            sweep(model, inputs, [CustomHooks([("blocks.1.hook_resid_post", wrong)])], logit(5))


# ---------------------------------------------------------------- what a hook gives back


EDITS: dict[str, Callable[[Tensor, Any], Tensor | None]] = {
    "in place": lambda x, hook: _scale(x),
    "through .data": lambda x, hook: _scale(x.data),
    "through .numpy()": lambda x, hook: _scale_array(x.numpy()),
    "through detach()": lambda x, hook: _scale(x.detach()),
    "a slice": lambda x, hook: _scale(x[:]),
}


def _scale(x: Tensor) -> None:
    x.mul_(1.5)


def _scale_array(x: np.ndarray) -> None:
    x *= 1.5


@cache
def scaled(family: str, rows: str) -> dict[str, Tensor]:
    """Logits under a hook that returns its tensor times 1.5, for every hook point reached."""
    model, inputs = model_and_inputs(family, rows)
    return {name: logits(model, inputs, (name, lambda x, hook: x * 1.5)) for name in reached(model, inputs)}


@pytest.mark.parametrize("rows", ["one image", "padded"])
@pytest.mark.parametrize("means", EDITS)
@pytest.mark.repeats_shapes
def test_an_edit_by_any_means_is_as_good_as_a_returned_one(family: str, rows: str, means: str) -> None:
    model, inputs = model_and_inputs(family, rows)
    expected = scaled(family, rows).items()
    assert [name for name, out in expected if not logits(model, inputs, (name, EDITS[means])).equal(out)] == []


@pytest.mark.parametrize(
    ("returns", "says"),
    [
        (lambda x, hook: x.norm(dim=-1, keepdim=True), "shape"),
        (lambda x, hook: x[:1, :1], "shape"),
        (lambda x, hook: x.double(), "float64"),
        (lambda x, hook: x.flatten(), "shape"),
        (lambda x, hook: (x,), "tuple"),
        (lambda x, hook: 0.0, "float"),
    ],
    ids=["a norm", "a part", "another dtype", "flat", "a tuple", "a number"],
)
@pytest.mark.repeats_shapes
def test_a_hook_that_returns_something_else_is_an_error(family: str, returns: Callable, says: str) -> None:
    model, inputs = model_and_inputs(family, "padded")
    accepted = []
    _, cache = model.run_with_cache(inputs, names_filter=lambda name: True)
    for name in reached(model, inputs)[::2]:
        one = cache[name]
        given = returns(one, None)
        if isinstance(given, Tensor) and (given.shape, given.dtype) == (one.shape, one.dtype):
            continue  # a denominator has one entry already
        try:
            logits(model, inputs, (name, returns))
            accepted.append(name)
        except HookError as error:
            assert name in str(error) and says in str(error)
    assert accepted == []


# ---------------------------------------------------------------- passes within passes


def test_a_hook_may_call_parts_of_the_model_and_other_models(family: str) -> None:
    model, inputs = model_and_inputs(family, "padded")
    other, text = model_and_inputs("internvl2" if family == "qwen2-vl" else "qwen2-vl", "one image")
    plain, expected, seen = logits(model, inputs), logits(other, text), []

    def call(x: Tensor, hook: Any) -> None:
        seen.append(model.unembed(model.ln_final(x[:, -1:])))
        assert logits(other, text).equal(expected)
        model(inputs, stop_at_layer=1)

    found = logits(model, inputs, ("blocks.1.hook_resid_post", call))
    assert found.equal(plain) and seen[0].shape == (len(inputs), 1, model.cfg.d_vocab)
    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", call)]):
        _, cache = model.run_with_cache(inputs)
    _, undisturbed = model.run_with_cache(inputs)
    assert set(cache) == set(undisturbed)
    assert all(cache[name].equal(undisturbed[name]) for name in cache)


def test_attention_outside_of_a_pass_says_what_it_needs(family: str) -> None:
    model, _ = model_and_inputs(family, "one image")
    with pytest.raises(RuntimeError, match="bound_to_pass"):
        model.blocks[0](torch.zeros(1, 3, model.cfg.d_model))


@pytest.mark.parametrize("rows", ["one image", "padded"])
def test_a_cache_holds_what_hooks_see(family: str, rows: str) -> None:
    """Recorded in the pass, without hooks; behind the edits of hooks that are there."""
    model, inputs = model_and_inputs(family, rows)
    names = [name for name in reached(model, inputs) if not is_quadratic(name)]
    seen: dict[str, Tensor] = {}
    logits(model, inputs, *((name, lambda x, hook: seen.__setitem__(str(hook.name), x.clone())) for name in names))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    assert Counter(seen) and all(cache[name].equal(x) for name, x in seen.items())
    for name in ("blocks.1.hook_mlp_out", "vision.hook_embed"):
        with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda x, hook: x * 2)]):
            _, after = model.run_with_cache(inputs)
        assert after[name].equal(cache[name] * 2)


def test_hooks_left_by_an_earlier_block_of_the_same_depth_go_with_the_next(family: str) -> None:
    """As in TransformerLens; and what other code left at another depth stays."""
    model, inputs = model_and_inputs(family, "one image")
    model = own_copy(model)
    calls: Counter[str] = Counter()

    def count(what: str) -> Callable:
        return lambda x, hook: calls.update([what])

    model.run_with_hooks(inputs, fwd_hooks=[("blocks.0.hook_mlp_out", count("left"))], reset_hooks_end=False)
    model.add_hook("blocks.0.hook_mlp_out", count("added"))
    model(inputs)
    model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_mlp_out", count("next"))])
    model(inputs)
    assert calls == {"left": 3, "next": 1, "added": 3}


def test_a_cache_whose_hooks_stay_follows_later_passes(family: str) -> None:
    model, inputs = model_and_inputs(family, "one image")
    model = own_copy(model)
    other = model_and_inputs(family, "two images")[1]
    _, cache = model.run_with_cache(inputs, reset_hooks_end=False)
    with torch.no_grad():
        model(other)
    model.reset_hooks()
    with torch.no_grad():
        _, expected = model.run_with_cache(other)
        model(inputs)
    for name in ("blocks.1.hook_mlp_out", "vision.blocks.0.hook_mlp_out", "hook_image_features"):
        close(cache[name], expected[name])
    with pytest.raises(KeyError, match="passes"):
        cache["pattern", 1]


def test_a_pass_within_another_records_nothing(family: str) -> None:
    """Begun by a hook before the outer pass; and the hook context of the outer pass is as it was."""
    model, inputs = model_and_inputs(family, "one image")
    model, other = own_copy(model), model_and_inputs(family, "two images")[1]
    _, expected = model.run_with_cache(inputs)
    running: list[int] = []

    def before(module: nn.Module, args: Any) -> None:
        if not running:
            running.append(1)
            model(other)

    with hooked(model, before, pre=True), torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    assert cache["resid_post", 1].shape == expected["resid_post", 1].shape
    found: list[tuple[int, bool]] = []

    def call(z: Tensor, hook: Any) -> None:
        call_no = hook.ctx["attention"].q.shape[1]
        if len(running) == 1:
            running.append(2)
            model(other)
        found.append((call_no, hook.ctx["attention"].q.shape[1] == call_no and "positions" in hook.ctx))

    logits(model, inputs, ("blocks.1.attn.hook_z", call))
    assert found == [(other.shape[1], True), (inputs.shape[1], True)]


def test_a_plain_hook_that_calls_parts_of_the_model_does_not_change_a_cache(family: str) -> None:
    model, inputs = model_and_inputs(family, "one image")
    _, expected = model.run_with_cache(inputs)

    def call(module: nn.Module, args: Any, out: Tensor) -> None:
        model.blocks[0].mlp(out)

    def call_silently(module: nn.Module, args: Any, out: Tensor) -> None:
        with silent_hook_points():
            model.blocks[0].mlp(out)

    with hooked(model.blocks[2], call), pytest.raises(HookError, match="twice"):
        model.run_with_cache(inputs)
    with hooked(model.blocks[2], call_silently):
        _, cache = model.run_with_cache(inputs)
    assert cache["post", 0].equal(expected["post", 0])


def test_logits_are_not_attributed_where_a_hook_changes_them_elsewhere(family: str) -> None:
    model, inputs = model_and_inputs(family, "one image")
    for where in ("unembed", "ln_final", "blocks.1"):
        twice = hooked(model.get_submodule(where), lambda module, args, out: 2 * out)
        with twice, pytest.raises(InputError, match="parts"):
            logit_attribution(model, inputs, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hook_that_is_not_linear_is_refused_for_head_results_in_any_dtype(family: str, dtype: torch.dtype) -> None:
    model, inputs = model_and_inputs(family, "one image")
    model = own_copy(model).to(dtype)
    model.set_use_attn_result(True)
    with hooked(model.blocks[1].attn.o_proj, lambda module, args, out: out.relu()), pytest.raises(HookError):
        model(inputs)
    with hooked(model.blocks[1].attn.o_proj, lambda module, args, out: 2 * out + 1), torch.no_grad():
        model(inputs)


def test_encoder_names_are_of_both_sides(family: str) -> None:
    model, inputs = model_and_inputs(family, "one image")
    assert {is_vision(name) for name in reached(model, inputs)} == {True, False}
