"""Settings of `hooked-vlm features`, which are also the command line; this module imports nothing but the parser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import subcommand

from hooked_vlm.errors import StudyError
from hooked_vlm.features.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model."""

    model: str = "toy-qwen2-vl"
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-2B-Instruct."""
    device: str | None = None
    """CUDA if present by default; "auto" spreads the model over what there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The checkpoint's own by default."""
    quiet: tyro.conf.Suppress[bool] = False
    """No progress bars."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainingConfig, ModelConfig):
    """Stored activations, and the dictionary to train on them. Repeat an interrupted command to go on."""

    activations: Annotated[
        tyro.conf.Positional[Path | None],
        tyro.conf.arg(metavar="[ACTIVATIONS]", help_behavior_hint="(default: those of toy pictures, made on the spot)"),
    ] = None
    """A folder that `hooked-vlm cache` wrote."""
    hook: str
    """Hook point: --hook blocks.1.hook_resid_post, --hook hook_image_features"""
    out: Path = Path("features-out")
    """Where dictionary/ (SAELens reads it), training.csv and the state of the training go."""
    pictures: int = 3000
    """Without ACTIVATIONS: toy pages, lines of text and drawings that the model is shown."""
    processes: int = 1
    """How many processes of this machine share each batch."""

    def check(self) -> None:
        """Refuse settings out of range before anything is loaded.

        Raises:
            StudyError, InputError: names the setting, what was expected and what came.
        """
        self.check_training()
        for name in ("pictures", "processes"):
            if getattr(self, name) < 1:
                raise StudyError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.batch % self.processes:
            raise StudyError(f"--batch must be a multiple of --processes, got {self.batch} and {self.processes}")


@dataclass(frozen=True, kw_only=True)
class FindConfig(ModelConfig):
    """A dictionary, and pictures of which it is known what lies where."""

    dictionary: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DICTIONARY", help_behavior_hint="")]
    """What `hooked-vlm features train` wrote (its --out or the folder dictionary in it), or SAELens."""
    out: Path = Path("features-found")
    """Where meanings.csv and features.csv go."""
    data: Path | None = None
    """JSON lines (id, prompt, images, boxes) whose boxes are named by what they hold; toy pictures by default."""
    pictures: int = 1000
    """How many pictures, at most: half of them choose features, the other half score them."""
    at: Literal["image", "answer"] = "image"
    """image: tokens of pictures, which show a label; answer: positions whose next token is a label (one character, the
    name of an object), with the sample's answer."""
    permutations: int = 20
    """How often labels are permuted between pictures."""
    at_least: float = 0.5
    """F1 that the interval of a feature must reach with its lower end to be said to stand for a label."""
    seed: int = 0
    """Of toy pictures (never those of `train`), of the halves, and of permutations."""

    def check(self) -> None:
        """Refuse settings out of range before anything is loaded.

        Raises:
            StudyError: names the setting, what was expected and what came.
        """
        if self.pictures < 4:
            raise StudyError(f"--pictures must be at least 4, two for each half, got {self.pictures}")
        if self.permutations < 1:
            raise StudyError(f"--permutations must be at least 1, got {self.permutations}")
        if not 0 < self.at_least < 1:
            raise StudyError(f"--at-least is an F1 between 0 and 1, got {self.at_least}")


@dataclass(frozen=True, kw_only=True)
class PageConfig(FindConfig):
    """As `find`, and a page with the pictures that activate each feature most."""

    out: Path = Path("features-page")
    """Where features.html, meanings.csv and features.csv go."""
    shown: int = 200
    """Features in the page, at most: those with a label first, then those with the largest F1 for any."""
    ablated: int = 12
    """Pictures with the largest activation on which a feature is ablated, for its effect on the answer; 0: none."""

    def check(self) -> None:
        """As `FindConfig.check`."""
        super().check()
        if self.shown < 1 or self.ablated < 0:
            raise StudyError(f"--shown must be at least 1 and --ablated at least 0, got {self.shown}, {self.ablated}")


Command = (
    Annotated[TrainConfig, subcommand("train")]
    | Annotated[FindConfig, subcommand("find")]
    | Annotated[PageConfig, subcommand("page")]
)
