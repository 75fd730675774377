"""Generation with a key-value cache and hooks at every step, and the probability of a given answer."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import trange

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import Answer, VLMInputs
from hooked_vlm.nn.forward_pass import check_context
from hooked_vlm.nn.hooks import HookName

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@torch.no_grad()
def generate(
    model: "HookedVLM",
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
        max_new_tokens: maximum; fewer if every row has stopped, or the context is full.
        do_sample: draw from softmax(logits / temperature) instead of taking the largest logit.
        top_k: draw from the `top_k` likeliest tokens.
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
    inputs = model.as_inputs(input)
    model.check_reachable([name for name, _ in fwd_hooks], inputs, {})
    _check_settings(inputs, max_new_tokens, do_sample, temperature, top_k, top_p)
    check_context(model.cfg, inputs, 0)
    n_prompt = inputs.shape[1]
    room = max(model.cfg.n_ctx_limit - n_prompt, 0)
    if max_new_tokens > room:
        warnings.warn(
            f"generation stops after {room} new tokens: the context of {model.cfg.n_ctx_limit} is full then",
            stacklevel=2,
        )
        max_new_tokens = room
    cache = model.new_kv_cache(len(inputs), n_prompt + max_new_tokens)
    stops = torch.tensor(model.cfg.eos_token_ids, device=inputs.device)
    done = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
    new: list[Tensor] = []
    with model.hooks(fwd_hooks=list(fwd_hooks)):
        for step in trange(max_new_tokens, disable=not verbose, desc="generating", unit="token"):
            if step == 0:
                logits = model(inputs, past_kv_cache=cache, logits_at="last")[:, -1]
            else:
                logits = model.next_logits(new[-1], cache)
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
    return _texts(model, tokens, stops if stop_at_eos else stops[:0])


def _texts(model: "HookedVLM", tokens: Int[Tensor, "batch new"], stops: Int[Tensor, "stop"]) -> str | list[str]:
    texts = []
    for row in tokens:
        at = torch.isin(row, stops).nonzero()
        texts.append(model.to_string(row[: int(at[0])] if len(at) else row))
    return texts[0] if len(texts) == 1 else texts


def log_probs(model: "HookedVLM", inputs: VLMInputs, answer: Answer) -> Float[Tensor, "batch answer"]:
    """Compute the log-probability of every token of `answer` after the prompt, in one forward pass.

    Where rows have answers of different lengths the shorter ones end in zeros, so that `.sum(-1)` is
    the log-probability of each whole answer.
    """
    with_answer = inputs.append(answer)
    n_new = [b - a for a, b in zip(inputs.n_generated, with_answer.n_generated, strict=True)]
    logits = model(with_answer)
    out = logits.new_zeros(len(inputs), max(n_new), dtype=torch.promote_types(logits.dtype, torch.float32))
    for row, (n, stop) in enumerate(zip(n_new, with_answer.stop, strict=True)):
        predicted = logits[row, stop - n - 1 : stop - 1].to(out.dtype).log_softmax(-1)
        targets = with_answer.tokens[row, stop - n : stop]
        out[row, :n] = predicted.gather(-1, targets[:, None])[:, 0]
    return out


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
