"""How far a reader has to walk: files of the library that a call enters."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import hooked_vlm
from hooked_vlm import HookedVLM, sweep
from hooked_vlm.interventions import ZeroHeads
from hooked_vlm.metrics import log_prob
from hooked_vlm.toys.pages import make_page

LIBRARY = Path(hooked_vlm.__file__).resolve().parent


def files_entered(call: Callable[[], Any]) -> set[str]:
    """Files with a function that `call` enters; the checks of shapes that tests install are not the library's."""
    found: set[str] = set()

    def note(frame: FrameType, event: str, arg: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_absolute() and path.is_relative_to(LIBRARY):
            found.add(path.relative_to(LIBRARY).as_posix())

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("toy", ["toy-qwen2-vl", "toy-internvl2"])
@pytest.mark.repeats_shapes
def test_a_first_pass_enters_ten_files_and_a_sweep_seventeen(toy: str) -> None:
    model = HookedVLM.from_pretrained(toy, device="cpu")
    page = make_page(np.random.default_rng(7), n_lines=4)
    prompt = model.to_inputs(page.question(2), images=page.image)
    entered = files_entered(lambda: model(prompt))
    assert len(entered) <= 10, sorted(entered)
    prompt = model.to_inputs(page.question(2), images=page.image)
    heads = [ZeroHeads(((layer, head),)) for layer in range(4) for head in range(4)]
    entered = files_entered(lambda: sweep(model, prompt, heads, log_prob(5)))
    assert len(entered) <= 17, sorted(entered)
