"""What a sweep measures: functions of logits [batch, d_vocab] that give one number for each row.

Those of this module are small frozen objects, so that they can be sent to other processes and told apart by their
content (`hooked_vlm.runtime.digests`). A metric of your own may be any function; where results are kept, a frozen
dataclass with `__call__`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
class _Logit:
    tokens: Tokens

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
        return _of(logits, self.tokens)


@dataclass(frozen=True, eq=False)
class _LogProb:
    tokens: Tokens

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
        return _of(_exact(logits).log_softmax(-1), self.tokens)


@dataclass(frozen=True, eq=False)
class _LogitDifference:
    right: Tokens
    wrong: Tokens

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
        return _of(logits, self.right) - _of(logits, self.wrong)


@dataclass(frozen=True, eq=False)
class _Margin:
    tokens: Tokens

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
        logits = _exact(logits)
        index = tokens_of_rows(self.tokens, len(logits), logits.shape[-1], logits.device)
        return _of(logits, self.tokens) - logits.scatter(-1, index[:, None], -torch.inf).amax(-1)


@dataclass(frozen=True, eq=False)
class _KLDivergence:
    log_p: Float[Tensor, "batch d_vocab"]

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
        log_q = _exact(logits).log_softmax(-1)
        return F.kl_div(log_q, self.log_p.to(log_q), reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True, eq=False)
class _Answered:
    inputs: VLMInputs

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch"]:
        inputs = self.inputs
        if logits.shape[:2] != inputs.shape:
            raise InputError(
                f"answered() needs logits of all positions, {tuple(inputs.shape)}, and got {tuple(logits.shape[:2])}: "
                'pass logits_at="all"'
            )
        right = []
        for row, (n, stop) in enumerate(zip(inputs.n_generated, inputs.stop, strict=True)):
            said = logits[row, stop - n - 1 : stop - 1].argmax(-1)
            right.append((said == inputs.tokens[row, stop - n : stop].to(said.device)).all())
        return torch.stack(right).to(torch.promote_types(logits.dtype, torch.float32))


def logit(tokens: Tokens) -> Metric:
    """The logit of a token."""
    return _Logit(tokens)


def log_prob(tokens: Tokens) -> Metric:
    """The log-probability of a token, in float32 at least."""
    return _LogProb(tokens)


def logit_difference(right: Tokens, wrong: Tokens) -> Metric:
    """How much higher the logit of one token is than that of another."""
    return _LogitDifference(right, wrong)


def margin(tokens: Tokens) -> Metric:
    """How much higher the logit of a token is than the best of all others."""
    return _Margin(tokens)


def kl_divergence(reference: Float[Tensor, "batch d_vocab"]) -> Metric:
    """KL(reference || run) in nats, for the logits of another run."""
    return _KLDivergence(_exact(reference).log_softmax(-1))


def answered(inputs: VLMInputs) -> Metric:
    """1 where greedy decoding would have generated just what was appended to the prompt, else 0.

    The metric is given logits of all positions (`logits_at="all"`) of runs on inputs with these columns:
    `answered(inputs)` for `inputs = prompt.append(answer)`. One pass tells, no generation is run: each token is
    compared with the argmax behind the prompt and the right tokens before it.

    Raises:
        InputError: a row has nothing appended, or the logits are not those of all positions.
    """
    if min(inputs.n_generated) == 0:
        raise InputError("there is no answer in these inputs to compare with: inputs.append(answer) adds one")
    return _Answered(inputs.portable())


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def tokens_of_rows(tokens: Tokens, n_rows: int, d_vocab: int, device: torch.device) -> Int[Tensor, "batch"]:
    """A token id for each row.

    Raises:
        InputError: another number of tokens, or one that is not in the vocabulary.
    """
    found = torch.as_tensor(tokens)
    if found.is_floating_point() or found.ndim > 1 or (found.ndim == 1 and len(found) not in (1, n_rows)):
        raise InputError(
            f"expected one token id for all {n_rows} rows or one for each, got {found.dtype} of shape "
            f"{tuple(found.shape)}"
        )
    outside = found[(found < 0) | (found >= d_vocab)]
    if len(outside):
        raise InputError(f"there is no token {int(outside[0])}: the vocabulary has 0 to {d_vocab - 1}")
    return found.to(device).expand(n_rows)


def _of(logits: Float[Tensor, "batch d_vocab"], tokens: Tokens) -> Float[Tensor, "batch"]:
    return _exact(logits).gather(-1, tokens_of_rows(tokens, len(logits), logits.shape[-1], logits.device)[:, None])[
        :, 0
    ]
