"""A model spread over devices, through `accelerate`: which part lies where, and how it gets to where it computes.

Parts are whole blocks of either tower, the patch embedding, the vision tower's norms before and behind its blocks, the
projector, and the three ends of the stream (embedding, final norm, unembedding), which stay together on the main
device: inputs, logits and `model.cfg.device` are there. A part may also be kept on the CPU or on disk and be loaded,
matrix by matrix, when it computes (offloading).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from accelerate.utils import OffloadedWeightsLoader, get_balanced_memory, get_max_memory, offload_weight
from accelerate.utils.offload import save_offload_index
from torch import Tensor, nn

from hooked_vlm.errors import CheckpointError
from hooked_vlm.nn.weight_access import check_unedited

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

ENDS = ("embed", "ln_final", "unembed")
VISION_NORMS = ("vision.ln_pre", "vision.ln_post", "vision.unread_norm")
_WHOLE = ["Block", "PatchEmbed", "TileEmbed", "Projector"]

DeviceMap = str | Mapping[str, int | str | torch.device]
"""How to spread: "auto" and "balanced" fill devices alike, "sequential" one after the other; or {part: device}, where
a part may stand for all below it ("blocks", "" for everything)."""


@dataclass(frozen=True)
class Spread:
    """Requested placement: device map, memory limits, folder for offloaded weights."""

    device_map: DeviceMap
    max_memory: Mapping[int | str, int | str] | None = None
    offload_folder: str | Path | None = None


@dataclass(frozen=True)
class Placement:
    """The device of every part: "cuda:0", "cpu", "disk"."""

    devices: dict[str, str]

    @property
    def main(self) -> str:
        return self.devices["embed"]

    def of(self, name: str) -> str:
        """Device that keeps a parameter."""
        return next(device for part, device in self.devices.items() if name.startswith(f"{part}."))

    def home(self, name: str) -> str:
        """Device of a parameter between uses: "meta" if it is offloaded."""
        device = self.of(name)
        return "meta" if self.offloads(device) else device

    def offloads(self, device: str) -> bool:
        """Whether what is kept there computes elsewhere."""
        return device == "disk" or (device == "cpu" and self.main != "cpu")


def planned(model: "HookedVLM", spread: Spread, dtype: torch.dtype) -> Placement:
    """Plan a device for each part of a model on the meta device.

    Raises:
        CheckpointError: an unknown part or device, parts without a place, the ends of the stream not together, or not
            enough memory for them.
    """
    asked = spread.device_map
    if isinstance(asked, str) and asked not in ("auto", "balanced", "sequential"):
        raise CheckpointError(
            f'device_map must be "auto", "balanced", "sequential" or {{part: device}}, got {asked!r}: for one device '
            "give device="
        )
    given = _inferred(model, spread, dtype) if isinstance(asked, str) else asked
    devices = _complete({name: _device_name(device) for name, device in given.items()}, _parts(model))
    ends = {devices[end] for end in ENDS}
    if len(ends) > 1 or ends == {"disk"}:
        found = ", ".join(f"{end} on {devices[end]}" for end in ENDS)
        raise CheckpointError(f"{', '.join(ENDS)} must be together on a device that computes, got {found}")
    return Placement(devices)


def _parts(model: "HookedVLM") -> list[str]:
    """Names of the parts that are placed as a whole, in the order of a pass."""
    alone = (*ENDS, *VISION_NORMS)
    found = [name for name, module in model.named_modules() if name in alone or type(module).__name__ in _WHOLE]
    return [name for name in found if not name.startswith(tuple(f"{part}." for part in found))]


def _complete(given: Mapping[str, str], parts: list[str]) -> dict[str, str]:
    """The device of every part, by the longest name given for it."""
    above = {part: [name for name in given if not name or f"{part}.".startswith(f"{name}.")] for part in parts}
    if missing := [part for part, names in above.items() if not names]:
        raise CheckpointError(f"the device_map says nothing of {', '.join(missing)}")
    if unknown := set(given) - {name for names in above.values() for name in names}:
        raise CheckpointError(
            f"the device_map names {', '.join(sorted(unknown))}, which is no part of this model: {', '.join(parts)}"
        )
    return {part: given[max(names, key=len)] for part, names in above.items()}


def _device_name(device: int | str | torch.device) -> str:
    if device == "disk":
        return "disk"
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"cannot use the device {str(device)!r} of the device_map ({reason})") from error
    return "cuda:0" if str(found) == "cuda" else str(found)


def _inferred(model: "HookedVLM", spread: Spread, dtype: torch.dtype) -> dict[str, int | str | torch.device]:
    """`accelerate`'s plan for the towers and the projector, on what the stream's ends leave of the first device."""
    model.to(dtype)
    memory = get_max_memory(None if spread.max_memory is None else dict(spread.max_memory))
    main = next(iter(memory))
    tied = {id(p): p for end in ENDS for p in model.get_submodule(end).parameters()}
    ends = sum(p.numel() * p.element_size() for p in tied.values())
    if ends > memory[main]:
        raise CheckpointError(
            f"embedding and unembedding need {ends / 2**30:.2f} GiB, device {main} has {memory[main] / 2**30:.2f} GiB"
        )
    memory[main] -= ends
    towers = nn.Module()
    for name in ("vision", "projector", "blocks"):
        if hasattr(model, name):
            towers.add_module(name, getattr(model, name))
    if spread.device_map != "sequential":
        disk = {"disk": memory.pop("disk")} if "disk" in memory else {}  # a name it does not know
        memory = {**(get_balanced_memory(towers, memory, _WHOLE) or {}), **disk}
    return {**infer_auto_device_map(towers, memory, _WHOLE), **dict.fromkeys(ENDS, main)}


def offloaded_weights(
    placement: Placement, tensors: Mapping[str, Tensor], dtype: torch.dtype, folder: str | Path | None
) -> Mapping[str, Tensor]:
    """The weights of offloaded parts, to be read when they compute.

    Those on disk stay in the checkpoint's files (mapped, converted at every use), or are written to `folder` once.

    Raises:
        CheckpointError: the folder is not empty (its weights may be another model's) or cannot be written.
    """
    kept: dict[str, Tensor] = {}
    on_disk: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        device = placement.of(name)
        if device == "disk":
            on_disk[name] = tensor
        elif placement.offloads(device):
            kept[name] = tensor.to("cpu", dtype)
    if folder is None or not on_disk:
        return {**kept, **on_disk}
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"offload_folder {folder} exists and is not an empty folder: choose another")
    index: dict[str, Any] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensor in on_disk.items():
            index = offload_weight(tensor.to("cpu", dtype), name, folder, index)
        save_offload_index(index, folder)
    except OSError as error:
        raise CheckpointError(f"cannot write offloaded weights to {folder}: {error}") from error
    return OffloadedWeightsLoader(state_dict=kept, save_folder=folder, index=index)


def attach(model: "HookedVLM", placement: Placement, offloaded: Mapping[str, Tensor]) -> None:
    """Have every part take its inputs to its device, and its weights there if they are kept elsewhere."""
    for part, device in placement.devices.items():
        module = model.get_submodule(part)
        if placement.offloads(device):
            device = placement.main
            execute: Any = device  # a name: with a torch.device `accelerate` would collect garbage after every weight
            attach_align_device_hook(module, execute, offload=True, weights_map=offloaded, module_name=part)
            for own in module.modules():
                if next(own.parameters(recurse=False), None) is not None:  # hook points have none and stay unhooked
                    own.register_forward_pre_hook(check_unedited)
        if not hasattr(module, "_hf_hook"):
            add_hook_to_module(module, AlignDevicesHook(device))
