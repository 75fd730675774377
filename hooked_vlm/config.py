"""The configuration of a hooked model: two frozen dataclasses with TransformerLens' field names.

A converter (`hooked_vlm.converters`) turns a checkpoint's `config.json` into the keyword arguments of
`VLMConfig`. The configuration is frozen: `model.set_use_*` and `model.to()` replace `model.cfg`, and no
module keeps a copy of a field that can change.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its projector (sizes in elements, image sizes in pixels)."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_out: int
    """Width the projector hands to the language model."""
    act_fn: str = "quick_gelu"
    normalization_type: str = "LN"
    eps: float = 1e-6
    rope_theta: float = 10000.0
    patch_size: int = 14
    temporal_patch_size: int = 2
    in_channels: int = 3
    merge_size: int = 2
    """Patches of a `merge_size` x `merge_size` block become one image token."""

    @property
    def d_patch(self) -> int:
        """Numbers in one flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of (resized) pixels that one image token covers."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class VLMConfig:
    """The language model, the placeholders of images in its token stream, and the vision tower.

    Field names are TransformerLens' where it has one, because its tools read them
    (`n_key_value_heads`, `normalization_type`, `final_rms`, `use_attn_result`, ...).
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    rope_theta: float
    mrope_section: tuple[int, ...] | None = None
    """How many rotary frequencies turn with the (temporal, height, width) position; None: plain RoPE."""
    eps: float = 1e-6
    act_fn: str = "silu"
    normalization_type: str = "RMS"
    gated_mlp: bool = True
    final_rms: bool = True
    attn_only: bool = False
    qkv_bias: bool = True
    tie_word_embeddings: bool = False

    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    vision: VisionConfig | None = None

    model_name: str = ""
    original_architecture: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False

    def __post_init__(self) -> None:
        if self.n_heads % self.n_key_value_heads:
            raise ValueError(
                f"n_heads ({self.n_heads}) must be a multiple of n_key_value_heads ({self.n_key_value_heads})"
            )
        if self.d_head % 2:
            raise ValueError(f"d_head must be even for rotary positions, got {self.d_head}")
        if self.mrope_section is not None and sum(self.mrope_section) != self.d_head // 2:
            raise ValueError(
                f"mrope_section {self.mrope_section} must sum to d_head/2 = {self.d_head // 2}, "
                f"but sums to {sum(self.mrope_section)}"
            )

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Token ids that stand for image or video features."""
        return tuple(i for i in (self.image_token_id, self.video_token_id) if i is not None)

    def with_(self, **changes: Any) -> "VLMConfig":
        """A copy with some fields changed."""
        return replace(self, **changes)
