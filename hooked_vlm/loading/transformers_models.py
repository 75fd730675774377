"""The weights of a `transformers` model in memory, if it is one that says what it computes."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hooked_vlm.errors import CheckpointError

# by name: peft and trl need not be installed
WRAPPERS = {
    "PeftModel": "pass peft_model.merge_and_unload(), which adds the adapter to the weights",
    "DistributedDataParallel": "pass its .module",
    "DataParallel": "pass its .module",
    "FullyShardedDataParallel": "pass a model loaded from its full state dict",
    "OptimizedModule": "pass its ._orig_mod, the model before torch.compile",
    "PreTrainedModelWrapper": "pass its .pretrained_model",
}


def state_of(hf_model: Any) -> dict[str, Tensor]:
    """The state dict of a model of `transformers`.

    Raises:
        CheckpointError: a wrapper around a model (what to pass instead is said), weights that are quantised or kept
            elsewhere, or no model of `transformers` at all.
    """
    kinds = [base.__name__ for base in type(hf_model).__mro__]
    if hint := next((WRAPPERS[kind] for kind in kinds if kind in WRAPPERS), None):
        raise CheckpointError(f"from_hf takes the model inside a {type(hf_model).__name__}: {hint}")
    if not all(hasattr(hf_model, name) for name in ("config", "state_dict")):
        raise CheckpointError(f"from_hf takes a model of transformers, got {type(hf_model).__name__}")
    state: dict[str, Tensor] = hf_model.state_dict()
    for name, tensor in state.items():
        if tensor.is_meta:
            raise CheckpointError(f"{name} is offloaded or empty (meta): load the model whole, without a device_map")
        if is_traceable_wrapper_subclass(tensor):
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__}, which holds something else than its own numbers (quantised or "
                "sharded): pass the model as it was before, with quantize= in from_pretrained to round it here"
            )
    return state
