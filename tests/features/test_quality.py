"""The table of a dictionary's quality equals a slow loop over tokens and runs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import inputs_of, model_and_inputs
from planted import RESID, dictionary_at, random_dictionary
from torch import Tensor

from hooked_vlm.errors import FeatureError, InputError
from hooked_vlm.features import Dictionary, reconstruction_quality


def batches_of(family: str) -> tuple[Any, list[Any]]:
    """A padded batch and a single row, with answers, since some families see whole prompts both ways."""
    model, padded = model_and_inputs(family, "padded")
    one = inputs_of(family, [[5, "large", 7, 8]], seed=3)
    return model, [padded.append([[7 + i, 9, 4] for i in range(3)]), one.append([[6, 9, 11, 2]])]


def group_of(batch: Any, row: int, position: int) -> str:
    image = any(v.row == row and position in v.positions.tolist() for v in batch.visuals)
    return "image" if image else "text"


def vectors(model: Any, batches: list[Any], own: Dictionary) -> list[tuple[str, Tensor, Tensor]]:
    """Group, what is read and what should be written, token by token."""
    found = []
    for batch in batches:
        _, cache = model.run_with_cache(batch, names_filter=[own.hook_name, own.out_hook_name])
        for row in range(len(batch)):
            for position in range(batch.first[row], batch.stop[row]):
                pair = [cache[name][row, position].flatten().detach() for name in (own.hook_name, own.out_hook_name)]
                found.append((group_of(batch, row, position), *pair))
    return found


def unchanged(x: Tensor) -> Tensor:
    raise AssertionError("the plain run is not edited")


def loss_by_hand(
    model: Any, batches: list[Any], own: Dictionary, group: str, new: Callable[[Tensor], Tensor] = unchanged
) -> float:
    """Mean loss with `new(x)` in the place of each vector of a group, row by row."""
    total, n = 0.0, 0
    for batch in batches:
        for row in range(len(batch)):
            one, kept = batch[row], {}

            def read(x: Tensor, hook: Any, kept: Any = kept) -> None:
                kept["x"] = x.clone()

            def write(y: Tensor, hook: Any, kept: Any = kept, one: Any = one) -> Tensor:
                y = y.clone()
                for position in range(one.first[0], one.stop[0]):
                    if group in ("all", group_of(one, 0, position)):
                        y[0, position] = new(kept["x"][0, position].flatten()).view(y.shape[2:])
                return y

            hooks = [] if new is unchanged else [(own.hook_name, read), (own.out_hook_name, write)]
            logits = model.run_with_hooks(one, fwd_hooks=hooks).double()
            prompt = one.stop[0] - one.n_generated[0]
            for position in range(one.first[0], one.stop[0] - 1):
                target = int(one.tokens[0, position + 1])
                hidden = model.cfg.bidirectional == "prompt" and position + 1 < prompt
                if target not in one.spec.placeholder_ids and not hidden:
                    total += F.cross_entropy(logits[0, position], torch.tensor(target)).item()
                    n += 1
    return total / n


@pytest.mark.parametrize("place", ["stream", "all heads", "transcoder"])
@torch.no_grad()
def test_it_equals_a_slow_loop(family: str, place: str) -> None:
    model, batches = batches_of(family)
    own = dictionary_at(model, place)
    table = reconstruction_quality(model, batches, own)
    assert list(table.index) == ["all", "image", "text"]
    tokens = vectors(model, batches, own)
    for group in table.index:
        chosen = [(x, y) for kind, x, y in tokens if group in ("all", kind)]
        features = torch.stack([own.encode(x) for x, _ in chosen])
        y = torch.stack([y for _, y in chosen]).double()
        out = torch.stack([own.decode(f, x) for f, (x, _) in zip(features, chosen, strict=True)]).double()
        mean = y.mean(0)
        expected = {
            "tokens": len(chosen),
            "L0": np.mean([int((f > 0).sum()) for f in features]),
            "dead": np.mean([not any(f[i] > 0 for f in features) for i in range(own.n_features)]),
            "explained variance": 1 - ((y - out) ** 2).sum().item() / ((y - mean) ** 2).sum().item(),
            "mean squared error": ((y - out) ** 2).mean().item(),
            "cosine": np.mean([float(a @ b / a.norm() / b.norm()) for a, b in zip(y, out, strict=True)]),
        }
        for column, value in expected.items():
            assert table.loc[group, column] == pytest.approx(value, rel=1e-5, abs=1e-7), (group, column)
        if family not in ("qwen3-vl", "paligemma2") and group != "image":
            continue
        plain = loss_by_hand(model, batches, own, group)
        replaced = loss_by_hand(model, batches, own, group, lambda x: own.decode(own.encode(x), x))
        zero = loss_by_hand(model, batches, own, group, lambda x: torch.zeros(own.d_out))
        by_mean = loss_by_hand(model, batches, own, group, lambda x, mean=mean: mean.float())
        losses = {
            "loss": plain,
            "loss with reconstruction": replaced,
            "loss with zero": zero,
            "loss with mean": by_mean,
        }
        for column, value in losses.items():
            assert table.loc[group, column] == pytest.approx(value, rel=1e-5), (group, column)
        assert table.loc[group, "loss recovered"] == pytest.approx((zero - replaced) / (zero - plain), rel=2e-2)


@torch.no_grad()
def test_a_perfect_dictionary(family: str) -> None:
    """Both signs of every direction of a basis: half of the features are active, and nothing is lost."""
    model, batches = batches_of(family)
    d = model.cfg.d_model
    basis = torch.linalg.qr(torch.randn(d, d))[0]
    both = torch.cat((basis, -basis))
    own = Dictionary(RESID, both.T.contiguous(), torch.zeros(2 * d), both, torch.zeros(d))
    table = reconstruction_quality(model, batches, own)
    for column, value in {"L0": d, "explained variance": 1, "cosine": 1, "loss recovered": 1}.items():
        np.testing.assert_allclose(table[column], value, rtol=1e-4)
    for end in ("", " from mean"):
        np.testing.assert_allclose(table[f"loss recovered{end}"], 1, rtol=1e-3)
    np.testing.assert_allclose(table["mean squared error"], 0, atol=1e-9)


@pytest.mark.parametrize("place", ["vision stream", "vision transcoder", "image features"])
@torch.no_grad()
def test_the_image_side_has_no_groups(family: str, place: str) -> None:
    model, batches = batches_of(family)
    own = dictionary_at(model, place)
    table = reconstruction_quality(model, batches, own, loss=False)
    assert list(table.index) == ["all"] and "loss" not in table
    active, n = 0, 0
    for batch in batches:
        for row in range(len(batch)):
            if not batch[row].has_visuals:
                continue
            _, cache = model.run_with_cache(batch[row], names_filter=own.hook_name)
            x = cache[own.hook_name]
            x = x[(x != 0).any(-1)]
            active, n = active + int((own.encode(x) > 0).sum()), n + len(x)
    assert table.loc["all", "tokens"] == n and table.loc["all", "L0"] == pytest.approx(active / n)


def test_groups_without_tokens_are_left_out_and_bad_inputs_refused() -> None:
    model, _ = model_and_inputs("qwen3-vl", "one image")
    own, text = dictionary_at(model, "stream"), inputs_of("qwen3-vl", [[5, 6, 7, 8]])
    assert list(reconstruction_quality(model, [text], own).index) == ["all", "text"]
    with pytest.raises(InputError, match="no inputs"):
        reconstruction_quality(model, [], own)
    with pytest.raises(FeatureError, match="reads 5"):
        reconstruction_quality(model, [text], random_dictionary(5))
    prefix, prompt = model_and_inputs("paligemma2", "one image")
    with pytest.raises(InputError, match="append an answer"):
        reconstruction_quality(prefix, [prompt], dictionary_at(prefix, "stream"))
    assert "loss" not in reconstruction_quality(prefix, [prompt], dictionary_at(prefix, "stream"), loss=False)
