"""What a pass does not do: wait for the device, compute what nobody asked for, copy what it has."""

import copy
from typing import Any

import pytest
import torch
from families import ROWS, model_and_inputs
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from hooked_vlm.nn.block import Block
from hooked_vlm.nn.hooks import HookPoint, bound_to_pass


def refuse_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor's values from Python makes the host wait for the device."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the host waits for the device")

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)


def of_all_positions(model: Any, inputs: Any) -> torch.Tensor:
    """A number that the logits of all real positions decide (a prompt whose tokens see each other has no loss)."""
    return model(inputs)[inputs.attention_mask.bool()].logsumexp(-1).mean()


@pytest.mark.parametrize("rows", ROWS)
def test_the_host_never_waits_for_the_device(family: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_and_inputs(family, rows)
    refuse_waiting(monkeypatch)
    with torch.no_grad():
        model(inputs)
        past = model.new_kv_cache(len(inputs), inputs.shape[1] + 2)
        logits = model(inputs, past_kv_cache=past, logits_at="last")
        for _ in range(2):
            logits = model.next_logits(logits.flatten(0, 1).argmax(-1), past)[:, None]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cached", [False, True])
def test_the_last_block_computes_what_is_asked_for(family: str, rows: str, cached: bool) -> None:
    model, inputs = model_and_inputs(family, rows)
    last = model.blocks[model.cfg.n_layers - 1]
    watched = {"q_proj": last.attn.q_proj, "k_proj": last.attn.k_proj, "o_proj": last.attn.o_proj}
    named = {id(linear.weight): name for name, linear in {**watched, "mlp": last.mlp.out_proj}.items()}
    sizes: dict[str, torch.Size] = {}

    class Watch(TorchFunctionMode):  # a hook would have the block compute everything
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.nn.functional.linear and id(args[1]) in named:
                sizes[named[id(args[1])]] = out.shape
            return out

    def run() -> torch.Tensor:
        past = model.new_kv_cache(len(inputs), inputs.shape[1]) if cached else None
        with torch.no_grad():
            return model(inputs, past_kv_cache=past, logits_at="last")

    with Watch():
        narrow = run()
    if rows != "padded":  # padded rows are packed
        assert {name: size[1] for name, size in sizes.items()} == {
            "q_proj": 1, "k_proj": inputs.shape[1], "o_proj": 1, "mlp": 1,
        }  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(narrow[:, 0], model(inputs)[:, -1], atol=1e-5, rtol=1e-5)
        seen = []
        with model.hooks(fwd_hooks=[(f"blocks.{model.cfg.n_layers - 1}.hook_mlp_out", lambda x, hook: seen.append(x))]):
            torch.testing.assert_close(run(), narrow, atol=1e-5, rtol=1e-5)
    assert seen[0].shape[:2] == inputs.shape


def test_a_cache_with_room_is_never_moved(family: str) -> None:
    model, inputs = model_and_inputs(family, "padded")
    past = model.new_kv_cache(len(inputs), inputs.shape[1] + 3)
    with torch.no_grad():
        logits = model(inputs, past_kv_cache=past, logits_at="last")
        before = [x.data_ptr() for x in (*past.keys, *past.values)]
        for _ in range(3):
            logits = model.next_logits(logits.flatten(0, 1).argmax(-1), past)[:, None]
        assert [x.data_ptr() for x in (*past.keys, *past.values)] == before
        model.next_logits(logits.flatten(0, 1).argmax(-1), past)  # beyond its room it grows
    assert past.length == inputs.shape[1] + 4
    assert past.keys[0].shape[1] == 2 * (inputs.shape[1] + 3)


def test_padding_is_left_out_of_linear_work(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_and_inputs(family, "padded")
    rows, forward = [], Block.forward

    def watch(block: Block, resid: torch.Tensor) -> torch.Tensor:
        if block is model.blocks[1]:
            rows.append(resid.shape)
        return forward(block, resid)

    monkeypatch.setattr(Block, "forward", watch)
    with torch.no_grad():
        model(inputs)
    assert rows == [(int(inputs.attention_mask.sum()), model.cfg.d_model)]


def test_what_hooks_see_of_padded_rows_has_its_gradient(family: str) -> None:
    model, inputs = model_and_inputs(family, "padded")
    seen = []

    def watch(x: torch.Tensor, hook: HookPoint) -> None:
        x.retain_grad()
        seen.append(x)

    model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_resid_post", watch)])[:, -1, 5].sum().backward()
    model.zero_grad()
    grad = seen[0].grad
    real = inputs.attention_mask.bool()
    assert grad.shape == (*inputs.shape, model.cfg.d_model) and grad[real].abs().sum() > 0 and not grad[~real].any()
    if model.cfg.bidirectional == "prompt":
        return  # it has no loss over its prompt
    _, cache = model.run_with_cache(inputs, incl_bwd=True, return_type="loss")
    assert cache["blocks.1.hook_resid_post_grad"].shape == grad.shape
    model.zero_grad()


def test_a_hook_may_ask_a_tensor_for_a_gradient(family: str) -> None:
    model, inputs = model_and_inputs(family, "padded")
    seen = []
    frozen = copy.deepcopy(model).requires_grad_(False)
    hooks = [("blocks.1.hook_resid_post", lambda x, hook: seen.append(x.requires_grad_()))]
    frozen.run_with_hooks(inputs, fwd_hooks=hooks)[:, -1, 5].sum().backward()
    assert seen[0].grad is not None and seen[0].grad.abs().sum() > 0


def test_inference_mode_gives_the_same_numbers(family: str) -> None:
    model, inputs = model_and_inputs(family, "padded")
    with torch.no_grad():
        expected = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: x * 2)])
    with torch.inference_mode():
        found = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: x.mul_(2))])
        _, cache = model.run_with_cache(inputs)
    assert found.equal(expected) and cache["resid_post", 1].shape == (*inputs.shape, model.cfg.d_model)


def test_hooks_are_told_where_they_are(family: str) -> None:
    model, inputs = model_and_inputs(family, "one image")
    n = inputs.shape[1]
    told: dict[str, tuple[list[int], int]] = {}

    def note(x: torch.Tensor, hook: HookPoint) -> None:
        told[str(hook.name)] = (hook.ctx["positions"].tolist(), hook.ctx["first_position"])

    hooks = [(name, note) for name in ("hook_embed", "blocks.0.attn.hook_k", "ln_final.hook_out")]
    model.run_with_hooks(inputs, fwd_hooks=hooks, logits_at="last")
    assert told["hook_embed"] == told["blocks.0.attn.hook_k"] == (list(range(n)), 0)
    assert told["ln_final.hook_out"] == ([n - 1], n - 1)
    assert not any(point.ctx for point in model.hook_dict.values())


@pytest.mark.parametrize("rows", ROWS)
def test_gradients_through_the_key_value_cache_are_those_of_one_pass(family: str, rows: str) -> None:
    """A vector added to a stream at all positions, trained through a prompt and two steps of decoding."""
    model, inputs = model_and_inputs(family, rows)
    answer = torch.tensor([[7, 9]] * len(inputs))
    vector = torch.zeros(model.cfg.d_model, requires_grad=True)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: x + vector)]):
        one_pass = torch.autograd.grad(model.log_probs(inputs, answer).sum(), vector)[0]
        past = model.new_kv_cache(len(inputs), inputs.shape[1] + 1)
        first = model(inputs, past_kv_cache=past, logits_at="last")[:, -1].log_softmax(-1)
        second = model.next_logits(answer[:, 0], past).log_softmax(-1)
        steps = first.gather(1, answer[:, :1]) + second.gather(1, answer[:, 1:])
        through_the_cache = torch.autograd.grad(steps.sum(), vector)[0]
    torch.testing.assert_close(through_the_cache, one_pass, atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # and the cache goes on without gradients
        assert model.next_logits(answer[:, 1], past).shape == (len(inputs), model.cfg.d_vocab)


def test_what_ran_in_inference_mode_is_trained_on_afterwards(family: str) -> None:
    model, inputs = model_and_inputs(family, "padded")
    with torch.inference_mode():
        model.generate(inputs, 2)
        model.run_with_cache(inputs)
        assert inputs.positions.final
    of_all_positions(model, inputs).backward()
    assert model.blocks[0].attn.q_proj.weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("rows", ["one image", "padded"])
def test_checkpointed_blocks_have_the_same_gradients(family: str, rows: str) -> None:
    model, inputs = model_and_inputs(family, rows)
    model = copy.deepcopy(model)
    hooks = [("blocks.1.attn.hook_z", lambda z, hook: z * (1 + 0.1 * hook.ctx["first_position"]) * 2)]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with model.hooks(fwd_hooks=hooks):
            of_all_positions(model, inputs).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()

    def checkpointed(forward: Any) -> Any:
        return lambda resid: checkpoint(bound_to_pass(forward), resid, use_reentrant=False)

    for block in (*model.blocks, *model.vision.blocks):
        block.forward = checkpointed(block.forward)
    for found, plain in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    _, cache = model.run_with_cache(inputs)
    assert cache["resid_post", 1].shape == (*inputs.shape, model.cfg.d_model)
