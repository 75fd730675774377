"""`HookedVLM`: a vision-language model whose every intermediate tensor passes a named hook point."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedRootModule

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.builder import InputBuilder
from hooked_vlm.inputs.other_names import ATTRIBUTES, refuse_arguments
from hooked_vlm.inputs.text import TextCodec
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.loading import checkpoints, saving
from hooked_vlm.model import (
    fingerprints,
    generation,
    hooking,
    losses,
    recording,
    switches,
    token_positions,
    weights,
)
from hooked_vlm.model.weights import stacked_view
from hooked_vlm.nn import kv_cache
from hooked_vlm.nn.block import run_blocks, text_blocks, text_norm
from hooked_vlm.nn.components import Embed, Norm, Unembed, WithViews
from hooked_vlm.nn.forward_pass import (
    DeepStack,
    ForwardPass,
    Recorder,
    check_call,
    last_of_rows,
    layer_range,
    step_pass,
    text_pass,
)
from hooked_vlm.nn.hooks import (
    HookName,
    HookPoint,
    foreign_module,
    hooked_module,
    is_own,
    running,
)
from hooked_vlm.nn.kv_cache import KVCache
from hooked_vlm.nn.vision import Projector, VisionTower, encode, image_features

P = ParamSpec("P")
Q = TypeVar("Q")
R = TypeVar("R")
Hooks = Sequence[tuple[HookName, Callable]]
ReturnType = Literal["logits", "loss", "both"] | None


def _of_part(
    part: Callable[["HookedVLM"], Q], method: Callable[Concatenate[Q, P], R]
) -> Callable[Concatenate["HookedVLM", P], R]:
    """Make a method of one of a model's parts a method of the model."""

    @wraps(method)
    def call(model: "HookedVLM", *args: P.args, **kwargs: P.kwargs) -> R:
        return method(part(model), *args, **kwargs)

    return call


def _builder(model: "HookedVLM") -> InputBuilder:
    return model.input_builder


def _codec(model: "HookedVLM") -> TextCodec:
    return model.input_builder.text


class HookedVLM(WithViews, HookedRootModule):
    """Text decoder, vision tower and projector with hooks in all three.

    Make one with `HookedVLM.from_pretrained(name_or_path)` or `HookedVLM.from_hf(hf_model)`; then

        inputs = model.to_inputs("What is written here?", images="page.png")
        logits, cache = model.run_with_cache(inputs)
        model.run_with_hooks(inputs, fwd_hooks=[("blocks.3.attn.hook_z", my_hook)])
        model.generate(inputs, max_new_tokens=32, return_type="str")

    Everything that takes tokens takes a `VLMInputs`. Hook points are listed in docs/hooks.md.
    """

    cfg: VLMConfig
    hook_dict: dict[str, Any]
    embed: Embed
    blocks: Any  # a ModuleList of Block
    ln_final: Norm
    unembed: Unembed

    def __init__(self, cfg: VLMConfig, tokenizer: Any = None, image_processor: Any = None) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.hf_config: dict[str, Any] = {}
        """The checkpoint's own config.json."""
        self.generation_config: dict[str, Any] = {}
        """The checkpoint's own generation_config.json, which acts with `generate(settings="checkpoint")` only."""
        self.device_map: dict[str, str] = {}
        """Where each part is, if they are spread (`hooked_vlm.loading.placement`)."""
        self._hooked_at: defaultdict[int, set[Any]] = defaultdict(set)
        """Hook points by the depth of the `hooks` block that set hooks there."""
        self.embed = Embed(cfg.d_vocab, cfg.d_model, cfg.embed_scale)
        if cfg.vision is not None:
            self.vision = VisionTower(cfg.vision)
            self.projector = Projector(cfg.vision)
            self.hook_image_features = HookPoint(packs=False)  # [image token of the batch, d_model]
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        self.blocks = text_blocks(cfg)
        self.ln_final = text_norm(cfg)
        self.unembed = Unembed(cfg.d_model, cfg.d_vocab, cfg.output_logits_soft_cap)
        if cfg.tie_word_embeddings:
            self.unembed.weight = self.embed.weight
        self.setup()

    # ---------------------------------------------------------------- inputs

    @property
    def input_builder(self) -> InputBuilder:
        """The builder of this model's inputs, with its present tokenizer and image processor."""
        return InputBuilder(self.cfg, self.tokenizer, self.image_processor)

    input_spec = _of_part(_builder, InputBuilder.input_spec)
    to_inputs = _of_part(_builder, InputBuilder.to_inputs)
    inputs_from_hf = _of_part(_builder, InputBuilder.inputs_from_hf)
    chat_text = _of_part(_builder, InputBuilder.chat_text)
    to_tokens = _of_part(_builder, InputBuilder.to_tokens)
    to_str_tokens = _of_part(_builder, InputBuilder.to_str_tokens)

    to_string = _of_part(_codec, TextCodec.to_string)
    to_single_token = _of_part(_codec, TextCodec.to_single_token)
    to_single_str_token = token_positions.to_single_str_token
    get_token_position = token_positions.get_token_position

    @property
    def image_token(self) -> str:
        """Text of an image's placeholder."""
        return self.input_builder.text.image_token

    @property
    def video_token(self) -> str:
        """Text of a video's placeholder."""
        return self.input_builder.text.video_token

    # ---------------------------------------------------------------- forward

    loss_fn = losses.loss_fn

    def forward(
        self,
        input: VLMInputs | Int[Tensor, "batch pos"] | str | Sequence[str],
        return_type: ReturnType = "logits",
        *,
        start_at_layer: int | None = None,
        resid: Float[Tensor, "batch pos d_model"] | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: KVCache | None = None,
        logits_at: Literal["all", "last"] = "all",
        loss_per_token: bool = False,
        recorder: Recorder | None = None,
        **elsewhere: Any,
    ) -> Any:
        """Run the model.

        Args:
            input: a `VLMInputs`, token ids without image placeholders, or raw text (no chat template).
            return_type: "logits" [batch, pos, d_vocab]; "loss", the mean next-token cross-entropy over text
                tokens (neither padding nor placeholders are predicted); "both" as a tuple; None for neither.
            start_at_layer: begin at this block (negative counts from the end) from `resid`, its `resid_pre`;
                `input` still says positions, padding and, for the loss, the tokens.
            stop_at_layer: return the residual stream before this block instead.
            past_kv_cache: keys and values of the positions before these (`model.new_kv_cache`); it grows.
            logits_at: "last" computes logits of each row's last real position only, [batch, 1, d_vocab].
            loss_per_token: the loss of each next token, [batch, pos - 1], in place of their mean.
            recorder: what `run_with_cache` records this pass with.

        Raises:
            InputError: inputs that do not fit the model or each other.
        """
        if elsewhere:
            refuse_arguments("forward", elsewhere)
        inputs = self.as_inputs(input)
        first, last = layer_range(self.cfg, start_at_layer, stop_at_layer)
        if return_type not in ("logits", "loss", "both", None):
            raise InputError(f'return_type must be "logits", "loss", "both" or None, got {return_type!r}')
        if loss_per_token and return_type not in ("loss", "both"):
            raise InputError('loss_per_token needs return_type="loss" or "both"')
        check_call(self.cfg, inputs, first, last, resid, past_kv_cache, logits_at)
        here = text_pass(self, inputs, past_kv_cache, None if resid is None else resid.dtype, recorder)
        stream, here = self._enter(inputs, here, resid, first)
        with running(here):
            narrow = logits_at == "last" and return_type == "logits" and stop_at_layer is None
            n_out = 1 if narrow and self._may_narrow(inputs, here) else None
            stream = self.run_layers(stream, here, first, last, n_out).to(inputs.device)
            if past_kv_cache is not None:
                past_kv_cache.advance(inputs.shape[1], inputs.next_position)
            if stop_at_layer is not None:
                return here.pad(stream)
            if return_type is None:
                # the final norm's hooks still fire, as they do in TransformerLens' own models
                self.ln_final(stream)
                return None
        if logits_at == "last":
            stream, here = last_of_rows(stream, here, inputs)
        with running(here):
            logits = here.pad(self.unembed(self.ln_final(stream)))
        if return_type == "logits":
            return logits
        loss = self.loss_fn(logits, inputs, per_token=loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def as_inputs(self, input: Any) -> VLMInputs:
        """Return `input` as a `VLMInputs` on the model's device, from raw text or token ids if need be.

        Bare ids of several rows, some of which begin with the model's or the tokenizer's padding token, are
        taken as padded on the left: so `to_tokens` and tokenizers make them.

        Raises:
            InputError: bare token ids with image placeholders, ids outside the vocabulary, no tokens at all.
        """
        if not isinstance(input, VLMInputs):
            return self.input_builder.from_text_or_ids(input)
        return input if input.device == self.cfg.device else input.to(self.cfg.device)

    def run_layers(
        self,
        stream: Float[Tensor, "*dims d_model"],
        here: ForwardPass,
        first: int,
        stop: int,
        n_out: int | None = None,
    ) -> Float[Tensor, "*out d_model"]:
        """Run the stream through the decoder's blocks `first` to `stop` - 1 in a pass (`hooked_vlm.nn.forward_pass`).

        `n_out`: number of last positions wanted of the model's last block, which then computes queries, and all that
        follows, for these alone.
        """
        narrow = n_out is not None and first < stop == self.cfg.n_layers
        with running(here):
            stream = run_blocks(self.blocks, stream, first, stop - 1 if narrow else stop)
        if narrow:
            with running(replace(here, n_out=n_out)):
                stream = run_blocks(self.blocks, stream, stop - 1, stop)
        return stream

    def _may_narrow(self, inputs: VLMInputs, here: ForwardPass) -> bool:
        """Whether the last block may compute queries of the last position alone: nothing else of it is observed."""
        block = self.blocks[-1]
        recorded = here.recorder is not None and here.recorder.touches(f"blocks.{self.cfg.n_layers - 1}.")
        together = here.packing is None and min(inputs.stop) == inputs.shape[1]
        return together and not recorded and is_own(block) and not hooked_module(block) and not foreign_module(block)

    def next_logits(self, token: Int[Tensor, "batch"], past_kv_cache: KVCache) -> Float[Tensor, "batch d_vocab"]:
        """Append one token to every row of the cache, which must not be frozen, and return the logits after it."""
        with running(step_pass(self.cfg, past_kv_cache)):
            stream = self.hook_embed(self.embed(token[:, None]))  # [batch, 1, d_model]
            stream = run_blocks(self.blocks, stream).to(token.device)
            logits = self.unembed(self.ln_final(stream))[:, 0]
        past_kv_cache.advance(1, 1)
        return logits

    def _enter(
        self, inputs: VLMInputs, here: ForwardPass, resid: Float[Tensor, "batch pos d_model"] | None, first: int
    ) -> tuple[Float[Tensor, "*dims d_model"], ForwardPass]:
        """The stream before block `first`, and the pass over the blocks from there on.

        Before block 0, token embeddings with image features at the placeholders; in the place of all that, `resid`.
        """
        with running(here):
            x = self.embed(inputs.tokens) if resid is None else resid.to(inputs.device)
            if inputs.has_visuals and (resid is None or first < self.cfg.n_deepstack):
                features = image_features(self, inputs, here.without_positions(), x)
                if self.cfg.n_deepstack:
                    features, inner = features[:, 0], features[:, 1:]
                    here = replace(here, deepstack=DeepStack(inner, inputs.feature_slots, inputs.shape))
                if resid is None:
                    with running(here.without_positions()):
                        features = self.hook_image_features(features)  # [image token of the batch, d_model]
                    x = x.flatten(0, 1).index_copy(0, inputs.feature_slots, features).view_as(x)
            x = here.pack(x)
            return (self.hook_embed(x) if resid is None else x), here  # [batch, pos, d_model]

    def encode_images(self, inputs: VLMInputs) -> Float[Tensor, "token *feature d_model"]:
        """Encode images: the projector's output for every image token, images first, then videos. With DeepStack
        [token, feature, d_model]: what enters at the embedding, then behind each of the first blocks.

        `inputs.with_image_features(model.encode_images(inputs))` runs without the vision tower.
        """
        if self.cfg.vision is None:
            raise InputError(f"{self.cfg.model_name or 'this model'} is a language model without a vision tower")
        if inputs.pixel_values is None and inputs.pixel_values_videos is None:
            raise InputError("there are no images in these inputs to encode")
        return encode(self, inputs, {"inputs": inputs}, None)

    new_kv_cache = kv_cache.new_kv_cache

    # ---------------------------------------------------------------- hooks

    def hooks(  # pyright: ignore[reportIncompatibleMethodOverride] (yields a HookedVLM)
        self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), reset_hooks_end: bool = True, clear_contexts: bool = False
    ) -> AbstractContextManager["HookedVLM"]:
        """Set hooks for the length of a `with` block: `hooking.hooks`."""
        return hooking.hooks(self, fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts)

    def add_hook(self, name: HookName, hook: Callable, *args: Any, **kwargs: Any) -> None:
        """Add a hook as in TransformerLens; one that cannot act is a `HookError`."""
        hooking.add_hook(self, name, hook, *args, **kwargs)

    def run_with_hooks(self, input: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run `forward` with temporary hooks; arguments as of `hooked_vlm.model.hooking.run_with_hooks`."""
        return hooking.run_with_hooks(self, input, *args, **kwargs)

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride] (the input has a type here)
        self, input: VLMInputs | Int[Tensor, "batch pos"] | str | Sequence[str], *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Run `forward` and keep its activations; arguments as of `hooked_vlm.model.recording.run_with_cache`."""
        return recording.run_with_cache(self, input, *args, **kwargs)

    get_caching_hooks = recording.get_caching_hooks  # pyright: ignore[reportAssignmentType] (more names and slices)
    add_caching_hooks = recording.add_caching_hooks  # pyright: ignore[reportAssignmentType]
    check_hook_name = hooking.check_hook_name
    points_of = hooking.points_of
    check_reachable = hooking.check_reachable
    why_silent = hooking.why_silent

    set_use_attn_result = switches.set_use_attn_result
    set_use_split_qkv_input = switches.set_use_split_qkv_input
    set_use_attn_in = switches.set_use_attn_in
    set_use_hook_mlp_in = switches.set_use_hook_mlp_in

    # ---------------------------------------------------------------- answers

    generate = generation.generate
    log_probs = generation.log_probs

    # ---------------------------------------------------------------- weights

    W_Q, W_K, W_V, W_O = (stacked_view("attn", name) for name in ("W_Q", "W_K", "W_V", "W_O"))
    b_Q, b_K, b_V, b_O = (stacked_view("attn", name) for name in ("b_Q", "b_K", "b_V", "b_O"))
    W_in, W_gate, W_out = (stacked_view("mlp", name) for name in ("W_in", "W_gate", "W_out"))
    b_in, b_out = (stacked_view("mlp", name) for name in ("b_in", "b_out"))
    W_E, W_U, b_U = weights.W_E, weights.W_U, weights.b_U
    OV, QK, adapter = (property(fn) for fn in (weights.OV, weights.QK, weights.adapter))
    all_head_labels, absent_biases = property(weights.all_head_labels), property(weights.absent_biases)
    tl_parameters = weights.tl_parameters
    tl_state_dict = weights.tl_state_dict
    blocks_with = weights.blocks_with
    accumulated_bias = weights.accumulated_bias
    tokens_to_residual_directions = weights.tokens_to_residual_directions

    # ---------------------------------------------------------------- checkpoints

    from_pretrained = classmethod(checkpoints.from_pretrained)
    without_weights = classmethod(checkpoints.without_weights)
    from_hf = classmethod(checkpoints.from_hf)
    to_hf_state_dict = saving.to_hf_state_dict
    save_pretrained = saving.save_pretrained
    identity = fingerprints.identity

    @property
    def device(self) -> torch.device:
        """Where inputs are expected; `device_map` says where each part is."""
        return self.cfg.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.cfg.dtype

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ATTRIBUTES:
                raise AttributeError(f"a HookedVLM has no {name}; its place takes {ATTRIBUTES[name]}") from None
            raise

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        # every move and cast (.to, .cuda, .half, ...) comes through here: cfg follows
        if self.device_map:
            raise InputError("this model is spread over devices and stays so: load it again with what you want instead")
        if self.cfg.quantize is not None:
            raise InputError(f"this model's weights are {self.cfg.quantize}: load it again where and as you want it")
        moved = super()._apply(fn, recurse)
        self.cfg = self.cfg.with_(device=self.embed.weight.device, dtype=self.embed.weight.dtype)
        return moved
