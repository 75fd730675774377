"""What the demo is: a frozen configuration, which is also the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Suppress

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.ocr_heads.config import MaskConfig


@dataclass(frozen=True)
class DemoConfig:
    """Two heads that read a page, and what the model answers as they are turned down."""

    model: str = "toy-qwen2-vl"
    """A bundled toy model, or a checkpoint that reads pages of `key = value` lines."""
    out: Path = Path("demo-out")
    """Where demo.html goes; finished results are kept there and taken up again."""
    samples: int = 100
    """Pages to score heads on; other pages than those that questions are asked about."""
    pages: int = 100
    """Pages to ask about, with all heads and without two of them. The one that is shown is one of these."""
    seed: int = 0
    """Of the pages and of random heads."""
    device: str | None = None
    """CUDA if present by default; "auto" spreads the model over what there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The checkpoint's own by default."""
    quiet: Suppress[bool] = False
    """No progress bars."""

    def check(self) -> None:
        """Refuse settings out of range before anything is loaded.

        Raises:
            StudyError: names the setting, what was expected and what came.
        """
        for name in ("samples", "pages"):
            if getattr(self, name) < 1:
                raise StudyError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise StudyError(f"--seed must not be negative, got {self.seed}")

    @property
    def study(self) -> MaskConfig:
        """The OCR-heads study whose scores, controls and answers these are."""
        return MaskConfig(
            model=self.model, out=self.out, samples=self.samples, seed=self.seed, data="toy", tasks=("page",),
            task_samples=self.pages, device=self.device, dtype=self.dtype, quiet=self.quiet,
        )  # fmt: skip
