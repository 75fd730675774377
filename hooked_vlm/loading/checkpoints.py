"""From checkpoint folders, the hub and `transformers` models to a `HookedVLM`, and back."""

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hooked_vlm.config import RopeScaling, VisionConfig, VLMConfig
from hooked_vlm.converters import DTYPES, KNOWN_MODELS, converter_for, open_tensors, read_config, read_json
from hooked_vlm.converters.fields import Fields
from hooked_vlm.errors import CheckpointError, ImageError
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.templates import template_named
from hooked_vlm.inputs.tiles import TileProcessor
from hooked_vlm.inputs.tokenization import load_tokenizer
from hooked_vlm.loading.placement import DeviceMap, Spread, attach, offloaded_weights, planned
from hooked_vlm.loading.quantisation import Bits, quantize_weights
from hooked_vlm.nn.components import Embed, Unembed
from hooked_vlm.nn.weight_access import why_closed
from hooked_vlm.runtime.files import why

TOY_MODELS = Path(__file__).parents[1] / "toy_models"
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_CONFIGS = ["config.json", "preprocessor_config.json"]

Model = TypeVar("Model", bound="LoadingMixin")
"""The class called upon (`typing.Self`, which beartype does not know in methods)."""


class LoadingMixin(nn.Module):
    """Loading and saving of a `HookedVLM`."""

    cfg: VLMConfig
    embed: Embed
    unembed: Unembed
    tokenizer: Any
    image_processor: ImageProcessor | TileProcessor | None
    hf_config: dict[str, Any]
    device_map: dict[str, str]

    @classmethod
    def from_pretrained(
        cls: type[Model],
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
            they are mapped from the files and read when first used.

        Raises:
            CheckpointError: no such checkpoint or device, an unsupported architecture, corrupt or missing files or
                tensors, a device_map that does not fit, a quantisation that does not work here.
        """
        spread = None if device_map is None else Spread(device_map, max_memory, offload_folder)
        if spread is None and (max_memory is not None or offload_folder is not None):
            raise CheckpointError('max_memory and offload_folder go with a device_map, e.g. device_map="auto"')
        if spread is not None and (device is not None or quantize is not None):
            other = "device" if device is not None else "quantize"
            raise CheckpointError(f"{other} and device_map exclude each other: give one of them")
        device = torch.device("cpu") if spread is not None else _device(device)
        start = torch.device("cpu") if quantize is not None else device  # matrices follow once they are small
        wanted = as_dtype(dtype)
        folder = find_checkpoint(name_or_path, revision, cache_dir, local_files_only)
        hf_config = read_config(folder)
        converter = converter_for(hf_config)
        tensors = converter.from_hf(open_tensors(folder), hf_config)
        dtype = wanted or converter.dtype(hf_config) or next(iter(tensors.values())).dtype
        generation = read_json(folder, "generation_config.json", default={})
        cfg = _config(converter, hf_config, generation).with_(model_name=str(name_or_path), device=start, dtype=dtype)
        tokenizer = load_tokenizer(folder)
        cfg = _with_tokens(cfg, tokenizer)
        processor = _image_processor(read_json(folder, "preprocessor_config.json", default={}), cfg)
        model = cls._assemble(cfg, tensors, hf_config, tokenizer, processor, spread)
        if quantize is not None:
            model.cfg = model.cfg.with_(device=device)
            quantize_weights(model, quantize)
        return model

    @classmethod
    def without_weights(
        cls: type[Model],
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Model:
        """A model on the meta device: modules, hook points and shapes, neither weights nor tokenizer.

        Published checkpoints of `hooked_vlm.converters.KNOWN_MODELS` need no files; of others only config.json (and
        preprocessor_config.json, if there is one) is read or downloaded.

        Args:
            name_or_path, revision, cache_dir, local_files_only: as in `from_pretrained`.

        Raises:
            CheckpointError: no such checkpoint, an unsupported architecture, a corrupt config.json.
        """
        known = None if Path(name_or_path).exists() else KNOWN_MODELS.get(str(name_or_path))
        if known is not None:
            hf_config, settings = known.config, {}
        else:
            folder = find_checkpoint(name_or_path, revision, cache_dir, local_files_only, _CONFIGS)
            hf_config = read_config(folder)
            settings = read_json(folder, "preprocessor_config.json", default={})
        converter = converter_for(hf_config)
        cfg = _config(converter, hf_config, {}).with_(
            model_name=str(name_or_path),
            device=torch.device("meta"),
            dtype=converter.dtype(hf_config) or torch.float32,
        )
        model = cls._unfilled(cfg, None, _image_processor(settings, cfg))
        model.hf_config = dict(hf_config)
        return model.eval()

    @classmethod
    def from_hf(
        cls: type[Model],
        hf_model: Any,
        tokenizer: Any = None,
        image_processor: ImageProcessor | TileProcessor | None = None,
    ) -> Model:
        """A model that shares the storage of a `transformers` model's parameters: an edit of one edits both.

        Raises:
            CheckpointError: an unsupported architecture.
        """
        hf_config = {"architectures": [type(hf_model).__name__], **_without_none(hf_model.config.to_dict())}
        converter = converter_for(hf_config)
        tensors = converter.from_hf(hf_model.state_dict(), hf_config)
        generation = getattr(hf_model, "generation_config", None)
        cfg = _config(converter, hf_config, {} if generation is None else generation.to_dict())
        some = tensors["embed.weight"]
        cfg = cfg.with_(model_name=type(hf_model).__name__, device=some.device, dtype=some.dtype)
        cfg = _with_tokens(cfg, tokenizer)
        return cls._assemble(cfg, tensors, hf_config, tokenizer, image_processor or _image_processor({}, cfg))

    @classmethod
    def _assemble(
        cls: type[Model],
        cfg: VLMConfig,
        tensors: Mapping[str, Tensor],
        hf_config: dict[str, Any],
        tokenizer: Any,
        image_processor: ImageProcessor | TileProcessor | None,
        spread: Spread | None = None,
    ) -> Model:
        model = cls._unfilled(cfg, tokenizer, image_processor)
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

    @classmethod
    def _unfilled(
        cls: type[Model], cfg: VLMConfig, tokenizer: Any, image_processor: ImageProcessor | TileProcessor | None
    ) -> Model:
        with torch.device("meta"), _Unfilled():
            return cls(cfg, tokenizer, image_processor)  # type: ignore[call-arg]

    def to_hf_state_dict(self, names: str = "published") -> dict[str, Tensor]:
        """The weights under the checkpoint's names ("published"), or as `transformers` holds them ("in_memory").

        InternVL's also in either layout ("original", "hf").

        Raises:
            CheckpointError: weights are offloaded or quantised.
        """
        if why := why_closed(self):
            raise CheckpointError(f"the weights of this model cannot be written: {why}")
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        return converter_for(self.hf_config).to_hf(state, self.hf_config, names)

    def save_pretrained(self, folder: str | Path, *, layout: Literal["original", "hf"] | None = None) -> None:
        """Write a checkpoint folder that `from_pretrained` loads, bit for bit.

        It is written aside and put in place when complete.

        Args:
            layout: of InternVL checkpoints, "original" as published or "hf" for `transformers`' own class; the
                loaded one by default. Qwen2-VL has one layout, which `transformers` loads.

        Raises:
            CheckpointError: the folder exists and is not empty, or cannot be written; no such layout.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists and is not an empty folder: choose another")
        converter = converter_for(self.hf_config)
        layouts = getattr(converter, "LAYOUTS", ())
        if layout is not None and layout not in layouts:
            known = ", ".join(map(repr, layouts)) or "None"
            raise CheckpointError(f"layout must be {known} for this model, got {layout!r}")
        # of models that tile images the tokenizer says which token stands for one
        more = (layout, self.cfg.image_token_id) if layouts else ()
        config = converter.published_config(self.hf_config, self.cfg.dtype, *more)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside:
                written = Path(aside) / "checkpoint"
                written.mkdir()
                save_torch_state_dict(_apart(self.to_hf_state_dict(layout or "published")), written)
                _write_json(written / "config.json", config)
                ids = {"eos_token_id": list(self.cfg.eos_token_ids) or None, "pad_token_id": self.cfg.pad_token_id}
                _write_json(written / "generation_config.json", _without_none(ids))
                if self.image_processor is not None:
                    _write_json(written / "preprocessor_config.json", _processor_dict(self.image_processor))
                if self.tokenizer is not None:
                    self._save_tokenizer(written, layout)
                if folder.exists():
                    folder.rmdir()
                shutil.move(written, folder)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write a checkpoint to {folder}: {why(error)}") from error

    def _save_tokenizer(self, folder: Path, layout: str | None) -> None:
        """For `transformers` the conversation template goes along, which the published layout only names."""
        tokenizer = self.tokenizer
        if layout == "hf" and self.cfg.chat_template is not None:
            template = template_named(self.cfg.chat_template)
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = template.jinja(self.cfg.system_message)
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the tokenizers library has no error class of its own
            raise OSError(why(error)) from error


class _Unfilled(TorchFunctionMode):
    """Parameters are made without values: the checkpoint's take their place.

    (Drawing values for tensors without storage does nothing, but it loads torch's compiler, which takes a second.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def as_dtype(wanted: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype, also by its name; None for None and "auto".

    Raises:
        CheckpointError: no such dtype, or none that weights can have.
    """
    if wanted is None or wanted == "auto":
        return None
    dtype = DTYPES.get(wanted) if isinstance(wanted, str) else wanted
    if dtype not in DTYPES.values():
        raise CheckpointError(f'dtype must be "auto" or one of {", ".join(DTYPES)}, got {wanted!r}')
    return dtype


def _device(wanted: torch.device | str | None) -> torch.device:
    """A device that holds tensors; CUDA, if there is one, by default."""
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"cannot use the device {str(wanted)!r} ({reason}): pass device=None or 'cpu'") from error
    return device


def bundled_models() -> list[str]:
    """Names of the toy models that come with the library."""
    return sorted(path.parent.name for path in TOY_MODELS.glob("*/config.json"))


def find_checkpoint(
    name_or_path: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    files: list[str] = _FILES,
) -> Path:
    """The folder of a checkpoint; of a hub name those of its `files` (patterns) are downloaded.

    Raises:
        CheckpointError: there is none, or the hub does not give it.
    """
    name, toys = str(name_or_path), bundled_models()
    if name in toys and not Path(name).exists():
        return TOY_MODELS / name
    path = Path(name).expanduser()
    if path.exists():
        return path
    bundled = f"bundled models are {', '.join(toys)}" if toys else "there are no bundled models"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no checkpoint folder {name!r}, nor is it a hub name (owner/model); {bundled}")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=files,
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"cannot get {name!r} from the hub ({reason}): check the name and the connection, or pass the "
            f"path of a downloaded folder; {bundled}"
        ) from error


def _config(converter: Any, hf_config: Mapping[str, Any], generation: Mapping[str, Any]) -> VLMConfig:
    fields = converter.config_kwargs(hf_config)
    vision, scaling = fields.pop("vision"), fields.pop("rope_scaling", None)
    cfg = VLMConfig(
        **fields,
        vision=None if vision is None else VisionConfig(**vision),
        rope_scaling=None if scaling is None else RopeScaling(**scaling),
    )
    stated = Fields(generation, where="generation_config.json")
    pad = stated.token_id("pad_token_id")
    return cfg.with_(
        eos_token_ids=stated.token_ids("eos_token_id", cfg.eos_token_ids),
        pad_token_id=pad if cfg.pad_token_id is None else cfg.pad_token_id,
    )


def _image_processor(settings: Mapping[str, Any], cfg: VLMConfig) -> ImageProcessor | TileProcessor | None:
    """The checkpoint's image processor, with the vision tower's sizes where the file is silent."""
    vision = cfg.vision
    if vision is None:
        return None
    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge_size,
    }
    try:
        if vision.tile_size is not None:
            names = (
                "tile_size",
                "patch_size",
                "merge_size",
                "min_tiles",
                "max_tiles",
                "thumbnail",
                "transposed_tokens",
            )
            return TileProcessor.from_dict(settings, **{name: getattr(vision, name) for name in names})
        processor = ImageProcessor.from_dict({**sizes, **settings})
    except ImageError as error:
        raise CheckpointError(f"preprocessor_config.json (or what config.json says of images): {error}") from error
    for name, size in sizes.items():
        if getattr(processor, name) != size:
            raise CheckpointError(
                f"preprocessor_config.json says {name} = {getattr(processor, name)}, config.json {size}"
            )
    return processor


def _with_tokens(cfg: VLMConfig, tokenizer: Any) -> VLMConfig:
    """What only the tokenizer knows of a model that tiles images: its placeholders, and where answers end."""
    if cfg.vision is None or cfg.vision.tile_size is None or tokenizer is None:
        return cfg
    known = tokenizer.get_vocab()
    names = {
        "image_token_id": "<IMG_CONTEXT>",
        "vision_start_token_id": "<img>",
        "vision_end_token_id": "</img>",
    }
    found: dict[str, Any] = {field: known[token] for field, token in names.items() if token in known}
    if cfg.chat_template is not None and (stop := template_named(cfg.chat_template).stop) in known:
        found["eos_token_ids"] = (known[stop],)
    outside = {token: i for token, i in known.items() if token in names.values() and i >= cfg.d_vocab}
    if outside:
        raise CheckpointError(
            f"the tokenizer's {outside} lie outside the vocabulary of {cfg.d_vocab} that config.json states: are the "
            "files of one checkpoint?"
        )
    return cfg.with_(**found)


def _processor_dict(processor: ImageProcessor | TileProcessor) -> dict[str, Any]:
    """`preprocessor_config.json`, as `transformers` spells it."""
    normalisation = {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std)}
    if isinstance(processor, TileProcessor):
        return {
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            "crop_to_patches": processor.max_tiles > 1,
            "min_patches": processor.min_tiles,
            "max_patches": processor.max_tiles,
            "use_thumbnail": processor.thumbnail,
            "size": {"height": processor.tile_size, "width": processor.tile_size},
            **normalisation,
        }
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": processor.patch_size,
        "temporal_patch_size": processor.temporal_patch_size,
        "merge_size": processor.merge_size,
        "min_pixels": processor.min_pixels,
        "max_pixels": processor.max_pixels,
        **normalisation,
    }


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts of one storage (projections that were loaded fused) as tensors of their own, for the file writer."""
    parts_of: dict[int, set[int]] = {}
    for tensor in tensors.values():
        parts_of.setdefault(tensor.untyped_storage().data_ptr(), set()).add(tensor.data_ptr())
    shared = {storage for storage, parts in parts_of.items() if len(parts) > 1}
    return {name: t.clone() if t.untyped_storage().data_ptr() in shared else t for name, t in tensors.items()}


def _without_none(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
