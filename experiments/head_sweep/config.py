"""What a sweep over the heads is: a frozen configuration, which is also the command line."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Suppress

from hooked_vlm.data.config import DataConfig
from hooked_vlm.errors import InputError
from hooked_vlm.experiments.common.workers import NOT_RECORDED, WorkersConfig

Kind = Literal["zero", "mean", "scale", "image-kv", "knockout"]
OF_TEXT: tuple[Kind, ...] = ("image-kv", "knockout")
"""Interventions on how text attends to images, which heads of the vision tower do not."""


@dataclass(frozen=True, kw_only=True)
class HeadSweepConfig(WorkersConfig, DataConfig):
    """What each head does for the answers to a data set."""

    model: str = "toy-qwen2-vl"
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-7B-Instruct."""
    out: Path = Path("sweep-out")
    """Where the results go, and the parts an interrupted run goes on from."""
    heads: tuple[str, ...] = ("all",)
    """all, layers (3) and heads (3.1)."""
    intervention: Kind = "zero"
    """What happens to a head: its output is zero, its mean over all samples of the data, or scaled by --factor; text
    sees the mean of the image's keys and values in their place (image-kv), or no image at all (knockout)."""
    factor: float = 0.5
    """What --intervention scale multiplies by."""
    tower: Literal["language", "vision"] = "language"
    """Whose heads."""
    metric: Literal["log-prob", "logit-diff", "answer"] = "log-prob"
    """log-prob: log-probability of the answer's first token. logit-diff: its logit minus that of the most likely other
    token without intervention. answer: whether what is generated begins with exactly this answer. The answer is the
    sample's, or what the model says without intervention."""
    max_new_tokens: int = 16
    """How long the model's own answer may get."""
    seed: int = 0
    """Of the resamples that intervals come from."""
    device: str | None = None
    """CUDA if present by default; "auto" spreads the model over what there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The checkpoint's own by default."""
    quiet: Suppress[bool] = False
    """No progress bars."""

    def check(self) -> None:
        """Refuse settings out of range before anything is loaded.

        Raises:
            InputError, StudyError: names the setting.
        """
        self.check_workers()
        _ = self.part
        if self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if self.tower == "vision" and self.intervention in OF_TEXT:
            raise InputError(
                f"--intervention {self.intervention} changes how text attends to images; heads of the vision tower "
                "take zero, mean and scale"
            )

    def chosen(self, n_layers: int, n_heads: int) -> list[tuple[int, int]]:
        """The heads, in the order of the model.

        Raises:
            InputError: a head that the tower does not have.
        """
        if "all" in self.heads:
            return [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        found: set[tuple[int, int]] = set()
        for word in self.heads:
            layer, dot, head = word.partition(".")
            if not layer.isdecimal() or (dot and not head.isdecimal()):
                raise InputError(f"--heads takes all, layers (3) and heads (3.1); got {word!r}")
            own = [(int(layer), int(head))] if dot else [(int(layer), number) for number in range(n_heads)]
            if int(layer) >= n_layers or own[-1][1] >= n_heads:
                where = "vision tower" if self.tower == "vision" else "language model"
                raise InputError(
                    f"there is no head {word} in the {where}: it has layers 0 to {n_layers - 1} with heads "
                    f"0 to {n_heads - 1}"
                )
            found.update(own)
        return sorted(found)

    def recorded(self) -> dict[str, Any]:
        """Settings that results depend on; equal for the shards of one run."""
        left_out = (*NOT_RECORDED, "out", "quiet", "shard", "on_error", "device")
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in left_out
        }
