"""Greedy and sampled generation with a key-value cache, hooks live at every step."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import trange

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.hooks import HookName


class GenerationMixin(nn.Module):
    """`generate` of a `HookedVLM`."""

    cfg: VLMConfig
    hook_dict: dict[str, Any]
    as_inputs: Callable[[Any], VLMInputs]
    hooks: Callable[..., Any]
    new_kv_cache: Callable[..., Any]
    to_string: Callable[..., Any]
    check_reachable: Callable[..., None]
    next_logits: Callable[[Tensor, Any], Tensor]
    _check_context: Callable[[VLMInputs, int], None]

    @torch.no_grad()
    def generate(
        self,
        input: Any,
        max_new_tokens: int = 32,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_at_eos: bool = True,
        fwd_hooks: Sequence[tuple[HookName, Callable]] = (),
        return_type: Literal["tokens", "str"] = "tokens",
        generator: torch.Generator | None = None,
        verbose: bool = False,
    ) -> Any:
        """Continue the prompt.

        Args:
            input: a `VLMInputs` (padded on the left, if at all), token ids or raw text.
            max_new_tokens: at most so many; fewer if every row has stopped, or the context is full.
            do_sample: draw from softmax(logits / temperature) instead of taking the largest logit.
            top_k: draw from so many likeliest tokens.
            top_p: draw from the smallest set with this probability.
            stop_at_eos: a row ends with its first stop token (generation_config.json's); what follows is
                padding.
            fwd_hooks: hooks for the prompt's pass and for every step. In a hook, `hook.ctx["step"]` counts
                passes (0 is the prompt's) and `hook.ctx["positions"]` holds the absolute position of each row
                of the pass.
            return_type: "tokens" for prompt and new tokens [batch, pos], "str" for the new text (a list of
                texts if the batch has several rows).
            verbose: show a progress bar.

        Raises:
            InputError: rows padded at the end, or settings out of range.
            HookError: a hook that cannot act.
        """
        if return_type not in ("tokens", "str"):
            raise InputError(f'return_type must be "tokens" or "str", got {return_type!r}')
        inputs = self.as_inputs(input)
        self.check_reachable([name for name, _ in fwd_hooks], inputs, {})
        _check_settings(inputs, max_new_tokens, do_sample, temperature, top_k, top_p)
        self._check_context(inputs, 0)
        n_prompt = inputs.shape[1]
        room = max(self.cfg.n_ctx_limit - n_prompt, 0)
        if max_new_tokens > room:
            warnings.warn(
                f"generation stops after {room} new tokens: the context of {self.cfg.n_ctx_limit} is full then",
                stacklevel=2,
            )
            max_new_tokens = room
        cache = self.new_kv_cache(len(inputs), n_prompt + max_new_tokens)
        stops = torch.tensor(self.cfg.eos_token_ids, device=inputs.device)
        done = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        new: list[Tensor] = []
        with self.hooks(fwd_hooks=list(fwd_hooks)):
            for step in trange(max_new_tokens, disable=not verbose, desc="generating", unit="token"):
                if step == 0:
                    logits = self(inputs, past_kv_cache=cache, logits_at="last")[:, -1]
                else:
                    logits = self.next_logits(new[-1], cache)
                token = _choose(logits, do_sample, temperature, top_k, top_p, generator)
                if stop_at_eos:
                    token = torch.where(done, inputs.spec.pad_token_id, token)
                    done |= torch.isin(token, stops)
                new.append(token)
                if stop_at_eos and bool(done.all()):
                    break
        tokens = torch.stack(new, dim=1) if new else inputs.tokens[:, :0]
        if return_type == "tokens":
            return torch.cat((inputs.tokens, tokens), dim=1)
        return self._texts(tokens, stops if stop_at_eos else stops[:0])

    def _texts(self, tokens: Int[Tensor, "batch new"], stops: Int[Tensor, "stop"]) -> str | list[str]:
        texts = []
        for row in tokens:
            at = torch.isin(row, stops).nonzero()
            texts.append(self.to_string(row[: int(at[0])] if len(at) else row))
        return texts[0] if len(texts) == 1 else texts


def _check_settings(
    inputs: VLMInputs,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if min(inputs.stop) != inputs.shape[1]:
        raise InputError("generation continues the last position: rows must be padded on the left, not at the end")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if do_sample and not temperature > 0:
        raise InputError(f"temperature must be positive, got {temperature} (do_sample=False is greedy)")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p must lie in (0, 1], got {top_p}")


def _choose(
    logits: Float[Tensor, "batch d_vocab"],
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Int[Tensor, "batch"]:
    if not do_sample:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = (before >= top_p).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
