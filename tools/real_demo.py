"""A published model: does it agree with `transformers`, and which of its heads carry a picture to its answer?

`make demo-real` runs it on SmolVLM-256M (0.5 GB, downloaded once), whose picture is a drawing of the toy models'. Where
the hub cannot be reached it says so and stops.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from hooked_vlm.analysis.pictures import overlay
from hooked_vlm.analysis.rows import attention_rows
from hooked_vlm.analysis.text_tables import text_table
from hooked_vlm.commands import verify
from hooked_vlm.errors import CheckpointError
from hooked_vlm.experiments.head_attribution.tasks import ONE_WORD
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import ReplaceImageKV
from hooked_vlm.interventions.attention import all_heads
from hooked_vlm.loading.folders import find_checkpoint
from hooked_vlm.metrics import log_prob
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.sweeps.run import sweep
from hooked_vlm.toys.drawings import draw_object
from hooked_vlm.verify.config import VerifyConfig

MODEL = "HuggingFaceTB/SmolVLM-256M-Instruct"
DRAWN, SIZE, SEED = "star", (320, 160), 7
"""Object, (width, height) in pixels, seed of its colour, place and clutter."""
TOP, PANELS = 10, 5
"""Heads in the table, and in the figure."""
Head = tuple[int, int]


@dataclass(frozen=True)
class DemoConfig:
    """Verify a published model, rank its heads by what the answer loses if one does not see the picture, and draw where
    the first ones look."""

    model: str = MODEL
    """A hub name or a checkpoint folder."""
    out: Path = Path("out/demo-real")
    max_tiles: int = 2
    """Tiles that the drawing is cut into, beside the whole; with more, more is seen and everything takes longer."""


@dataclass(frozen=True)
class Ranking:
    """The heads by their effects, largest loss first."""

    answer: str
    baseline: float
    """Log-probability of the answer's first token."""
    blind: float
    """The same if no head sees the picture from the text behind it."""
    effects: dict[Head, float]
    """Change of the log-probability if one head does not."""

    def __str__(self) -> str:
        first = list(self.effects.items())[:TOP]
        (layer, head), most = first[0]
        summary = (
            f"{self.answer!r} (probability {np.exp(self.baseline):.2f}) leans most on head {layer}.{head}: without its "
            f"sight of the picture the log-probability changes by {most:+.2f}, without all {len(self.effects)} heads' "
            f"by {self.blind - self.baseline:+.2f}"
        )
        rows = [(f"{layer}.{head}", f"{effect:+.3f}") for (layer, head), effect in first]
        return f"{summary}\n\n{text_table(('head', 'change of log-probability'), rows)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code: 1 if the model and `transformers` disagree."""
    config = tyro.cli(DemoConfig, args=argv, description=DemoConfig.__doc__)
    try:
        folder = find_checkpoint(config.model)
    except CheckpointError as error:
        print(f"skipped: {error}")
        return 0
    began = time.perf_counter()
    asked = VerifyConfig(
        str(folder), out=config.out / "verify.json", device="cpu", max_new_tokens=4, quick=True, quiet=True
    )
    print(f"{config.model} and its reference are compared, then its heads are ranked ...", file=sys.stderr)
    compared, found = verify.answer(asked)
    model = HookedVLM.from_pretrained(folder, device="cpu", dtype="float32")
    image, inputs = drawing(model, config.max_tiles)
    ranking = rank(model, inputs)
    picture = config.out / "where-it-looks.png"
    look(model, inputs, image, list(ranking.effects)[:PANELS], picture)
    seconds, n_cores = time.perf_counter() - began, torch.get_num_threads()
    print(f"{ranking}\n\nwhere these heads look: {picture}\n\n{compared}\n{seconds:.0f} s on {n_cores} cores")
    return 0 if found["passed"] else 1


@torch.no_grad()
def drawing(model: HookedVLM, max_tiles: int) -> tuple[Image.Image, VLMInputs]:
    """A drawn object, and the question for its name; the picture is encoded here, once for all that follows."""
    image = Image.fromarray(draw_object(np.random.default_rng(SEED), DRAWN, SIZE)[0])
    inputs = model.to_inputs(ONE_WORD, images=image, max_tiles=max_tiles)
    return image, inputs.with_image_features(model.encode_images(inputs))


@torch.no_grad()
def rank(model: HookedVLM, inputs: VLMInputs) -> Ranking:
    """Hide the picture from one head at a time, for all of the text behind it."""
    token = int(model(inputs, logits_at="last")[0, -1].argmax())
    behind = tuple(range(inputs.visuals[0].stop, inputs.stop[0]))
    heads = all_heads(model)
    hidden: list[Any] = [ReplaceImageKV((head,), "knockout", queries=(behind,)) for head in heads]
    hidden.append(ReplaceImageKV(heads, "knockout", queries=(behind,)))
    result = sweep(model, inputs, hidden, log_prob(token))
    effects = dict(zip(heads, result.effects[:-1, 0].tolist(), strict=True))
    ordered = dict(sorted(effects.items(), key=lambda item: item[1]))
    return Ranking(
        str(model.to_string([token])).strip(), float(result.baseline[0]), float(result.values[-1, 0]), ordered
    )


def look(model: HookedVLM, inputs: VLMInputs, image: Image.Image, heads: list[Head], path: Path) -> None:
    """Draw the attention of heads, from the last token, over the picture."""
    layers = sorted({layer for layer, _ in heads})
    rows = attention_rows(model, inputs, torch.tensor([[inputs.stop[0] - 1]]), layers)  # [layer, 1, head, 1, key]
    at = inputs.visuals[0].positions
    panels = [inputs.on_image(0, rows[layers.index(layer), 0, head, 0, at]) for layer, head in heads]
    titles = [f"head {layer}.{head}" for layer, head in heads]
    overlay(image, np.stack(panels), titles, "attention from the last token").savefig(path)


if __name__ == "__main__":
    sys.exit(main())
