"""The axes of the hook table as numbers: those of a model, and those of a prompt."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hooked_vlm.config import VLMConfig
from hooked_vlm.model.hook_catalogue import HookRow
from hooked_vlm.nn.hooks import is_vision

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

TYPICAL_PICTURE = (1024, 768)
"""Width and height in pixels."""


@dataclass(frozen=True)
class PromptSize:
    """One row without padding, in units of the hook table's axes."""

    n_tokens: int
    """Tokens of the whole prompt, image tokens included."""
    n_images: int = 0
    """As the vision tower counts them: images seen whole, or tiles and thumbnails."""
    n_patches: int = 0
    """Patches of each of them, the class token included."""
    n_image_tokens: int = 0
    """Image tokens of each of them."""


def prompt_with_picture(model: "HookedVLM", n_tokens: int, picture: tuple[int, int] = TYPICAL_PICTURE) -> PromptSize:
    """A prompt of `n_tokens` with one picture in it, as large as the image processor makes it and the prompt allows.

    Args:
        picture: width and height in pixels.
    """
    vision, processor = model.cfg.vision, model.image_processor
    if vision is None or processor is None:
        return PromptSize(n_tokens)
    layout = processor.layout(picture)
    n_patches = layout.tower_order.shape[1]
    per_token = vision.token_size**2
    if layout.n_tiles == 1:  # a larger one is resized
        n_patches = min(n_patches, n_tokens * per_token)
    n_image_tokens = n_patches // per_token
    n_tiles = min(layout.n_tiles, n_tokens // n_image_tokens)
    return PromptSize(n_tokens, n_tiles, int(vision.class_token) + n_patches, n_image_tokens)


def axis_sizes(cfg: VLMConfig, name: str) -> dict[str, int]:
    """The axes that the model alone decides, of the hook point `name` (which says whose heads and widths are meant)."""
    vision = cfg.vision
    if not is_vision(name) or vision is None:
        sizes = {"d_model": cfg.d_model, "head": cfg.n_heads, "kv_head": cfg.n_key_value_heads}
        return {**sizes, "d_head": cfg.d_head, "d_mlp": cfg.d_mlp}
    sizes = {"d_model": vision.d_model, "head": vision.n_heads, "d_head": vision.d_head, "d_mlp": vision.d_mlp}
    d_projector = vision.d_merged if vision.d_projector is None else vision.d_projector
    return {**sizes, "d_merged": vision.d_merged, "d_projector": d_projector, "d_model_text": cfg.d_model}


def prompt_axis_sizes(prompt: PromptSize) -> dict[str, int]:
    """The axes that the prompt decides."""
    return {
        **dict.fromkeys(("pos", "query", "key"), prompt.n_tokens),
        **dict.fromkeys(("patch", "query_patch", "key_patch"), prompt.n_patches),
        "batch": 1,
        "image": prompt.n_images,
        "token": prompt.n_image_tokens,
        "image_token": prompt.n_images * prompt.n_image_tokens,
    }


def filled(row: HookRow, cfg: VLMConfig, prompt: PromptSize | None = None) -> tuple[int | str, ...]:
    """The shape of a hook point, a number for every axis that is known; what a prompt decides may keep its name."""
    known = axis_sizes(cfg, row.name) | ({} if prompt is None else prompt_axis_sizes(prompt))
    return tuple(int(axis) if axis.isdigit() else known.get(axis, axis) for axis in row.shape)


def layers_of(row: HookRow, cfg: VLMConfig) -> int:
    """Number of running layers with this hook point; 1 where it belongs to no layer."""
    if "{l}" not in row.name:
        return 1
    if "deepstack" in row.name:
        return cfg.n_deepstack
    if not is_vision(row.name):
        return cfg.n_layers
    return 0 if cfg.vision is None else cfg.vision.n_layers_run
