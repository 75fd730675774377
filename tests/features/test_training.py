"""Training of dictionaries on planted data: what is found, what is revived, and that interruptions change no bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from made_up_activations import HOOK, planted, write_activations
from torch import Tensor

from hooked_vlm.activations import Activations
from hooked_vlm.errors import ActivationsError, InputError, WorkerError
from hooked_vlm.features.config import TrainingConfig
from hooked_vlm.features.learner import Jump, Learner, Scale, Step
from hooked_vlm.features.training import CHECKPOINT, CURVE, Trained, reconstruction, train_dictionary

SMALL = TrainingConfig(
    n_features=64, k=3, n_tokens=300_000, batch=256, lr=3e-3, dead_after=5000, measure_every=50, held_out=0.1
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Activations, Tensor]:
    """20,000 rows of 32 planted directions, 3 in each row."""
    rows, directions = planted(20_000, 32, 3)
    return write_activations(tmp_path_factory.mktemp("planted"), rows, per_shard=400), directions


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_planted_directions_are_recovered(activation: Any, data: tuple[Activations, Tensor], tmp_path: Path) -> None:
    found = train_dictionary(data[0], HOOK, replace(SMALL, activation=activation), tmp_path)
    cosines = (data[1] @ found.dictionary.W_dec.T).amax(1)
    assert (cosines > 0.95).float().mean() >= 0.95, cosines
    last = found.measured.iloc[-1]
    assert last["explained variance"] > 0.95 and abs(last["active"] - 3) < 0.5
    norms = found.dictionary.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def assert_same(first: Trained, second: Trained) -> None:
    for name, tensor in first.dictionary.tensors.items():
        assert torch.equal(tensor, second.dictionary.tensors[name]), name
    pd.testing.assert_frame_equal(first.measured, second.measured, check_exact=True)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
@pytest.mark.parametrize("steps", [1, 69, 100, 101])
def test_an_interrupted_training_ends_with_the_same_bits(
    activation: Any, steps: int, data: tuple[Activations, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 160 steps of 256 in passes of 70, so that interruptions fall into the second pass too; some features are dead
    config = replace(SMALL, activation=activation, n_tokens=160 * 256, dead_after=1000, buffer_megabytes=1)
    whole = train_dictionary(data[0], HOOK, config, tmp_path / "whole")
    update = Learner.update

    def interrupted(self: Learner, x: Tensor) -> None:
        if self.step == steps:
            raise KeyboardInterrupt
        update(self, x)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Learner, "update", interrupted)
        train_dictionary(data[0], HOOK, config, tmp_path / "twice")
    again = train_dictionary(data[0], HOOK, config, tmp_path / "twice")
    assert_same(again, whole)
    assert (tmp_path / "twice" / CURVE).read_bytes() == (tmp_path / "whole" / CURVE).read_bytes()
    assert_same(train_dictionary(data[0], HOOK, config, tmp_path / "twice"), whole)  # a finished one is read


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_several_processes_find_what_one_finds(
    activation: Any, data: tuple[Activations, Tensor], tmp_path: Path
) -> None:
    config = replace(SMALL, activation=activation, n_tokens=60 * 256, dead_after=1000)
    one = train_dictionary(data[0], HOOK, config, tmp_path / "one")
    two = train_dictionary(data[0], HOOK, config, tmp_path / "two", processes=2)
    for name, tensor in one.dictionary.tensors.items():
        torch.testing.assert_close(two.dictionary.tensors[name], tensor, rtol=1e-3, atol=1e-3)
    pd.testing.assert_frame_equal(two.measured, one.measured, rtol=1e-3)


def test_dead_features_are_revived(data: tuple[Activations, Tensor]) -> None:
    """All features but 16 begin below their reach: they find the other directions only if the error is theirs."""
    x, directions = data[0][HOOK][:5120], data[1]
    found = {}
    for weight in (0.0, 1 / 32):
        learner = Learner(replace(SMALL, n_features=128, dead_after=1000, dead_weight=weight), Scale.of(x))
        with torch.no_grad():
            learner.weights["b_enc"][:-16] = -1.0
        for _ in range(40):
            for batch in x.split(256):
                learner.update(batch)
        cosines = (directions @ learner.dictionary(HOOK).W_dec.T).amax(1)
        found[weight] = int((cosines > 0.95).sum()), int(learner.dead.sum())
    assert found[0.0][0] < 8 and found[0.0][1] == 112
    assert found[1 / 32][0] == 32 and found[1 / 32][1] < 100


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_the_loss_is_that_of_a_slow_loop(activation: Any, data: tuple[Activations, Tensor]) -> None:
    x = data[0][HOOK][:40]
    config = replace(SMALL, activation=activation, n_features=24, k=2, dead_after=10)
    learner = Learner(config, Scale.of(x))
    learner.idle[:5] = 10
    rows = x / learner.scale.spread
    w = {name: weight.detach() for name, weight in learner.weights.items()}
    expected, counts = 0.0, []
    for row in rows:
        z = (row - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        if activation == "topk":
            f = torch.tensor([float(v) if v > 0 and v >= z.sort().values[-2] else 0.0 for v in z])
        else:
            f = torch.tensor([float(v) if v > t else 0.0 for v, t in zip(z, w["log_threshold"].exp(), strict=True)])
        counts.append(int((f > 0).sum()))
        error = row - f @ w["W_dec"] - w["b_dec"]
        largest = sorted(range(5), key=lambda i: -float(z[i]))[:4]
        revived = error - sum(z[i] * w["W_dec"][i] for i in largest)
        expected += (float(error @ error) + float(revived @ revived) / 32) / len(rows)
    if activation == "jumprelu":  # only the gradient of the penalty is used: check its slope
        mean = sum(counts) / len(counts)
        expected += 2 * (mean / 2 - 1) / 2 * mean
    loss, active = learner._loss(rows)
    assert active.sum(1).tolist() == counts
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-5)


def test_straight_through_gradients_are_those_of_the_paper() -> None:
    z = torch.tensor([[0.10, 0.52, 0.48, 0.9]], requires_grad=True)
    threshold = torch.full((4,), 0.5, requires_grad=True)
    Jump.apply(z, threshold, 0.1).sum().backward()  # within 0.05 of the threshold: -threshold / 0.1
    assert z.grad is not None and threshold.grad is not None
    torch.testing.assert_close(z.grad, torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    torch.testing.assert_close(threshold.grad, torch.tensor([0.0, -5.0, -5.0, 0.0]))
    threshold.grad = None
    Step.apply(z, threshold, 0.1).sum().backward()
    torch.testing.assert_close(threshold.grad, torch.tensor([0.0, -10.0, -10.0, 0.0]))


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_the_dictionary_is_the_learner_in_units_of_the_stream(
    activation: Any, data: tuple[Activations, Tensor]
) -> None:
    x = data[0][HOOK][:300]
    learner = Learner(replace(SMALL, activation=activation), Scale.of(x))
    for batch in x.split(100):
        learner.update(batch)
    spread, w = learner.scale.spread, learner.weights
    z = (x / spread - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    kept = z >= z.sort(dim=1).values[:, -3:-2] if activation == "topk" else z > w["log_threshold"].exp()
    f = torch.where(kept & (z > 0), z, 0.0)
    found = learner.dictionary(HOOK)
    torch.testing.assert_close(found.encode(x), f * spread, rtol=1e-4, atol=1e-4)
    expected = (f @ w["W_dec"] + w["b_dec"]) * spread
    torch.testing.assert_close(found.decode(found.encode(x)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(learner.scale.mean, x.mean(0))
    assert spread == pytest.approx(float((x - x.mean(0)).square().sum(1).mean().sqrt()), rel=1e-6)


def test_measurements_are_those_of_a_slow_loop(data: tuple[Activations, Tensor]) -> None:
    x = data[0][HOOK][:5000]  # more than is measured at a time
    dictionary = Learner(SMALL, Scale.of(x)).dictionary(HOOK)
    errors, totals, active, mean = [], [], [], x.double().mean(0)
    for row in x:
        f = dictionary.encode(row)
        errors.append(float((row - dictionary.decode(f)).double().square().sum()))
        totals.append(float((row.double() - mean).square().sum()))
        active.append(int((f != 0).sum()))
    assert reconstruction(dictionary, x) == pytest.approx(
        {
            "mean squared error": sum(errors) / len(errors) / 32,
            "explained variance": 1 - sum(errors) / sum(totals),
            "active": sum(active) / len(active),
        }
    )


def test_another_training_in_the_folder_is_refused(data: tuple[Activations, Tensor], tmp_path: Path) -> None:
    config = replace(SMALL, n_tokens=512)
    train_dictionary(data[0], HOOK, config, tmp_path)
    with pytest.raises(InputError, match="other settings"):
        train_dictionary(data[0], HOOK, replace(config, seed=1), tmp_path)
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        train_dictionary(data[0], HOOK, config, tmp_path)


SETTINGS = {
    "n_features": 0, "k": 65, "batch": 0, "lr": float("nan"), "held_out": 1.0, "n_tokens": 100, "penalty": -1.0,
    "bandwidth": 0.0, "measure_every": 0, "dead_weight": float("inf"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_out_of_range_are_refused(name: str, data: tuple[Activations, Tensor], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=name):
        train_dictionary(data[0], HOOK, replace(SMALL, **{name: SETTINGS[name]}), tmp_path)


def test_damaged_activations_are_refused(tmp_path: Path) -> None:
    rows, _ = planted(2000, 8, 2)
    acts = write_activations(tmp_path / "acts", rows)
    shard = acts.shards[3].data
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ActivationsError, match="damaged"):
        train_dictionary(acts, HOOK, replace(SMALL, n_tokens=5000), tmp_path / "out")


@pytest.mark.slow
def test_an_error_in_a_process_is_one_sentence(tmp_path: Path) -> None:
    rows, _ = planted(2000, 8, 2)
    rows[1234, 3] = float("nan")
    acts = write_activations(tmp_path / "acts", rows)
    with pytest.raises(WorkerError, match="not finite") as raised:
        train_dictionary(acts, HOOK, replace(SMALL, n_tokens=5000), tmp_path / "out", processes=2)
    assert "\n" not in str(raised.value)
