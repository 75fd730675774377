"""The two toy models by name."""

import json
from pathlib import Path

from tools.toy_training.family import HFModel, ToyFamily
from tools.toy_training.internvl2 import InternVL2
from tools.toy_training.qwen2_vl import Qwen2VL

QWEN2_VL, INTERNVL2 = Qwen2VL(), InternVL2()
FAMILIES: dict[str, ToyFamily] = {family.name: family for family in (QWEN2_VL, INTERNVL2)}


def family_of(model: HFModel) -> ToyFamily:
    """The family of one of `transformers`' models."""
    return {"qwen2_vl": QWEN2_VL, "internvl": INTERNVL2}[model.config.model_type]


def family_in(folder: Path) -> ToyFamily:
    """The family of a checkpoint's folder."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return {"qwen2_vl": QWEN2_VL, "internvl_chat": INTERNVL2}[model_type]
