"""How the next token is chosen: greedily or by drawing, with the logits processors of `transformers`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.errors import InputError

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

    from hooked_vlm.model.vlm import HookedVLM

_DRAWING = ("temperature", "top_k", "top_p")
"""Settings that change nothing without `do_sample`."""
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups"), (1,)),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale"), (1.0,)),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha"), (0.0,)),
    **dict.fromkeys(("token_healing", "watermarking_config"), (False,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "stop_strings"), ([],)),
    **dict.fromkeys(("sequence_bias", "forced_decoder_ids", "constraints", "force_words_ids"), ([], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("top_h", "dola_layers"), ()),
}
"""Settings of a generation_config.json that would change tokens and are refused, unless they have one of these values.
None always changes nothing."""


@dataclass(frozen=True)
class Sampling:
    """Settings of generation by `transformers`' names; None where nothing is asked for.

    Raises:
        InputError: a setting out of range, or one that acts on draws only, without `do_sample`.
    """

    do_sample: Any = None
    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    repetition_penalty: Any = None
    min_new_tokens: Any = None
    num_return_sequences: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool | None):
            raise InputError(f"do_sample must be True or False, got {self.do_sample!r}")
        for name, kind, fits, expected in (
            ("temperature", Real, lambda x: x > 0, "a positive number (do_sample=False is greedy)"),
            ("top_k", Integral, lambda x: x >= 1, "a whole number from 1"),
            ("top_p", Real, lambda x: 0 < x <= 1, "a number in (0, 1]"),
            ("repetition_penalty", Real, lambda x: x > 0, "a positive number"),
            ("min_new_tokens", Integral, lambda x: x >= 0, "a whole number from 0"),
            ("num_return_sequences", Integral, lambda x: x >= 1, "a whole number from 1"),
        ):
            value: Any = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
                raise InputError(f"{name} must be {expected}, got {value!r}")
            number: Any = value  # as Python has it, whatever numpy calls it
            object.__setattr__(self, name, int(number) if kind is Integral else float(number))
        if self.do_sample:
            return
        if idle := [name for name in _DRAWING if getattr(self, name) is not None]:
            raise InputError(f"{idle[0]} changes draws only, and greedy generation draws nothing: add do_sample=True")
        if self.n_samples > 1:
            raise InputError(f"num_return_sequences={self.n_samples} greedy answers are the same: add do_sample=True")

    @property
    def n_samples(self) -> int:
        """Number of samples of each prompt."""
        return 1 if self.num_return_sequences is None else self.num_return_sequences

    def processors(self, n_prompt: int, stops: Sequence[int], device: torch.device) -> "LogitsProcessorList | None":
        """Return what changes the logits before a token is chosen, in `transformers`' order; None if nothing does."""
        wanted = (self.repetition_penalty, self.min_new_tokens, self.temperature, self.top_k, self.top_p)
        if all(value is None for value in wanted):
            return None
        from transformers import LogitsProcessorList
        from transformers.generation import logits_process as processes

        chain: list[Any] = []
        if self.repetition_penalty is not None:
            chain.append(processes.RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.min_new_tokens and stops:
            shortest = processes.MinNewTokensLengthLogitsProcessor
            chain.append(shortest(n_prompt, self.min_new_tokens, list(stops), device=str(device)))
        if self.temperature is not None:
            chain.append(processes.TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            chain.append(processes.TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            chain.append(processes.TopPLogitsWarper(float(self.top_p)))
        return LogitsProcessorList(chain)

    def choose(self, scores: Float[Tensor, "batch d_vocab"], generator: torch.Generator | None) -> Int[Tensor, "batch"]:
        """Choose one token for each row from its processed logits."""
        if not self.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


@dataclass(frozen=True)
class Stopping:
    """What ends a row: its first stop token, or a text."""

    eos: tuple[int, ...]
    texts: Any = None
    """`transformers`' criteria for texts."""

    @classmethod
    def of(
        cls,
        model: "HookedVLM",
        stop_at_eos: bool,
        eos_token_id: Any,
        stop_strings: Any,
    ) -> "Stopping":
        """Check what is given.

        Raises:
            InputError: stop tokens that are not to stop, ids outside of the vocabulary, texts without a tokenizer.
        """
        if eos_token_id is not None and not stop_at_eos:
            raise InputError("eos_token_id says where to stop, stop_at_eos=False not to stop: give one of them")
        given = model.cfg.eos_token_ids if eos_token_id is None else eos_token_id
        ids: tuple[Any, ...] = tuple(given) if isinstance(given, list | tuple) else (given,)
        if eos_token_id is not None:
            wrong = [i for i in ids if not isinstance(i, Integral) or isinstance(i, bool)]
            if wrong or not ids:
                raise InputError(f"eos_token_id must be the id of a token, or several, got {eos_token_id!r}")
            if outside := [i for i in ids if not 0 <= i < model.cfg.d_vocab]:
                raise InputError(f"eos_token_id={outside[0]} lies outside of the vocabulary of {model.cfg.d_vocab}")
        if stop_strings is None:
            return cls(ids if stop_at_eos else ())
        if model.tokenizer is None:
            raise InputError("stop_strings are texts, and this model has no tokenizer: give eos_token_id")
        texts: list[Any] = list(stop_strings) if isinstance(stop_strings, list | tuple) else [stop_strings]
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise InputError(f"stop_strings must be texts with at least one character, got {stop_strings!r}")
        from transformers import StopStringCriteria

        return cls(ids if stop_at_eos else (), StopStringCriteria(model.tokenizer, texts))

    @property
    def stops(self) -> bool:
        """Whether anything ends a row."""
        return bool(self.eos) or self.texts is not None

    def __call__(self, token: Int[Tensor, "row"], ids: Int[Tensor, "row pos"] | None) -> Bool[Tensor, "row"]:
        """Return which rows end with their newest token."""
        ended = self._is_eos(token)
        return ended if self.texts is None else ended | self.texts(ids, None)

    def _is_eos(self, tokens: Int[Tensor, "*row"]) -> Bool[Tensor, "*row"]:
        return torch.isin(tokens, torch.tensor(self.eos, dtype=tokens.dtype, device=tokens.device))

    def without_stop(self, answer: Int[Tensor, "pos"]) -> Int[Tensor, "kept"]:
        """Drop the stop token that ends an answer, if one does."""
        return answer[:-1] if len(answer) and bool(self._is_eos(answer[-1:])) else answer


def checkpoint_settings(config: Mapping[str, Any], do_sample: bool | None = None) -> dict[str, Any]:
    """Settings of a generation_config.json, as `transformers`' `generate` takes them.

    Args:
        do_sample: in place of the file's.

    Raises:
        InputError: one that would change tokens and is not supported here.
    """
    for name, neutral in _UNSUPPORTED.items():
        value = config.get(name)
        if value is not None and not any(value == same and type(value) is type(same) for same in neutral):
            raise InputError(
                f'the checkpoint generates with {name}={value!r}, which is not supported: leave settings="checkpoint" '
                "out and pass what you want"
            )
    stated = {field.name: config[field.name] for field in fields(Sampling) if config.get(field.name) is not None}
    if do_sample is not None:
        stated["do_sample"] = do_sample
    if not stated.get("do_sample"):
        return {name: value for name, value in stated.items() if name not in _DRAWING}
    stated.setdefault("top_k", 50)  # transformers' own where the file states none
    return {name: value for name, value in stated.items() if (name, value) != ("top_k", 0)}
