"""Settings of `hooked-vlm steer`, which are also the command line; this module imports nothing but the parser."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.common.workers import ReportConfig


@dataclass(frozen=True)
class SteerConfig(ReportConfig):
    """Two data sets, and what to ask with the vector between them added."""

    positive: Path
    """Data that steering leads to: JSON lines (id, prompt, images, answer), or a folder of pictures (then --prompt)."""
    negative: Path
    """Data that it leads away from."""
    model: str = "toy-qwen2-vl"
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-2B-Instruct."""
    out: Path = Path("steering-out")
    """Where steering.safetensors and the report with its tables and figures go."""
    prompt: str | None = None
    """Asked about every picture of a folder, and where a line has no prompt."""
    hook: Literal["hook_resid_pre", "hook_resid_mid", "hook_resid_post"] = "hook_resid_post"
    """Point of the residual stream that is measured and steered."""
    positions: str = "final"
    """Where streams are averaged: a group of positions (final, question, image, text, generated), or a sum with +."""
    layers: tuple[int, ...] = ()
    """All by default."""
    unit: Literal["item", "picture"] = "item"
    """What the separability is to hold for: new items, or new pictures where several items are about one picture."""
    at: str = "final+generated"
    """Where the vector is added."""
    scales: tuple[float, ...] = (1.0, 2.0)
    """Multiples of the mean difference that are added at the best layer."""
    ask: Path | None = None
    """Data to ask about; held-out items of the negative set by default."""
    ask_prompt: str | None = None
    """One prompt to ask instead, with the pictures of --ask-image."""
    ask_image: tuple[Path, ...] = ()
    """Picture files of --ask-prompt."""
    samples: int = 12
    """How many prompts are asked, at most."""
    max_new_tokens: int = 32
    """How long an answer may get."""
    max_pixels: int | None = None
    """Bound on the area of a resized picture (Qwen2-VL); the checkpoint's by default."""
    max_tiles: int | None = None
    """How many tiles a picture is cut into at most (InternVL); the checkpoint's by default."""
    seed: int = 0
    """Of the parts of the data, and of random vectors."""
    device: str | None = None
    """CUDA if present by default; "auto" spreads the model over what there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The checkpoint's own by default."""
    quiet: tyro.conf.Suppress[bool] = False
    """No progress bars."""

    def check(self) -> None:
        """Refuse settings out of range before anything is loaded.

        Raises:
            StudyError: names the setting, what was expected and what came.
        """
        for name in ("samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise StudyError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not self.scales or not all(scale and math.isfinite(scale) for scale in self.scales):
            raise StudyError(f"--scales takes finite numbers other than 0, got {self.scales}")
        for name in ("layers", "scales"):
            if len(set(values := getattr(self, name))) < len(values):
                raise StudyError(f"--{name} names a value twice: {', '.join(map(str, values))}")
        if self.ask is not None and self.ask_prompt is not None:
            raise StudyError("--ask names data and --ask-prompt is a prompt: leave one of them out")
        if self.ask_image and self.ask_prompt is None:
            raise StudyError("--ask-image shows pictures to --ask-prompt: give the prompt too")
