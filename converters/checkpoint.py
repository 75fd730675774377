"""Reading a Hugging Face checkpoint folder: JSON files and memory-mapped safetensors.

Nothing is executed or unpickled: a folder must hold `config.json` and `*.safetensors`, or it is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_vlm.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER_FILES = ("adapter_config.json", "adapter_model*", "*lora*.safetensors", "*lora*.bin", "non_lora_trainables.bin")
"""Patterns of the files in which trainers keep what is to be added to the weights of a base model."""
MERGE = "merge it into its base model (peft: merge_and_unload()) and save that"


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the checkpoint's `config.json`.

    Raises:
        CheckpointError: no such folder, no `config.json` in it, or not a JSON object.
    """
    folder = _existing(folder)
    config = read_json(folder, "config.json", default=None)
    if config is None:
        hint = f"; it holds an adapter: {MERGE}" if (folder / "adapter_config.json").exists() else ""
        raise CheckpointError(f"{folder} has no config.json, so it is not a checkpoint folder{hint}")
    return config


def read_json(folder: str | Path, name: str, default: Any) -> Any:
    """Read the JSON object in `folder/name`; `default` if there is no such file.

    Raises:
        CheckpointError: the file cannot be read or does not hold a JSON object.
    """
    path = Path(folder) / name
    try:
        if not path.exists():
            return default
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, nesting without end
        raise CheckpointError(f"{path} is not valid JSON: {error}{_lfs_hint(path)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def open_tensors(folder: str | Path, notes: list[str] | None = None) -> dict[str, Tensor]:
    """Map every tensor of the checkpoint into memory, by its name in the files, on the CPU.

    Tensors are read when used. The mapping is private (copy on write): a tensor may be edited in place, which
    costs memory for the pages touched and never reaches the file. The files may be replaced or removed
    meanwhile, but must not be rewritten in place.

    Args:
        notes: gains what is wrong with the index and cannot change a number: tensors that are in another file than
            it says, or in none, or in two with equal values.

    Raises:
        CheckpointError: no safetensors (pickle files are refused), a file that is missing, truncated or
            corrupt, an index that names a file outside the folder, a tensor with two values, or an adapter
            beside the weights.
    """
    folder = _existing(folder)
    _refuse_adapters(folder)
    if (folder / SINGLE_FILE).exists():
        return _open_file(folder / SINGLE_FILE)
    index = read_json(folder, INDEX_FILE, default=None)
    if index is None:
        raise CheckpointError(_why_no_safetensors(folder))
    return _open_shards(folder, _file_of_tensor(folder, index), [] if notes is None else notes)


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.exists():
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected the folder that holds config.json")
    return folder


def _open_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():  # neither is a named pipe, which would block when opened
        raise CheckpointError(f"{path} is not a file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        hint = _lfs_hint(path) or "; download it again"
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}){hint}") from error


def _file_of_tensor(folder: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The index's `weight_map` {tensor name: file name}, after a check that its file names are harmless."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map from tensor names to files")
    for tensor, name in weight_map.items():
        # Only the name is checked. Links are followed, because in the Hugging Face cache every file of a
        # snapshot is a symbolic link to ../../blobs, outside the folder; anyone who could plant another link
        # there could also have replaced the file.
        plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:")
        if not plain or ".." in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX_FILE} puts {tensor} into {name!r}; expected the plain name of a "
                ".safetensors file in the same folder"
            )
    return weight_map


def _open_shards(folder: Path, file_of: Mapping[str, str], notes: list[str]) -> dict[str, Tensor]:
    files = sorted(set(file_of.values()))
    if missing := [name for name in files if not (folder / name).exists()]:
        raise CheckpointError(f"{folder} lacks {listed(missing)}, named in {INDEX_FILE}; finish the download")
    tensors: dict[str, Tensor] = {}
    holders: dict[str, list[str]] = {}
    for file in files:
        for name, tensor in _open_file(folder / file).items():
            if name in tensors and not same_values(tensor, tensors[name]):
                raise CheckpointError(f"{folder}: {name} is both in {holders[name][0]} and in {file}, and they differ")
            tensors.setdefault(name, tensor)
            holders.setdefault(name, []).append(file)
    twice = [name for name, own in holders.items() if len(own) > 1]
    absent = [name for name in file_of if name not in holders]
    elsewhere = [name for name, file in file_of.items() if name in holders and file not in holders[name]]
    for names, said in (
        (twice, "are in two files, with equal values"),
        (absent, f"are in {INDEX_FILE} and in no file"),
        (elsewhere, f"are in another file than {INDEX_FILE} says"),
    ):
        if names:
            notes.append(f"{listed(names, most=3)} {said}")
    return tensors


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and bits; on the meta device bits are not compared."""
    if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
        return False
    if first.is_meta or first.data_ptr() == second.data_ptr() or torch.equal(first, second):
        return True
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))  # NaN, too


def _refuse_adapters(folder: Path) -> None:
    beside = sorted({path.name for pattern in ADAPTER_FILES for path in folder.glob(pattern)})
    if beside:
        raise CheckpointError(
            f"{folder} holds an adapter ({listed(beside, most=3)}), which would change the weights: {MERGE}, or move "
            "its files away to load the weights without it"
        )


def _why_no_safetensors(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        return (
            f"{folder} holds pickle files ({listed(pickles, most=3)}) and no {SINGLE_FILE}; pickle "
            "checkpoints are refused because loading one can run any code: if you trust it, load it with "
            "transformers and write it again with save_pretrained"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    hint = f"; it has {listed(others, most=3)}" if others else ""
    return f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}"


def _lfs_hint(path: Path) -> str:
    """Advice for a Git LFS pointer: a clone without LFS leaves a three-line text in place of each large file."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return ""
    return "; it is a Git LFS pointer, not the file itself: run `git lfs pull`" if is_pointer else ""


def listed(items: list[str], most: int = 20) -> str:
    """Join items as in `a, b, c and 4 more`."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
