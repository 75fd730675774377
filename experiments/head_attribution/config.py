"""What a run of the study is: frozen configurations, which are also the command line."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Suppress, subcommand

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.common.workers import NOT_RECORDED, ReportConfig, WorkersConfig

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Tower = Literal["language", "vision"]
Target = Literal["logit", "log_prob", "margin", "difference"]
Regression = Literal["ols", "ridge", "lasso"]
Design = Literal["random", "antithetic", "balanced", "paired"]
Section = Literal["attribution", "curves", "where", "tokens"]
MASKS_PER_UNIT, FEWEST = 5, 320
"""Random masks by default: for each coefficient to be found, and at least."""
FEWEST_SEEN = 10
"""Masks a regression is made from, at least."""
BLOCK = 20
"""Masks in a block of the balanced design."""


@dataclass(frozen=True)
class HeadAttributionConfig(WorkersConfig):
    """Which attention heads carry information from the image to the text."""

    model: str = "toy-qwen2-vl"
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-7B-Instruct."""
    out: Path = Path("head-attribution-out")
    """Where the report goes, and the parts an interrupted run goes on from."""
    data: Literal["auto", "toy", "folder", "coco"] = "auto"
    """Drawn objects (toy models), a folder with one folder of pictures per name, or COCO. "auto": COCO with
    --annotations, a folder with --images, drawn objects without either."""
    images: Path | None = None
    """The folder of pictures."""
    annotations: Path | None = None
    """COCO's annotation file, e.g. instances_val2017.json."""
    min_object: float = 0.1
    """COCO: the object's smallest share of the picture's area."""
    max_object: float = 0.8
    """COCO: the largest."""
    samples: int = 50
    """Pictures to ask about; those answered correctly are studied."""
    question: str | None = None
    """The question; by default the paper's, with a request for one word where the model is not a toy."""
    tower: Tower = "language"
    """Heads of the language model, ablated as readers of the image; or heads of the vision tower, whose outputs are
    replaced (token flow is left out there)."""
    target: Target = "logit"
    """Of the answer's first token: its logit, its log-probability, its lead over the best other token, or over the
    likeliest name of the other objects in the data ("difference")."""
    baseline: Literal["mean", "dataset", "zero", "knockout"] = "mean"
    """Replacement of the image's keys and values for an ablated head: their mean over the image or over all
    pictures, zero, or nothing at all. Of outputs in the vision tower: their mean over the picture's patches or over
    those of all pictures, or zero."""
    rope: Literal["before", "after"] = "before"
    """Whether mean keys are taken before rotation and then rotated to each place, or after it."""
    keep: float = 0.5
    """The share of heads (image tokens) that a random mask keeps."""
    masks: int | None = None
    """Random masks over heads per picture; five per head and 320 at least by default."""
    token_masks: int | None = None
    """Random masks over image tokens per picture; five per token and 320 at least by default."""
    design: Design = "random"
    """How masks are drawn: each unit independently; each mask with its complement; in blocks that keep each unit
    equally often; or in pairs that differ in one unit. Held-out masks are always random."""
    held_out: float = 0.1
    """The share of masks that the regression is judged by and does not see."""
    regression: Regression = "ols"
    """Penalties of ridge and lasso are chosen by cross-validation."""
    bootstrap: int = 200
    """Resamples of the masks for intervals of the lasso's coefficients; others have a formula."""
    random_rankings: int = 10
    """Random orders of the heads per picture for comparison."""
    top: int | None = None
    """How many top heads agreement is counted on; an eighth of the heads by default."""
    window: int | None = None
    """Layers in a window of the token-flow experiments; a quarter of the layers by default."""
    object_overlap: float = 0.1
    """An image token belongs to the object if more than this share of its area does."""
    seed: int = 0
    device: str | None = None
    """CUDA if present by default; "auto" spreads the model over what there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The checkpoint's own by default."""
    quiet: Suppress[bool] = False
    """No progress bars."""

    sections: ClassVar[tuple[Section, ...]] = ("attribution",)
    """Quantities measured and reported."""

    def check(self) -> None:
        """Refuse settings out of range before anything is loaded.

        Raises:
            StudyError: names the setting, what was expected and what came.
        """
        self.check_workers()
        for name in ("samples", "masks", "token_masks", "bootstrap", "random_rankings", "top", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StudyError(f"{_option(name)} must be at least 1, got {value}")
        for name in ("keep", "held_out"):
            if not 0 < getattr(self, name) < 1:
                raise StudyError(f"{_option(name)} must lie between 0 and 1, got {getattr(self, name)}")
        if self.design == "antithetic" and self.keep != 0.5:
            raise StudyError(f"--design antithetic needs --keep 0.5, which complements keep, got {self.keep:g}")
        if self.design == "balanced" and round(self.keep * BLOCK, 9) % 1:
            raise StudyError(f"--design balanced needs a --keep that is a multiple of {1 / BLOCK:g}, got {self.keep:g}")
        for name in ("min_object", "max_object", "object_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise StudyError(f"{_option(name)} must lie in [0, 1], got {getattr(self, name)}")
        for name, n in (("masks", self.masks or FEWEST), ("token_masks", self.token_masks or FEWEST)):
            n_train = n - n_held_out(n, self.held_out)
            if n_train < FEWEST_SEEN:
                raise StudyError(
                    f"{_option(name)} {n} with --held-out {self.held_out:g} leaves {n_train} masks to regress on; "
                    f"{FEWEST_SEEN} are needed at least"
                )
        if self.min_object > self.max_object:
            raise StudyError(f"--min-object {self.min_object:g} is more than --max-object {self.max_object:g}")
        if self.seed < 0:
            raise StudyError(f"--seed must not be negative, got {self.seed}")
        if self.tower == "vision":
            self._check_vision()
        needed = {"toy": (), "folder": ("images",), "coco": ("images", "annotations")}[self.source]
        for name in needed:
            path = getattr(self, name)
            if path is None:
                raise StudyError(f"--data {self.source} needs {_option(name)}")
            if not path.exists():
                raise StudyError(f"{_option(name)} {path} does not exist")

    def _check_vision(self) -> None:
        """Refuse settings of the language model's heads alone.

        Raises:
            StudyError: names the setting.
        """
        if self.sections == ("tokens",):
            raise StudyError(
                "--tower vision has no token flow: which text sees the image is about heads of the language model"
            )
        for name, value, why in (
            ("baseline", "knockout", "a head that attends to nothing writes nothing: --baseline zero"),
            ("rope", "after", "outputs of heads are not rotated"),
        ):
            if getattr(self, name) == value:
                raise StudyError(f"--{name} {value} is about the image's keys, not for --tower vision: {why}")

    @property
    def shown_sections(self) -> tuple[Section, ...]:
        """`sections` that there are in the tower: token flow is about the language model's heads."""
        return tuple(section for section in self.sections if self.tower == "language" or section != "tokens")

    @property
    def carrier(self) -> str:
        """What ablating all heads takes from the answer."""
        return "the image" if self.tower == "language" else "attention in the vision tower"

    def check_against(self, model: "HookedVLM") -> None:
        """Refuse more heads or layers than the model, or its vision tower, has.

        Raises:
            StudyError: names the setting and what the model has.
        """
        n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
        if self.tower == "vision" and model.cfg.vision is not None:
            n_layers, n_heads = model.cfg.vision.n_layers_run, model.cfg.vision.n_heads
        for name, most, of in (("top", n_layers * n_heads, "heads"), ("window", n_layers, "layers")):
            asked = getattr(self, name)
            if asked is not None and asked > most:
                raise StudyError(f"{_option(name)} {asked} is more than the {most} {of} of {self.model}")

    @property
    def source(self) -> Literal["toy", "folder", "coco"]:
        """Kind of the pictures."""
        if self.data != "auto":
            return self.data
        return "coco" if self.annotations else "folder" if self.images else "toy"

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        told = {name: value for name, value in asdict(self).items() if name not in NOT_RECORDED}
        values = {name: str(value) if isinstance(value, Path) else value for name, value in told.items()}
        return values | {"sections": list(self.shown_sections)}


@dataclass(frozen=True)
class Attribute(HeadAttributionConfig):
    """Random masks over all heads, and the target regressed on them."""


@dataclass(frozen=True)
class Curves(HeadAttributionConfig):
    """Faithfulness and completeness of the top heads, by attribution and by other rankings."""

    sections: ClassVar[tuple[Section, ...]] = ("attribution", "curves")


@dataclass(frozen=True)
class Where(HeadAttributionConfig):
    """Importance by layer, attention against importance, agreement between pictures and what explains it."""

    sections: ClassVar[tuple[Section, ...]] = ("attribution", "where")


@dataclass(frozen=True)
class Tokens(HeadAttributionConfig):
    """Which text tokens receive image information, in what order, and which image tokens matter."""

    sections: ClassVar[tuple[Section, ...]] = ("tokens",)


@dataclass(frozen=True)
class All(HeadAttributionConfig):
    """Everything."""

    sections: ClassVar[tuple[Section, ...]] = ("attribution", "curves", "where", "tokens")


@dataclass(frozen=True)
class Compare(ReportConfig):
    """Several models' finished runs side by side."""

    runs: tuple[Path, ...]
    """Folders that `all` or `curves` wrote."""
    out: Path = Path("head-attribution-compared")
    """Where the report goes."""


Command = (
    Annotated[All, subcommand("all")]
    | Annotated[Attribute, subcommand("attribute")]
    | Annotated[Curves, subcommand("curves")]
    | Annotated[Where, subcommand("where")]
    | Annotated[Tokens, subcommand("tokens")]
    | Annotated[Compare, subcommand("compare")]
)


def n_masks(asked: int | None, n_units: int) -> int:
    """As asked, or five for each coefficient to be found, and 320 at least."""
    return asked or max(FEWEST, MASKS_PER_UNIT * n_units)


def n_held_out(n: int, share: float) -> int:
    """How many of the masks a regression does not see: two at least, for a correlation."""
    return max(2, round(share * n))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
