"""Qwen2-VL and InternVL2 with a hook on every intermediate tensor, in both towers."""

from hooked_vlm.config import VisionConfig as VisionConfig
from hooked_vlm.config import VLMConfig as VLMConfig
from hooked_vlm.errors import CheckpointError as CheckpointError
from hooked_vlm.errors import GeometryError as GeometryError
from hooked_vlm.errors import HookedVLMError as HookedVLMError
from hooked_vlm.errors import HookError as HookError
from hooked_vlm.errors import ImageError as ImageError
from hooked_vlm.errors import InputError as InputError
from hooked_vlm.inputs.geometry import ImageGrid as ImageGrid
from hooked_vlm.inputs.vlm_inputs import VLMInputs as VLMInputs
from hooked_vlm.model.cache import VLMCache as VLMCache
from hooked_vlm.model.vlm import HookedVLM as HookedVLM
from hooked_vlm.sweeps.engine import SweepResult as SweepResult
from hooked_vlm.sweeps.engine import sweep as sweep
from hooked_vlm.sweeps.many import SweepCase as SweepCase
from hooked_vlm.sweeps.many import sweep_many as sweep_many
