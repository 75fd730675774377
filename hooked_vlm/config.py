"""The configuration of a hooked model: two frozen dataclasses with TransformerLens' field names.

A converter (`hooked_vlm.converters`) turns a checkpoint's `config.json` into the keyword arguments of
`VLMConfig`. The configuration is frozen: `model.set_use_*` and `model.to()` replace `model.cfg`, and no
module keeps a copy of a field that can change.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from hooked_vlm.vision_config import VisionConfig


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change with the length of the sequence (`hooked_vlm.nn.rotary` has the formulas)."""

    kind: Literal["linear", "dynamic", "longrope", "llama3"]
    factor: float = 1.0
    """All but longrope: by how much the context grows."""
    n_ctx_trained: int = 0
    """Dynamic and longrope: up to this length the frequencies are those of training. Llama3: length of training."""
    short_factor: tuple[float, ...] = ()
    """Longrope: divisors of the frequencies up to `n_ctx_trained` positions, one for each."""
    long_factor: tuple[float, ...] = ()
    """Longrope: the same beyond."""
    attention_factor: float = 1.0
    """Longrope: queries and keys are both multiplied by it."""
    low_freq_factor: float = 1.0
    """Llama3: frequencies of fewer turns over `n_ctx_trained` positions are divided by `factor`."""
    high_freq_factor: float = 4.0
    """Llama3: frequencies of more turns stay."""


@dataclass(frozen=True)
class LayerKind:
    """Layers of the language model that share a window and rotary positions."""

    window: int | None
    """As `VLMConfig.sliding_window`."""
    rope_theta: float
    rope_scaling: RopeScaling | None = None


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
    mrope_interleaved: bool = False
    """Whether these frequencies take turns, from the fastest on; otherwise each axis has a chunk of them."""
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
    qk_norm: bool = False
    """RMSNorm of queries and of keys, each head by itself, before they are rotated."""
    rmsnorm_uses_offset: bool = False
    """Whether the language model's norms multiply by 1 + weight, in float32 (Gemma)."""
    use_normalization_before_and_after: bool = False
    """Whether what attention and MLP write is normalised, too, before it is added to the stream (`ln1_post`, ...)."""
    attn_scale: float | None = None
    """What scores are divided by; None: sqrt(d_head)."""
    attn_scores_soft_cap: float | None = None
    """Scores s become cap * tanh(s / cap), before the mask; None: they stay."""
    output_logits_soft_cap: float | None = None
    """The same of logits."""
    embed_scale: float | None = None
    """What embeddings of tokens are multiplied by, rounded to their dtype; image features are not. None: 1."""
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
    prompt_style: str = "chatml"
    """Name of the marks around turns and pictures (`hooked_vlm.inputs.prompt_styles`)."""
    pad_token_id: int | None = None

    vision: VisionConfig | None = None

    model_name: str = ""
    original_architecture: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    exceeds_float16: bool = False
    """Whether activations of the published weights exceed float16's range, 65,504 (Gemma 3)."""
    processed: tuple[str, ...] = ()
    """Steps of `hooked_vlm.model.weight_processing` applied to the weights, in order; loading applies none."""
    quantize: str | None = None
    """How the matrices are kept in fewer bits (`hooked_vlm.loading.quantisation`), if they are."""
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False
    use_attn_in: bool = field(default=False, repr=False)  # not part of `fingerprints.weights_hash`
    layer_kinds: tuple[LayerKind, ...] = ()
    """Kinds of layers; empty where all are alike (one kind, of `sliding_window`, `rope_theta` and `rope_scaling`)."""
    layer_kind_of: tuple[int, ...] = ()
    """The kind of each layer, as an index into `layer_kinds`."""
    bidirectional: Literal["image", "prompt"] | None = None
    """Tokens that see each other both ways: those of one picture, or the whole prompt (all that is not generated)."""
    window_cuts_blocks: bool = True
    """Whether a window hides earlier tokens of a picture or prompt whose tokens see each other both ways."""
    kinds: tuple[LayerKind, ...] = field(init=False, repr=False, compare=False)
    """Kinds of layers, at least one."""
    n_deepstack: int = field(init=False, repr=False, compare=False)
    """Number of blocks behind which image features enter the stream (DeepStack)."""

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
        n_deepstack = 0 if self.vision is None else len(self.vision.deepstack_layers)
        object.__setattr__(self, "n_deepstack", n_deepstack)  # the dataclass is frozen
        if n_deepstack > self.n_layers:
            raise ValueError(f"DeepStack enters behind {n_deepstack} blocks, but there are {self.n_layers} layers")
        self._check_kinds()
        alike = LayerKind(self.sliding_window, self.rope_theta, self.rope_scaling)
        object.__setattr__(self, "kinds", self.layer_kinds or (alike,))

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

    def kind_of(self, layer: int) -> LayerKind:
        """The window and rotary positions of a layer."""
        return self.kinds[self.kind_number(layer)]

    def kind_number(self, layer: int) -> int:
        """Index of a layer's kind into `kinds`."""
        return self.layer_kind_of[layer] if self.layer_kind_of else 0

    @property
    def n_ctx_limit(self) -> int:
        """How many positions may be run: `n_ctx`, or more where a scaling stretches it (dynamic: without end)."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind in ("longrope", "llama3"):
            return self.n_ctx
        return 2**31 - 1 if scaling.kind == "dynamic" else int(self.n_ctx * scaling.factor)

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Token ids that stand for image or video features."""
        return tuple(i for i in (self.image_token_id, self.video_token_id) if i is not None)

    def with_(self, **changes: Any) -> "VLMConfig":
        """A copy with some fields changed."""
        return replace(self, **changes)
