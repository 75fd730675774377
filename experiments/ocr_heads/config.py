"""What an experiment of the study is: frozen configurations, which are also the command line."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Suppress, arg, subcommand

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.common.workers import NOT_RECORDED, WorkersConfig

Granularity = Literal["sample", "token"]
Source = Literal["live", "others", "any", "layer", "norm", "attention"]
"""Where a random control comes from (`controls`)."""


@dataclass(frozen=True)
class Protocol:
    """How heads are scored. The defaults are the paper's definition; `OFFICIAL_CODE` is its code."""

    min_overlap: float = 0.1
    """A token is evidence if more than this share of a character's box lies in it (the code: 0.001)."""
    truncate_boxes: bool = False
    """Scale boxes to the resized image and cut them to whole pixels, as the code does."""
    query: Literal["producing", "copied"] = "producing"
    """Whose attention counts: the position that predicts the copied token, or the copied token itself (the code)."""
    matching: Literal["aligned", "in_order"] = "aligned"
    """Which generated tokens are copies: those in the longest run shared with the answer, each against its own box;
    or all whose id occurs in the answer, the i-th against the i-th box (the code)."""
    missing: Literal["zero", "skip"] = "zero"
    """Answer tokens that were not generated: they count as not copied, or not at all (the code)."""
    weight_by_run: Literal["no", "reply", "prompt_and_reply"] = "no"
    """Count a copy by 1, or by the share of the answer in the longest run it shares with the reply (the code for
    InternVL2), or with prompt and reply (the code for Qwen2-VL)."""
    keys: Literal["all", "prompt"] = "all"
    """Where the argmax is taken: over all keys, or over the prompt but its last token (the code)."""
    ocr_instance: Granularity = "sample"
    """Unit of means and frequencies of OCR scores: samples, or single boxes (the code)."""
    retrieval_instance: Granularity = "sample"
    """Unit of means and frequencies of retrieval scores: samples (the code, too), or single tokens of the needle."""
    frequency_rule: Literal["active", "inverted"] = "active"
    """A head is kept if it is active (score above the threshold) in enough instances; the code's rule is
    inverted: it drops heads that are non-zero in 90% of the instances."""
    retrieval: Literal["needle", "same_token"] = "needle"
    """The text retrieval score: Wu et al.'s (the argmax lies in the needle, on the token that is generated), or the
    code's (the argmax has the same token, for every answer token anywhere)."""
    pages: Literal["paper", "code"] = "paper"
    """Needles on lines as high as those of passkeys, with line breaks as spaces; or as the code makes them: lines of
    12 pixels, line breaks deleted, and its questions, boxes and draws of needles."""
    page_order: Literal["number", "name"] = "number"
    """Pages by their numbers, or by the names of the code's files ("10" before "2"), whose evidence is then on another
    page from 11 pages on. The published OCR scores contain this, so `compare` uses it against published heads."""
    first_resize: int | None = None
    """Resize pictures to multiples of this many pixels before the model's own resizing (the code for Qwen2-VL: 28)."""
    chat: Annotated[
        bool, arg(help="Ask without the chat template (the code for InternVL2).", help_behavior_hint="")
    ] = True
    """Ask in the checkpoint's chat template, or without one (the code for InternVL2)."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a reply beside the checkpoint's own while heads are scored (the code for InternVL2: 281)."""

    def instance(self, kind: Literal["ocr", "retrieval"]) -> Granularity:
        """Unit of means and frequencies of a kind of score."""
        return self.ocr_instance if kind == "ocr" else self.retrieval_instance


OFFICIAL_CODE = Protocol(
    min_overlap=0.001,
    truncate_boxes=True,
    query="copied",
    matching="in_order",
    missing="skip",
    weight_by_run="prompt_and_reply",
    keys="prompt",
    ocr_instance="token",
    frequency_rule="inverted",
    retrieval="same_token",
    pages="code",
    page_order="name",
    first_resize=28,
)
"""What the code published with the paper does with Qwen2-VL (step1 to step3 of baekingeol/OCR_Head)."""


@dataclass(frozen=True)
class ScoreConfig(WorkersConfig):
    """Score every head: which ones look at what is being read, in images and in text."""

    model: str = "toy-qwen2-vl"
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-2B-Instruct."""
    out: Path = Path("ocr-heads-out")
    """Where the report, tables and figures go; finished parts are kept there and taken up again."""
    samples: int = 200
    """Pages to score heads on, and as many texts."""
    seed: int = 0
    data: Literal["auto", "toy", "passkey", "niah", "paper"] = "auto"
    """Content of the pages: the toy models' key = value lines, or the paper's passkey and needle-in-a-haystack
    pages ("paper": both). "auto" is "toy" for the toy models and "paper" for others."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Context lengths of the paper's pages: tokens for passkey, characters for niah."""
    data_folder: Path | None = None
    """Where data sets are built once and read again; `data` in the output folder by default."""
    granularity: Literal["fine", "coarse"] = "fine"
    """Evidence boxes of single characters (passkey: digits, niah: words), or one box for the whole answer."""
    text_model: str | None = None
    """The text-only sibling whose retrieval heads are measured too (Qwen/Qwen2-1.5B, Qwen/Qwen2-7B,
    internlm/internlm2_5-7b-chat in the paper)."""
    protocol: Protocol = field(default_factory=Protocol)
    compat: bool = False
    """Measure as the official code does: replaces the protocol by that of the code for this kind of model, and a length
    of replies that is not given by the code's."""
    threshold: float = 0.1
    """A head is an OCR (or retrieval) head if it scores above this in the mean, and often enough."""
    min_frequency: float = 0.1
    """In at least this share of the instances it scores above the threshold."""
    max_new_tokens: int | None = None
    """How long an answer may get; by default 8 on toy data, 32 otherwise, with --compat as in the code (Qwen2-VL: 128
    while heads are scored, 256 in tasks; InternVL2: 32)."""
    tokens_per_batch: int = 8192
    """Rows are batched up to this many tokens: less needs less memory."""
    device: str | None = None
    """CUDA if present by default; "auto" spreads the model over what there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The checkpoint's own by default."""
    quiet: Suppress[bool] = False
    """No progress bars."""

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens or (8 if self.data == "toy" else 32)

    def check(self) -> None:
        """Refuse settings out of range before anything is loaded.

        Raises:
            StudyError: names the setting, what was expected and what came.
        """
        self.check_workers()
        for name, values in vars(self).items():
            if isinstance(values, tuple) and len(set(values)) < len(values):
                raise StudyError(f"--{name.replace('_', '-')} names a value twice: {', '.join(map(str, values))}")
            if values == () and name != "random_from":
                raise StudyError(f"--{name.replace('_', '-')} needs at least one value")
        for name in COUNTS:
            values = getattr(self, name, None)
            for value in values if isinstance(values, tuple) else (values,):
                if value is not None and value < 1:
                    raise StudyError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if not self.lengths or min(self.lengths) < 64:
            raise StudyError(f"--lengths must be at least 64, got {self.lengths}")
        for name in ("threshold", "min_frequency"):
            if not 0 <= getattr(self, name) < 1:
                raise StudyError(f"--{name.replace('_', '-')} must lie in [0, 1), got {getattr(self, name)}")
        if self.protocol.first_resize is not None and self.protocol.first_resize < 1:
            raise StudyError(f"--first-resize must be at least 1 pixel, got {self.protocol.first_resize}")
        if not 0 <= self.protocol.min_overlap < 1:
            raise StudyError(f"--min-overlap must lie in [0, 1), got {self.protocol.min_overlap}")
        if self.seed < 0:
            raise StudyError(f"--seed must not be negative, got {self.seed}")
        if any(not 0 <= beta <= 1 for beta in getattr(self, "betas", None) or ()):
            raise StudyError(f"--betas are shares of attention, between 0 and 1, got {getattr(self, 'betas', ())}")

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        found = {name: value for name, value in asdict(self).items() if name not in NOT_RECORDED}
        return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}


COUNTS = (
    "samples", "max_new_tokens", "tokens_per_batch", "permutations", "mask_heads", "random_draws", "task_samples",
    "sink_heads", "case_samples",
)  # fmt: skip
"""Settings that count something."""


@dataclass(frozen=True)
class SelectConfig(ScoreConfig):
    """Which heads pass, how sparse they are, and how OCR heads differ from retrieval heads."""

    permutations: int = 2000
    """Random draws of heads, for the baseline of every similarity."""


@dataclass(frozen=True)
class TaskConfig(ScoreConfig):
    """Settings shared by the experiments that change heads."""

    tasks: tuple[str, ...] | None = None
    """page, text, naming; docvqa, mpdocvqa, nq, hotpotqa, passkey, niah. Those of the data by default."""
    task_samples: int = 100
    """Samples of each task."""
    task_files: Path | None = None
    """Folder with biencoder-nq-dev.json and hotpot_dev_distractor_v1.json, where they were downloaded."""
    random_draws: int = 20
    """Distinct random sets of heads for comparison; the smallest p of n draws is 1 / (n + 1), so fewer than 20 cannot
    reach 0.05 (the paper: 5)."""
    random_from: tuple[Source, ...] | None = None
    """Where random heads come from: live ones that score below the threshold (the default); all but the changed; all
    (the paper's code); or those below the threshold most like each changed head in layer, output norm or attention on
    the image. Heads of the vision tower have no scores: all but the changed (the default there), all, or like in
    layer."""


@dataclass(frozen=True)
class MaskConfig(TaskConfig):
    """Mask the top OCR and retrieval heads, against random ones."""

    mask_heads: tuple[int, ...] | None = None
    """How many top heads to mask; 10 and 20 (as the paper), and for small models an eighth of all, by default."""
    modes: tuple[Literal["zero", "uniform"], ...] = ("zero",)
    """Heads write nothing (the paper), or look everywhere alike (Wu et al.'s retrieval heads)."""
    tower: Literal["language", "vision"] = "language"
    """Heads of the language model, the top ones by their scores; or heads of the vision tower, which have no such
    scores and are named by --heads."""
    heads: tuple[str, ...] | None = None
    """Heads of the vision tower to mask together, LAYER.HEAD each, such as 2.1 2.3."""

    def check(self) -> None:
        super().check()
        if self.tower == "language":
            if self.heads is not None:
                raise StudyError(
                    "--heads names heads of the vision tower, --tower vision; those of the language model are the top "
                    "ones by score, --mask-heads of them"
                )
            return
        if self.heads is None:
            raise StudyError(
                "--tower vision needs --heads: OCR and retrieval scores rank heads of the language model only, so name "
                "those of the vision tower, such as --heads 2.1 2.3"
            )
        if self.mask_heads is not None:
            raise StudyError("--mask-heads counts top heads by score, of which the vision tower has none: use --heads")
        for head in self.heads:
            if not re.fullmatch(r"\d+\.\d+", head):
                raise StudyError(f"--heads are LAYER.HEAD, such as 2.1, got {head}")
        scored = [source for source in self.random_from or () if source not in ("others", "any", "layer")]
        if scored:
            raise StudyError(
                f"--random-from {scored[0]} needs scores, which heads of the vision tower do not have: others, any or "
                "layer"
            )

    @property
    def named_heads(self) -> tuple[tuple[int, int], ...]:
        """`heads` as (layer, head)."""
        pairs = [head.split(".") for head in self.heads or ()]
        return tuple((int(layer), int(head)) for layer, head in pairs)


@dataclass(frozen=True)
class SinkConfig(TaskConfig):
    """Redistribute attention from the first token, in the top heads and in random ones."""

    betas: tuple[float, ...] | None = None
    """The share of its attention that the first token keeps; 0, 0.2, 0.4, 0.6 and 0.8 by default, with --compat 0.4
    (the paper), and as the code does it."""
    sink_heads: tuple[int, ...] = (2,)
    """In how many top heads (the paper: 2)."""


@dataclass(frozen=True)
class ThoughtConfig(TaskConfig):
    """Answers with the steps written out first: what becomes of OCR and retrieval heads."""


@dataclass(frozen=True)
class CaseConfig(ScoreConfig):
    """Which heads read which character."""

    characters: str = "0123456789abcdefghijklmnopqrstuvwxyz"
    case_samples: int = 20
    """Pages for each character."""


@dataclass(frozen=True)
class CompareConfig(ScoreConfig):
    """How the heads found agree with the published lists."""


@dataclass(frozen=True)
class OcrHeadsConfig(SelectConfig, MaskConfig, SinkConfig, ThoughtConfig, CaseConfig, CompareConfig):
    """All experiments, in one report."""


Command = (
    Annotated[OcrHeadsConfig, subcommand("all")]
    | Annotated[ScoreConfig, subcommand("score")]
    | Annotated[SelectConfig, subcommand("select")]
    | Annotated[MaskConfig, subcommand("mask")]
    | Annotated[SinkConfig, subcommand("sink")]
    | Annotated[ThoughtConfig, subcommand("thought")]
    | Annotated[CaseConfig, subcommand("case")]
    | Annotated[CompareConfig, subcommand("compare")]
)
