"""Sweeps over heads of the vision tower: the loop's numbers, at the cost of what the runs touch."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from every_kind import VISION_KINDS, of_every_kind, of_every_vision_kind
from families import ROWS, inputs_of, model_and_inputs
from layer_kinds import BOTH_WAYS, with_kinds
from sweeps_by_hand import agrees, naive
from torch import Tensor

from hooked_vlm import sweep
from hooked_vlm.interventions import (
    Compose,
    Intervention,
    ReplaceImageKV,
    ZeroHeads,
    all_heads,
)
from hooked_vlm.interventions.base import n_patches
from hooked_vlm.metrics import log_prob, logit
from hooked_vlm.nn.block import Block
from hooked_vlm.sweeps import encoder
from hooked_vlm.sweeps.plan import make_plan


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("max_runs", [None, 1, 3])
def test_every_kind_of_head_of_the_vision_tower(family: str, rows: str, max_runs: int | None) -> None:
    model, batch = model_and_inputs(family, rows)
    result = agrees(model, batch, list(of_every_vision_kind(model, batch).values()), log_prob(7), max_runs=max_runs)
    acts = result.effects.abs().amax(1) > 1e-6
    assert bool(acts.all()), [kind for kind, act in zip(VISION_KINDS, acts, strict=True) if not act]
    assert result.plan.encoder_runs == tuple(range(len(VISION_KINDS)))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("logits_at", ["last", "all"])
def test_heads_of_both_towers_in_one_sweep(family: str, rows: str, logits_at: str) -> None:
    model, batch = model_and_inputs(family, rows)
    text, vision = of_every_kind(model, batch).values(), of_every_vision_kind(model, batch).values()
    mixed = [run for pair in zip(text, vision, strict=False) for run in pair]
    metric: Any = log_prob(7) if logits_at == "last" else lambda logits: logits[:, -3:, 5].sum(-1)
    result = agrees(model, batch, mixed, metric, logits_at=logits_at)
    assert result.plan.encoder_runs == tuple(range(1, len(mixed), 2))
    shown = result.to_dataframe()["intervention"]
    assert {"ZeroHeads 0.1 1.0 1.3 2.2", "ZeroHeads vision 0.1 1.0 1.1"} <= set(shown)


@pytest.mark.parametrize("mode", BOTH_WAYS)
def test_where_tokens_see_each_other_both_ways(family: str, mode: str) -> None:
    model, batch = with_kinds(family, mode), model_and_inputs(family, "padded")[1]
    agrees(model, batch, [ZeroHeads(((0, 0),)), *of_every_vision_kind(model, batch).values()], log_prob(7))


def test_runs_that_differ_in_their_heads_are_one_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_inputs("qwen2-vl", "padded")
    calls: Counter[str] = Counter()
    joint = encoder.joint_edits

    def counted(*args: Any) -> dict[str, list]:
        edits = joint(*args)
        calls.update({name: len(own) for name, own in edits.items()})
        return edits

    monkeypatch.setattr(encoder, "joint_edits", counted)
    runs: list[Intervention] = [ZeroHeads((head,), tower="vision") for head in all_heads(model, tower="vision")]
    agrees(model, batch, runs, logit(5), max_runs=len(runs))
    assert calls == {f"vision.blocks.{layer}.attn.hook_z": 1 for layer in range(model.cfg.vision.n_layers_run)}


def test_a_composed_run_reuses_what_is_in_front_of_the_first_image(family: str) -> None:
    model, batch = model_and_inputs(family, "one image")
    both = Compose((ZeroHeads(((1, 0),), tower="vision"), ZeroHeads(((1, 0),), positions="final")))
    plan = agrees(model, batch, [both], logit(5)).plan
    first = 0 if model.cfg.bidirectional == "prompt" else batch.visuals[0].start
    assert first > 0 or model.cfg.bidirectional == "prompt"
    assert plan.batches[0].first_position == first and plan.batches[0].vision_layers == (1,)


def computed(model: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Patches x layers of the tower and positions x layers of the decoder that blocks put out while `run` runs."""
    counted = [0, 0]
    forward = Block.forward

    def watch(block: Block, resid: Tensor) -> Tensor:
        out = forward(block, resid)
        counted[block.split_inputs] += out.numel() // out.shape[-1]
        return out

    with monkeypatch.context() as patched:
        patched.setattr(Block, "forward", watch)
        run()
    return counted[0], counted[1]


@pytest.mark.parametrize("rows", [[[5, 6, "small", 7, 8]], [[5, "large", 7, "small", 8], [5, 6, "small", 9, 9, 9, 9]]])
@pytest.mark.parametrize("max_runs", [None, 2])
def test_the_plans_numbers_are_what_is_computed(
    family: str, rows: list[list[Any]], max_runs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = model_and_inputs(family, "one image")
    batch = inputs_of(family, rows)
    vision = [ZeroHeads((head,), tower="vision") for head in all_heads(model, tower="vision")]
    runs: Sequence[Intervention] = [*vision, *(ReplaceImageKV((head,)) for head in all_heads(model))]
    plan = make_plan(model, batch, runs, "last", max_runs)
    swept = computed(model, lambda: sweep(model, batch, runs, logit(5), max_runs=max_runs), monkeypatch)
    looped = computed(model, lambda: naive(model, batch, list(runs), logit(5)), monkeypatch)
    assert (plan.vision_work, plan.naive_vision_work) == (swept[0], looped[0])
    if batch.attention_mask.all():  # a plain pass leaves padding out
        assert (plan.work, plan.naive_work) == (swept[1], looped[1])
    n, layers = sum(n_patches(batch)), model.cfg.vision.n_layers_run
    per_layer = model.cfg.vision.n_heads
    assert plan.vision_work == n * (layers + per_layer * sum(range(1, layers + 1)))
    told = plan.describe()
    assert f"patches x layers of the vision tower: {plan.vision_work:,} (the plain run included) instead of" in told
    assert f"vision tower: 1 pass instead of {len(runs) - len(vision)}" in told
    assert f"{per_layer} from layer 1" in told


def test_images_that_are_encoded_already_cost_nothing() -> None:
    model, batch = model_and_inputs("qwen2-vl", "one image")
    encoded = batch.with_image_features(model.encode_images(batch))
    plan = make_plan(model, encoded, [ZeroHeads(((0, 0),))], "last")
    assert plan.vision_work == plan.naive_vision_work == 0 and "vision tower" not in plan.describe()
