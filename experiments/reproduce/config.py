"""Settings of a reproduction, which are also the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.common.workers import WorkersConfig


@dataclass(frozen=True)
class ReproduceConfig(WorkersConfig):
    """Check a model against transformers, run a paper's study on it, and judge the paper's claims one by one: pass,
    differs, or cannot say. Exit status 0 if nothing differs, 1 if a claim (or the check) differs."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-2B-Instruct."""
    paper: Literal["ocr-heads", "head-attribution"]
    """arXiv 2505.15865 (OCR heads) or arXiv 2509.17588 (head attribution)."""
    size: Literal["small", "paper"] = "small"
    """Samples: as few as a toy model needs to be judged in minutes on a CPU, or the paper's."""
    compat: bool = False
    """OCR heads: measure as the official code does, which the comparison with the published lists needs."""
    text_model: str | None = None
    """OCR heads: the text-only sibling, whose retrieval heads the paper compares with (Qwen/Qwen2-1.5B, ...)."""
    data_folder: Path | None = None
    """OCR heads: where data sets are built once and read again; `data` in the study's folder by default."""
    task_files: Path | None = None
    """OCR heads: folder with biencoder-nq-dev.json and hotpot_dev_distractor_v1.json."""
    images: Path | None = None
    """Head attribution: folder of pictures (COCO's with --annotations); drawn objects by default."""
    annotations: Path | None = None
    """Head attribution: COCO's annotation file, e.g. instances_val2017.json."""
    seed: int = 0
    out: Path = Path("reproduce-out")
    """Where the page goes; the study's own report lies in a folder beside it. An interrupted run resumes."""
    device: str | None = None
    """CUDA if present by default; "auto" spreads the model over what there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The checkpoint's own by default."""
    quiet: tyro.conf.Suppress[bool] = False
    """No progress bars."""

    def check(self) -> None:
        """Refuse settings of the other paper.

        Raises:
            StudyError: names the setting and the paper it belongs to.
        """
        self.check_workers()
        others = {
            "ocr-heads": ("images", "annotations"),
            "head-attribution": ("compat", "text_model", "data_folder", "task_files"),
        }
        for name in others[self.paper]:
            if getattr(self, name):
                other = next(paper for paper in others if paper != self.paper)
                raise StudyError(f"--{name.replace('_', '-')} goes with --paper {other}, not with {self.paper}")
