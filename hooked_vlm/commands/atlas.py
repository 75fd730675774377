"""`hooked-vlm atlas`: what every head of both towers does, as tables and a page."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_vlm.atlas.definitions import PICTURES
from hooked_vlm.atlas.page import MOST_PICTURES, Picture, save_atlas_page
from hooked_vlm.atlas.result import Atlas
from hooked_vlm.atlas.show import above_null, in_terminal, number_of_tests
from hooked_vlm.atlas.stimuli import Stimulus, as_stimuli, of_kind, shipped
from hooked_vlm.atlas.study import atlas
from hooked_vlm.commands.config import AtlasConfig
from hooked_vlm.data.sources import read_samples
from hooked_vlm.errors import InputError
from hooked_vlm.experiments.common.workers import workers_of
from hooked_vlm.model.by_name import load
from hooked_vlm.runtime.files import writable_folder
from hooked_vlm.runtime.progress import recorded
from hooked_vlm.viewer.attention_view import attention
from hooked_vlm.viewer.vision_view import vision_attention

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

VISION_QUERIES = 64
"""Patches of a picture that can be clicked in the page of the vision tower."""


def answer(config: AtlasConfig) -> tuple[str, dict[str, Any]]:
    """Make the atlas; what to print, and the same as data."""
    config.check_workers()
    if not 0 <= config.pictures <= MOST_PICTURES:
        raise InputError(f"--pictures must be 0 to {MOST_PICTURES}, got {config.pictures}")
    samples = None if config.data is None else list(read_samples(config.data, config.prompt))
    out = writable_folder(config.out)
    model = load(config.model, config.device, config.dtype)
    with recorded(out), workers_of(config, model, config.device) as workers:
        found = atlas(
            model, samples, n=config.n, groups=config.groups, seed=config.seed, folder=out / "parts", workers=workers,
            quiet=config.quiet,
        )  # fmt: skip
    found.save(out)
    stimuli = shipped(model, config.n, config.seed) if samples is None else as_stimuli(samples)
    save_atlas_page(out / "atlas.html", found, pictures_of(model, stimuli, out, config.pictures))
    files = {"page": out / "atlas.html", "table": out / "heads.csv", "observations": out / "observations.parquet"}
    text = in_terminal(found) + "\n" + "".join(f"\n{name}: {path}" for name, path in files.items())
    return text, {**{name: str(path) for name, path in files.items()}, **as_data(found)}


def as_data(found: Atlas) -> dict[str, Any]:
    """For each score the number of heads above the null (None: no head was tested), and every head's mean."""
    scores = {}
    for score in found.scores:
        rows = found.rows(score.name)
        means = {f"{row['layer']}.{row['head']}": row["value"] for row in rows.to_dict("records")}
        above = int(above_null(rows).sum()) if number_of_tests(rows) else None
        scores[score.name] = {"tower": score.tower, "above_null": above, "heads": means}
    return {"model": found.model, "scores": scores}


def pictures_of(model: "HookedVLM", stimuli: Sequence[Stimulus], out: Path, most: int) -> list[Picture]:
    """The first pictures, the kinds in turn, each with pages of its attention in `out/pictures`."""
    in_turn = zip_longest(*(of_kind(stimuli, (kind,)) for kind in PICTURES))
    shown = [stimulus for some in in_turn for stimulus in some if stimulus is not None][:most]
    return [_picture(model, stimulus, out, number) for number, stimulus in enumerate(shown)]


def _picture(model: "HookedVLM", stimulus: Stimulus, out: Path, number: int) -> Picture:
    """A picture and its pages, whose files have its number: a name may be no name of a file."""
    sample = stimulus.asked
    inputs, images = sample.inputs(model), sample.pictures
    boxes = {i: [box.box for box in stimulus.boxes("evidence") if box.image == i] for i in range(len(images))}
    link, vision_link = f"pictures/{number}.html", f"pictures/{number}-vision.html"
    n_patches = inputs.image_grid(0).n_patches
    patches = range(0, n_patches, max(1, n_patches // VISION_QUERIES))
    attention(model, inputs, boxes=boxes, images=images, title=f"{stimulus.name}: attention").save(out / link)
    vision_attention(
        model, inputs, patches=patches, boxes=boxes, images=images, title=f"{stimulus.name}: vision tower"
    ).save(out / vision_link)
    question = inputs.tokens[0, inputs.positions.question[0]].tolist()
    asked = sample.prompt if isinstance(sample.prompt, str) else model.tokenizer.decode(question)
    return Picture(stimulus.name, images[0], f"{asked} {sample.answer}", link, vision_link)
