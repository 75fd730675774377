"""Qwen2-VL and InternVL2 with a hook on every intermediate tensor, in both towers."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm import (  # isort: skip
        activations, analysis, atlas, converters, data, experiments, features, inputs, interventions, lens, loading,
        metrics, model, nn, patching, runtime, steering, sweeps, toys, verify, viewer,
    )  # fmt: skip
    from hooked_vlm.config import VLMConfig
    from hooked_vlm.errors import CheckpointError, GeometryError, HookedVLMError, HookError, ImageError, InputError
    from hooked_vlm.inputs.geometry import ImageLayout
    from hooked_vlm.inputs.vlm_inputs import VLMInputs
    from hooked_vlm.model.cache import VLMCache
    from hooked_vlm.model.vlm import HookedVLM
    from hooked_vlm.sweeps.many import SweepCase, sweep_many
    from hooked_vlm.sweeps.run import SweepResult, sweep
    from hooked_vlm.vision_config import VisionConfig

__all__ = [
    "CheckpointError", "GeometryError", "HookError", "HookedVLM", "HookedVLMError", "ImageError", "ImageLayout",
    "InputError", "SweepCase", "SweepResult", "VLMCache", "VLMConfig", "VLMInputs", "VisionConfig", "activations",
    "analysis", "atlas", "converters", "data", "experiments", "features", "inputs", "interventions", "lens", "loading",
    "metrics", "model", "nn", "patching", "runtime", "steering", "sweep", "sweep_many", "sweeps", "toys", "verify",
    "viewer",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
