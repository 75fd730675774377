"""An atlas of every family: scores of attention by their definitions, everything else a number."""

from pathlib import Path

import numpy as np
import pytest
from atlas_by_hand import check_attention
from whole_folders import REFERENCES, save_whole

from hooked_vlm import HookedVLM
from hooked_vlm.atlas import as_stimuli, atlas, shipped
from hooked_vlm.atlas.stimuli import of_kind

FAMILIES = ("qwen3-vl", *REFERENCES)


@pytest.mark.parametrize(
    "family",
    [name if name == "gemma3" else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES],
)
def test_an_atlas_of_a_family(family: str, tmp_path: Path) -> None:
    toy = HookedVLM.from_pretrained("toy-qwen2-vl")
    model = HookedVLM.from_pretrained(save_whole(family, tmp_path), device="cpu")
    samples = [stimulus.asked for stimulus in shipped(toy, 2) if stimulus.sample is not None]
    own = as_stimuli(samples)
    for kind in ("page", "text", "object"):
        check_attention(model, of_kind(own, (kind,))[: 2 if kind == "page" else 1])
    found = atlas(model, samples, groups=0)
    expected = {"localisation", "induction", "transfer", "direct_logit", "distance", "text_region", "answer_without"}
    assert expected <= set(found.observed)
    for name in found.observed:
        values = found.values(name)
        windows = family in ("gemma3", "paligemma2")  # from which the picture of the longest prompts is out of sight
        assert np.isfinite(values).all() or (windows and name == "localisation"), name
        if name in ("distance", "text_region", "sink_patches", "localisation", "image_from_answer"):
            assert np.nanmin(values) >= 0 and np.nanmax(values) <= 1 + 1e-6, name
