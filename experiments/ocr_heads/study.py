"""One run of the study: its model, its data sets, the parts it has finished, and what its experiments share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.common.models import check_asks_about_images
from hooked_vlm.experiments.common.workers import workers_of
from hooked_vlm.experiments.ocr_heads.config import ScoreConfig
from hooked_vlm.experiments.ocr_heads.data.scored import PAPER_PIXELS, scored_sets
from hooked_vlm.experiments.ocr_heads.data.store import DataSet
from hooked_vlm.experiments.ocr_heads.examples import Example, batches, coarse, prompt_length
from hooked_vlm.experiments.ocr_heads.scoring import Scores, gather, score_batch
from hooked_vlm.experiments.ocr_heads.selection import ranked, select
from hooked_vlm.interventions import Head
from hooked_vlm.loading.folders import TOY_MODELS
from hooked_vlm.model.by_name import load
from hooked_vlm.model.fingerprints import weights_hash
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import SharedSetup, Task, Workers

LIVE_SHARE = 0.1
"""A head is live if its mean output norm is at least this share of the largest."""


@dataclass(frozen=True)
class Finding:
    """What an experiment found: a section of the report, and lines for the terminal."""

    heading: str
    lines: list[str]
    paragraphs: list[str] = field(default_factory=list)
    figures: Mapping[str, tuple[Figure, str]] = field(default_factory=dict)
    """Name: (figure, caption)."""
    tables: Mapping[str, tuple[pd.DataFrame, str, int | None]] = field(default_factory=dict)
    """Name: (all rows, caption, how many are shown)."""


class Study:
    """A model with the study's settings, and who does its work. What several experiments need is made once."""

    def __init__(self, config: ScoreConfig, model: HookedVLM | None = None, workers: Workers | None = None) -> None:
        if config.data == "auto":
            toy = (TOY_MODELS / Path(config.model).name).exists()
            config = replace(config, data="toy" if toy else "paper")
        self.config = config
        self.model = model or load(config.model, config.device, config.dtype)
        check_asks_about_images(self.model, config.model)
        self.parts = ResultStore(config.out / "parts")
        self.data_folder = config.data_folder or config.out / "data"
        self.pixels = None if config.data == "toy" else PAPER_PIXELS
        self.workers = workers or workers_of(config, self.model, config.device)
        """They count the tokens of prompts and answers, and the time these take."""

    @property
    def n_heads(self) -> int:
        return self.model.cfg.n_layers * self.model.cfg.n_heads

    @cached_property
    def weights(self) -> str:
        return weights_hash(self.model)

    def scored(self, as_text: bool) -> list[DataSet]:
        """The pages that heads are scored on, or the texts."""
        return self.sets(as_text, self.config.seed, self.config.samples)

    def sets(self, as_text: bool, seed: int, n: int) -> list[DataSet]:
        """`n` pages or texts of the kinds that heads are scored on."""
        names = ["passkey", "niah"] if self.config.data == "paper" else [self.config.data]
        return scored_sets(self.data_folder, names, as_text, seed, n, self.config.lengths)

    @cached_property
    def ocr(self) -> Scores:
        """Every head's OCR score."""
        return self.score("ocr", self.scored(as_text=False), self.model, self.weights)

    @cached_property
    def retrieval(self) -> Scores:
        """Every head's text retrieval score."""
        return self.score("retrieval", self.scored(as_text=True), self.model, self.weights)

    @cached_property
    def sibling(self) -> Scores | None:
        """Every head's text retrieval score in the text-only model, if one is named."""
        if self.config.text_model is None:
            return None
        model = load(self.config.text_model, self.config.device, self.config.dtype)
        if model.tokenizer is None:
            raise StudyError(f"{self.config.text_model} has no tokenizer")
        self.workers.rest()  # both models' workers together may be more than there is room for
        with workers_of(self.config, model, self.config.device) as workers:
            found = self.score("retrieval", self.scored(as_text=True), model, weights_hash(model), workers)
            self.workers.count(workers.size, workers.seconds)
        return found

    def score(
        self,
        kind: Literal["ocr", "retrieval"],
        sets: Sequence[DataSet],
        model: HookedVLM,
        weights: str,
        workers: Workers | None = None,
    ) -> Scores:
        """Score every head on some data sets, batch by batch; finished batches are kept.

        Args:
            workers: of another model than the study's.

        Raises:
            StudyError: no head can be scored, because the model answers nothing.
        """
        config, protocol, found = self.config, self.config.measured_by, []
        for data in sets:
            examples = [coarse(e) for e in data.examples] if config.granularity == "coarse" else data.examples
            exact = data.name.startswith("toy")
            units = []
            for group, n_tokens in self.groups(model, examples, config.new_tokens):
                key = {
                    "score": kind, "weights": weights, "data": data.digest, "examples": group, "pixels": self.pixels,
                    "granularity": config.granularity, "protocol": vars(protocol), "new_tokens": config.new_tokens,
                }  # fmt: skip
                own = [examples[i] for i in group]
                arguments = (kind, own, protocol, self.pixels, config.new_tokens, exact)
                units.append(self.unit(key, score_batch, arguments, n_tokens))
            found += self.tables(units, f"{kind} scores, {data.name}", workers)
        shape = (model.cfg.n_layers, model.cfg.n_heads)
        scores = gather(kind, pd.concat(found, ignore_index=True), shape, protocol.instance)
        if not len(scores.instances):
            raise StudyError(
                f"no answer was found on any of {scores.n_asked} {'pages' if kind == 'ocr' else 'texts'}, so no head "
                f"can be scored: this model does not answer these questions, in {config.new_tokens} tokens "
                "(--max-new-tokens) at most"
            )
        return scores

    def groups(self, model: Any, examples: Sequence[Example], new_tokens: int = 0) -> list[tuple[list[int], int]]:
        """Batches of examples (their indices), each with its number of tokens, those to be generated included."""
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
        """A unit of work, kept among the study's parts."""
        return Task(self.parts, {**key, "version": version("hooked-vlm")}, work, arguments, n_tokens, common)

    def tables(self, units: Sequence[Task], what: str, workers: Workers | None = None) -> list[pd.DataFrame]:
        """The units' tables, with a bar."""
        workers = workers or self.workers
        return workers.tables(units, what, each="batch", counted="tokens", quiet=self.config.quiet)

    # ---------------------------------------------------------------- heads

    def selected(self, scores: Scores) -> Bool[np.ndarray, "layer head"]:
        return select(scores, self.config.threshold, self.config.min_frequency, self.config.measured_by.frequency_rule)

    def top(self, scores: Scores, k: int) -> tuple[Head, ...]:
        """The best `k` heads by their mean; under the code's protocol those its rule drops come last."""
        mean = scores.mean
        if self.config.measured_by.frequency_rule == "inverted":
            mean = np.where((scores.instances == 0).mean(0) > self.config.min_frequency, mean, 0.0)
        return tuple(ranked(mean)[:k])

    def candidates(self, source: str, masked: Sequence[Head]) -> list[Head]:
        """Heads to draw a random control from: "live" ones that score below the threshold, as OCR and as retrieval
        heads, and are not masked, all "others", or "any"."""
        heads = [(layer, head) for layer in range(self.model.cfg.n_layers) for head in range(self.model.cfg.n_heads)]
        if source == "any":
            return heads
        others = [head for head in heads if head not in set(masked)]
        if source == "others":
            return others
        norms, scores = self.ocr.output_norm, np.maximum(self.ocr.mean, self.retrieval.mean)
        live = norms >= LIVE_SHARE * norms.max()
        return [head for head in others if live[head] and scores[head] < self.config.threshold]

    def random_sets(self, source: str, masked: Sequence[Head], k: int, draws: int) -> list[tuple[Head, ...]]:
        """`draws` sets of `k` heads, or none where there are too few to draw from."""
        candidates = self.candidates(source, masked)
        if len(candidates) < k:
            return []
        rng = np.random.default_rng([self.config.seed, 4])
        chosen = [rng.choice(len(candidates), size=k, replace=False) for _ in range(draws)]
        return [tuple(candidates[i] for i in sorted(own)) for own in chosen]

    def default_counts(self) -> tuple[int, ...]:
        """How many heads to mask: the paper's 10 and 20, or an eighth of the heads of a small model."""
        eighth = max(1, self.n_heads // 8)
        return (eighth,) if eighth < 10 else (10, 20)

    def default_tasks(self) -> tuple[str, ...]:
        toy = self.config.data == "toy"
        return ("page", "text", "naming") if toy else ("docvqa", "mpdocvqa", "nq", "hotpotqa", "passkey")


def head_names(heads: Sequence[Head]) -> str:
    """ "2.1, 2.0"."""
    return ", ".join(f"{layer}.{head}" for layer, head in heads)


def head_table(values: dict[str, Float[np.ndarray, "layer head"]]) -> pd.DataFrame:
    """One row per head with a column for each quantity."""
    shape = next(iter(values.values())).shape
    layers, heads = np.indices(shape)
    return pd.DataFrame({"layer": layers.ravel(), "head": heads.ravel()} | {k: v.ravel() for k, v in values.items()})
