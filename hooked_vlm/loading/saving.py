"""From a `HookedVLM` back to a checkpoint folder."""

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor

from hooked_vlm.converters import converter_for
from hooked_vlm.errors import CheckpointError
from hooked_vlm.inputs.templates import template_named
from hooked_vlm.nn.weight_access import why_closed
from hooked_vlm.runtime.files import why

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


def to_hf_state_dict(model: "HookedVLM", names: str = "published") -> dict[str, Tensor]:
    """The weights under the checkpoint's names ("published"), or as `transformers` holds them ("in_memory").

    InternVL's also in either layout ("original", "hf").

    Raises:
        CheckpointError: weights are offloaded or quantised.
    """
    if why := why_closed(model):
        raise CheckpointError(f"the weights of this model cannot be written: {why}")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return converter_for(model.hf_config).to_hf(state, model.hf_config, names)


NULL_IS_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
"""Settings whose class default is a number, which a null takes away."""


def save_pretrained(model: "HookedVLM", folder: str | Path, *, layout: Literal["original", "hf"] | None = None) -> None:
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
    converter = converter_for(model.hf_config)
    layouts = getattr(converter, "LAYOUTS", ())
    if layout is not None and layout not in layouts:
        known = ", ".join(map(repr, layouts)) or "None"
        raise CheckpointError(f"layout must be {known} for this model, got {layout!r}")
    # of models that tile images the tokenizer says which token stands for one
    more = (layout, model.cfg.image_token_id) if layouts else ()
    config = converter.published_config(model.hf_config, model.cfg.dtype, *more)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside:
            written = Path(aside) / "checkpoint"
            written.mkdir()
            save_torch_state_dict(_apart(to_hf_state_dict(model, layout or "published")), written)
            _write_json(written / "config.json", config)
            ids = {"eos_token_id": list(model.cfg.eos_token_ids) or None, "pad_token_id": model.cfg.pad_token_id}
            _write_json(written / "generation_config.json", {**model.generation_config, **without_none(ids)})
            if model.image_processor is not None:
                for file, settings in model.image_processor.to_files().items():
                    _write_json(written / file, settings)
            if model.tokenizer is not None:
                _save_tokenizer(model, written, layout)
            if folder.exists():
                folder.rmdir()
            shutil.move(written, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write a checkpoint to {folder}: {why(error)}") from error


def _save_tokenizer(model: "HookedVLM", folder: Path, layout: str | None) -> None:
    """For `transformers` the conversation template goes along, which the published layout only names."""
    tokenizer = model.tokenizer
    if layout == "hf" and model.cfg.chat_template is not None:
        template = template_named(model.cfg.chat_template)
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template.jinja(model.cfg.system_message)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no error class of its own
        raise OSError(why(error)) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts of one storage (projections that were loaded fused) as tensors of their own, for the file writer."""
    parts_of: dict[int, set[int]] = {}
    for tensor in tensors.values():
        parts_of.setdefault(tensor.untyped_storage().data_ptr(), set()).add(tensor.data_ptr())
    shared = {storage for storage, parts in parts_of.items() if len(parts) > 1}
    return {name: t.clone() if t.untyped_storage().data_ptr() in shared else t for name, t in tensors.items()}


def without_none(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that have a value; a null window, or cap of scores or logits, is one: none."""
    return {key: value for key, value in config.items() if value is not None or key in NULL_IS_NONE}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
