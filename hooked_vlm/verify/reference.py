"""The same checkpoint in `transformers`. Remote code is never executed.

InternVL as published is remote code; its weights are given to `transformers`' own InternVL class instead, under
that class's names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import init_empty_weights
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, InternVLConfig, InternVLForConditionalGeneration
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string
from transformers.processing_utils import ProcessorMixin
from transformers.vision_utils import get_vision_window_index

from hooked_vlm.converters import (
    converter_for,
    gemma3,
    idefics3,
    language_models,
    llava,
    llava_variants,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    read_config,
    read_json,
)
from hooked_vlm.converters.internvl import HF, ORIGINAL
from hooked_vlm.errors import CheckpointError, InputError
from hooked_vlm.inputs.anyres import AnyresProcessor
from hooked_vlm.inputs.cropped import CropProcessor
from hooked_vlm.inputs.idefics3 import MARK, WHOLE, Idefics3Processor
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.image_settings import IMAGES
from hooked_vlm.inputs.onevision import OneVisionProcessor
from hooked_vlm.inputs.pan_and_scan import PanScanProcessor
from hooked_vlm.inputs.stretched import StretchProcessor
from hooked_vlm.inputs.tiles import IMAGENET_MEAN, IMAGENET_STD, TileProcessor
from hooked_vlm.inputs.token_layout import Grid
from hooked_vlm.inputs.tokenization import load_tokenizer
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.loading.pictures import picture_settings
from hooked_vlm.verify.prompt_suite import Prompt, bounded_processor

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

QWEN_VL = tuple(family.architecture for family in (qwen2_vl.FAMILY, qwen2_5_vl.FAMILY, qwen3_vl.FAMILY))
LANGUAGE_MODELS = tuple(name for name in language_models.ARCHITECTURES if name != "InternLM2ForCausalLM")
COMPOSED = (*llava.ARCHITECTURES, *gemma3.ARCHITECTURES, *paligemma.ARCHITECTURES)
"""Architectures made of a CLIP or SigLIP tower, a projector and a language model."""
OWN_CLASS = (HF, *QWEN_VL, *COMPOSED, *idefics3.ARCHITECTURES)
"""Architectures of models with pictures that `transformers` loads from the same folder."""


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
        if type(self.model).__name__ in COMPOSED:
            return list(self.model.model.vision_tower.encoder.layers)
        if self.is_idefics3:
            return list(self.model.model.vision_model.encoder.layers)
        return list(self.model.model.visual.blocks) if self.is_qwen_vl else []

    @property
    def projector(self) -> nn.Module | None:
        """Projector: from the tower's output to image features; None where these are arranged behind it."""
        if self.packs:
            return None
        if type(self.model).__name__ in (HF, *COMPOSED):
            return self.model.model.multi_modal_projector
        if self.is_idefics3:
            return self.model.model.connector
        return self.model.model.visual.merger if self.is_qwen_vl else None

    @property
    def packs(self) -> bool:
        """Whether the projector's outputs are arranged with line breaks before they are image tokens."""
        return type(self.model).__name__ in (llava_variants.NEXT.architecture, llava_variants.ONEVISION.architecture)

    @property
    def deepstack(self) -> list[nn.Module]:
        """Projectors of inner blocks of the tower (DeepStack)."""
        return list(getattr(self.model.model.visual, "deepstack_merger_list", ())) if self.is_qwen_vl else []

    @property
    def is_qwen_vl(self) -> bool:
        return type(self.model).__name__ in QWEN_VL

    @property
    def is_idefics3(self) -> bool:
        return type(self.model).__name__ in idefics3.ARCHITECTURES

    def in_order(self, x: Float[Tensor, "position *rest"], grids: Sequence[Grid]) -> Float[Tensor, "position *rest"]:
        """Patches or image tokens in the order of the picture, where this class has them window by window."""
        if type(self.model).__name__ != qwen2_5_vl.FAMILY.architecture:
            return x
        cfg = self.model.config.vision_config
        order, _ = get_vision_window_index(torch.tensor(grids), cfg.spatial_merge_size, cfg.window_size, cfg.patch_size)
        return x.unflatten(0, (len(order), -1))[order.argsort()].flatten(0, 1)

    def batch(self, inputs: VLMInputs) -> dict[str, Tensor]:
        """`inputs` as this class takes them; positions are its own business."""
        dtype = next(self.model.parameters()).dtype
        batch = {"input_ids": inputs.tokens, "attention_mask": inputs.attention_mask}
        if self.is_qwen_vl:
            batch["mm_token_type_ids"] = (inputs.tokens == inputs.spec.image_token_id).int()
        if (kinds := self._token_types(inputs)) is not None:
            batch["token_type_ids"] = kinds
        if inputs.pixel_values is not None:
            pixels = inputs.pixel_values.to(dtype)
            batch["pixel_values"] = (
                pixels[None] if self.is_idefics3 else pixels
            )  # [row, tile, ...]: rows are not told apart
            if self.is_qwen_vl and inputs.image_grid_thw is not None:
                batch["image_grid_thw"] = inputs.image_grid_thw
            if self.packs and inputs.image_sizes is not None:
                sizes = [(height, width) for width, height in inputs.image_sizes]
                batch["image_sizes"] = torch.tensor(sizes, device=inputs.device)
                if type(self.model).__name__ == llava_variants.ONEVISION.architecture:
                    batch["batch_num_images"] = torch.tensor(_images_of_rows(inputs), device=inputs.device)
        return batch

    def _token_types(self, inputs: VLMInputs) -> Int[Tensor, "batch pos"] | None:
        """Gemma 3: which tokens are images; PaliGemma: which follow the prompt. Without them, both run causally."""
        if type(self.model).__name__ in gemma3.ARCHITECTURES:
            return (inputs.tokens == inputs.spec.image_token_id).long()
        if type(self.model).__name__ not in paligemma.ARCHITECTURES:
            return None
        kinds = torch.zeros_like(inputs.tokens)
        for row, stop, n in zip(kinds, inputs.stop, inputs.n_generated, strict=True):
            row[stop - n : stop] = 1
        return kinds


def _images_of_rows(inputs: VLMInputs) -> list[int]:
    """Numbers of images of the rows that have some."""
    counts = [sum(visual.row == row for visual in inputs.visuals) for row in range(len(inputs))]
    return [n for n in counts if n]


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
    elif architecture in (*OWN_CLASS, *LANGUAGE_MODELS):
        hf, how = _from_folder(architecture, folder, model), "loaded by transformers from the same folder"
    else:
        raise InputError(
            f"transformers has no class for {architecture}, and its remote code is not executed: there is nothing to "
            "compare with"
        )
    hf = hf.eval().requires_grad_(False)
    # what generation_config.json says (repetition_penalty, say) belongs to sampling, not to the model that is compared
    hf.generation_config = GenerationConfig()
    hf.set_attn_implementation("eager")
    return Reference(hf, f"transformers {transformers.__version__}, {type(hf).__name__}, {how}")


def _from_folder(architecture: str, folder: Path, model: "HookedVLM") -> Any:
    known: Any = getattr(transformers, architecture) if architecture in OWN_CLASS else AutoModelForCausalLM
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


# ---------------------------------------------------------------- images and prompts


REFERENCE_PROCESSORS = {
    ImageProcessor: Qwen2VLImageProcessorPil,
    TileProcessor: GotOcr2ImageProcessorPil,
    CropProcessor: LlavaImageProcessorPil,
    AnyresProcessor: LlavaNextImageProcessorPil,
    OneVisionProcessor: LlavaOnevisionImageProcessorPil,
    StretchProcessor: SiglipImageProcessorPil,
    PanScanProcessor: Gemma3ImageProcessorPil,
    Idefics3Processor: Idefics3ImageProcessorPil,
}
"""Classes of `transformers` that prepare pictures as ours do."""


def reference_processor(model: "HookedVLM", folder: Path) -> Any:
    """`transformers`' Pillow image processor, from the folder's own files: from a picture to {"pixel_values": ...}."""
    ours = model.image_processor
    theirs: Any = REFERENCE_PROCESSORS[type(ours)]
    tiles = isinstance(ours, TileProcessor)
    options: dict[str, Any] = {"crop_to_patches": True} if tiles else {}  # as transformers' InternVLProcessor calls it
    if model.cfg.original_architecture == ORIGINAL:
        processor = theirs(**_published_tiles(folder))
    elif picture_settings(folder)[0].file is not None:
        processor = theirs.from_pretrained(folder, local_files_only=True)
    elif isinstance(ours, CropProcessor | AnyresProcessor | StretchProcessor | Idefics3Processor):
        processor = theirs(**ours.to_files()[IMAGES])
    elif tiles:
        processor = theirs(size={"height": ours.tile_size, "width": ours.tile_size})
    else:
        bounds = {"min_pixels": ours.min_pixels, "max_pixels": ours.max_pixels}
        colours = {"image_mean": list(ours.image_mean), "image_std": list(ours.image_std)}
        processor = theirs(patch_size=ours.patch_size, **bounds, **colours)
    if not isinstance(ours, AnyresProcessor | Idefics3Processor):
        return lambda picture: processor([picture], return_tensors="pt", **options)
    return lambda picture: {"pixel_values": processor([picture], return_tensors="pt")["pixel_values"].flatten(0, 1)}


def _published_tiles(folder: Path) -> dict[str, Any]:
    """Settings of `transformers`' tiles from published InternVL's config.json and preprocessor_config.json."""
    config, settings = read_config(folder), read_json(folder, "preprocessor_config.json", default={})
    side = config.get("force_image_size") or config["vision_config"]["image_size"]
    dynamic = config.get("dynamic_image_size", False)
    return {
        "size": {"height": side, "width": side},
        "image_mean": settings.get("image_mean") or list(IMAGENET_MEAN),
        "image_std": settings.get("image_std") or list(IMAGENET_STD),
        "min_patches": config.get("min_dynamic_patch", 1) if dynamic else 1,
        "max_patches": config.get("max_dynamic_patch", 6) if dynamic else 1,
    }


def reference_prompt(model: "HookedVLM", folder: Path) -> Callable[[Prompt], list[int]] | None:
    """Token ids of a prompt in the template that `transformers` finds in the folder, one placeholder for each picture.

    (Of Idefics3, for each tile.) None where there is no such template: the published InternVL code has its own.
    """
    tokenizer: Any = model.tokenizer
    sees = model.cfg.vision is not None
    template: Any = ProcessorMixin.get_processor_dict(folder)[0].get("chat_template") if sees else None
    template = template or load_tokenizer(folder).chat_template  # pyright: ignore[reportOptionalMemberAccess]
    template = template.get("default") if isinstance(template, dict) else template
    if template is None and model.cfg.original_architecture in paligemma.ARCHITECTURES:
        return lambda prompt: _prompt_of_paligemma(tokenizer, model.cfg.image_token_id, prompt)
    if template is None or model.cfg.original_architecture == ORIGINAL:
        return None

    def ids(prompt: Prompt) -> list[int]:
        content: Any = [{"type": "image"} for _ in prompt.pictures] + [{"type": "text", "text": prompt.text}]
        chat = [{"role": "user", "content": content if sees else prompt.text}]
        text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
        if model.cfg.original_architecture == HF:  # as its processor's `replace_image_token`
            text = text.replace("<IMG_CONTEXT>", "<img><IMG_CONTEXT></img>")
        if model.cfg.original_architecture in gemma3.ARCHITECTURES:  # likewise
            text = text.replace("<start_of_image>", "\n\n<start_of_image><image_soft_token><end_of_image>\n\n")
        if model.cfg.original_architecture in idefics3.ARCHITECTURES:
            text = _with_tiles(text, prompt, model)
        first = tokenizer.bos_token
        special = sees and not (first is not None and text.startswith(first))  # as `apply_chat_template` of processors
        return tokenizer(text, add_special_tokens=special)["input_ids"]

    return ids


def _prompt_of_paligemma(tokenizer: Any, image: int | None, prompt: Prompt) -> list[int]:
    """As its processor's `prepare_inputs_layout`."""
    pictures = tokenizer.convert_ids_to_tokens(image) * len(prompt.pictures)
    text = f"{pictures}{tokenizer.bos_token}{prompt.text}\n"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _with_tiles(text: str, prompt: Prompt, model: "HookedVLM") -> str:
    """The text with what the processor of `transformers` writes for the tiles of each picture."""
    processor: Any = bounded_processor(model)
    for picture in prompt.pictures:
        cols, rows = processor.tiling(picture.size)
        grid = (0, 0) if cols == rows == 1 else (rows, cols)
        tiles = get_image_prompt_string(*grid, 1, MARK, "\0", WHOLE)
        text = text.replace("<image>", tiles, 1)
    return text.replace("\0", "<image>")
