"""A family that does not exist, as an example of all that a family adds: a converter, an image processor, a style.

Its tower (without a class token) sees a picture as one square, a tall one as two below each other; each becomes 4 x 4
tokens, means of 2 x 2 patches, with a line break behind each row. Its text model is Llama.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hooked_vlm.config import VLMConfig
from hooked_vlm.converters.dialects import LLAMA
from hooked_vlm.converters.language_models import decoder_kwargs
from hooked_vlm.converters.renaming import Rename, affine, tied_to_ours, tied_to_theirs
from hooked_vlm.inputs.boxes import ImageSize
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.image_settings import IMAGES, Settings, normalisation_tables
from hooked_vlm.inputs.layouts import even_part, whole_layout
from hooked_vlm.inputs.picture_processor import PictureProcessor, Prepared, each_image
from hooked_vlm.inputs.prompt_styles import PromptStyle

# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class MadeUpProcessor(PictureProcessor):
    """Stretch a picture to one square, or to two below each other if it is tall."""

    sees: ClassVar[str] = "this model sees pictures as squares"
    patch_size: int = 4
    side: int = 32
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __call__(self, images: Sequence[Any], *, resized: Any = None) -> Prepared:
        pixels, layouts, tables = [], [], normalisation_tables(self.image_mean, self.image_std)
        for _, picture in each_image(images):
            layouts.append(self.layout(picture.size))
            n = layouts[-1].grid[0]
            colours = np.asarray(picture.resize((self.side, n * self.side))).reshape(n, self.side, self.side, 3)
            pixels.append(np.stack([table[colours[..., c]] for c, table in enumerate(tables)], axis=1))
        return torch.from_numpy(np.concatenate(pixels)), torch.tensor([own.grid for own in layouts]), layouts

    def layout(self, size: tuple[int, int]) -> ImageLayout:
        return self.layout_of((1 + (size[1] > size[0]), 8, 8), size)

    def layout_of(self, grid: Any, size: tuple[int, int] | None = None, kind: str = "image") -> ImageLayout:
        n, rows, cols = grid
        area, width = ImageSize(*(size or (self.side, n * self.side))), cols // 2 + 1
        numbers = np.arange(n * rows // 2 * width).reshape(-1, width)  # the last of each row is a line break
        features = np.full(numbers.shape, -1)
        features[:, :-1] = np.arange(n * rows * cols // 4).reshape(-1, cols // 2)
        patches = partial(whole_layout, area, (1, n * rows, cols), self.patch_size, 1)
        part = even_part("tiles", numbers[None, :, :-1], (0, 0, *area), 2 * self.patch_size, (1, n))
        tiles = np.where(features < 0, -1, features // (rows * cols // 4)).ravel()
        order = np.arange(n * rows * cols).reshape(n, -1)
        return ImageLayout(
            area, (part,), numbers.size, grid, tiles, order, patches, features=features.ravel(),
            size_known=size is not None,
        )  # fmt: skip

    def read_batch(self, tokens: Tensor, batch: Mapping[str, Any], spec: Any) -> tuple[Any, Any, None]:
        pixels, counts = batch["pixel_values"], batch["num_tiles"]
        return pixels, None if pixels is None else torch.tensor([[n, 8, 8] for n in counts.tolist()]), None

    @classmethod
    def from_checkpoint(cls, cfg: VLMConfig, images: Settings, videos: Settings) -> "MadeUpProcessor":
        return cls()

    def to_files(self) -> dict[str, dict[str, Any]]:
        return {IMAGES: {"image_mean": list(self.image_mean), "image_std": list(self.image_std)}}


STYLE = PromptStyle(user_header="USER: ", assistant_header=" ASSISTANT:")

# ---------------------------------------------------------------- configuration and tensors

ARCHITECTURES = ("MadeUpForConditionalGeneration",)
MODEL_TYPES = ("made_up",)


def config_kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    text, vision = decoder_kwargs(config["text_config"], LLAMA), config["vision_config"]
    d_model, n_heads = vision["hidden_size"], vision["num_attention_heads"]
    tower = {
        "n_layers": vision["num_hidden_layers"], "d_model": d_model, "n_heads": n_heads, "d_head": d_model // n_heads,
        "d_mlp": vision["intermediate_size"], "d_out": text["d_model"], "act_fn": "gelu_tanh", "patch_bias": True,
        "rope_theta": None, "patch_order": "raster", "n_positions": 64, "tile_size": 32, "patch_size": 4,
        "temporal_patch_size": 1, "merge_size": 1, "pool_size": 2, "projector": ("pool", "linear"),
        "line_break": True, "processor": "made-up",
    }  # fmt: skip
    names = {"image_token_id": config["image_token_index"], "original_architecture": ARCHITECTURES[0]}
    return {**text, **names, "prompt_style": "made-up", "vision": tower}


def dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    return None


def published_config(config: Mapping[str, Any], stored_as: torch.dtype | None = None) -> dict[str, Any]:
    return dict(config)


def from_hf(tensors: Mapping[str, Tensor], config: Mapping[str, Any], notes: Any = None) -> dict[str, Tensor]:
    cfg = config_kwargs(config)
    return tied_to_ours(tensors, table(cfg), cfg, (TEXT.embed, TEXT.head), notes=notes)


def to_hf(tensors: Mapping[str, Tensor], config: Mapping[str, Any], names: str = "published") -> dict[str, Tensor]:
    cfg = config_kwargs(config)
    return tied_to_theirs(tensors, table(cfg), cfg)


TEXT = replace(LLAMA, embed="model.language_model.embed_tokens.weight", norm="model.language_model.norm.weight")


def table(cfg: Mapping[str, Any]) -> list[Rename]:
    vision, tower = cfg["vision"], "model.vision_tower"
    d, wide = vision["d_model"], vision["d_mlp"]
    rows = [
        replace(row, theirs=row.theirs.replace("model.layers", "model.language_model.layers"))
        for row in TEXT.table(cfg)
    ]
    kernel, positions = affine(f"{tower}.embeddings.patch_embedding", ("vision.patch_embed.proj",), (d, 3, 4, 4))
    rows += [replace(kernel, flat=True), positions]
    rows.append(
        Rename(f"{tower}.embeddings.position_embedding.weight", ("vision.tile_embed.positions",), (64, d), lead=1)
    )
    for layer in range(vision["n_layers"]):
        theirs, ours = f"{tower}.encoder.layers.{layer}", f"vision.blocks.{layer}"
        for part, own, shape in (
            ("layer_norm1", "ln1", (d,)), ("layer_norm2", "ln2", (d,)), ("mlp.fc1", "mlp.in_proj", (wide, d)),
            ("mlp.fc2", "mlp.out_proj", (d, wide)), ("self_attn.out_proj", "attn.o_proj", (d, d)),
            *((f"self_attn.{name}_proj", f"attn.{name}_proj", (d, d)) for name in "qkv"),
        ):  # fmt: skip
            rows += affine(f"{theirs}.{part}", (f"{ours}.{own}",), shape)
    rows += affine("model.multi_modal_projector.linear", ("projector.out_proj",), (cfg["d_model"], d))
    return [*rows, Rename("model.multi_modal_projector.newline", ("projector.line_break",), (cfg["d_model"],))]
