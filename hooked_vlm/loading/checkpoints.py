"""From checkpoint folders, the hub and `transformers` models to a `HookedVLM`.

The functions below are its class methods; `kind` is the class called upon.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hooked_vlm.config import VLMConfig
from hooked_vlm.converters import KNOWN_MODELS, converter_for, open_tensors, read_config, read_json
from hooked_vlm.errors import CheckpointError, CheckpointWarning
from hooked_vlm.inputs.other_names import LOADING, refuse_arguments
from hooked_vlm.inputs.picture_processor import PictureProcessor
from hooked_vlm.inputs.processors import processor_of
from hooked_vlm.inputs.tokenization import load_tokenizer
from hooked_vlm.loading.chat_templates import take_processor_template
from hooked_vlm.loading.folders import CONFIG_FILES, find_checkpoint
from hooked_vlm.loading.pictures import picture_settings
from hooked_vlm.loading.placement import DeviceMap, Spread, attach, offloaded_weights, planned
from hooked_vlm.loading.quantisation import Bits, quantize_weights
from hooked_vlm.loading.saving import without_none
from hooked_vlm.loading.settings import as_device, as_dtype, in_range, model_config, with_tokens
from hooked_vlm.loading.transformers_models import state_of

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

    Model = TypeVar("Model", bound=HookedVLM)
else:
    Model = TypeVar("Model")


def from_pretrained(
    kind: type[Model],
    name_or_path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    quantize: Bits | Any = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **elsewhere: Any,
) -> Model:
    """A model from a checkpoint folder, a bundled toy model or the Hugging Face hub.

    Args:
        name_or_path: a folder, "toy-qwen2-vl", "toy-internvl2", or a hub name such as
            "Qwen/Qwen2-VL-2B-Instruct".
        device: CUDA if present by default.
        dtype: a floating-point type or its name ("bfloat16"); the checkpoint's own by default ("auto").
        device_map: instead of `device`, spread over several (docs/large-models.md): "auto", "balanced",
            "sequential" or {part: device}, with "cpu" and "disk" for what is loaded only when it computes.
        max_memory: how much each device may take, {0: "20GiB", "cpu": "60GiB"}; what is free by default.
        offload_folder: an empty folder for the parts on disk, which otherwise stay in the checkpoint's files.
        quantize: keep the matrices of both towers' blocks and of the projector in 8 or 4 bits
            (`hooked_vlm.loading.quantisation`).
        revision: as in `huggingface_hub.snapshot_download`.
        cache_dir: likewise.
        local_files_only: likewise.

    Returns:
        The model in eval mode; its parameters require gradients. On the CPU in the checkpoint's dtype
        they are mapped from the files and read when first used. One `CheckpointWarning` lists what was wrong and
        cannot change a number (docs/checkpoint-folders.md).

    Raises:
        CheckpointError: no such checkpoint or device, an unsupported architecture, corrupt or missing files or
            tensors, a device_map that does not fit, a quantisation that does not work here.
        InputError: an argument that is called otherwise here.
    """
    refuse_arguments("from_pretrained", elsewhere, LOADING)
    spread = None if device_map is None else Spread(device_map, max_memory, offload_folder)
    if spread is None and (max_memory is not None or offload_folder is not None):
        raise CheckpointError('max_memory and offload_folder go with a device_map, e.g. device_map="auto"')
    if spread is not None and (device is not None or quantize is not None):
        other = "device" if device is not None else "quantize"
        raise CheckpointError(f"{other} and device_map exclude each other: give one of them")
    device = torch.device("cpu") if spread is not None else as_device(device)
    start = torch.device("cpu") if quantize is not None else device  # matrices follow once they are small
    wanted = as_dtype(dtype)
    folder = find_checkpoint(name_or_path, revision, cache_dir, local_files_only)
    hf_config = read_config(folder)
    converter = converter_for(hf_config)
    notes: list[str] = []
    tensors = converter.from_hf(open_tensors(folder, notes), hf_config, notes)
    dtype = wanted or converter.dtype(hf_config) or next(iter(tensors.values())).dtype
    generation = read_json(folder, "generation_config.json", default={})
    cfg = model_config(converter, hf_config, generation).with_(model_name=str(name_or_path), device=start, dtype=dtype)
    tokenizer = load_tokenizer(folder)
    cfg = with_tokens(cfg, tokenizer)
    if tokenizer is not None and cfg.vision is not None:
        take_processor_template(tokenizer, folder)
    processor = processor_of(cfg, *picture_settings(folder))
    model = _assemble(kind, cfg, tensors, hf_config, tokenizer, processor, spread)
    model.generation_config = generation
    if quantize is not None:
        model.cfg = model.cfg.with_(device=device)
        quantize_weights(model, quantize)
    _warn(str(name_or_path), notes)
    return model


def without_weights(
    kind: type[Model],
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Model:
    """A model on the meta device: modules, hook points and shapes, neither weights nor tokenizer.

    Published checkpoints of `hooked_vlm.converters.KNOWN_MODELS` need no files; of others only config.json and the
    settings of images and videos are read or downloaded.

    Args:
        name_or_path, revision, cache_dir, local_files_only: as in `from_pretrained`.

    Raises:
        CheckpointError: no such checkpoint, an unsupported architecture, a corrupt config.json.
    """
    known = None if Path(name_or_path).exists() else KNOWN_MODELS.get(str(name_or_path))
    if known is not None:
        hf_config, settings = known.config, ()
    else:
        folder = find_checkpoint(name_or_path, revision, cache_dir, local_files_only, CONFIG_FILES)
        hf_config = read_config(folder)
        settings = picture_settings(folder)
    converter = converter_for(hf_config)
    cfg = model_config(converter, hf_config, {}).with_(
        model_name=str(name_or_path),
        device=torch.device("meta"),
        dtype=converter.dtype(hf_config) or torch.float32,
    )
    model = _unfilled(kind, cfg, None, processor_of(cfg, *settings))
    model.hf_config = dict(hf_config)
    return model.eval()


def from_hf(
    kind: type[Model],
    hf_model: Any,
    tokenizer: Any = None,
    image_processor: PictureProcessor | None = None,
) -> Model:
    """A model that shares the storage of a `transformers` model's parameters: an edit of one edits both.

    Raises:
        CheckpointError: an unsupported architecture, an adapter that is not merged, weights that are quantised or
            offloaded, a wrapper around the model.
    """
    state = state_of(hf_model)
    hf_config = {"architectures": [type(hf_model).__name__], **without_none(hf_model.config.to_dict())}
    converter = converter_for(hf_config)
    notes: list[str] = []
    tensors = converter.from_hf(state, hf_config, notes)
    _warn(type(hf_model).__name__, notes)
    stated = getattr(hf_model, "generation_config", None)
    generation = {} if stated is None else without_none(stated.to_dict())
    cfg = model_config(converter, hf_config, generation)
    some = tensors["embed.weight"]
    cfg = cfg.with_(model_name=type(hf_model).__name__, device=some.device, dtype=some.dtype)
    cfg = with_tokens(cfg, tokenizer)
    model = _assemble(kind, cfg, tensors, hf_config, tokenizer, image_processor or processor_of(cfg))
    model.generation_config = generation
    return model


def _warn(name: str, notes: list[str]) -> None:
    """Say once what was found and left out."""
    if notes:
        text = f"{name} holds what cannot change a number and is left out: {'; '.join(notes)}"
        warnings.warn(text, CheckpointWarning, stacklevel=3)


def _assemble(
    kind: type[Model],
    cfg: VLMConfig,
    tensors: Mapping[str, Tensor],
    hf_config: dict[str, Any],
    tokenizer: Any,
    image_processor: PictureProcessor | None,
    spread: Spread | None = None,
) -> Model:
    model = _unfilled(kind, in_range(cfg), tokenizer, image_processor)
    placement = None if spread is None else planned(model, spread, cfg.dtype)
    placed: dict[int, Tensor] = {}  # tied tensors are one object, before and after
    for name, tensor in tensors.items():
        if id(tensor) not in placed:
            home = cfg.device if placement is None else placement.home(name)
            placed[id(tensor)] = tensor.to(home, cfg.dtype)
    model.load_state_dict({name: placed[id(t)] for name, t in tensors.items()}, strict=True, assign=True)
    if cfg.tie_word_embeddings:
        model.unembed.weight = model.embed.weight
    model.hf_config = dict(hf_config)
    model.requires_grad_(True).eval()
    if spread is not None and placement is not None:
        attach(model, placement, offloaded_weights(placement, tensors, cfg.dtype, spread.offload_folder))
        model.cfg, model.device_map = cfg.with_(device=torch.device(placement.main)), placement.devices
    return model


def _unfilled(kind: type[Model], cfg: VLMConfig, tokenizer: Any, image_processor: PictureProcessor | None) -> Model:
    with torch.device("meta"), _Unfilled():
        return kind(cfg, tokenizer, image_processor)


class _Unfilled(TorchFunctionMode):
    """Parameters are made without values: the checkpoint's take their place.

    (Drawing values for tensors without storage does nothing, but it loads torch's compiler, which takes a second.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
