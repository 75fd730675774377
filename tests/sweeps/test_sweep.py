"""A sweep gives the numbers of a loop over `run_with_hooks`, whatever it shares and reuses."""

import copy
from importlib import import_module
from typing import Any

import pytest
import torch
from every_kind import KINDS, of_every_kind, some_of_the_image
from families import ROWS, inputs_of, model_and_inputs
from hypothesis import given
from hypothesis import strategies as st
from layer_kinds import BOTH_WAYS, with_kinds
from sweeps_by_hand import agrees, naive
from torch import Tensor

from hooked_vlm import HookError, InputError, sweep
from hooked_vlm.interventions import (
    AddVector,
    BlockAttention,
    Compose,
    CustomHooks,
    Intervention,
    PatchActivation,
    RedistributeSink,
    ReplaceImageKV,
    ReplaceImageTokens,
    ScaleHeads,
    UniformAttention,
    ZeroHeads,
)
from hooked_vlm.interventions.base import n_patches
from hooked_vlm.metrics import kl_divergence, log_prob, logit, logit_difference, margin
from hooked_vlm.nn.block import Block
from hooked_vlm.sweeps import run as sweep_run_module
from hooked_vlm.sweeps.plan import make_plan

FAMILIES = ("qwen2-vl", "internvl2", "made-up")
SWEEP = import_module("hooked_vlm.sweeps.run")  # the package's attribute of this name is the function


def right_padded(model: Any, batch: Any) -> Any:
    """Answers of several lengths: rows end at different columns."""
    return batch.append([[7 + i] * (1 + i % 3) for i in range(len(batch))])


@pytest.mark.parametrize("rows", ROWS)
def test_every_kind_of_intervention_at_once(family: str, rows: str) -> None:
    model, batch = model_and_inputs(family, rows)
    kinds = of_every_kind(model, batch)
    result = agrees(model, batch, list(kinds.values()), log_prob(7))
    acts = result.effects.abs().amax(1) > 1e-4
    assert [kind for kind, act in zip(kinds, acts, strict=True) if not act] == ["uniform while generating"]


@pytest.mark.parametrize("mode", BOTH_WAYS)
@pytest.mark.parametrize("with_answer", [False, True], ids=["prompt", "answered"])
def test_every_kind_where_tokens_see_each_other_both_ways(family: str, mode: str, with_answer: bool) -> None:
    model, batch = with_kinds(family, mode), model_and_inputs(family, "padded")[1]
    batch = right_padded(model, batch) if with_answer else batch
    kinds = of_every_kind(model, batch)
    encoder = AddVector("vision.blocks.1.hook_resid_pre", torch.randn(model.cfg.vision.d_model), 3.0)
    metric: Any = (lambda logits: logits[:, -4:, 5].sum(-1)) if with_answer else log_prob(7)
    agrees(model, batch, [*kinds.values(), encoder], metric, logits_at="all" if with_answer else "last")


@pytest.mark.parametrize(("mode", "begins"), [("causal", 8), ("image, cut", 4), ("prompt, cut", 0)])
def test_a_prefix_is_shared_up_to_the_tokens_that_see_each_other_both_ways(mode: str, begins: int) -> None:
    model, batch = with_kinds("qwen2-vl", mode), inputs_of("qwen2-vl", [[5, 6, 9, "large", 7, 8, 9, 10]])
    assert (batch.visuals[0].start, batch.visuals[0].stop) == (4, 10)
    change = AddVector("blocks.1.hook_resid_post", torch.randn(model.cfg.d_model), positions=(8,))
    plan = make_plan(model, batch, [change], "last")
    assert plan.batches[0].first_position == begins
    assert ("1 runs begin before their first change" in plan.describe()) == (begins < 8)
    agrees(model, batch, [change], log_prob(7))
    # between query and key of a blocked edge, both orders, where all layers see far
    model = with_kinds("qwen2-vl", mode, layer_kind_of=(1, 1, 1))
    edges: list[Intervention] = [
        BlockAttention(((1, 0), (1, 1)), (5,), (8,)),
        BlockAttention(((1, 0), (1, 1)), (8,), (5,)),
    ]
    effects = agrees(model, batch, edges, log_prob(7)).effects.abs()
    assert (effects[0] > 1e-6) == (mode != "causal") and effects[1] > 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ragged", [False, True], ids=["padded left", "padded at both ends"])
@pytest.mark.parametrize("logits_at", ["last", "all"])
def test_one_kind_at_a_time(family: str, kind: str, ragged: bool, logits_at: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    interventions = [of_every_kind(model, batch)[kind]]
    if ragged:
        patched = kind == "patch"  # its source has the columns of the prompt
        batch = batch if patched else right_padded(model, batch)
        interventions = interventions if patched else [of_every_kind(model, batch)[kind]]
    real = batch.attention_mask[..., None]
    metric = logit(9) if logits_at == "last" else lambda logits: (logits * real).sum((1, 2))
    if logits_at == "last":
        agrees(model, batch, interventions, metric)
    else:
        found = sweep(model, batch, interventions, metric, logits_at="all").values
        torch.testing.assert_close(found, naive(model, batch, interventions, metric, "all"), atol=2e-3, rtol=1e-4)


def random_intervention(draw: Any, model: Any, batch: Any, cache: Any) -> Intervention:
    """Any kind, with any heads, layers and positions."""
    heads = tuple(draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=12, unique=True)))
    groups = st.sampled_from([None, "text", "image", "question", "final"])
    where = draw(groups)
    layer = draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 5)))
    kind = draw(st.integers(0, 9))
    if kind == 9:
        return random_vision_heads(draw, batch)
    if kind == 0:
        return ZeroHeads(heads, where)
    if kind == 1:
        return ScaleHeads(heads, draw(st.sampled_from([-1.0, 0.5])), where)
    if kind == 2:
        baseline = draw(st.sampled_from(["mean", "zero", "knockout"]))
        tokens = draw(st.sampled_from([None, "image", some_of_the_image(batch)]))
        return ReplaceImageKV(heads, baseline, draw(st.booleans()), draw(st.sampled_from([None, "final"])), tokens)
    if kind == 3:
        return BlockAttention(heads, where, draw(groups))
    if kind == 4:
        if draw(st.booleans()):
            return UniformAttention(heads, where)
        return RedistributeSink(heads, draw(st.sampled_from([0.0, 0.4])))
    if kind == 5:
        suffix = draw(st.sampled_from(["hook_resid_pre", "hook_mlp_out", "attn.hook_z", "attn.hook_k", "attn.hook_v"]))
        name = f"blocks.{layer}.{suffix}"
        return PatchActivation(name, cache[name], where)
    if kind == 6:
        name = draw(st.sampled_from([f"blocks.{layer}.hook_resid_post", "hook_embed", "ln_final.hook_out"]))
        return AddVector(name, torch.randn(model.cfg.d_model, generator=generator), positions=where)
    if kind == 7:
        return ReplaceImageTokens("image", draw(st.sampled_from(["mean", "zero"])))
    together = Compose(tuple(random_intervention(draw, model, batch, cache) for _ in range(2)))
    try:
        together.hooks(model, batch)
    except InputError:  # both want to make the z of one head again
        return together.parts[0]
    return together


def random_vision_heads(draw: Any, batch: Any) -> Intervention:
    heads = tuple(draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, unique=True)))
    each = tuple((image % 4, 0) for image in range(len(n_patches(batch))))
    patches = st.sampled_from([None, (0, 2), each])
    kind = draw(st.sampled_from([ZeroHeads, UniformAttention, BlockAttention]))
    where = (draw(patches), draw(patches)) if kind is BlockAttention else (draw(patches),)
    return kind(heads, *where, tower="vision")


@pytest.mark.repeats_shapes
@given(data=st.data())
def test_random_sweeps(data: Any) -> None:
    family, rows = data.draw(st.sampled_from(FAMILIES)), data.draw(st.sampled_from(list(ROWS)))
    model, batch = model_and_inputs(family, rows)
    with torch.no_grad():
        other = torch.randn(model.cfg.d_model)
        with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x + other)]):
            _, cache = model.run_with_cache(batch)
    n = data.draw(st.integers(1, 6))
    interventions = [random_intervention(data.draw, model, batch, cache) for _ in range(n)]
    max_runs = data.draw(st.sampled_from([None, 1, 2, 3]))
    agrees(model, batch, interventions, logit_difference(5, 9), max_runs=max_runs)


@pytest.mark.parametrize("rows", ROWS)
def test_replacements_that_differ_in_queries_and_tokens_are_one_edit(family: str, rows: str) -> None:
    model, batch = model_and_inputs(family, rows)
    some = some_of_the_image(batch)
    heads = ((0, 1), (1, 0), (2, 2))
    runs = [
        ReplaceImageKV(heads[:n], "mean", True, queries, tokens)
        for n, queries, tokens in [
            (1, None, None),
            (2, "final", some),
            (3, None, some),
            (3, "final", None),
            (0, None, some),
        ]
    ]
    assert len({run.kind for run in runs}) == 1
    agrees(model, batch, [*runs, ZeroHeads(((1, 1),)), *runs[::-1]], logit_difference(5, 9))


def test_hooks_of_your_own_see_whole_tensors(family: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    shapes = []

    def halve(x: Tensor, hook: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return x / 2

    def in_place(x: Tensor, hook: Any) -> None:
        x[:, 3:] += 1

    last = f"blocks.{model.cfg.n_layers - 1}.hook_mlp_out"
    own = [CustomHooks([(last, halve)]), CustomHooks([("blocks.0.hook_resid_pre", in_place), (last, halve)])]
    agrees(model, batch, [*own, ZeroHeads(((1, 1),))], logit(5))
    assert set(shapes) == {(len(batch), batch.shape[1], model.cfg.d_model)}


def test_hooks_of_your_own_may_have_filters_and_sit_on_the_final_norm(family: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    filtered = CustomHooks([(lambda name: name.endswith("hook_mlp_out"), lambda x, hook: x * 0.9)])

    def shift(x: Tensor, hook: Any) -> Tensor:
        return x + x[:, -2:-1]  # of all rows a token; what padding holds is not specified

    behind = CustomHooks([("ln_final.hook_out", shift)])
    agrees(model, batch, [filtered, behind, ZeroHeads(((1, 1),))], logit(5))
    _, cache = model.run_with_cache(batch, names_filter="vision.hook_embed")
    encoder = Compose((PatchActivation("vision.hook_embed", cache["vision.hook_embed"].flip(0)), behind))
    agrees(model, batch, [encoder], logit(5))


def test_an_intervention_of_your_own_sees_whole_tensors_unless_it_says_otherwise(family: str) -> None:
    model, batch = model_and_inputs(family, "one image")

    class Own(Intervention):
        def hooks(self, model: Any, inputs: Any) -> Any:
            def halve(x: Tensor, hook: Any) -> Tensor:
                assert x.shape[1] == inputs.shape[1]
                return x / 2

            return [(f"blocks.{model.cfg.n_layers - 1}.hook_mlp_out", halve)]

    agrees(model, batch, [Own(), ZeroHeads(((0, 0),))], logit(5))


def test_positions_past_the_end_of_a_shorter_row(family: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    n = batch.shape[1]
    ragged = batch.append([[7], [8, 9, 10, 11, 12], [13, 14]])
    late = tuple((n + 3,) if row == 1 else () for row in range(len(batch)))
    agrees(model, ragged, [ZeroHeads(((1, 1), (2, 0)), late)], logit(5))


@pytest.mark.parametrize("switch", ["use_split_qkv_input", "use_attn_result", "use_hook_mlp_in"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.repeats_shapes
def test_switches(family: str, switch: str, ragged: bool) -> None:
    model, batch = model_and_inputs(family, "padded")
    batch = right_padded(model, batch) if ragged else batch
    getattr(model, f"set_{switch}")(True)
    try:
        result = agrees(model, batch, list(of_every_kind(model, batch).values()), logit(5))
    finally:
        getattr(model, f"set_{switch}")(False)
    last = torch.tensor(batch.stop) - 1
    with torch.no_grad():
        expected = model(batch)[torch.arange(len(batch)), last, 5]
    torch.testing.assert_close(result.baseline, expected, atol=2e-5, rtol=1e-5)


def test_low_precision_gives_a_table(family: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    half = copy.deepcopy(model).to(torch.bfloat16)
    result = sweep(half, batch, [ZeroHeads(((1, 1),)), ReplaceImageKV(((2, 0),))], lambda logits: logits[:, 5])
    assert result.values.dtype == torch.float32 and len(result.to_dataframe()) == 6
    assert margin(3)(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_image_side_is_swept_too(family: str) -> None:
    model, batch = model_and_inputs(family, "two images")
    _, cache = model.run_with_cache(batch)
    source = cache["vision.blocks.1.hook_resid_pre"].flip(-1)
    patches = [PatchActivation("vision.blocks.1.hook_resid_pre", source, (i,)) for i in range(3)]
    features = PatchActivation("hook_image_features", cache["hook_image_features"].flip(0), (0, 2))
    result = agrees(model, batch, [*patches, ZeroHeads(((0, 0),)), features], logit(5))
    assert result.plan.encoder_runs == (0, 1, 2, 4)


@pytest.mark.parametrize("max_runs", [None, 1, 3])
def test_runs_on_the_image_side_share_batches_and_begin_where_they_act(family: str, max_runs: int | None) -> None:
    model, batch = model_and_inputs(family, "padded")
    _, cache = model.run_with_cache(batch)

    def shrink(x: Tensor, hook: Any) -> None:
        x[:, 1] *= 0.5

    def patched(name: str, at: Any) -> PatchActivation:
        return PatchActivation(name, cache[name].flip(-1), at)

    inner = "projector.hook_pre" if "projector.hook_pre" in model.hook_dict else "vision.blocks.1.hook_mlp_out"
    n_images, n_patches = cache["vision.hook_embed"].shape[:2]
    own = tuple((i % n_patches,) if i else () for i in range(n_images))
    inner = "projector.hook_pre" if "projector.hook_pre" in model.hook_dict else "vision.blocks.1.hook_mlp_out"
    runs: list[Intervention] = [
        patched("vision.blocks.1.attn.hook_z", (1,)),
        patched("vision.hook_embed", own),
        CustomHooks([("vision.blocks.0.hook_resid_mid", shrink), ("blocks.1.hook_mlp_out", shrink)]),
        patched(inner, None),
        Compose((patched("vision.blocks.1.hook_resid_post", (0, 2)), ZeroHeads(((1, 2),)))),
        ZeroHeads(((1, 2),)),
        patched("hook_image_features", (1,)),
        patched("vision.blocks.0.attn.hook_pattern", (2,)),
    ]
    agrees(model, batch, runs, log_prob(7), max_runs=max_runs)
    finding = [run for run in runs if run.position_aware]
    result = agrees(model, batch, finding, log_prob(7), max_runs=max_runs)
    assert result.plan.encoder_runs == (0, 1, 2, 3, 5, 6)
    assert (result.effects.abs().amax(1) > 1e-6).all()
    encoded = batch.with_image_features(model.encode_images(batch))
    agrees(model, encoded, [runs[6], runs[5]], log_prob(7))
    with pytest.raises(HookError, match="image features"):
        sweep(model, encoded, [runs[0]], log_prob(7))


def test_what_is_shared_is_left_as_it_was(family: str) -> None:
    """Edits in place, of points whose tensors are tiled from the plain run."""
    model, batch = model_and_inputs(family, "padded")
    with torch.no_grad():
        features = model.encode_images(batch)
        encoded = batch.with_image_features(features)
        kept, logits = features.clone(), model(encoded)

    def ruin(x: Tensor, hook: Any) -> None:
        x.fill_(3.0)

    names = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_k"]
    runs: list[Intervention] = [CustomHooks([(name, ruin)]) for name in names]
    agrees(model, encoded, [*runs, ZeroHeads(((2, 1),)), ReplaceImageKV(((1, 1),))], logit(5))
    with torch.no_grad():
        assert features.equal(kept) and model(encoded).equal(logits)
    assert not any(point.ctx or point.fwd_hooks for point in model.hook_dict.values())


def test_hooks_find_their_inputs_in_a_sweep_as_in_a_run(family: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    names = ["hook_embed", "blocks.1.hook_resid_mid", "blocks.2.attn.hook_z", "ln_final.hook_scale"]
    names += ["vision.blocks.0.hook_resid_post", "vision.hook_embed", "hook_image_features"]
    seen: dict[str, Any] = {}

    def look(x: Tensor, hook: Any) -> None:
        seen[hook.name] = hook.ctx["inputs"]

    for run in (
        lambda: sweep(model, batch, [CustomHooks([(name, look)]) for name in names], logit(5)),
        lambda: model.run_with_hooks(batch, fwd_hooks=[(name, look) for name in names]),
    ):
        seen.clear()
        run()
        assert set(seen) == set(names) and all(given.tokens.equal(batch.tokens) for given in seen.values())


def test_the_vision_tower_runs_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_inputs(family, "one image")
    calls = []
    tower = type(model.vision)
    run = tower.forward
    monkeypatch.setattr(tower, "forward", lambda *args: calls.append(1) or run(*args))
    sweep(model, batch, [ZeroHeads(((i, 0),)) for i in range(3)], logit(5))
    assert len(calls) == 1


def test_only_what_an_intervention_touches_is_computed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_inputs(family, "one image")
    ran: list[tuple[int, ...]] = []
    forward = Block.forward

    def watch(block: Block, resid: Tensor) -> Tensor:
        out = forward(block, resid)
        if block.split_inputs:  # of the language model
            ran.append((block.attn.layer, *out.shape[:2]))
        return out

    heads = [(layer, head) for layer in range(3) for head in range(4)]
    plan = make_plan(model, batch, [ReplaceImageKV((h,)) for h in heads], logits_at="last")
    monkeypatch.setattr(Block, "forward", watch)
    sweep(model, batch, [ReplaceImageKV((h,)) for h in heads], logit(5))
    first, n = batch.visuals[0].runs[0][1], batch.shape[1]
    first = 0 if model.cfg.bidirectional == "prompt" else first  # later text changes the image there
    whole = [(0, 1, n), (1, 1, n), (2, 1, n)]
    assert ran == [*whole, (0, 4, n - first), (1, 8, n - first), (2, 12, 1)]
    assert plan.work == 3 * n + (4 + 8) * (n - first) + 12
    assert plan.naive_work == 12 * 3 * n
    told = plan.describe()
    assert "vision tower: 1 pass instead of 12" in told
    assert (f"reuse keys and values of positions 0 to {first - 1}" in told) == (first > 0)
    assert "4 from layer 0, 4 from layer 1, 4 from layer 2" in told
    assert f"{plan.work:,} (the plain run included) instead of {plan.naive_work:,}" in told


def accelerator_out_of_memory() -> None:
    raise torch.OutOfMemoryError("out of memory")


LACKS = {
    "accelerator": accelerator_out_of_memory,
    "torch on the CPU": lambda: torch.empty(2**60, dtype=torch.uint8),  # what its allocator really says
    "Python": lambda: bytearray(2**62),
}


@pytest.mark.parametrize("lack", LACKS)
def test_a_batch_that_does_not_fit_is_halved(family: str, lack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_inputs(family, "one image")
    sizes = []
    run = sweep_run_module.batch_logits

    def short_of_memory(model: Any, plain: Any, part: Any, *rest: Any) -> Tensor:
        sizes.append(len(part.runs))
        if len(part.runs) > 3:
            LACKS[lack]()
        return run(model, plain, part, *rest)

    monkeypatch.setattr(SWEEP, "batch_logits", short_of_memory)
    agrees(model, batch, [ScaleHeads(((i % 3, i % 4),), 0.1 * i) for i in range(10)], logit(5))
    assert sizes == [10, 5, 2, 3, 5, 2, 3]
    monkeypatch.setattr(SWEEP, "batch_logits", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        sweep(model, batch, [ZeroHeads(((0, 0),))], logit(5))


def test_an_error_in_a_hook_is_not_taken_for_a_lack_of_memory() -> None:
    model, batch = model_and_inputs("qwen2-vl", "one image")

    def fail(x: Tensor, hook: Any) -> None:
        raise RuntimeError("broken hook")

    runs = [CustomHooks([("blocks.1.hook_mlp_out", fail)]), CustomHooks([("blocks.1.hook_mlp_out", fail)])]
    with pytest.raises(RuntimeError, match="broken hook"):
        sweep(model, batch, runs, logit(5))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_the_table(family: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    result = sweep(model, batch, [ZeroHeads(((0, 1), (2, 3))), ReplaceImageKV(((1, 0),))], logit(5), progress=True)
    table = result.to_dataframe()
    assert list(table.columns) == ["run", "intervention", "row", "value", "baseline", "effect"]
    assert len(table) == 6
    assert table["intervention"].tolist() == ["ZeroHeads 0.1 2.3"] * 3 + ["ReplaceImageKV 1.0"] * 3
    assert table["value"].tolist() == result.values.flatten().tolist()
    assert table["effect"].tolist() == (result.values - result.baseline).flatten().tolist()
    with torch.no_grad():
        torch.testing.assert_close(result.baseline, model(batch)[:, -1, 5], atol=1e-5, rtol=1e-5)


def test_values_that_are_not_numbers_are_kept_and_told() -> None:
    model, batch = model_and_inputs("qwen2-vl", "one image")
    broken = AddVector("blocks.1.hook_resid_post", torch.full((64,), torch.nan))
    with pytest.warns(UserWarning, match=r"1 of 2.*NaN"):
        result = sweep(model, batch, [broken, ZeroHeads(((0, 0),))], logit(5))
    assert result.values.isnan().tolist() == [[True], [False]]


def test_no_interventions_are_an_empty_table() -> None:
    model, batch = model_and_inputs("qwen2-vl", "one image")
    result = sweep(model, batch, [], logit(5))
    assert result.values.shape == (0, 1) and len(result.to_dataframe()) == 0


def test_metrics_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 4.0]])
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    assert logit([1, 0])(logits).tolist() == [3.0, 0.0]
    torch.testing.assert_close(log_prob(2)(logits), p[:, 2].log())
    assert logit_difference(torch.tensor([1, 2]), 0)(logits).tolist() == [2.0, 4.0]
    assert margin([1, 0])(logits).tolist() == [1.0, -4.0]
    q = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    torch.testing.assert_close(kl_divergence(q.log())(logits), (q * (q / p).log()).sum(-1))


def test_what_a_sweep_cannot_do_is_said() -> None:
    model, batch = model_and_inputs("qwen2-vl", "one image")
    with pytest.raises(InputError, match=r"metric.*1 rows"):
        sweep(model, batch, [], lambda logits: logits)
    with pytest.raises(InputError, match=r"max_runs.*0"):
        sweep(model, batch, [ZeroHeads(((0, 0),))], logit(5), max_runs=0)
    with pytest.raises(InputError, match=r"7\.0"):
        sweep(model, batch, [ZeroHeads(((7, 0),))], logit(5))
    hooked = model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: x)])
    with hooked, pytest.raises(InputError, match=r"blocks\.1\.hook_mlp_out.*reset_hooks"):
        sweep(model, batch, [], logit(5))
