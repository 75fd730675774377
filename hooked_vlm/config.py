"""The configuration of a hooked model: two frozen dataclasses with TransformerLens' field names.

A converter (`hooked_vlm.converters`) turns a checkpoint's `config.json` into the keyword arguments of
`VLMConfig`. The configuration is frozen: `model.set_use_*` and `model.to()` replace `model.cfg`, and no
module keeps a copy of a field that can change.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change with the length of the sequence (`hooked_vlm.nn.rotary` has the formulas)."""

    kind: Literal["linear", "dynamic", "longrope"]
    factor: float = 1.0
    """Linear and dynamic: by how much the context grows."""
    n_ctx_trained: int = 0
    """Dynamic and longrope: up to this length the frequencies are those of training."""
    short_factor: tuple[float, ...] = ()
    """Longrope: divisors of the frequencies up to `n_ctx_trained` positions, one for each."""
    long_factor: tuple[float, ...] = ()
    """Longrope: the same beyond."""
    attention_factor: float = 1.0
    """Longrope: queries and keys are both multiplied by it."""


@dataclass(frozen=True)
class LayerKind:
    """Layers of the language model that share a window and rotary positions."""

    window: int | None
    """As `VLMConfig.sliding_window`."""
    rope_theta: float
    rope_scaling: RopeScaling | None = None


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
    qkv_bias: bool = True
    qk_norm: bool = False
    """RMSNorm of queries and of keys over all heads together, before they are told apart."""
    layer_scale: bool = False
    """Whether the outputs of attention and MLP are multiplied by a learned vector (layer scale)."""
    rope_theta: float | None = 10000.0
    """Base of the rotary positions (row, column) of patches; None: absolute positions are learned."""
    tile_size: int | None = None
    """Side in pixels of the square tiles that images are cut into; None: each image is seen whole.

    A tower of tiles has a class token before each tile's patches and one learned position for each."""
    n_positions: int = 0
    """Learned positions of patches (the class token's not counted); other tile sizes interpolate them."""
    n_layers_used: int | None = None
    """Blocks that run, if not all: the projector reads what leaves the last of them."""
    patch_size: int = 14
    temporal_patch_size: int = 2
    in_channels: int = 3
    merge_size: int = 2
    """Patches of a `merge_size` x `merge_size` block become one image token."""
    transposed_tokens: bool = False
    """The tokens of a tile are numbered column by column (pixel shuffle "v1")."""
    min_tiles: int = 1
    max_tiles: int = 12
    """Bounds on the tiles of an image, its thumbnail not counted."""
    thumbnail: bool = True
    """Whether the whole image, as one more tile, follows the tiles of an image that has several."""
    d_projector: int | None = None
    """Hidden width of the projector; None: as wide as a merge block."""
    projector_norm: Literal["patch", "token"] = "patch"
    """Whether the projector's norm sees single patches or whole merge blocks."""
    projector_eps: float = 1e-6
    window: int | None = field(default=None, repr=False)
    """Side in patches of the square windows that patches see each other in; None: they see the whole image."""
    full_layers: tuple[int, ...] = field(default=(), repr=False)
    """Blocks that see the whole image in a tower with windows."""

    def __post_init__(self) -> None:
        if self.window is None:
            if self.full_layers:
                raise ValueError(f"full_layers {self.full_layers} are for a tower with windows, but window is None")
            return
        if self.tile_size is not None:
            raise ValueError(f"a tower of tiles ({self.tile_size} pixels) sees them whole: window must be None")
        if self.window < 1 or self.window % self.merge_size:
            raise ValueError(f"window must be a multiple of merge_size ({self.merge_size}), got {self.window} patches")
        if any(not 0 <= layer < self.n_layers for layer in self.full_layers):
            raise ValueError(f"full_layers must be among blocks 0 to {self.n_layers - 1}, got {self.full_layers}")

    @property
    def layer_kind_of(self) -> tuple[int, ...]:
        """Kind of each block: 0 sees whole images, 1 windows; empty where none has windows."""
        if self.window is None:
            return ()
        return tuple(int(layer not in self.full_layers) for layer in range(self.n_layers))

    @property
    def class_token(self) -> bool:
        return self.tile_size is not None

    @property
    def patch_order(self) -> str:
        return "blocks" if self.tile_size is None else "raster"

    @property
    def processor(self) -> str:
        return "resized" if self.tile_size is None else "tiles"

    @property
    def n_layers_run(self) -> int:
        return self.n_layers if self.n_layers_used is None else self.n_layers_used

    @property
    def d_merged(self) -> int:
        """Width of the patches of a merge block side by side."""
        return self.d_model * self.merge_size**2

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
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    """Largest number of positions that a position sees, itself included; None: all before it."""
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
    chat_template: str | None = None
    """Name of the conversation template of checkpoints that do not carry one (`hooked_vlm.inputs.templates`)."""
    system_message: str | None = None
    """In place of that template's own."""
    prompt_style: str = field(default="chatml", repr=False)
    """Name of the marks around turns and pictures (`hooked_vlm.inputs.prompt_styles`)."""
    pad_token_id: int | None = None

    vision: VisionConfig | None = None

    model_name: str = ""
    original_architecture: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    processed: tuple[str, ...] = ()
    """Steps of `hooked_vlm.model.weight_processing` applied to the weights, in order; loading applies none."""
    quantize: str | None = None
    """How the matrices are kept in fewer bits (`hooked_vlm.loading.quantisation`), if they are."""
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False
    use_attn_in: bool = field(default=False, repr=False)  # not part of `provenance.weights_hash`
    layer_kinds: tuple[LayerKind, ...] = field(default=(), repr=False)
    """Kinds of layers; empty where all are alike (one kind, of `sliding_window`, `rope_theta` and `rope_scaling`)."""
    layer_kind_of: tuple[int, ...] = field(default=(), repr=False)
    """The kind of each layer, as an index into `layer_kinds`."""
    bidirectional: Literal["image", "prompt"] | None = field(default=None, repr=False)
    """Tokens that see each other both ways: those of one picture, or the whole prompt (all that is not generated)."""
    window_cuts_blocks: bool = field(default=True, repr=False)
    """Whether a window hides earlier tokens of a picture or prompt whose tokens see each other both ways."""

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
        if self.bidirectional not in ("image", "prompt", None):
            raise ValueError(f'bidirectional must be "image", "prompt" or None, got {self.bidirectional!r}')
        self._check_kinds()

    def _check_kinds(self) -> None:
        n_kinds = len(self.layer_kinds)
        if not n_kinds and not self.layer_kind_of:
            return
        if len(self.layer_kind_of) != self.n_layers:
            raise ValueError(
                f"layer_kind_of must name the kind of each of {self.n_layers} layers, got {len(self.layer_kind_of)}"
            )
        if any(not 0 <= kind < n_kinds for kind in self.layer_kind_of):
            raise ValueError(f"layer_kind_of must be among kinds 0 to {n_kinds - 1}, got {self.layer_kind_of}")
        if self.sliding_window is not None or self.rope_scaling is not None:
            raise ValueError(
                "layer_kinds have a window and a rope_scaling each: leave sliding_window, rope_scaling out"
            )
        if self.rope_theta not in [kind.rope_theta for kind in self.layer_kinds]:
            bases = [kind.rope_theta for kind in self.layer_kinds]
            raise ValueError(f"rope_theta must be that of one of the layer_kinds, {bases}, got {self.rope_theta}")

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Kinds of layers, at least one."""
        return self.layer_kinds or (LayerKind(self.sliding_window, self.rope_theta, self.rope_scaling),)

    def kind_of(self, layer: int) -> LayerKind:
        """The window and rotary positions of a layer."""
        return self.kinds[self.layer_kind_of[layer] if self.layer_kind_of else 0]

    @property
    def n_ctx_limit(self) -> int:
        """How many positions may be run: `n_ctx`, or more where a scaling stretches it (dynamic: without end)."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind == "longrope":
            return self.n_ctx
        return 2**31 - 1 if scaling.kind == "dynamic" else int(self.n_ctx * scaling.factor)

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Token ids that stand for image or video features."""
        return tuple(i for i in (self.image_token_id, self.video_token_id) if i is not None)

    def with_(self, **changes: Any) -> "VLMConfig":
        """A copy with some fields changed."""
        return replace(self, **changes)
