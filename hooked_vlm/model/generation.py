"""Generation with a key-value cache and hooks at every step, and the probability of a given answer."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import trange

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.other_names import refuse_arguments
from hooked_vlm.inputs.vlm_inputs import Answer, VLMInputs
from hooked_vlm.model.cache import VLMCache
from hooked_vlm.model.finite import check_finite
from hooked_vlm.model.recording import names_to_store
from hooked_vlm.model.sampling import Sampling, Stopping, checkpoint_settings
from hooked_vlm.nn.forward_pass import are_finite, check_context
from hooked_vlm.nn.hooks import HookName

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@torch.no_grad()
def generate(
    model: "HookedVLM",
    input: Any,
    max_new_tokens: Any = 32,
    *,
    do_sample: bool | None = None,
    temperature: Any = None,
    top_k: Any = None,
    top_p: Any = None,
    repetition_penalty: Any = None,
    min_new_tokens: Any = None,
    num_return_sequences: Any = None,
    stop_at_eos: bool = True,
    eos_token_id: Any = None,
    stop_strings: Any = None,
    settings: Literal["checkpoint"] | None = None,
    fwd_hooks: Sequence[tuple[HookName, Callable]] = (),
    return_type: Literal["tokens", "str"] | None = None,
    output_logits: bool = False,
    return_cache: bool = False,
    names_filter: Any = None,
    generator: torch.Generator | None = None,
    verbose: bool = False,
    **elsewhere: Any,
) -> Any:
    """Continue the prompt, greedily unless `do_sample`.

    The logits are the model's own: a generation_config.json acts only with `settings="checkpoint"`.

    Args:
        input: a `VLMInputs` (padded on the left, if at all), token ids or raw text.
        max_new_tokens: maximum; fewer if every row has stopped, or the context is full.
        do_sample: draw from softmax(logits / temperature) instead of taking the largest logit.
        top_k: draw from the `top_k` likeliest tokens.
        top_p: draw from the smallest set with this probability.
        repetition_penalty: divide logits of tokens that occur in the row by this where positive, else multiply.
        min_new_tokens: no stop token before this many.
        num_return_sequences: samples of each prompt, one after the other in the result; images and prompt run once.
            Hooks then see the prompt's rows in its pass, and in each step all rows of the first samples, of the
            second ones, and so on.
        stop_at_eos: a row ends with its first stop token; what follows is padding.
        eos_token_id: stop tokens in place of generation_config.json's.
        stop_strings: a row ends with any of these texts, which stay in it (one may begin in the prompt).
        settings: "checkpoint" takes what is not given here from generation_config.json, as `transformers` does.
        fwd_hooks: hooks for the prompt's pass and for every step. In a hook, `hook.ctx["step"]` counts
            passes (0 is the prompt's) and `hook.ctx["positions"]` holds the absolute position of each row
            of the pass.
        return_type: "tokens" for prompt and new tokens [batch, pos], "str" for the new text (a list of texts if
            there are several rows); by default text for text, otherwise tokens.
        output_logits: also return the model's logits of every new token, [batch, new, d_vocab].
        return_cache: also return the activations of one pass over prompts and answers under the same hooks, which
            find all positions in it at once.
        names_filter: which activations, as for `run_with_cache`.
        verbose: show a progress bar.

    Returns:
        Tokens or text; a tuple of them, the logits and the cache where those are asked for.

    Raises:
        InputError: rows padded at the end, or settings that are out of range or change nothing.
        HookError: a hook that cannot act.
        NotFiniteError: logits that are infinite or not numbers.
    """
    refuse_arguments("generate", elsewhere)
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be a whole number from 1, got {max_new_tokens!r}")
    if return_type not in ("tokens", "str", None):
        raise InputError(f'return_type must be "tokens" or "str", got {return_type!r}')
    if settings not in ("checkpoint", None):
        raise InputError(f'settings must be "checkpoint" or None, got {settings!r}')
    named = {
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "min_new_tokens": min_new_tokens,
        "num_return_sequences": num_return_sequences,
    }
    given = {name: value for name, value in named.items() if value is not None}
    if settings is not None:
        given = {**checkpoint_settings(model.generation_config, do_sample), **given}
    sampling = Sampling(**given)
    _check_idle(sampling, stop_at_eos, max_new_tokens, generator, names_filter if not return_cache else None)
    if return_cache and sampling.n_samples > 1:
        raise InputError("return_cache goes with one sample of each prompt: run_with_cache(inputs.append(answers))")
    inputs = model.as_inputs(input)
    model.check_reachable([name for name, _ in fwd_hooks], inputs, {})
    if return_cache:
        names_to_store(model, names_filter, inputs, {})  # which refuses names before the work
    n_new = _room(model, inputs, max_new_tokens)
    stopping = Stopping.of(model, stop_at_eos, eos_token_id, stop_strings)
    with model.hooks(fwd_hooks=list(fwd_hooks)):
        tokens, lengths, logits = _continued(
            model, inputs, n_new, sampling, stopping, generator, output_logits, verbose
        )
        answers = [row[:length] for row, length in zip(tokens, lengths.tolist(), strict=True)]
        cache = _activations(model, inputs.append(answers), names_filter) if return_cache else None
    as_text = return_type == "str" or (return_type is None and _is_text(input))
    if as_text:
        texts = [model.to_string(stopping.without_stop(answer)) for answer in answers]
        out: Any = texts[0] if len(texts) == 1 else texts
    else:
        out = torch.cat((inputs.tokens.repeat_interleave(sampling.n_samples, dim=0), tokens), dim=1)
    extras = ([logits] if output_logits else []) + ([cache] if return_cache else [])
    return (out, *extras) if extras else out


def _activations(model: "HookedVLM", answered: VLMInputs, names_filter: Any) -> VLMCache:
    """Run over prompts and answers; hooks find a `step` there, too, that of the prompt's pass."""
    past = model.new_kv_cache(*answered.shape)
    return model.run_with_cache(answered, names_filter=names_filter, past_kv_cache=past)[1]


def _check_idle(
    sampling: Sampling,
    stop_at_eos: bool,
    max_new_tokens: int,
    generator: torch.Generator | None,
    names_filter: Any,
) -> None:
    """Refuse settings that would change nothing.

    Raises:
        InputError: names one.
    """
    if generator is not None and not sampling.do_sample:
        raise InputError("a generator is for draws, and greedy generation draws nothing: add do_sample=True")
    if names_filter is not None:
        raise InputError("names_filter says which activations come back: add return_cache=True")
    if sampling.min_new_tokens and not stop_at_eos:
        raise InputError("min_new_tokens holds stop tokens back, and stop_at_eos=False has none: leave one of them out")
    if sampling.min_new_tokens and sampling.min_new_tokens > max_new_tokens:
        raise InputError(f"min_new_tokens={sampling.min_new_tokens} is more than max_new_tokens={max_new_tokens}")


def _continued(
    model: "HookedVLM",
    inputs: VLMInputs,
    n_new: int,
    sampling: Sampling,
    stopping: "Stopping",
    generator: torch.Generator | None,
    keep_logits: bool,
    verbose: bool,
) -> tuple[Int[Tensor, "sample new"], Int[Tensor, "sample"], Float[Tensor, "sample new d_vocab"] | None]:
    """Run the prompts, then token after token; the samples of a prompt lie one after the other.

    Returns:
        The new tokens, how many of each row came before it had stopped (its stop included), and the logits of each.
    """
    n_rows, n_samples, n_prompt = len(inputs), sampling.n_samples, inputs.shape[1]
    cache = model.new_kv_cache(n_rows, n_prompt + n_new)
    processors = sampling.processors(n_prompt, stopping.eos, inputs.device)
    ids = _without_padding(inputs).repeat_interleave(n_samples, dim=0) if processors or stopping.texts else None
    done = torch.zeros(n_rows * n_samples, dtype=torch.bool, device=inputs.device)
    lengths = torch.zeros_like(done, dtype=torch.long)
    new: list[Tensor] = []
    kept: list[Tensor] = []
    for step in trange(n_new, disable=not verbose, desc="generating", unit="token"):
        if step == 0:
            logits = model(inputs, past_kv_cache=cache, logits_at="last")[:, -1].repeat_interleave(n_samples, dim=0)
            cache = cache if n_samples == 1 else cache.repeat(n_samples)
        else:  # hooks see all rows of the first samples, then of the second ones, ...
            token = new[-1].view(n_rows, n_samples).T.flatten()
            logits = model.next_logits(token, cache).unflatten(0, (n_samples, n_rows)).transpose(0, 1).flatten(0, 1)
        _check_step(model, inputs, new, logits)
        if keep_logits:
            kept.append(logits)
        scores = logits if not sampling.do_sample and processors is None else logits.float()
        token = sampling.choose(scores if processors is None else processors(ids, scores), generator)  # pyright: ignore[reportArgumentType]
        token = torch.where(done, inputs.spec.pad_token_id, token)
        lengths += ~done
        new.append(token)
        ids = None if ids is None else torch.cat((ids, token[:, None]), dim=1)
        if stopping.stops:
            done |= stopping(token, ids)
            if bool(done.all()):
                break
    tokens = torch.stack(new, dim=1) if new else inputs.tokens.repeat_interleave(n_samples, dim=0)[:, :0]
    return tokens, lengths, torch.stack(kept, dim=1) if kept else None


def _check_step(model: "HookedVLM", inputs: VLMInputs, new: list[Tensor], logits: Tensor) -> None:
    if not are_finite(logits):
        one_sample = new and len(new[0]) == len(inputs)
        check_finite(model, inputs.append(torch.stack(new, dim=1)) if one_sample else inputs, logits)


def _without_padding(inputs: VLMInputs) -> Int[Tensor, "batch pos"]:
    """Token ids with each row's first token in place of its padding: what `transformers` looks for repetitions in."""
    first = inputs.tokens.gather(1, torch.tensor(inputs.first, device=inputs.device)[:, None])
    return torch.where(inputs.attention_mask.bool(), inputs.tokens, first)


def _is_text(input: Any) -> bool:
    return isinstance(input, str) or (isinstance(input, Sequence) and all(isinstance(row, str) for row in input))


def _room(model: "HookedVLM", inputs: VLMInputs, max_new_tokens: int) -> int:
    """Return how many tokens may follow the prompts; warn where the context ends before.

    Raises:
        InputError: rows padded at the end, prompts longer than the context.
    """
    if min(inputs.stop) != inputs.shape[1]:
        raise InputError("generation continues the last position: rows must be padded on the left, not at the end")
    check_context(model.cfg, inputs, 0)
    room = max(model.cfg.n_ctx_limit - inputs.shape[1], 0)
    if max_new_tokens <= room:
        return max_new_tokens
    limit = model.cfg.n_ctx_limit
    warnings.warn(f"generation stops after {room} new tokens: the context of {limit} is full then", stacklevel=3)
    return room


def log_probs(model: "HookedVLM", inputs: VLMInputs, answer: Answer) -> Float[Tensor, "batch answer"]:
    """Compute the log-probability of every token of `answer` after the prompt, in one forward pass.

    Where rows have answers of different lengths the shorter ones end in zeros, so that `.sum(-1)` is
    the log-probability of each whole answer.
    """
    with_answer = inputs.append(answer)
    n_new = [b - a for a, b in zip(inputs.n_generated, with_answer.n_generated, strict=True)]
    logits = model(with_answer)
    check_finite(model, with_answer, logits)
    out = logits.new_zeros(len(inputs), max(n_new), dtype=torch.promote_types(logits.dtype, torch.float32))
    for row, (n, stop) in enumerate(zip(n_new, with_answer.stop, strict=True)):
        predicted = logits[row, stop - n - 1 : stop - 1].to(out.dtype).log_softmax(-1)
        targets = with_answer.tokens[row, stop - n : stop]
        out[row, :n] = predicted.gather(-1, targets[:, None])[:, 0]
    return out
