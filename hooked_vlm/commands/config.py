"""Settings of the commands, which are also their options; this module imports nothing but the parser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hooked_vlm.data.config import DataConfig
from hooked_vlm.experiments.common.workers import RayConfig


@dataclass(frozen=True)
class ModelsConfig:
    """Sizes, memory and GPUs, planned from config.json alone: nothing is loaded, known models need no download."""

    model: Annotated[
        tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[MODEL]", help_behavior_hint="(default: all known)")
    ] = None
    """One model in detail: a known name, a checkpoint folder or a hub name."""
    tokens: int = 4096
    """Length of the prompt, a picture of 1024 x 768 (or what fits of it) included; a shorter context bounds it."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of the model on the GPUs."""
    full_cache: bool = False
    """Room for run_with_cache of everything, too."""
    gradients: bool = False
    """Room for run_with_cache(incl_bwd=True): the full cache, its gradients and those of the weights."""


@dataclass(frozen=True)
class HooksConfig:
    """Names, shapes, when they fire and what they are; of known models without a download."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-72B-Instruct."""
    tower: Literal["all", "language", "vision", "projector"] = "all"
    """Which part of the model."""
    grep: str | None = None
    """Only hook points whose name or description has this in it (a regular expression, case ignored)."""
    layers: bool = False
    """A line for each layer instead of one with {l} for all of them."""


@dataclass(frozen=True)
class ViewConfig:
    """One prompt with its pictures, and what to show of it."""

    image: tuple[Path, ...] = ()
    """Picture files, in the order of the prompt; with --serve one, or none, to begin with."""
    prompt: str = ""
    """With --serve what stands in the page at first."""
    model: str = "toy-qwen2-vl"
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-2B-Instruct."""
    out: Path = Path("attention.html")
    """The page."""
    answer: str | None = None
    """Text whose tokens are shown; by default the model's greedy answer."""
    heads: tuple[str, ...] = ()
    """Heads to step through, best first, as LAYER.HEAD: --heads 2.1 2.0"""
    box: tuple[float, ...] = ()
    """Evidence boxes in the first picture, x0 y0 x1 y1 each, in its pixels."""
    query: Literal["producing", "token"] = "producing"
    """A token shows the attention of the position that predicted it, or its own."""
    tower: Literal["language", "vision"] = "language"
    """vision: which patches of the first picture look at which, in the vision tower."""
    max_new_tokens: int = 32
    """How long the answer may get."""
    max_pixels: int | None = None
    """Bound on the area of the resized picture (Qwen2-VL); the checkpoint's by default."""
    max_tiles: int | None = None
    """How many tiles a picture is cut into at most (InternVL); the checkpoint's by default."""
    serve: bool = False
    """Instead of writing a page, serve one on 127.0.0.1 in which picture, prompt and heads can be changed."""
    steer: Path | None = None
    """With --serve: a steering.safetensors (`hooked-vlm steer`) whose layer and scale can be chosen in the page."""
    port: int = 0
    """Where the page is served; 0 takes any free port."""
    open: Annotated[bool, tyro.conf.arg(help="Do not show the page in the browser.", help_behavior_hint="")] = True
    """Show the page in the browser."""
    device: str | None = None
    """CUDA if present by default; "auto" spreads the model over what there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The checkpoint's own by default."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig(RayConfig, DataConfig):
    """A data set, and what to keep of it."""

    names: tuple[str, ...]
    """Hook points, wildcards allowed: --names 'blocks.*.hook_resid_post' hook_image_features"""
    out: Path
    """The folder; the same command goes on where it stopped. With --ray all machines must see it under this path."""
    model: str = "toy-qwen2-vl"
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-2B-Instruct."""
    tokens: tuple[str, ...] = ("all",)
    """Tokens of the language model to keep: all, text, image, question, role, generated, final, evidence, or
    positions in the sample (--tokens=-1 is its last)."""
    tokens_per_batch: int = 2048
    """Largest number of tokens that run together."""
    shard_megabytes: int = 64
    """Size of a file; memory grows with it."""
    min_overlap: float = 0.0
    """A token lies in a box if more than this share of the box lies in it."""
    keep_as: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the files; the model's own by default."""
    device: str | None = None
    """CUDA if present by default; "auto" spreads the model over what there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The checkpoint's own by default."""
    quiet: tyro.conf.Suppress[bool] = False
    """No progress bar."""


@dataclass(frozen=True)
class MergeConfig:
    """Folders that the shards of one command wrote."""

    folders: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDER [FOLDER ...]", help_behavior_hint="")
    ]
    """What `hooked-vlm sweep --shard` or `hooked-vlm cache --shard` wrote, in any order."""
    out: Path
    """Where the whole goes."""
    quiet: tyro.conf.Suppress[bool] = False
    """No progress bar."""


@dataclass(frozen=True)
class PushConfig:
    """A folder of results, and where it goes."""

    folder: tyro.conf.Positional[Path]
    """What `hooked-vlm cache`, `sweep` or a study wrote."""
    to: tyro.conf.Positional[str]
    """A data set on the hub (owner/name), or a new folder (./name)."""
    public: bool = False
    """Everybody may see the data set on the hub."""


@dataclass(frozen=True, kw_only=True)
class AtlasConfig(RayConfig):
    """The scores of docs/atlas.md for every head of both towers. An interrupted command goes on if it is repeated."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-2B-Instruct."""
    out: Path = Path("atlas-out")
    """Where page and tables go, and the parts that an interrupted run goes on from."""
    n: int = 32
    """How many pages, objects, texts and repeated sequences heads are scored on."""
    data: Path | None = None
    """Samples of your own in place of those that are drawn: JSON lines or CSV (id, prompt, images, boxes, answer)."""
    prompt: str | None = None
    """Asked where a sample of --data has no prompt."""
    groups: int | None = None
    """How many random groups of heads give the coefficients of transfer in groups, for each picture; twice the number
    of heads and at least 64 by default, 0 leaves them out."""
    pictures: int = 24
    """How many pictures the page shows and links to pages of their attention."""
    seed: int = 0
    """Of what is drawn, of the groups, and of the resamples that intervals come from."""
    device: str | None = None
    """CUDA if present by default; "auto" spreads the model over what there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The checkpoint's own by default."""
    quiet: tyro.conf.Suppress[bool] = False
    """No progress bar."""


@dataclass(frozen=True)
class AtlasCompareConfig:
    """Two folders that `hooked-vlm atlas` wrote, on the same stimuli."""

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """The atlas before, or of the first model."""
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """The atlas after, or of the second model."""
    out: Path | None = None
    """A folder for the table (compare.csv) and a page with both (compare.html)."""
