"""The five rules, for every hook point of the model; hooks that cannot act; the two attention kernels."""

from collections import Counter
from functools import lru_cache, partial

import pytest
import tiny_qwen2_vl as tiny
import torch
from families import FAMILIES, KINDS, plain_first
from jaxtyping import TypeCheckError
from largest import Largest

from hooked_vlm import HookedVLM, HookError, VLMInputs
from hooked_vlm.model.hook_catalogue import HookRow, hook_table
from hooked_vlm.model.hooking import switched_off
from hooked_vlm.nn.attention import attend
from hooked_vlm.nn.hooks import HookPoint, is_encoder, is_quadratic, is_vision
from hooked_vlm.nn.masks import AttentionMask
from tools.hook_page import page

MIXED = [
    [5, 6, ("image", (1, 4, 6)), 7, 8],
    [11, 12, 13],
    [5, ("video", (2, 4, 4)), 7, ("image", (1, 2, 6)), 9],
]
"""Left-padded, images of different sizes, a video."""

SWITCHES = ("use_attn_result", "use_hook_mlp_in")
OWN_INPUTS = ("use_split_qkv_input", "use_attn_in")
"""Switches that exclude each other."""


@lru_cache
def own_model(switched: bool, kind: str = "qwen2-vl", own_inputs: str = "use_split_qkv_input") -> HookedVLM:
    """A model on the shared weights whose switches these tests may turn."""
    model = HookedVLM.from_hf(KINDS[kind].hf())
    for switch in (*SWITCHES, own_inputs):
        getattr(model, f"set_{switch}")(switched)
    return model


def live_names(model: HookedVLM) -> list[str]:
    """Every hook point that is switched on."""
    return [n for n in model.hook_dict if not switched_off(model, n)]


FURTHER = [
    *(pytest.param(f"{kind}, one image", marks=pytest.mark.full) for kind in KINDS),
    *(pytest.param(f"{kind}, switches, padding", marks=pytest.mark.full) for kind in KINDS if kind not in FAMILIES),
    pytest.param("qwen2-vl, inputs of all heads, one image", marks=pytest.mark.full),
    pytest.param("qwen2-vl, inputs of all heads, padding", marks=pytest.mark.full),
]


@pytest.fixture(params=[*plain_first(FAMILIES, "{}, switches, padding"), *FURTHER])
def case(request) -> tuple[HookedVLM, VLMInputs]:
    kind = max((kind for kind in KINDS if request.param.startswith(kind)), key=len)
    rows = KINDS[kind].cases["left-padded" if request.param.endswith("padding") else "one-image"]
    if kind == "qwen2-vl" and request.param.endswith("padding"):
        rows = MIXED
    own_inputs = "use_attn_in" if "all heads" in request.param else "use_split_qkv_input"
    model = own_model("switches" in request.param or "all heads" in request.param, kind, own_inputs)
    return model, model.inputs_from_hf(KINDS[kind].batch(rows))


@torch.no_grad()
def real_logits(model: HookedVLM, inputs: VLMInputs, *hooks, **kwargs) -> torch.Tensor:
    """Logits of the positions that are not padding."""
    return model.run_with_hooks(inputs, fwd_hooks=list(hooks), **kwargs)[inputs.attention_mask.bool()]


def factors(x: torch.Tensor) -> torch.Tensor:
    """Another factor between 1 and 2 for every element, the same in every call."""
    return 1 + torch.rand(x.shape, generator=torch.Generator().manual_seed(x.ndim), dtype=x.dtype)


def in_place(x: torch.Tensor, hook: HookPoint) -> None:
    x.mul_(factors(x))


def returned(x: torch.Tensor, hook: HookPoint) -> torch.Tensor:
    return x * factors(x)


def expected_shape(row: HookRow, name: str, model: HookedVLM, inputs: VLMInputs) -> tuple[int, ...]:
    """The table's axis names as numbers."""
    cfg, vision = model.cfg, model.cfg.vision
    assert vision is not None
    seen = [h * w for t, h, w in inputs.grids for _ in range(t)]
    patches = [n + vision.class_token for n in seen]
    n_image_tokens = sum(v.n_tokens for v in inputs.visuals)
    sizes = {
        "1": 1,
        "batch": len(inputs),
        "pos": inputs.shape[1],
        "query": inputs.shape[1],
        "key": inputs.shape[1],
        "kv_head": cfg.n_key_value_heads,
        "image": len(patches),
        "patch": max(patches),
        "query_patch": max(patches),
        "key_patch": max(patches),
        "token": max(seen) // vision.token_size**2,
        "image_token": n_image_tokens,
        "d_merged": vision.d_model * vision.merge_size**2,
        "d_projector": vision.d_projector or vision.d_model * vision.merge_size**2,
        "d_model_text": cfg.d_model,
    }
    own = vision if is_vision(name) else cfg
    sizes |= {"head": own.n_heads, "d_head": own.d_head, "d_model": own.d_model, "d_mlp": own.d_mlp}
    return tuple(sizes[axis] for axis in row.shape)


def row_of(model: HookedVLM, name: str) -> HookRow:
    parts = [part if not part.isdigit() else "{l}" for part in name.split(".")]
    return next(row for row in hook_table(model) if row.name == ".".join(parts))


# ---- the five rules ----


@pytest.mark.parametrize("case", [*(f"{family}, switches, padding" for family in FAMILIES), *FURTHER], indirect=True)
def test_every_hook_fires_once_with_the_shape_of_the_table(case):
    model, inputs = case
    fired: Counter[str] = Counter()
    wrong = []

    def look(x, hook):
        fired[hook.name] += 1
        expected = expected_shape(row_of(model, hook.name), hook.name, model, inputs)
        thrice = ".ln1." in hook.name and not is_vision(hook.name) and model.cfg.use_split_qkv_input
        if thrice:  # q, k and v, each with a head axis
            heads = model.cfg.n_heads if fired[hook.name] == 1 else model.cfg.n_key_value_heads
            expected = (*expected[:2], heads, expected[2])
        elif ".ln1." in hook.name and not is_vision(hook.name) and model.cfg.use_attn_in:
            expected = (*expected[:2], model.cfg.n_heads, expected[2])
        if x.shape != expected:
            wrong.append((hook.name, x.shape, expected))

    real_logits(model, inputs, (lambda name: True, look))
    assert wrong == []
    for name in live_names(model):
        thrice = ".ln1." in name and not is_vision(name) and model.cfg.use_split_qkv_input
        assert fired[name] == (3 if thrice else 1), name
    assert set(fired) == set(live_names(model))


@pytest.mark.parametrize("edit", [lambda x, hook: x, lambda x, hook: x.clone()], ids=["itself", "clone"])
@pytest.mark.repeats_shapes
def test_an_identity_edit_changes_nothing_bit_for_bit(case, edit):
    model, inputs = case
    plain = real_logits(model, inputs)
    changed = []
    for name in live_names(model):
        edited = real_logits(model, inputs, (name, edit))
        within = (edited - plain).abs().max() <= 1e-5 if is_quadratic(name) else edited.equal(plain)
        if not within:
            changed.append(name)
    assert changed == []


@pytest.mark.repeats_shapes
def test_a_real_edit_changes_the_output_and_in_place_is_as_good_as_returned(case):
    model, inputs = case
    plain = real_logits(model, inputs)
    dead, differ = [], []
    for name in live_names(model):
        edited = real_logits(model, inputs, (name, returned))
        if (edited - plain).abs().max() < 1e-4:
            dead.append(name)
        if not edited.equal(real_logits(model, inputs, (name, in_place))):
            differ.append(name)
    assert dead == []
    assert differ == []


@pytest.mark.repeats_shapes
def test_an_edit_in_place_leaves_no_trace(case):
    """Nor does it reach what was recorded upstream of it in the same run, or in an earlier one."""
    model, inputs = case
    plain, pixels = real_logits(model, inputs), inputs.pixel_values.clone()
    with torch.no_grad():
        _, earlier = model.run_with_cache(inputs, names_filter=lambda name: True)
    snapshot = {name: earlier[name].clone() for name in live_names(model)}
    reached = []
    for name in live_names(model):
        seen: dict[str, torch.Tensor] = {}
        upstream: list[str] = []

        def look(x, hook, name=name, seen=seen, upstream=upstream):
            if hook.name == name:
                upstream.extend(seen)
            seen[hook.name] = x

        real_logits(model, inputs, (lambda name: True, look), (name, in_place))
        for other in set(upstream) - {name}:
            fires_again_downstream = ".ln1." in other and model.cfg.use_split_qkv_input
            if not fires_again_downstream and not seen[other].equal(snapshot[other]):
                reached.append((name, other))
    assert reached == []
    assert all(earlier[name].equal(value) for name, value in snapshot.items())
    assert inputs.pixel_values.equal(pixels)
    assert real_logits(model, inputs).equal(plain)


@pytest.mark.repeats_shapes
def test_an_edit_in_place_leaves_shared_image_features_as_they_were():
    model, inputs = own_model(False), tiny.inputs(MIXED)
    with torch.no_grad():
        features = model.encode_images(inputs)
    kept = features.clone()
    encoded = inputs.with_image_features(features)
    plain = real_logits(model, encoded)
    assert plain.equal(real_logits(model, inputs))
    for name in live_names(model):
        if not is_encoder(name):
            real_logits(model, encoded, (name, in_place))
            assert features.equal(kept), name
    assert real_logits(model, encoded).equal(plain)


def test_an_edit_in_place_leaves_a_given_residual_stream_as_it_was():
    model, inputs = own_model(False), tiny.inputs(tiny.ONE_IMAGE)
    with torch.no_grad():
        resid = model(inputs, stop_at_layer=1)
    kept = resid.clone()
    real_logits(model, inputs, ("blocks.1.hook_resid_pre", in_place), start_at_layer=1, resid=resid)
    assert resid.equal(kept)


# ---- what counts as a hook ----


def test_backward_hooks_on_every_point_see_a_gradient_once():
    model, inputs = own_model(False), tiny.inputs(MIXED)
    fired: Counter[str] = Counter()

    def look(grad, hook):
        fired[hook.name] += 1
        assert grad.isfinite().all()

    with model.hooks(bwd_hooks=[(lambda name: True, look)]):
        model(inputs, return_type="loss").backward()
    model.zero_grad(set_to_none=True)
    assert fired == Counter(live_names(model))


@pytest.mark.parametrize("side", ["", "vision."])
@pytest.mark.parametrize("suffix", ["hook_pattern", "hook_attn_scores"])
def test_a_hook_set_through_plain_pytorch_switches_the_kernel(side, suffix):
    model, inputs = own_model(False), tiny.inputs(tiny.ONE_IMAGE)
    point = model.hook_dict[f"{side}blocks.1.attn.{suffix}"]
    plain = real_logits(model, inputs)
    handle = point.register_forward_hook(lambda module, args, output: returned(output, point))
    try:
        edited = real_logits(model, inputs)
    finally:
        handle.remove()
    assert (edited - plain).abs().max() > 1e-4
    assert edited.equal(real_logits(model, inputs, (f"{side}blocks.1.attn.{suffix}", returned)))


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_full_backward_pre_hook"])
def test_pre_hooks_switch_the_kernel_too(register):
    model, inputs = own_model(False), tiny.inputs(tiny.ONE_IMAGE)
    seen = []
    handle = getattr(model.hook_dict["blocks.1.attn.hook_pattern"], register)(lambda *args: seen.append(1))
    try:
        model(inputs, return_type="loss").backward()
    finally:
        handle.remove()
        model.zero_grad(set_to_none=True)
    assert seen == [1]


# ---- hooks that cannot act ----

IMAGE_INPUT, TEXT_INPUT = tiny.ONE_IMAGE, tiny.TEXT


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        ("blocks.1.hook_resid_prе", IMAGE_INPUT, "blocks.1.hook_resid_pre"),  # a Cyrillic e
        ("blocks.7.attn.hook_z", IMAGE_INPUT, "blocks.*attn.hook_z"),
        ("vision.blocks.0.hook_resid_past", IMAGE_INPUT, "vision.blocks.0.hook_resid_post"),
        (lambda name: name.endswith("hook_nothing"), IMAGE_INPUT, "filter"),
        ("blocks.0.attn.hook_result", IMAGE_INPUT, r"set_use_attn_result\(True\)"),
        ("vision.blocks.0.attn.hook_result", IMAGE_INPUT, r"set_use_attn_result\(True\)"),
        ("blocks.0.attn.hook_q_input", IMAGE_INPUT, r"set_use_split_qkv_input\(True\)"),
        ("blocks.0.hook_mlp_in", IMAGE_INPUT, r"set_use_hook_mlp_in\(True\)"),
        (lambda name: name.endswith("hook_mlp_in"), IMAGE_INPUT, r"set_use_hook_mlp_in\(True\)"),
        ("vision.hook_embed", TEXT_INPUT, "no image"),
        ("projector.hook_pre", TEXT_INPUT, "no image"),
        ("hook_image_features", TEXT_INPUT, "no image"),
        (lambda name: name.startswith("vision."), TEXT_INPUT, "no image"),
    ],
)
def test_a_hook_that_cannot_act_is_refused(name, rows, says):
    model, inputs = own_model(False), tiny.inputs(rows)
    with pytest.raises(HookError, match=says):
        model.run_with_hooks(inputs, fwd_hooks=[(name, returned)])
    with pytest.raises(HookError, match=says):
        model.run_with_cache(inputs, names_filter=name)
    assert not any(point._forward_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("name", ["vision.blocks.0.hook_resid_pre", "projector.hook_post"])
def test_an_encoder_hook_is_refused_where_features_came_with_the_inputs(name):
    model, inputs = own_model(False), tiny.inputs(tiny.ONE_IMAGE)
    with torch.no_grad():
        inputs = inputs.with_image_features(model.encode_images(inputs))
    with pytest.raises(HookError, match="image features"):
        model.run_with_hooks(inputs, fwd_hooks=[(name, returned)])
    with pytest.raises(HookError, match="image features"), model.hooks([(name, returned)]):
        model(inputs)


@pytest.mark.parametrize("name", ["blocks.0.attn.hook_zz", "blocks.0.hook_mlp_in"])
def test_permanent_hooks_and_hooks_of_a_with_block_are_checked_too(name):
    model = own_model(False)
    with pytest.raises(HookError):
        model.add_hook(name, returned)
    with pytest.raises(HookError):
        model.add_perma_hook(name, lambda tensor, hook: None)
    with pytest.raises(HookError), model.hooks([(name, returned)]):
        pass
    with pytest.raises(HookError):
        model.generate(tiny.inputs(tiny.TEXT), max_new_tokens=1, fwd_hooks=[(name, returned)])


class Object:
    def short(self, x):
        return x

    def __call__(self, x, hook):
        return None


WRONG = {
    "one argument": lambda x: x,
    "two tensors": lambda x, y: x,
    "one more": lambda x, hook, more: x,
    "a method": Object().short,
    "filled": partial(lambda hook, x: x, None),
    "a function of C": torch.zeros_like,
    "a module": torch.nn.Identity(),
    "no function": 3,
    "the result of one": None,
}
RIGHT = {
    "a default": lambda x, hook=None: None,
    "any names": lambda x, **names: None,
    "filled": partial(lambda x, hook, more: None, more=1),
    "an object": Object(),
}


@pytest.mark.parametrize("hook", WRONG.values(), ids=list(WRONG))
def test_what_cannot_be_called_as_a_hook_is_refused_at_once(hook):
    model, inputs, name = own_model(False), tiny.inputs(tiny.TEXT), "blocks.0.attn.hook_z"
    for call in (
        lambda: model.add_hook(name, hook),
        lambda: model.add_perma_hook(name, hook),
        lambda: model.run_with_hooks(inputs, fwd_hooks=[(name, returned), (name, hook)]),
        lambda: model.run_with_hooks(inputs, bwd_hooks=[(name, hook)]),
        lambda: model.generate(inputs, 1, fwd_hooks=[(name, hook)]),
    ):
        with pytest.raises((HookError, TypeCheckError), match="hook"):  # the second where annotations are executed
            call()
    assert not any(point._forward_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("hook", RIGHT.values(), ids=list(RIGHT))
def test_hooks_may_take_more_than_they_are_given(hook):
    model, inputs = own_model(False), tiny.inputs(tiny.TEXT)
    model.run_with_hooks(inputs, fwd_hooks=[("blocks.0.attn.hook_z", hook)])


# ---- the two kernels ----

LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]).bool()
BOTH = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1]]).bool()
MASKS = {
    "causal": (AttentionMask(True), 7),
    "causal, padded left": (AttentionMask(True, LEFT, torch.tensor([2, 0, 4])), 7),
    "causal, padded right": (AttentionMask(True, LEFT.flip(1)), 7),
    "causal, padded both": (AttentionMask(True, BOTH, torch.tensor([2, 0, 1])), 7),
    "one query after others": (AttentionMask(True, LEFT), 1),
    "some queries after others": (AttentionMask(True, LEFT), 3),
    "some queries after others, unpadded": (AttentionMask(True), 3),
    "images of one size": (AttentionMask(False), 7),
    "images of several sizes": (AttentionMask(False, LEFT.flip(1)), 7),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_the_fused_and_the_explicit_kernel_agree(kind, dtype):
    mask, n_queries = MASKS[kind]
    q = torch.randn(3, n_queries, 4, 8).to(dtype)
    k, v = torch.randn(2, 3, 7, 2, 8).to(dtype)
    fused = attend(q, k, v, mask, HookPoint(), HookPoint())
    listening, patterns = HookPoint(), []
    listening.add_hook(lambda tensor, hook: patterns.append(tensor))
    explicit = attend(q, k, v, mask, HookPoint(), listening)
    assert (fused - explicit).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2)

    # against the definition, one query at a time in float64
    real = torch.ones(3, 7).bool() if mask.key_valid is None else mask.key_valid
    for row in range(3):
        for i in range(n_queries):
            at = 7 - n_queries + i
            seen = [j for j in range(7) if real[row, j] and (j <= at or not mask.causal)]
            for head in range(4):
                expected = torch.zeros(7, dtype=torch.double)
                if real[row, at]:
                    scores = k[row, seen, head // 2].double() @ q[row, i, head].double() / 8**0.5
                    expected[seen] = scores.softmax(0)
                pattern = patterns[0][row, head, i].double()
                assert (pattern - expected).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-2)


def test_rows_of_padding_are_zero_in_patterns_of_both_towers():
    model, inputs = own_model(False), tiny.inputs(MIXED)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_pattern"))
    real = inputs.attention_mask.bool()[:, None, :, None]
    pattern = cache["pattern", 0]
    assert pattern.masked_select(~real).eq(0).all()
    assert (pattern.sum(-1) - real[..., 0].float()).abs().max() < 1e-5
    assert pattern.masked_select(~real.transpose(2, 3)).eq(0).all()  # nothing looks at padding

    patches = torch.tensor([24, 12, 16, 16])
    real = torch.arange(24) < patches[:, None]
    pattern = cache["vision.blocks.0.attn.hook_pattern"]
    assert (pattern.sum(-1) - real[:, None].float()).abs().max() < 1e-5
    assert pattern.masked_select(~real[:, None, None]).eq(0).all()


LONG = [5, ("image", (1, 32, 32)), *[7, 8, 9] * 120]
N = 600


@pytest.mark.parametrize("rows", [[LONG], [LONG, [5, ("image", (1, 4, 4)), 9]]], ids=["one row", "padded"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_no_tensor_of_pos_times_pos_is_made_unless_a_pattern_is_hooked(rows, grad):
    model = HookedVLM.from_hf(tiny.tiny_hf())
    model.cfg = model.cfg.with_(n_ctx=2 * N)
    inputs = model.inputs_from_hf(tiny.hf_batch(rows))
    assert inputs.shape[1] >= N
    with torch.set_grad_enabled(grad):
        with Largest() as made:
            model(inputs, logits_at="last")
        assert made.numel < N * N
        with Largest() as made:  # what everything but patterns is cached for
            model.run_with_cache(inputs, logits_at="last")
        assert made.numel < N * N
        with Largest() as made:
            model.run_with_hooks(inputs, logits_at="last", fwd_hooks=[("blocks.1.attn.hook_pattern", returned)])
        assert made.numel >= N * N
    with Largest() as made:
        model.generate(inputs, max_new_tokens=3, stop_at_eos=False)
    assert made.numel < N * N


# ---- the table ----


def test_the_page_of_hook_points_is_up_to_date(request):
    text = (request.config.rootpath / "docs" / "hooks.md").read_text()
    assert text == page(), "run: python -m tools.hook_page"


def test_the_table_has_a_row_for_every_hook_point_and_no_other():
    model = own_model(False)
    described = {
        row.name.replace("{l}", str(layer)) for row in hook_table(model) for layer in range(model.cfg.n_layers)
    }
    n_vision = len(model.vision.blocks)
    described = {n for n in described if not (n.startswith("vision.blocks.") and int(n.split(".")[2]) >= n_vision)}
    assert described == set(model.hook_dict)
