"""Masking heads of the vision tower: by hand, against random heads of the tower, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.errors import InputError, StudyError
from hooked_vlm.experiments.ocr_heads import MaskConfig, run
from hooked_vlm.experiments.ocr_heads.changed import answer_all, tasks_of, tasks_with_pictures
from hooked_vlm.experiments.ocr_heads.controls import vision_heads
from hooked_vlm.experiments.ocr_heads.examples import to_inputs
from hooked_vlm.experiments.ocr_heads.masking import masking_conditions
from hooked_vlm.experiments.ocr_heads.study import Study

SMALL: dict[str, Any] = {"samples": 3, "quiet": True, "device": "cpu", "max_new_tokens": 6, "task_samples": 4}


def config_of(out: Path, **changes: Any) -> MaskConfig:
    given = {"tower": "vision", "heads": ("0.2", "2.1"), "random_draws": 2, "modes": ("zero", "uniform")}
    return MaskConfig(**{**SMALL, **given, "out": out, **changes})


@pytest.mark.repeats_shapes
def test_masking_equals_hooks_by_hand(toy: HookedVLM, tmp_path: Path) -> None:
    config = config_of(tmp_path, tasks=("page",))
    study = Study(config, toy)
    conditions = masking_conditions([vision_heads(study, config)], config.modes, "vision")
    answers = answer_all(study, tasks_of(study, config), conditions, "", encode=False)

    def zero(z: torch.Tensor, hook: Any) -> None:
        z[:, :, 2 if hook.layer() == 0 else 1] = 0

    def uniform(pattern: torch.Tensor, hook: Any) -> None:
        pattern[:, 2 if hook.layer() == 0 else 1] = 1 / pattern.shape[-1]  # pictures of one size, without windows

    for name, point, edit in (("2 vision", "hook_z", zero), ("2 vision, uniform", "hook_pattern", uniform)):
        own = next(c for c in conditions if c.name == name)
        assert own.heads == ((0, 2), (2, 1))
        found = answers[answers["condition"] == name].set_index("sample")
        hooks = [(f"vision.blocks.{layer}.attn.{point}", edit) for layer in (0, 2)]
        for i, example in enumerate(tasks_of(study, config)[0].data.examples):
            reply = toy.generate(to_inputs(toy, [example], None), 6, fwd_hooks=hooks, return_type="str")
            assert found.loc[i, "reply"] == reply
    unchanged = answers[answers["condition"] == "unchanged"].set_index("sample")
    plain = to_inputs(toy, [tasks_of(study, config)[0].data.examples[0]], None)
    assert unchanged.loc[0, "reply"] == toy.generate(plain, 6, return_type="str")


def test_controls_are_other_heads_of_the_tower(qwen: HookedVLM, tmp_path: Path) -> None:
    config = config_of(tmp_path, random_draws=20, random_from=("others", "any", "layer"))
    chosen = vision_heads(Study(config, qwen), config)
    others, every, layer = (own["vision"] for own in chosen.randoms)
    assert all(len(set(own)) == 2 and not set(own) & {(0, 2), (2, 1)} for own in (*others.sets, *layer.sets))
    assert {head for own in every.sets for head in own} <= {(la, head) for la in range(3) for head in range(4)}
    assert "10 heads that are not changed, of the vision tower" in others.origin and "nearest in layer" in layer.origin
    assert [own.sets for own in vision_heads(Study(config, qwen), config).controls] == [
        own.sets for own in (others, every, layer)
    ]
    by_default = vision_heads(Study(config_of(tmp_path), qwen), config_of(tmp_path)).controls
    assert [own.name for own in by_default] == ["random 2 others"]


@pytest.mark.repeats_shapes
def test_a_run_leaves_out_tasks_without_pictures(qwen: HookedVLM, tmp_path: Path) -> None:
    result = run(config_of(tmp_path, task_samples=2, random_draws=1), qwen)
    table = result.table("masking")
    assert set(table["task"]) == {"page", "naming"}
    assert list(dict.fromkeys(table["condition"])) == [
        "unchanged", "2 vision", "random 2 others", "2 vision, uniform", "random 2 others, uniform"
    ]  # fmt: skip
    assert "Masking the 2 vision heads (0.2, 2.1)" in result.summary and "left out: text" in result.summary
    assert np.isfinite(table["value"].to_numpy(dtype=float)).all()
    config = config_of(tmp_path, tasks=("page", "text"))
    with pytest.raises(StudyError, match="--tasks text"):
        tasks_with_pictures(Study(config, qwen), config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": None}, "--tower vision needs --heads"),
        ({"tower": "language"}, "--heads names heads of the vision tower"),
        ({"mask_heads": (2,)}, "--mask-heads counts top heads"),
        ({"heads": ("2-1",)}, r"LAYER\.HEAD.*2-1"),
        ({"heads": ("2.1", "2.1")}, "--heads names a value twice"),
        ({"heads": ()}, "--heads needs at least one"),
        ({"random_from": ("others", "live")}, "--random-from live needs scores"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=words):
        config_of(tmp_path, **changes).check()


def test_a_head_that_the_tower_does_not_have_is_refused(qwen: HookedVLM, tmp_path: Path) -> None:
    config = config_of(tmp_path, heads=("3.0",))
    with pytest.raises(InputError, match=r"no head 3\.0: the vision tower has layers 0 to 2"):
        vision_heads(Study(config, qwen), config)
