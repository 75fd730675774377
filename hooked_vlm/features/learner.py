"""The parameters of a dictionary in training, its losses, and one step of Adam.

Activations are divided by their root mean squared distance from the mean, so that losses and learning rates mean the
same at every hook point; `Learner.dictionary` is in the units of the stream again. All losses are means over rows, so
that gradients of equal parts of a batch average to that of the whole.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from hooked_vlm.features.config import TrainingConfig
from hooked_vlm.features.dictionary import Dictionary

FIRST_THRESHOLD = 0.35
"""Thresholds before training, in units of 1 / sqrt(k): the size of k equal activations whose squares sum to 1. From
0.001, where the paper begins, they do not arrive in some thousand steps."""
WARM_UP, DECAY = 0.05, 0.2
"""Shares of the steps over which the learning rate rises and falls."""


class Jump(torch.autograd.Function):
    """z where z exceeds a threshold, else 0; a straight-through estimate for the threshold (2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        to_threshold = -threshold / ctx.bandwidth * _kernel(z, threshold, ctx.bandwidth) * grads[0]
        return grads[0] * (z > threshold), to_threshold.sum(0), None


class Step(torch.autograd.Function):
    """1 where z exceeds a threshold, else 0; a straight-through estimate for the threshold (2407.14435, eq. 12)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        return None, (-1 / ctx.bandwidth * _kernel(z, threshold, ctx.bandwidth) * grads[0]).sum(0), None


def _kernel(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The rectangle of width `bandwidth` around the threshold."""
    return ((z - threshold).abs() < bandwidth / 2).to(z.dtype)


def averaged(x: Tensor) -> Tensor:
    """The mean over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


@dataclass(frozen=True, eq=False)
class Scale:
    """Mean of the activations, and their root mean squared distance from it."""

    mean: Float[Tensor, "d_in"]
    spread: float

    @classmethod
    def of(cls, x: Float[Tensor, "row d_in"]) -> "Scale":
        """Measure it on one batch, whose parts all processes hold."""
        mean = averaged(x.double().mean(0))
        return cls(mean.float(), math.sqrt(averaged((x.double() - mean).square().sum(1).mean()).item()) or 1.0)


class Learner:
    """Weights, optimiser, and for each feature the tokens since it was last active."""

    def __init__(self, config: TrainingConfig, scale: Scale, device: str = "cpu") -> None:
        self.config, self.scale = config, scale
        n, d_in = config.n_features, len(scale.mean)
        drawn = torch.randn((n, d_in), generator=torch.Generator().manual_seed(config.seed))
        directions = normalize(drawn, dim=1)
        self.weights: dict[str, Tensor] = {
            "W_enc": directions.T.clone(),
            "b_enc": torch.zeros(n),
            "W_dec": directions,
            "b_dec": scale.mean / scale.spread,
        }
        if config.activation == "jumprelu":
            self.weights["log_threshold"] = torch.full((n,), math.log(FIRST_THRESHOLD / math.sqrt(config.k)))
        self.weights = {name: weight.to(device).requires_grad_() for name, weight in self.weights.items()}
        self.bandwidth = config.bandwidth / math.sqrt(config.k)
        self.adam = torch.optim.Adam(self.weights.values(), lr=config.lr)
        self.idle = torch.zeros(n, dtype=torch.int64, device=device)
        """Tokens since each feature was last active."""
        self.step = 0

    @property
    def dead(self) -> Bool[Tensor, "feature"]:
        return self.idle >= self.config.dead_after

    def update(self, x: Float[Tensor, "row d_in"]) -> None:
        """One step on this process's part of a batch, given in the units of the stream."""
        for group in self.adam.param_groups:
            group["lr"] = self.config.lr * _schedule(self.step, self.config.n_steps)
        self.adam.zero_grad()
        loss, active = self._loss(x.to(self.idle.device) / self.scale.spread)
        loss.backward()
        with torch.no_grad():
            for weight in self.weights.values():
                assert weight.grad is not None
                averaged(weight.grad)
            self._project()
            self.adam.step()
            self.weights["W_dec"].copy_(normalize(self.weights["W_dec"], dim=1))
            active = averaged(active.any(0).float()) > 0
            self.idle = torch.where(active, 0, self.idle + self.config.batch)
        self.step += 1

    def _loss(self, x: Float[Tensor, "row d_in"]) -> tuple[Tensor, Bool[Tensor, "row feature"]]:
        """The loss of rows of mean squared distance 1 from their mean, and which features are active."""
        w, config = self.weights, self.config
        z = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]  # [row, feature]
        penalty = z.new_zeros(())
        if config.activation == "topk":
            top = z.topk(config.k, dim=1)
            f = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
        else:
            threshold = w["log_threshold"].exp()
            f = Jump.apply(z, threshold, self.bandwidth)
            n_active = Step.apply(z, threshold, self.bandwidth).sum(1).mean()
            excess = averaged(n_active.detach().clone()) / config.k - 1
            penalty = config.penalty * 2 * excess / config.k * n_active  # its gradient is that of excess²
        error = x - (f @ w["W_dec"] + w["b_dec"])
        return error.square().sum(1).mean() + penalty + self._revival(z, error.detach()), f > 0

    def _revival(self, z: Float[Tensor, "row feature"], error: Float[Tensor, "row d_in"]) -> Tensor:
        """AuxK: how well the 2k largest of the dead features reconstruct the error of the others (2406.04093, A.2).

        They are taken before the ReLU: a feature that is negative everywhere has a gradient too. With d_in / 2 of them,
        as in the paper, few dead features are all taken, fit the error linearly, and never stand out.
        """
        dead = self.dead.nonzero()[:, 0]
        if not len(dead) or not self.config.dead_weight:
            return z.new_zeros(())
        top = z[:, dead].topk(min(len(dead), 2 * self.config.k), dim=1)
        f = torch.zeros_like(z[:, dead]).scatter(1, top.indices, top.values)
        return self.config.dead_weight * (error - f @ self.weights["W_dec"][dead]).square().sum(1).mean()

    def _project(self) -> None:
        """Remove from the decoder's gradient what would change the norm of its directions."""
        weight = self.weights["W_dec"]
        if weight.grad is not None:
            weight.grad -= (weight.grad * weight).sum(1, keepdim=True) * weight

    # ------------------------------------------------------------ results and state

    def dictionary(self, hook_name: str) -> Dictionary:
        """The dictionary in the units of the stream: directions stay, biases and thresholds are scaled back.

        All of it is homogeneous in the activations, so nothing is left of the scale.
        """
        spread, w = self.scale.spread, {name: weight.detach().clone() for name, weight in self.weights.items()}
        own: dict[str, Any] = {"activation": "topk", "k": self.config.k}
        if "log_threshold" in w:
            own = {"activation": "jumprelu", "threshold": w["log_threshold"].exp() * spread}
        return Dictionary(
            W_enc=w["W_enc"], b_enc=w["b_enc"] * spread, W_dec=w["W_dec"], b_dec=w["b_dec"] * spread,
            hook_name=hook_name, apply_b_dec_to_input=True, **own,
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, and the scale, on the CPU."""
        moments = {
            f"{kind}.{name}": own
            for name, weight in self.weights.items()
            for kind, own in self.adam.state[weight].items()
        }
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        spread = torch.tensor(self.scale.spread, dtype=torch.float64)
        found = {**weights, **moments, "idle": self.idle, "mean": self.scale.mean, "spread": spread}
        return {name: x.cpu() for name, x in found.items()}

    @classmethod
    def restored(cls, config: TrainingConfig, state: Mapping[str, Tensor], step: int, device: str = "cpu") -> "Learner":
        """A learner as it was after `step` steps.

        Raises:
            KeyError, RuntimeError: the state is none of this configuration.
        """
        learner = cls(config, Scale(state["mean"], state["spread"].item()), device)
        with torch.no_grad():
            for name, weight in learner.weights.items():
                weight.copy_(state[name])
                if step:
                    moments = {
                        kind: state[f"{kind}.{name}"].to(device, copy=True) for kind in ("exp_avg", "exp_avg_sq")
                    }
                    learner.adam.state[weight] = {"step": state[f"step.{name}"].clone(), **moments}
        learner.idle, learner.step = state["idle"].to(device, copy=True), step
        return learner


def _schedule(step: int, n_steps: int) -> float:
    """The learning rate as a share of the largest."""
    rising = (step + 1) / max(1, WARM_UP * n_steps)
    falling = (n_steps - step) / max(1, DECAY * n_steps)
    return min(1.0, rising, falling)
