"""Metrics of answers that are known where a sweep runs: the data's, or what the model itself would say."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from hooked_vlm.data.samples import Sample
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.metrics import Metric, answered, log_prob, logit_difference
from hooked_vlm.sweeps.run import with_features

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

LogitsAt = Literal["last", "all"]


@dataclass(frozen=True)
class OfAnswer:
    """A metric of the answer to a prompt: a sample's own, or else the greedy answer of the model without intervention.

    - "log-prob": the log-probability of the answer's first token;
    - "logit-diff": the logit of the answer's first token minus that of the most likely other token of the run without
      intervention;
    - "answer": 1 where greedy decoding would begin with exactly this answer's tokens, else 0
      (`hooked_vlm.metrics.answered`). The model's own answer ends with its end token unless it reached
      `max_new_tokens`; a sample's answer has none, so a generated "42" may count for the answer "4".
    """

    kind: Literal["log-prob", "logit-diff", "answer"] = "log-prob"
    answer: str | None = None
    """The answer to inputs that are no `Sample`."""
    max_new_tokens: int = 16
    """How long the greedy answer may get."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What the sweeps of a case run on."""

    model: "HookedVLM"
    inputs: VLMInputs
    metric: Metric
    logits_at: LogitsAt
    answer: str | None = None
    """The answer that the metric is about, if it is of one."""

    @cached_property
    def encoded(self) -> VLMInputs:
        """The inputs with their images encoded, for interventions that leave the image side as it is."""
        return with_features(self.model, self.inputs)


def subject(
    model: "HookedVLM",
    given: VLMInputs | Sample,
    metric: Metric | OfAnswer,
    logits_at: LogitsAt,
    bounds: dict[str, Any],
) -> Subject:
    """Prepare a case, on the model's device.

    Raises:
        InputError: a sample that cannot be used.
    """
    if not isinstance(metric, OfAnswer):
        inputs = given.inputs(model, **bounds) if isinstance(given, Sample) else given
        return Subject(model, model.as_inputs(inputs), metric, logits_at)
    if isinstance(given, Sample):
        metric = replace(metric, answer=given.answer) if metric.answer is None else metric
        given = without_answer(given).inputs(model, **bounds)
    prompt = Subject(model, model.as_inputs(given), log_prob(0), "last")
    return _of_answer(prompt, metric)


def without_answer(sample: Sample) -> Sample:
    """The prompt of a sample."""
    return replace(sample, answer=None)


def _of_answer(prompt: Subject, wanted: OfAnswer) -> Subject:
    """Find the answer to one prompt, and the metric it gives."""
    model, inputs = prompt.model, prompt.inputs
    if len(inputs) != 1 or any(inputs.n_generated):
        raise InputError(f"OfAnswer is about one prompt without an answer; got {inputs}")
    if model.tokenizer is None:
        raise InputError("the model has no tokenizer: an answer is text")
    if wanted.answer is None:
        tokens = model.generate(prompt.encoded, wanted.max_new_tokens, return_type="tokens")[0, inputs.shape[1] :]
        special = set(model.tokenizer.all_special_ids)
        text = str(model.to_string([token for token in tokens.tolist() if token not in special]))
    else:
        text = wanted.answer
        tokens = torch.tensor(model.tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)
    if not tokens.numel():
        raise InputError("the answer is empty: there is no token whose probability could be measured")
    first = int(tokens[0])
    if wanted.kind == "answer":
        whole = inputs.append(tokens)
        return Subject(model, whole, answered(whole), "all", text)
    if wanted.kind == "log-prob":
        return replace(prompt, metric=log_prob(first), answer=text)
    logits = model(prompt.encoded, logits_at="last")[0, 0]
    logits[first] = -float("inf")
    return replace(prompt, metric=logit_difference(first, int(logits.argmax())), answer=text)
