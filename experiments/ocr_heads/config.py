"""What a run of the study is: one frozen configuration, which is also the command line."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hooked_vlm.experiments.common.errors import StudyError

DATASETS = ("toy", "passkey", "niah")


@dataclass(frozen=True)
class Protocol:
    """How a head's score is measured. The defaults are the paper's definition; `OFFICIAL_CODE` is its code."""

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
    weight_by_run: bool = False
    """Count a copy by the share of the answer in the longest shared run instead of by 1, as the code does."""
    keys: Literal["all", "prompt"] = "all"
    """Where the argmax is taken: over all keys, or over the prompt but its last token (the code)."""
    instance: Literal["sample", "token"] = "sample"
    """What means and frequencies are taken over: samples, or single answer tokens (the code)."""
    frequency_rule: Literal["active", "inverted"] = "active"
    """A head is kept if it is active (score above the threshold) in enough instances; the code's rule is
    inverted: it drops heads that are non-zero in 90% of the instances."""


OFFICIAL_CODE = Protocol(0.001, True, "copied", "in_order", "skip", True, "prompt", "token", "inverted")
"""What the code published with the paper does (papers' repository, step2_ocr_retrieval_head.py and step3)."""


@dataclass(frozen=True)
class OcrHeadsConfig:
    """Which attention heads of a vision-language model read text from images."""

    model: str = "toy-qwen2-vl"
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-2B-Instruct."""
    samples: int = 200
    """Pages to score heads on."""
    out: Path = Path("ocr-heads-out")
    """Where tables and pictures go."""
    seed: int = 0
    data: Literal["auto", "toy", "passkey", "niah", "paper"] = "auto"
    """What the pages show: the toy models' key = value lines, or the paper's passkey and needle-in-a-haystack
    pages ("paper": both). "auto" is "toy" for the toy models and "paper" for others."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Context lengths of the paper's pages: tokens for passkey, characters for niah."""
    granularity: Literal["fine", "coarse"] = "fine"
    """Evidence boxes of single characters (passkey: digits, niah: words), or one box for the whole answer."""
    protocol: Protocol = field(default_factory=Protocol)
    compat: bool = False
    """Measure as the official code does: replaces the protocol by that of the code."""
    threshold: float = 0.1
    """An OCR head scores above this in the mean, and in at least `min_frequency` of the instances."""
    min_frequency: float = 0.1
    mask_heads: int | None = None
    """How many top heads to mask in the control; an eighth of the heads, at most the paper's 10, by default."""
    mask_samples: int = 100
    """Samples of each task in the masking control."""
    random_draws: int | None = None
    """Random sets of heads to mask for comparison; 20 on toy data, 5 (as the paper) otherwise, by default."""
    max_new_tokens: int | None = None
    """How long an answer may get; 8 on toy data, 32 otherwise, by default."""
    tokens_per_batch: int = 8192
    """Rows are batched up to this many tokens: less needs less memory."""
    device: str | None = None
    """CUDA if present by default."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The checkpoint's own by default."""
    quiet: bool = False
    """No progress bars."""

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens or (8 if self.data == "toy" else 32)

    @property
    def draws(self) -> int:
        return self.random_draws or (20 if self.data == "toy" else 5)

    @property
    def measured_by(self) -> Protocol:
        return OFFICIAL_CODE if self.compat else self.protocol

    def check(self) -> None:
        """Refuse settings out of range before anything is loaded.

        Raises:
            StudyError: names the setting, what was expected and what came.
        """
        for name in ("samples", "mask_samples", "mask_heads", "random_draws", "max_new_tokens", "tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StudyError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if not self.lengths or min(self.lengths) < 64:
            raise StudyError(f"--lengths must be at least 64, got {self.lengths}")
        for name in ("threshold", "min_frequency"):
            if not 0 <= getattr(self, name) < 1:
                raise StudyError(f"--{name.replace('_', '-')} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.protocol.min_overlap < 1:
            raise StudyError(f"--protocol.min-overlap must lie in [0, 1), got {self.protocol.min_overlap}")
        if self.seed < 0:
            raise StudyError(f"--seed must not be negative, got {self.seed}")

    def as_dict(self) -> dict[str, Any]:
        """For config.json."""
        return {**asdict(self), "out": str(self.out), "lengths": list(self.lengths)}
