"""Settings of the training of a dictionary, which are also the command line's; imports nothing of the model."""

from dataclasses import dataclass
from typing import Literal

from hooked_vlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What is trained, on how much, and how."""

    activation: Literal["topk", "jumprelu"] = "topk"
    """topk: the k largest of each token (Gao et al., 2406.04093); jumprelu: those above a threshold of each feature,
    trained to k active features on average (Rajamanoharan et al., 2407.14435)."""
    n_features: int = 1024
    """Size of the dictionary."""
    k: int = 16
    """Active features of a token: of each with topk, on average with jumprelu."""
    group: Literal["all", "image", "text"] = "all"
    """Which tokens of the language model are trained on; rows of the vision tower are all of the image."""
    n_tokens: int = 1_000_000
    """Tokens trained on; those stored are passed over again and again, in another order each time."""
    batch: int = 1024
    """Tokens of a step."""
    lr: float = 1e-3
    """Largest learning rate (Adam): it rises over the first 5% of the steps, and falls to 0 over the last 20%."""
    penalty: float = 1.0
    """jumprelu: weight of (mean active features / k - 1)²."""
    bandwidth: float = 0.35
    """jumprelu: width of the kernel through which the thresholds are trained, in units of 1 / sqrt(k), where
    activations have a mean squared norm of 1."""
    dead_after: int = 50_000
    """A feature that was active for none of so many tokens is dead; dead features are trained to reconstruct the error
    of the others (AuxK of Gao et al.)."""
    dead_weight: float = 1 / 32
    """Weight of this."""
    held_out: float = 0.1
    """Share of samples that is kept from training, and measured."""
    held_out_tokens: int = 16_384
    """Tokens measured, at most."""
    measure_every: int = 100
    """Steps between two lines of training.csv; as often the state is saved, from which an interrupted run goes on."""
    buffer_megabytes: int = 512
    """Shards that are shuffled together hold so much, at most (one shard at least)."""
    seed: int = 0
    """Of held-out samples, initial weights, and the order of tokens."""

    @property
    def n_steps(self) -> int:
        return self.n_tokens // self.batch

    def check_training(self) -> None:
        """Refuse settings out of range.

        Raises:
            InputError: names the setting, what was expected and what came.
        """
        for name in ("n_features", "k", "batch", "dead_after", "held_out_tokens", "measure_every", "buffer_megabytes"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        for name in ("lr", "bandwidth"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise InputError(f"{name} must be greater than 0 and finite, got {value}")
        for name in ("penalty", "dead_weight"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise InputError(f"{name} must be at least 0 and finite, got {value}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out is a share of the samples, between 0 and 1, got {self.held_out}")
        if self.k > self.n_features:
            raise InputError(f"k must be at most n_features, got {self.k} of {self.n_features}")
        if self.n_steps < 1:
            raise InputError(f"n_tokens must be at least one batch, got {self.n_tokens} for batches of {self.batch}")
