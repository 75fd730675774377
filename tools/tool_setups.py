"""Minute random models of every family, for docs/transformerlens.md: the published values, the smallest sizes."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.config import VLMConfig
from hooked_vlm.converters import KNOWN_MODELS, converter_for
from hooked_vlm.inputs.processors import processor_of
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.loading.settings import model_config
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.vision_config import VisionConfig

SHORT_NAMES = {
    "Qwen2-VL": "Qwen/Qwen2-VL-2B-Instruct",
    "Qwen2.5-VL": "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen3-VL": "Qwen/Qwen3-VL-2B-Instruct",
    "InternVL2": "OpenGVLab/InternVL2-1B",
    "InternVL3.5": "OpenGVLab/InternVL3_5-1B",
    "LLaVA-1.5": "llava-hf/llava-1.5-7b-hf",
    "LLaVA-NeXT": "llava-hf/llava-v1.6-mistral-7b-hf",
    "OneVision": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "Gemma 3": "google/gemma-3-4b-it",
    "PaliGemma": "google/paligemma-3b-mix-224",
    "PaliGemma 2": "google/paligemma2-3b-mix-448",
    "SmolVLM": "HuggingFaceTB/SmolVLM-256M-Instruct",
}
"""Of the families, and the published size whose values the minute model has."""
SIDE = 8
"""Of a picture in pixels: 2 x 2 tokens."""


def minute(cfg: VLMConfig) -> VLMConfig:
    """A published configuration with the smallest sizes; with grouped queries if it has them."""
    vision = cfg.vision
    assert vision is not None
    sizes = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_head": 4, "d_mlp": 8, "d_vocab": 16, "n_ctx": 64}
    grouped = cfg.n_key_value_heads < cfg.n_heads
    return replace(
        cfg,
        **sizes,
        n_key_value_heads=1 if grouped else 2,
        rope_scaling=None,
        layer_kind_of=(0, len(cfg.layer_kinds) - 1) if cfg.layer_kinds else (),
        mrope_section=None if cfg.mrope_section is None else (1, 1, 0),
        image_token_id=1,
        video_token_id=None,
        vision=minute_tower(vision),
    )


def minute_tower(vision: VisionConfig) -> VisionConfig:
    cells = 2 * vision.token_size
    sizes = {"n_layers": 2, "d_model": 4, "n_heads": 1, "d_head": 4, "d_mlp": 4, "d_out": 8}
    return replace(
        vision,
        **sizes,
        n_layers_used=None if vision.n_layers_used is None else 1,
        patch_size=SIDE // cells,
        n_positions=cells**2 if vision.n_positions else 0,
        tile_size=SIDE if vision.patch_order == "raster" else None,
        pinpoints=((SIDE, 2 * SIDE),) if vision.pinpoints else (),
        window=None if vision.window is None else 2,
        full_layers=(1,) if vision.full_layers else (),
        deepstack_layers=(0,) if vision.deepstack_layers else (),
        d_projector=None if vision.d_projector is None else 4,
    )


@dataclass(frozen=True, eq=False)
class Setup:
    """A model, and the same prompt about two images."""

    model: HookedVLM
    clean: VLMInputs
    corrupt: VLMInputs

    @classmethod
    def of(cls, published: VLMConfig) -> "Setup":
        torch.manual_seed(0)
        cfg = minute(published)
        assert cfg.vision is not None
        model, processor = HookedVLM(cfg).eval(), processor_of(cfg)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        assert processor is not None
        n, cells = (3 if cfg.vision.pinpoints else 1), SIDE // cfg.vision.patch_size
        grid = (n, cells, cells)
        layout = processor.layout_of(grid, (2 * SIDE, SIDE) if cfg.vision.pinpoints else None)
        tokens = torch.tensor([[5, *[1] * layout.n_tokens, 6, 7]])
        raster = cfg.vision.patch_order == "raster"
        shape = (n, 3, SIDE, SIDE) if raster else (cells**2, cfg.vision.d_patch)
        clean, corrupt = (
            VLMInputs(
                tokens,
                model.input_spec(),
                pixel_values=torch.randn(shape),
                image_grid_thw=torch.tensor([grid]),
                image_layouts=(layout,),
            )
            for _ in range(2)
        )
        return cls(model, clean, corrupt)

    @property
    def last(self) -> int:
        """Position of the last token."""
        return self.clean.shape[1] - 1

    @cached_property
    def caches(self) -> tuple[Any, Any]:
        """Of the clean and of the corrupt input."""
        with torch.no_grad():
            clean, corrupt = (
                self.model.run_with_cache(x, names_filter=lambda name: True)[1] for x in (self.clean, self.corrupt)
            )
        return clean, corrupt

    @property
    def both(self) -> VLMInputs:
        return VLMInputs.concat([self.clean, self.corrupt])

    def metric(self, logits: Tensor) -> Tensor:
        return (logits[:, -1, 3] - logits[:, -1, 4]).mean()

    def task(self, inputs: Any) -> Tensor:
        return self.model(inputs)[:, -1, [3, 4]]


def setups() -> dict[str, Setup]:
    """A minute model of every family, by its short name."""
    published = {short: KNOWN_MODELS[name].config for short, name in SHORT_NAMES.items()}
    return {short: Setup.of(model_config(converter_for(known), known, {})) for short, known in published.items()}
