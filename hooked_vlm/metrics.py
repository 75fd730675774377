"""Metrics of a sweep: functions of logits [batch, d_vocab] that return one number for each row.

    metric = log_prob(answer)
    metric(logits)  # [batch]

The metrics of this module are frozen dataclasses, so that they can be pickled and identified by their content
(`hooked_vlm.runtime.digests`). A metric of your own may be any function; where results are stored, it must be a frozen
dataclass with `__call__`, or have a name and a version (`Named`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs

Metric = Callable[[Tensor], Tensor]
Tokens = Int[Tensor, "batch"] | Sequence[int] | int
"""A token id for each row, or one for all."""


@dataclass(frozen=True, eq=False)
class Logit:
    """The logit of a token."""

    tokens: Tokens

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
        return _at(logits, self.tokens)


@dataclass(frozen=True, eq=False)
class LogProb:
    """The log-probability of a token, in float32 at least."""

    tokens: Tokens

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
        return _at(_exact(logits).log_softmax(-1), self.tokens)


@dataclass(frozen=True, eq=False)
class LogitDifference:
    """The logit of one token minus that of another."""

    right: Tokens
    wrong: Tokens

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
        return _at(logits, self.right) - _at(logits, self.wrong)


@dataclass(frozen=True, eq=False)
class Margin:
    """The logit of a token minus the highest logit of all others."""

    tokens: Tokens

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
        logits = _exact(logits)
        index = tokens_of_rows(self.tokens, len(logits), logits.shape[-1], logits.device)
        return _at(logits, self.tokens) - logits.scatter(-1, index[:, None], -torch.inf).amax(-1)


@dataclass(frozen=True, eq=False)
class KLDivergence:
    """KL(reference || run) in nats, for the logits of another run."""

    reference: Float[Tensor, "batch d_vocab"]

    @cached_property
    def _log_p(self) -> Float[Tensor, "batch d_vocab"]:
        return _exact(self.reference).log_softmax(-1)

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
        log_q = _exact(logits).log_softmax(-1)
        return F.kl_div(log_q, self._log_p.to(log_q), reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True, eq=False)
class Answered:
    """1 where greedy decoding would have generated exactly the tokens appended to the prompt, else 0.

    The metric takes logits of all positions (`logits_at="all"`) of runs on inputs with these columns:
    `answered(inputs)` for `inputs = prompt.append(answer)`. One pass is enough, without generation: each token is
    compared with the argmax that follows the prompt and the correct tokens before it.

    Raises:
        InputError: a row has nothing appended, or the logits are not those of all positions.
    """

    inputs: VLMInputs

    def __post_init__(self) -> None:
        if min(self.inputs.n_generated) == 0:
            raise InputError("there is no answer in these inputs to compare with: inputs.append(answer) adds one")
        object.__setattr__(self, "inputs", self.inputs.portable())

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch"]:
        inputs = self.inputs
        if logits.shape[:2] != inputs.shape:
            raise InputError(
                f"answered() needs logits of all positions, {tuple(inputs.shape)}, and got {tuple(logits.shape[:2])}: "
                'pass logits_at="all"'
            )
        right = []
        for row, (n, stop) in enumerate(zip(inputs.n_generated, inputs.stop, strict=True)):
            greedy = logits[row, stop - n - 1 : stop - 1].argmax(-1)
            right.append((greedy == inputs.tokens[row, stop - n : stop].to(greedy.device)).all())
        return torch.stack(right).to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Named:
    """A metric of your own that stored results know by a name and a version; change the version with the function."""

    function: Metric
    name: str
    version: str | int

    @property
    def known_as(self) -> tuple[str, str | int]:
        """What it is identified by."""
        return self.name, self.version

    def __call__(self, logits: Float[Tensor, "batch *pos d_vocab"]) -> Float[Tensor, "batch"]:
        return self.function(logits)


logit, log_prob, logit_difference, margin = Logit, LogProb, LogitDifference, Margin
kl_divergence, answered = KLDivergence, Answered


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def tokens_of_rows(tokens: Tokens, n_rows: int, d_vocab: int, device: torch.device) -> Int[Tensor, "batch"]:
    """Check token ids and expand them to one for each row.

    Raises:
        InputError: another number of tokens, or one that is not in the vocabulary.
    """
    ids = torch.as_tensor(tokens)
    if ids.is_floating_point() or ids.ndim > 1 or (ids.ndim == 1 and len(ids) not in (1, n_rows)):
        raise InputError(
            f"expected one token id for all {n_rows} rows or one for each, got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    outside = ids[(ids < 0) | (ids >= d_vocab)]
    if len(outside):
        raise InputError(f"there is no token {int(outside[0])}: the vocabulary has 0 to {d_vocab - 1}")
    return ids.to(device).expand(n_rows)


def _at(logits: Float[Tensor, "batch d_vocab"], tokens: Tokens) -> Float[Tensor, "batch"]:
    index = tokens_of_rows(tokens, len(logits), logits.shape[-1], logits.device)
    return _exact(logits).gather(-1, index[:, None])[:, 0]
