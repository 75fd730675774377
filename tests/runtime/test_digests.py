"""What stands for content: equal for equal content, different for anything that could change a number."""

import pickle
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from every_kind import of_every_kind
from families import model_and_inputs

from hooked_vlm import InputError
from hooked_vlm.interventions import AddVector, Compose, CustomHooks, ImageMeans, ReplaceImageKV, ZeroHeads
from hooked_vlm.metrics import answered, kl_divergence, log_prob, logit, logit_difference, margin
from hooked_vlm.runtime.digests import digest


@dataclass(frozen=True)
class Ours:
    """As a user's metric may be."""

    tokens: tuple[int, ...]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, list(self.tokens)].sum(-1)


class More(Ours):
    """Not decorated: what it holds besides its fields is not seen."""


def vector(*values: float) -> AddVector:
    return AddVector("blocks.1.hook_resid_post", torch.tensor(values, dtype=torch.float32))


DIFFERENT: list[Any] = [
    None, 0, 0.0, False, "", b"", (), [], {}, set(), 1, True, "1", (1,), ((1,),), (1, 2), (12,), ("1", "2"), ("1, 2",),
    {"a": 1}, {"a": 2}, {1}, torch.tensor(1), torch.tensor([1]), torch.tensor([[1]]), torch.tensor([1.0]),
    torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.0]), torch.tensor([-0.0]), torch.float32, torch.bfloat16,
    torch.tensor([1.0], dtype=torch.bfloat16), np.float64(1), np.array([1.0]), np.array([1]), Ours((1,)), Ours((2,)),
    ZeroHeads(((0, 1),)), ZeroHeads(((1, 0),)), ZeroHeads(((0, 1),), "text"), vector(1, 2), vector(1, 3), vector(2, 1),
    replace(vector(1, 2), scale=2.0), Compose((ZeroHeads(((0, 1),)),)), Compose((vector(1, 2),)),
    ReplaceImageKV(((0, 1),)), ReplaceImageKV(((0, 1),), before_rope=False),
    ReplaceImageKV(((0, 1),), ImageMeans(torch.zeros(1, 1, 2), torch.ones(1, 1, 2))),
    ReplaceImageKV(((0, 1),), ImageMeans(torch.ones(1, 1, 2), torch.zeros(1, 1, 2))),
    logit(5), logit([5]), logit(torch.tensor([5])), logit(6), log_prob(5), margin(5), logit_difference(5, 6),
    logit_difference(6, 5), kl_divergence(torch.tensor([[0.0, 1.0]])), kl_divergence(torch.tensor([[0.0, 2.0]])),
]  # fmt: skip


def test_different_content_has_different_digests() -> None:
    digests = [digest(value) for value in DIFFERENT]
    assert len(set(digests)) == len(DIFFERENT)


def test_equal_content_has_equal_digests_in_every_copy() -> None:
    for value in DIFFERENT:
        assert digest(pickle.loads(pickle.dumps(value))) == digest(value)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    base = torch.arange(6.0).view(2, 3)
    assert digest(base.T) == digest(base.T.contiguous()) != digest(base)


@pytest.mark.parametrize("family", ["qwen2-vl", "internvl2"])
def test_inputs_and_interventions_of_every_kind_have_digests(family: str) -> None:
    model, batch = model_and_inputs(family, "padded")
    kinds = of_every_kind(model, batch)
    told = {kind: digest(iv) for kind, iv in kinds.items() if not isinstance(iv, CustomHooks)}
    assert len(set(told.values())) == len(told) > 5
    inputs = batch.portable()
    assert digest(inputs) == digest(batch.portable())
    changed = inputs.tokens.clone()
    changed[0, -1] += 1
    brighter = replace(inputs, pixel_values=inputs.pixel_values + 1)
    others = [replace(inputs, tokens=changed), brighter, batch[:1].portable(), batch.append([[7]] * 3).portable()]
    assert len({digest(other) for other in [inputs, *others]}) == 5
    assert digest(answered(batch.append([[7]] * 3))) != digest(answered(batch.append([[8]] * 3)))


def test_what_cannot_be_told_by_its_content_is_refused() -> None:
    @dataclass
    class Inside:
        """Made in a function, whose variables it may depend on."""

    for value in (
        lambda logits: logits,
        CustomHooks([]),
        More((1,)),
        Inside(),
        object(),
        print,
        Ours,
        np.array([print]),
    ):
        if isinstance(value, CustomHooks):
            value = CustomHooks([("hook_embed", print)])
        with pytest.raises(InputError, match="dataclass"):
            digest(value)
