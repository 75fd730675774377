"""Steering in the served page: answers are those of the vectors' own intervention, whatever heads are edited too."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import bundled

from hooked_vlm import InputError, cli
from hooked_vlm.data import Sample
from hooked_vlm.interventions import Compose, ScaleHeads
from hooked_vlm.steering import SteeringVectors, steering_vectors
from hooked_vlm.toys import NAMING_PROMPT, naming_sample
from hooked_vlm.viewer.session import Asked, Picture, Session


def drawings(name: str, seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample(f"{name}{i}", NAMING_PROMPT, [naming_sample(rng, name=name).image]) for i in range(8)]


@pytest.fixture(scope="module")
def vectors() -> SteeringVectors:
    return steering_vectors(bundled("toy-qwen2-vl"), drawings("circle", 0), drawings("square", 1))


def square(**settings: Any) -> Asked:
    return Asked(Picture("square.png", drawings("square", 5)[0].images[0]), NAMING_PROMPT, 4, **settings)


@pytest.mark.parametrize("factors", [(), (((0, 1), 0.5),)])
def test_answers_are_steered(factors: Any, vectors: SteeringVectors) -> None:
    model = bundled("toy-qwen2-vl")
    asked = square(factors=factors, steering=(2, 1.5))
    shown = Session(model, steering=vectors).answer(asked)
    assert asked.picture is not None
    inputs = model.to_inputs(NAMING_PROMPT, images=asked.picture.image)
    scaled = [ScaleHeads(((0, 1),), 0.5)] if factors else []
    hooks = Compose((*scaled, vectors.at(2, 1.5))).hooks(model, inputs)
    assert shown.unedited.text == model.generate(inputs, 4, return_type="str") == "square"
    assert shown.edited.text == model.generate(inputs, 4, fwd_hooks=hooks, return_type="str") != "square"
    assert "steering at layer 2 × 1.5" in asked.edits and "steering at layer 2 × 1.5" in shown.page
    assert asked != square(factors=factors) and asked == replace(asked)


def test_steering_without_vectors_or_at_other_layers_is_refused(vectors: SteeringVectors) -> None:
    model = bundled("toy-qwen2-vl")
    with pytest.raises(InputError, match="--steer"):
        Session(model).answer(square(steering=(2, 1.0)))
    with pytest.raises(InputError, match="layer 7"):
        Session(model, steering=vectors).answer(square(steering=(7, 1.0)))


def test_the_command_takes_the_file_only_to_serve(
    vectors: SteeringVectors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve = pytest.importorskip("hooked_vlm.viewer.server", reason="NiceGUI is not installed")
    served: list[Any] = []
    monkeypatch.setattr(serve, "serve", lambda *arguments: served.append(arguments))
    file = vectors.save(tmp_path / "steering.safetensors")

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["hooked-vlm", "view", "--no-open", *arguments])
        cli.main()

    call("--serve", "--steer", str(file), "--device", "cpu")
    assert torch.equal(served[0][0].steering.vectors, vectors.vectors)
    with pytest.raises(SystemExit, match="--serve"):
        call("--steer", str(file), "--image", "a.png", "--prompt", "b")
    with pytest.raises(SystemExit, match="weights"):
        call("--serve", "--steer", str(file), "--model", "toy-qwen2-vl", "--dtype", "bfloat16", "--device", "cpu")


@pytest.mark.slow
def test_layer_and_scale_are_chosen_in_the_page(browser: Any, vectors: SteeringVectors, tmp_path: Path) -> None:
    pytest.importorskip("nicegui", reason="NiceGUI is not installed")
    file, picture = vectors.save(tmp_path / "steering.safetensors"), tmp_path / "square.png"
    drawings("square", 5)[0].images[0].save(picture)
    command = [sys.executable, "-m", "hooked_vlm.cli", "view", "--serve", "--no-open", "--max-new-tokens", "4"]
    command += ["--steer", str(file), "--image", str(picture), "--prompt", NAMING_PROMPT, "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            found = re.match(r"page: (\S+)", process.stdout.readline())
            assert found
            page = browser.new_page()
            page.goto(found[1])
            page.get_by_label("Scale").fill("1.5")
            page.get_by_label("Steer at").click()
            page.get_by_role("option", name="layer 2").click()
            page.click("button.run")
            page.get_by_text("With steering at layer 2 × 1.5").wait_for()
            plain, steered = page.locator(".answer-text").all_inner_texts()
            model = bundled("toy-qwen2-vl")
            inputs = model.to_inputs(NAMING_PROMPT, images=str(picture))
            hooks = vectors.at(2, 1.5).hooks(model, inputs)
            assert plain == "square"
            assert steered == model.generate(inputs, 4, fwd_hooks=hooks, return_type="str")
            page.get_by_label("Scale").fill("")
            page.click("button.run")
            page.get_by_text("the scale must be a number").wait_for()
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
