"""What each toy model is trained on, and how hard: batches by stage, learning rates, the pressure on its heads."""

from dataclasses import dataclass

import numpy as np

from hooked_vlm.toys import pages as data
from tools.toy_training.specialise import Specialisation

Sizes = tuple[tuple[int, int], ...]  # width, height


@dataclass(frozen=True)
class Stage:
    """From step ``first`` on: rows of one step, number of lines, sizes of images."""

    first: int
    continuations: int
    texts: int
    text_lines: tuple[float, ...]  # how often a text has 1, 2, ... lines
    echo: float  # share of questions (pages and texts) whose answer is the whole line
    pages: int = 0
    full_pages: int = 0
    strips: int = 0
    drawings: int = 0
    lines: tuple[float, ...] = (1.0,)  # as ``text_lines``, for pages
    separators: tuple[str, ...] = (data.SEPARATOR,)  # between key and value in texts
    page_sizes: Sizes = ()
    strip_sizes: Sizes = ()
    drawing_sizes: Sizes = ()
    decoys: float = 0.0  # of `data.random_lines`, in pages and texts
    guided: bool = False  # texts and pages, which then have no echo and no other separators


@dataclass(frozen=True)
class Recipe:
    """What a bundled model was trained with."""

    curriculum: tuple[Stage, ...]
    steps: int
    schedule: tuple[tuple[int, float], ...]
    """(step, factor on the learning rates), straight lines between."""
    specialise_from: int  # step
    specialisation: Specialisation
    imitation: int = 0
    """So many first steps teach the vision tower to give what toy-qwen2-vl's gives; the decoder starts from its."""
    lr: float = 1.5e-3
    muon_lr: float = 4e-3
    weight_decay: float = 0.02
    clip: float = 1.0
    turns: int = 4  # questions per page or text

    def stage_at(self, step: int) -> Stage:
        return [stage for stage in self.curriculum if step >= stage.first][-1]

    def learning_rate_factor(self, step: int) -> float:
        """The factor on every learning rate."""
        steps, factors = zip(*self.schedule, strict=True)
        return float(np.interp(step, steps, factors))


FULL = (*(data.PAGE_SIZE,) * 6, *data.OTHER_PAGE_SIZES)

SMALL_PAGES = ((112, 32), (112, 48), (128, 48))
MIDDLE_PAGES = ((128, 64), (128, 80), (112, 80))

# First the two elements: finding a place by its content, in text with the value right behind its key, and
# letters and objects, on small images (while no glyph is known, a large page is mostly cost and noise).
# Then pages, from small ones to full size.
QWEN2_VL_CURRICULUM = (
    Stage(
        0, continuations=10, texts=12, text_lines=(0.0, 0.34, 0.33, 0.33), echo=0.5,
        strips=56, drawings=20, strip_sizes=((32, 32), (32, 32), (48, 32), (64, 32)),
        drawing_sizes=((64, 64),), separators=("", " ", "=", data.SEPARATOR),
    ),
    Stage(
        600, continuations=2, texts=8, text_lines=(0.0, 0.3, 0.3, 0.2, 0.1, 0.1), echo=0.5,
        pages=20, full_pages=4, strips=32, drawings=16, lines=(0.5, 0.5), page_sizes=SMALL_PAGES,
        strip_sizes=((32, 32), (48, 32), (64, 32), (96, 32)), drawing_sizes=((64, 64),),
        separators=("", "=", data.SEPARATOR, data.SEPARATOR),
    ),
    Stage(
        1100, continuations=1, texts=6, text_lines=(0.0, 0.2, 0.2, 0.2, 0.2, 0.2), echo=0.4,
        pages=22, full_pages=6, strips=12, drawings=10, lines=(0.25, 0.25, 0.25, 0.25),
        page_sizes=MIDDLE_PAGES, strip_sizes=((128, 48), (96, 64)), drawing_sizes=((80, 80), (112, 96)),
    ),
    Stage(
        1700, continuations=0, texts=6, text_lines=(0.0, 0.1, 0.15, 0.25, 0.25, 0.25), echo=0.1,
        pages=28, full_pages=4, strips=6, drawings=6, lines=(0.1, 0.1, 0.15, 0.2, 0.2, 0.25),
        page_sizes=FULL, strip_sizes=FULL, drawing_sizes=FULL,
    ),
    # What is left to learn is to tell glyphs apart: whole pages read out supervise every one of them.
    Stage(
        2700, continuations=0, texts=6, text_lines=(0.0, 0.1, 0.15, 0.25, 0.25, 0.25), echo=0.1,
        pages=16, full_pages=16, strips=8, drawings=6, lines=(0.1, 0.1, 0.15, 0.2, 0.2, 0.25),
        page_sizes=FULL, strip_sizes=FULL, drawing_sizes=FULL,
    ),
    # Glyphs are known; lines are still mixed up, on pages and in texts of many lines.
    Stage(
        7500, continuations=0, texts=10, text_lines=(0.0, 0.05, 0.1, 0.2, 0.3, 0.35), echo=0.05,
        pages=28, full_pages=4, strips=4, drawings=4, lines=(0.05, 0.05, 0.1, 0.2, 0.3, 0.3),
        page_sizes=FULL, strip_sizes=FULL, drawing_sizes=FULL,
    ),
    Stage(
        8900, continuations=0, texts=6, text_lines=(0.0, 0.05, 0.1, 0.2, 0.3, 0.35), echo=0.0,
        pages=36, full_pages=2, strips=2, drawings=3, lines=(0.02, 0.03, 0.1, 0.2, 0.3, 0.35),
        page_sizes=FULL, strip_sizes=FULL, drawing_sizes=FULL,
    ),
    # Nearly all mistakes are an answer's second character: it followed the first one where that stands elsewhere.
    Stage(
        10400, continuations=0, texts=16, text_lines=(0.0, 0.1, 0.1, 0.2, 0.3, 0.3), echo=0.0,
        pages=30, full_pages=2, strips=2, drawings=3, lines=(0.02, 0.08, 0.1, 0.2, 0.3, 0.3),
        page_sizes=FULL, strip_sizes=FULL, drawing_sizes=FULL, decoys=0.5, guided=True,
    ),
    # Meanwhile glyphs were mixed up again (transcription lost three points), and pages of many lines suffer most.
    Stage(
        11900, continuations=0, texts=8, text_lines=(0.0, 0.1, 0.1, 0.2, 0.3, 0.3), echo=0.0,
        pages=24, full_pages=10, strips=6, drawings=3, lines=(0.02, 0.03, 0.1, 0.2, 0.3, 0.35),
        page_sizes=FULL, strip_sizes=FULL, drawing_sizes=FULL, decoys=0.4, guided=True,
    ),
)  # fmt: skip

QWEN2_VL = Recipe(
    QWEN2_VL_CURRICULUM,
    steps=13300,
    schedule=(
        (0, 0.01), (100, 1.0), (3200, 1.0), (4200, 0.643), (5000, 0.643), (5300, 0.514), (6500, 0.514),
        (7300, 0.377), (8900, 0.0), (9000, 0.2), (10400, 0.0), (10440, 0.5), (10750, 0.5),
        (11100, 0.182), (11110, 0.5), (11300, 0.5), (11900, 0.0),
        (11930, 0.6), (12600, 0.6), (13300, 0.0),
    ),
    specialise_from=5300,
    specialisation=Specialisation(),
)  # fmt: skip

# A page of any of the usual sizes is one tile; these are two and a thumbnail.
WIDE = ((256, 112), (256, 128), (240, 128))
TILED = (*FULL * 2, *WIDE)

INTERNVL2_CURRICULUM = (
    Stage(
        0, continuations=0, texts=8, text_lines=(0.0, 0.1, 0.15, 0.25, 0.25, 0.25), echo=0.0,
        pages=24, full_pages=8, strips=6, drawings=5, lines=(0.1, 0.1, 0.15, 0.2, 0.2, 0.25),
        page_sizes=TILED, strip_sizes=TILED, drawing_sizes=TILED, decoys=0.5, guided=True,
    ),
    # Texts are known from the other model; reading is found again on short lines and pages of few.
    Stage(
        600, continuations=0, texts=5, text_lines=(0.0, 0.1, 0.15, 0.25, 0.25, 0.25), echo=0.0,
        pages=20, full_pages=4, strips=18, drawings=5, lines=(0.3, 0.25, 0.2, 0.1, 0.1, 0.05),
        page_sizes=TILED, strip_sizes=TILED, drawing_sizes=TILED, decoys=0.5, guided=True,
    ),
    Stage(
        1200, continuations=0, texts=8, text_lines=(0.0, 0.1, 0.1, 0.2, 0.3, 0.3), echo=0.0,
        pages=30, full_pages=4, strips=4, drawings=4, lines=(0.05, 0.05, 0.1, 0.2, 0.3, 0.3),
        page_sizes=TILED, strip_sizes=TILED, drawing_sizes=TILED, decoys=0.5, guided=True,
    ),
    # Lines are found; glyphs are mixed up. Whole pages read out supervise every one of them.
    Stage(
        1500, continuations=0, texts=5, text_lines=(0.0, 0.1, 0.1, 0.2, 0.3, 0.3), echo=0.0,
        pages=14, full_pages=16, strips=6, drawings=5, lines=(0.1, 0.1, 0.15, 0.2, 0.2, 0.25),
        page_sizes=TILED, strip_sizes=TILED, drawing_sizes=TILED, decoys=0.5, guided=True,
    ),
    # Two heads read by now. Glyphs are still mixed up, most of all in single lines.
    Stage(
        4200, continuations=0, texts=4, text_lines=(0.0, 0.1, 0.1, 0.2, 0.3, 0.3), echo=0.0,
        pages=14, full_pages=16, strips=12, drawings=4, lines=(0.05, 0.1, 0.15, 0.2, 0.2, 0.3),
        page_sizes=TILED, strip_sizes=TILED, drawing_sizes=TILED, decoys=0.4, guided=True,
    ),
    # Pages of many lines are last.
    Stage(
        6400, continuations=0, texts=3, text_lines=(0.0, 0.1, 0.1, 0.2, 0.3, 0.3), echo=0.0,
        pages=18, full_pages=14, strips=12, drawings=3, lines=(0.05, 0.08, 0.12, 0.2, 0.25, 0.3),
        page_sizes=TILED, strip_sizes=TILED, drawing_sizes=TILED, decoys=0.4, guided=True,
    ),
)  # fmt: skip

INTERNVL2 = Recipe(
    INTERNVL2_CURRICULUM,
    steps=8200,
    schedule=(
        (0, 0.01), (50, 1.0), (250, 1.0), (300, 0.5), (310, 1.0), (450, 1.0), (480, 0.5), (600, 0.5), (620, 1.0),
        (1300, 1.0), (1500, 0.75), (1900, 0.75), (2200, 0.0),
        (2210, 0.6), (2360, 0.6), (2600, 0.0), (2620, 0.75), (3400, 0.75), (4200, 0.0),
        (4230, 0.75), (4900, 0.75), (5800, 0.0), (5820, 0.5), (6050, 0.5), (6400, 0.0),
        (6430, 0.75), (7300, 0.75), (8200, 0.0),
    ),
    specialise_from=3200,
    specialisation=Specialisation(penalty=((3200, 0.1), (3600, 0.3))),
    imitation=450,
)  # fmt: skip

RECIPES = {"toy-qwen2-vl": QWEN2_VL, "toy-internvl2": INTERNVL2}
