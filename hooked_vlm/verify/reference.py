"""The same checkpoint in `transformers`. Remote code is never executed.

InternVL as published is remote code; its weights are given to `transformers`' own InternVL class instead, under
that class's names.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, InternVLConfig, InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hooked_vlm.converters import converter_for
from hooked_vlm.converters.internvl import HF, ORIGINAL
from hooked_vlm.errors import CheckpointError, InputError
from hooked_vlm.inputs.tiles import TileProcessor
from hooked_vlm.inputs.vlm_inputs import VLMInputs

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

QWEN2_VL = "Qwen2VLForConditionalGeneration"
LANGUAGE_MODELS = ("Qwen2ForCausalLM", "LlamaForCausalLM", "Phi3ForCausalLM")


@dataclass(frozen=True, eq=False)
class Reference:
    """A model of `transformers`, and where its parts are."""

    model: Any
    description: str
    """Which class, and how it came by the weights."""

    @property
    def vision_blocks(self) -> list[nn.Module]:
        """The blocks of the vision tower; none in a language model."""
        if isinstance(self.model, InternVLForConditionalGeneration):
            return list(self.model.model.vision_tower.encoder.layer)
        return list(self.model.model.visual.blocks) if type(self.model).__name__ == QWEN2_VL else []

    @property
    def projector(self) -> nn.Module | None:
        """Projector: from the tower's output to image features."""
        if isinstance(self.model, InternVLForConditionalGeneration):
            return self.model.model.multi_modal_projector
        return self.model.model.visual.merger if type(self.model).__name__ == QWEN2_VL else None

    def batch(self, inputs: VLMInputs) -> dict[str, Tensor]:
        """`inputs` as this class takes them; positions are its own business."""
        dtype = next(self.model.parameters()).dtype
        batch = {"input_ids": inputs.tokens, "attention_mask": inputs.attention_mask}
        if type(self.model).__name__ == QWEN2_VL:
            batch["mm_token_type_ids"] = (inputs.tokens == inputs.spec.image_token_id).int()
        if inputs.pixel_values is not None:
            batch["pixel_values"] = inputs.pixel_values.to(dtype)
            if type(self.model).__name__ == QWEN2_VL and inputs.image_grid_thw is not None:
                batch["image_grid_thw"] = inputs.image_grid_thw
        return batch


def reference_for(model: "HookedVLM", folder: Path) -> Reference:
    """The checkpoint in `folder`, which `model` was loaded from, in `model`'s dtype and on its device.

    Attention is written out (`set_attn_implementation` changes that).

    Raises:
        InputError: `transformers` has no class for it.
        CheckpointError: its InternVL class cannot do what this checkpoint asks for.
    """
    architecture = model.cfg.original_architecture
    if architecture == ORIGINAL:
        hf, how = _internvl_in_memory(model), _how_internvl(model)
    elif architecture in (HF, QWEN2_VL, *LANGUAGE_MODELS):
        hf, how = _from_folder(architecture, folder, model), "loaded by transformers from the same folder"
    else:
        raise InputError(
            f"transformers has no class for {architecture}, and its remote code is not executed: there is nothing to "
            "compare with"
        )
    hf = hf.eval().requires_grad_(False)
    hf.set_attn_implementation("eager")
    return Reference(hf, f"transformers {transformers.__version__}, {type(hf).__name__}, {how}")


def _from_folder(architecture: str, folder: Path, model: "HookedVLM") -> Any:
    known: Any = getattr(transformers, architecture) if architecture in (HF, QWEN2_VL) else AutoModelForCausalLM
    try:
        loaded = known.from_pretrained(
            folder, dtype=model.cfg.dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"transformers cannot load {folder} ({reason}): there is nothing to compare") from error
    return loaded.to(model.cfg.device)


def _internvl_in_memory(model: "HookedVLM") -> Any:
    """`transformers`' InternVL on this model's tensors, under its own names."""
    cfg, vision = model.cfg, model.cfg.vision
    if vision is not None and not vision.thumbnail and vision.max_tiles > 1:
        raise CheckpointError("transformers' InternVL always adds a thumbnail, this checkpoint none: no reference")
    published = converter_for(model.hf_config).published_config(model.hf_config, cfg.dtype, "hf", cfg.image_token_id)
    config = InternVLConfig(**{name: value for name, value in published.items() if name != "model_type"})
    config.dtype = cfg.dtype
    with init_empty_weights(include_buffers=False):
        hf: Any = InternVLForConditionalGeneration._from_config(config)
    hf.load_state_dict(model.to_hf_state_dict("in_memory"), strict=True, assign=True)
    hf.tie_weights()
    return hf.to(cfg.device)


def _how_internvl(model: "HookedVLM") -> str:
    how = "on the tensors of this library's converter (the published class is remote code, which is not executed)"
    llm = model.hf_config.get("llm_config", {}).get("architectures") or [""]
    if llm[0] == "InternLM2ForCausalLM":
        how += "; InternLM2, which transformers has not, as the Llama with the equivalent weights"
    return how


# ---------------------------------------------------------------- images


def reference_processor(model: "HookedVLM", folder: Path) -> Any:
    """`transformers`' Pillow image processor: a function from a picture to {"pixel_values": ..., ...}."""
    ours = model.image_processor
    if isinstance(ours, TileProcessor):
        theirs: Any = GotOcr2ImageProcessorPil(
            size={"height": ours.tile_size, "width": ours.tile_size},
            image_mean=list(ours.image_mean),
            image_std=list(ours.image_std),
            crop_to_patches=ours.max_tiles > 1,
            min_patches=ours.min_tiles,
            max_patches=ours.max_tiles,
        )
    elif (folder / "preprocessor_config.json").exists():
        theirs = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    else:
        theirs = Qwen2VLImageProcessorPil(
            patch_size=ours.patch_size, min_pixels=ours.min_pixels, max_pixels=ours.max_pixels
        )
    return lambda picture: theirs([picture], return_tensors="pt")
