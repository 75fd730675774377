"""One run of the study: model, data sets, stored results, and what its experiments share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.common.finding import Finding
from hooked_vlm.experiments.common.models import check_takes_images
from hooked_vlm.experiments.common.workers import workers_of
from hooked_vlm.experiments.ocr_heads.config import Protocol, ScoreConfig
from hooked_vlm.experiments.ocr_heads.data.scored import PAPER_PIXELS, scored_sets
from hooked_vlm.experiments.ocr_heads.data.store import DataSet
from hooked_vlm.experiments.ocr_heads.data.tasks import QATask
from hooked_vlm.experiments.ocr_heads.examples import Example, as_asked, batches, coarse, prompt_length
from hooked_vlm.experiments.ocr_heads.official import official_code
from hooked_vlm.experiments.ocr_heads.scoring import Scores, gather, score_batch
from hooked_vlm.experiments.ocr_heads.selection import kept_by_code, ranked, select
from hooked_vlm.interventions import Head
from hooked_vlm.loading.folders import TOY_MODELS
from hooked_vlm.model.by_name import load
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import SharedSetup, Task, Workers

__all__ = ["Finding", "Study", "head_names", "head_table"]


class Study:
    """Model, settings and workers of a run. Scores that several experiments need are computed once."""

    def __init__(self, config: ScoreConfig, model: HookedVLM | None = None, workers: Workers | None = None) -> None:
        if config.data == "auto":
            toy = (TOY_MODELS / Path(config.model).name).exists()
            config = replace(config, data="toy" if toy else "paper")
        self.model = model or load(config.model, config.device, config.dtype)
        check_takes_images(self.model, config.model)
        self.scored_tokens = config.new_tokens
        """Length of a reply while heads are scored."""
        code = official_code(self.model)
        if config.compat:
            self.scored_tokens = config.max_new_tokens or code.reply_tokens
            config = replace(config, protocol=code.protocol, max_new_tokens=config.max_new_tokens or code.task_tokens)
        self.config = config
        self.code = code if config.protocol.pages == "code" else None
        """The published code's questions, where its pages are made."""
        self.parts = ResultStore(config.out / "parts")
        self.data_folder = config.data_folder or config.out / "data"
        self.pixels = None if config.data == "toy" else PAPER_PIXELS
        self.workers = workers or workers_of(config, self.model, config.device)
        """Workers count the tokens of prompts and answers, and their time."""

    @property
    def n_heads(self) -> int:
        return self.model.cfg.n_layers * self.model.cfg.n_heads

    @cached_property
    def identity(self) -> dict[str, str]:
        return self.model.identity()

    def scored(self, as_text: bool) -> list[DataSet]:
        """Pages or texts that heads are scored on."""
        return self.sets(as_text, self.config.seed, self.config.samples)

    def sets(self, as_text: bool, seed: int, n: int) -> list[DataSet]:
        """Make `n` pages or texts of the kinds that heads are scored on."""
        names = ["passkey", "niah"] if self.config.data == "paper" else [self.config.data]
        return scored_sets(self.data_folder, names, as_text, seed, n, self.config.lengths, self.code)

    def asked(self, tasks: Sequence[QATask]) -> list[QATask]:
        """Tasks with their examples as the protocol puts them to the model."""
        protocol = self.config.protocol
        way = {"chat": protocol.chat, "first_resize": protocol.first_resize}  # pages of tasks keep their order
        if way == {"chat": True, "first_resize": None}:
            return list(tasks)
        found = []
        for task in tasks:
            examples = [as_asked(e, replace(protocol, page_order="number")) for e in task.data.examples]
            found.append(replace(task, data=replace(task.data, examples=examples, digest=f"{task.data.digest} {way}")))
        return found

    @cached_property
    def ocr(self) -> Scores:
        """OCR score of every head."""
        return self.score("ocr", self.scored(as_text=False), self.model, self.identity)

    @cached_property
    def retrieval(self) -> Scores:
        """Text retrieval score of every head."""
        return self.score("retrieval", self.scored(as_text=True), self.model, self.identity)

    @cached_property
    def sibling(self) -> Scores | None:
        """Text retrieval score of every head of the text-only model, if one is configured."""
        if self.config.text_model is None:
            return None
        model = load(self.config.text_model, self.config.device, self.config.dtype)
        if model.tokenizer is None:
            raise StudyError(f"--text-model {self.config.text_model} has no tokenizer")
        self.workers.rest()  # both models' workers together may not fit
        with workers_of(self.config, model, self.config.device) as workers:
            found = self.score("retrieval", self.scored(as_text=True), model, model.identity(), workers)
            self.workers.count(workers.size, workers.seconds)
        return found

    def score(
        self,
        kind: Literal["ocr", "retrieval"],
        sets: Sequence[DataSet],
        model: HookedVLM,
        identity: Mapping[str, str],
        workers: Workers | None = None,
    ) -> Scores:
        """Score every head on data sets, batch by batch; finished batches are stored.

        Args:
            workers: those of another model than the study's.

        Raises:
            StudyError: no sample counts, so no head can be scored.
        """
        config, protocol, new_tokens, found = self.config, self.config.protocol, self.scored_tokens, []
        for data in sets:
            examples = [as_asked(e, protocol) for e in data.examples]
            if config.granularity == "coarse":
                examples = [coarse(e) for e in examples]
            exact = data.name.startswith("toy")
            units = []
            for group, n_tokens in self.groups(model, examples, new_tokens):
                own = [examples[i] for i in group]
                key = {
                    "score": kind, "model": identity, "sees": model.cfg.vision is not None,
                    "data": data.digest, "examples": group, "pixels": self.pixels,
                    "granularity": config.granularity, "protocol": vars(_as_it_acts(protocol, own)),
                    "new_tokens": new_tokens,
                }  # fmt: skip
                arguments = (kind, own, protocol, self.pixels, new_tokens, exact)
                units.append(self.unit(key, score_batch, arguments, n_tokens))
            found += self.tables(units, f"{kind} scores, {data.name}", workers)
        shape = (model.cfg.n_layers, model.cfg.n_heads)
        scores = gather(kind, pd.concat(found, ignore_index=True), shape, protocol.instance(kind))
        if not len(scores.instances):
            raise StudyError(
                f"the model answers none of {scores.n_asked} {'pages' if kind == 'ocr' else 'texts'} within "
                f"{new_tokens} tokens, so no head can be scored: raise --max-new-tokens or use another model"
            )
        return scores

    def groups(self, model: HookedVLM, examples: Sequence[Example], new_tokens: int = 0) -> list[tuple[list[int], int]]:
        """Batches of examples (as indices), each with its number of tokens, those to be generated included."""
        lengths = [prompt_length(model, example, self.pixels) + new_tokens for example in examples]
        return [(group, sum(lengths[i] for i in group)) for group in batches(lengths, self.config.tokens_per_batch)]

    def unit(
        self,
        key: Mapping[str, Any],
        work: Callable[..., pd.DataFrame],
        arguments: tuple[Any, ...],
        n_tokens: int,
        common: SharedSetup | None = None,
    ) -> Task:
        """Task whose table is stored with the study's results."""
        return Task(self.parts, key, work, arguments, n_tokens, common)

    def tables(self, units: Sequence[Task], what: str, workers: Workers | None = None) -> list[pd.DataFrame]:
        """Run tasks with a progress bar and return their tables."""
        workers = workers or self.workers
        return workers.tables(units, what, each="batch", counted="tokens", quiet=self.config.quiet)

    # ---------------------------------------------------------------- heads

    def selected(self, scores: Scores) -> Bool[np.ndarray, "layer head"]:
        return select(scores, self.config.threshold, self.config.min_frequency, self.config.protocol.frequency_rule)

    def top(self, scores: Scores, k: int) -> tuple[Head, ...]:
        """Top `k` heads by mean score; under the code's protocol the heads that its rule drops come last."""
        mean = scores.mean
        if self.config.protocol.frequency_rule == "inverted":
            mean = np.where(kept_by_code(scores, self.config.min_frequency), mean, 0.0)
        return tuple(ranked(mean)[:k])

    def default_counts(self) -> tuple[int, ...]:
        """Numbers of heads to mask: the paper's 10 and 20, or an eighth of the heads of a small model."""
        eighth = max(1, self.n_heads // 8)
        return (eighth,) if eighth < 10 else (10, 20)

    def default_tasks(self) -> tuple[str, ...]:
        toy = self.config.data == "toy"
        return ("page", "text", "naming") if toy else ("docvqa", "mpdocvqa", "nq", "hotpotqa", "passkey")


def _as_it_acts(protocol: Protocol, examples: Sequence[Example]) -> Protocol:
    """The protocol without its order of pages, where there are too few of them for it to matter."""
    many = any(len(example.images) > 10 for example in examples)
    return protocol if many else replace(protocol, page_order="number")


def head_names(heads: Sequence[Head]) -> str:
    """Format heads as "2.1, 2.0"."""
    return ", ".join(f"{layer}.{head}" for layer, head in heads)


def head_table(values: dict[str, Float[np.ndarray, "layer head"]]) -> pd.DataFrame:
    """Table with one row per head and one column per quantity."""
    shape = next(iter(values.values())).shape
    layers, heads = np.indices(shape)
    return pd.DataFrame({"layer": layers.ravel(), "head": heads.ravel()} | {k: v.ravel() for k, v in values.items()})
