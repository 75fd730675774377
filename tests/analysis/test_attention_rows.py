"""Rows of the attention pattern, made without the pattern."""

import pytest
import torch
from tiny_qwen2_vl import ONE_IMAGE, PADDED, TEXT, inputs, tiny_model

from hooked_vlm import InputError
from hooked_vlm.analysis.rows import attention_rows, generate_with_rows


@pytest.mark.parametrize("rows", [ONE_IMAGE, TEXT, PADDED], ids=["image", "text", "padded"])
def test_rows_equal_those_of_the_stored_pattern(rows: list) -> None:
    model, batch = tiny_model(), inputs(rows)
    positions = torch.tensor([[stop - 1, stop - 2, first] for first, stop in zip(batch.first, batch.stop, strict=True)])
    found = attention_rows(model, batch, positions)
    _, cache = model.run_with_cache(batch, names_filter=lambda name: name.endswith("hook_pattern"))
    for layer in range(model.cfg.n_layers):
        pattern = cache["pattern", layer]
        for row in range(len(batch)):
            torch.testing.assert_close(found[layer, row], pattern[row][:, positions[row]], atol=1e-6, rtol=0)


def test_rows_of_an_appended_answer_equal_the_steps_of_generation() -> None:
    model, batch = tiny_model(), inputs(PADDED)
    steps: dict[int, torch.Tensor] = {}

    def keep(pattern: torch.Tensor, hook: object) -> None:
        steps[hook.ctx["step"]] = pattern[:, :, -1].clone()  # pyright: ignore[reportAttributeAccessIssue]

    tokens = model.generate(batch, 4, stop_at_eos=False, fwd_hooks=[("blocks.1.attn.hook_pattern", keep)])
    continued = batch.append(tokens[:, batch.shape[1] :])
    n = batch.shape[1]
    positions = torch.arange(n - 1, n + 3).expand(len(batch), -1)
    found = attention_rows(model, continued, positions, layers=[1])[0]
    for step, row in steps.items():
        torch.testing.assert_close(found[:, :, step, : n + step], row, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [ONE_IMAGE, TEXT, PADDED], ids=["image", "text", "padded"])
def test_rows_made_while_generating_equal_those_of_a_pass_over_the_answer(rows: list) -> None:
    model, batch = tiny_model(), inputs(rows)
    tokens, found = generate_with_rows(model, batch, 4, stop_at_eos=False)
    assert tokens.equal(model.generate(batch, 4, stop_at_eos=False))
    n = batch.shape[1]
    positions = torch.arange(n - 1, n + 3).expand(len(batch), -1)
    expected = attention_rows(model, batch.append(tokens[:, n:]), positions)
    torch.testing.assert_close(found, expected[..., : n + 3], atol=1e-5, rtol=0)
    _, best = generate_with_rows(model, batch, 4, [1], lambda row: row.argmax(-1), stop_at_eos=False)
    assert best.equal(found[1:2].argmax(-1))
    with pytest.raises(InputError, match="layer 3"):
        generate_with_rows(model, batch, 4, [3])


def test_reduce_sees_one_layer_at_a_time() -> None:
    model, batch = tiny_model(), inputs(ONE_IMAGE)
    positions = torch.tensor([[batch.stop[0] - 1]])
    rows = attention_rows(model, batch, positions)
    best = attention_rows(model, batch, positions, reduce=lambda rows: rows.argmax(-1))
    assert torch.equal(best, rows.argmax(-1))


def test_layers_and_positions_out_of_range_are_refused() -> None:
    model, batch = tiny_model(), inputs(PADDED)
    everywhere = torch.full((len(batch), 1), batch.shape[1] - 1)
    with pytest.raises(InputError, match="layer 7"):
        attention_rows(model, batch, everywhere, layers=[7])
    with pytest.raises(InputError, match="padding"):
        attention_rows(model, batch, torch.zeros_like(everywhere))
    with pytest.raises(InputError, match="3 rows"):
        attention_rows(model, batch, everywhere[:1])
