"""Interventions compile to hooks that do what they say."""

import pytest
import torch
from tiny import PADDED, inputs, tiny_model

from hooked_vlm import InputError
from hooked_vlm.interventions import ZeroHeads


def test_zero_heads_equals_removing_their_rows_of_W_O() -> None:
    model, batch = tiny_model(), inputs(PADDED)
    heads = ((0, 1), (2, 0), (2, 3))
    masked = model.run_with_hooks(batch, fwd_hooks=ZeroHeads(heads).hooks(model))
    saved = [block.attn.W_O.detach().clone() for block in model.blocks]
    with torch.no_grad():
        for layer, head in heads:
            model.blocks[layer].attn.W_O[head] = 0
        expected = model(batch)
        for block, weight in zip(model.blocks, saved, strict=True):
            block.attn.W_O[:] = weight
    real = batch.attention_mask.bool()
    torch.testing.assert_close(masked[real], expected[real], atol=1e-6, rtol=1e-6)
    assert not torch.equal(masked[real], model(batch)[real])


@pytest.mark.parametrize("head", [(3, 0), (0, 4), (-1, 0)])
def test_a_head_the_model_does_not_have_is_refused(head: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="layers 0 to 2 with heads 0 to 3"):
        ZeroHeads((head,)).hooks(tiny_model())
