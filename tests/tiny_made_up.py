"""A small random model of the family of `made_up_family`, its reference and batches."""

from functools import lru_cache
from typing import Any

import made_up_family
import torch
import torch.nn.functional as F
import transformers
from made_up_family import MadeUpProcessor
from tiny import LANGUAGE_MODEL, reference, spelled
from torch import Tensor, nn

from hooked_vlm.converters import FAMILIES
from hooked_vlm.inputs.processors import PROCESSORS
from hooked_vlm.inputs.prompt_styles import STYLES

IMAGE = 197

FAMILIES.append(made_up_family)
PROCESSORS["made-up"], STYLES["made-up"] = MadeUpProcessor, made_up_family.STYLE


class Rows(nn.Module):
    """Means of 2 x 2 patches, a linear map, a line break behind each row."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear, self.newline = nn.Linear(d_in, d_out), nn.Parameter(torch.zeros(d_out))

    def forward(self, patches: Tensor) -> Tensor:
        square = F.avg_pool2d(patches.unflatten(1, (8, 8)).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        tokens = self.linear(square)  # picture row col d_out
        return torch.cat((tokens, self.newline.expand(*tokens.shape[:2], 1, -1)), 2).flatten(1, 2)


class MadeUpForConditionalGeneration(transformers.LlavaForConditionalGeneration):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.vision_tower.post_layernorm = nn.Identity()
        rows: Any = Rows(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.model.multi_modal_projector = rows


@lru_cache
def tiny_hf() -> Any:
    """The reference. Shared: tests must not change its weights."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {"model_type": "llama", **LANGUAGE_MODEL, "max_position_embeddings": 128, "rope_parameters": rope}
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 32, "patch_size": 4, "vision_use_head": False,
        },
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )  # fmt: skip
    return reference(MadeUpForConditionalGeneration, config)


def hf_batch(rows: list[list[Any]], seed: int = 0) -> dict[str, Tensor]:
    """A row is a list of token ids and of ("image", number of squares)."""
    counts: list[int] = []

    def placeholders(item: tuple[str, int]) -> list[int]:
        counts.append(item[1])
        return [IMAGE] * (20 * item[1])

    batch = spelled(rows, placeholders)
    if counts:
        generator = torch.Generator().manual_seed(seed)
        batch |= {
            "num_tiles": torch.tensor(counts),
            "pixel_values": torch.randn(sum(counts), 3, 32, 32, generator=generator),
        }
    return batch


CASES: dict[str, list[list[Any]]] = {
    "one-image": [[5, 6, ("image", 1), 7, 8, 9, 10]],
    "images-of-two-sizes": [[5, ("image", 2), 7, ("image", 1), 8, 9]],
    "text": [[5, 6, 7, 8, 9, 10, 11]],
    "left-padded": [[5, ("image", 2), 7, 8], [11, 12, 13], [("image", 1), 4, ("image", 1), 9]],
}
