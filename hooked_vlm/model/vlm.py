"""`HookedVLM`: a vision-language model whose every intermediate tensor passes a named hook point."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.utilities import Slice, SliceInput

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.prompting import PromptMixin
from hooked_vlm.inputs.vlm_inputs import Answer, VLMInputs
from hooked_vlm.loading.checkpoints import LoadingMixin
from hooked_vlm.model.cache import VLMCache
from hooked_vlm.model.caching import Caching, default_filter, exchanged_patterns, runs_explicitly
from hooked_vlm.model.fingerprints import identity
from hooked_vlm.model.generation import GenerationMixin
from hooked_vlm.model.weights import WeightsMixin
from hooked_vlm.nn.block import run_blocks, text_blocks
from hooked_vlm.nn.components import Embed, Norm, Unembed
from hooked_vlm.nn.forward_pass import ForwardPass, Recorder, inputs_mask, last_of_rows, step_pass, text_pass
from hooked_vlm.nn.hooks import (
    HookChecksMixin,
    HookName,
    HookPoint,
    canonical,
    foreign_module,
    hooked_module,
    is_encoder,
    is_hooked,
    is_own,
    running,
    shows_modules,
)
from hooked_vlm.nn.kv_cache import KVCache
from hooked_vlm.nn.vision import Projector, VisionTower, image_pass
from hooked_vlm.nn.weight_access import device_of

ReturnType = Literal["logits", "loss", "both"] | None


class HookedVLM(LoadingMixin, PromptMixin, GenerationMixin, WeightsMixin, HookChecksMixin, HookedRootModule):
    """Text decoder, vision tower and projector with hooks in all three.

    Make one with `HookedVLM.from_pretrained(name_or_path)` or `HookedVLM.from_hf(hf_model)`; then

        inputs = model.to_inputs("What is written here?", images="page.png")
        logits, cache = model.run_with_cache(inputs)
        model.run_with_hooks(inputs, fwd_hooks=[("blocks.3.attn.hook_z", my_hook)])
        model.generate(inputs, max_new_tokens=32, return_type="str")

    Everything that takes tokens takes a `VLMInputs`. Hook points are listed in docs/hooks.md.
    """

    def __init__(self, cfg: VLMConfig, tokenizer: Any = None, image_processor: Any = None) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.hf_config: dict[str, Any] = {}
        """The checkpoint's own config.json."""
        self.device_map: dict[str, str] = {}
        """Where each part is, if they are spread (`hooked_vlm.loading.placement`)."""
        self._hooked_at: defaultdict[int, set[Any]] = defaultdict(set)
        """Hook points by the depth of the `hooks` block that set hooks there."""
        self.embed = Embed(cfg.d_vocab, cfg.d_model)
        if cfg.vision is not None:
            self.vision = VisionTower(cfg.vision)
            self.projector = Projector(cfg.vision)
            self.hook_image_features = HookPoint(packs=False)  # [image token of the batch, d_model]
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        self.blocks = text_blocks(cfg)
        self.ln_final = Norm(cfg.d_model, cfg.eps, centered=False)
        self.unembed = Unembed(cfg.d_model, cfg.d_vocab)
        if cfg.tie_word_embeddings:
            self.unembed.weight = self.embed.weight
        self.setup()

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        input: VLMInputs | Int[Tensor, "batch pos"] | str | Sequence[str],
        return_type: ReturnType = "logits",
        *,
        start_at_layer: int = 0,
        resid: Float[Tensor, "batch pos d_model"] | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: KVCache | None = None,
        logits_at: Literal["all", "last"] = "all",
        recorder: Recorder | None = None,
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
            recorder: what `run_with_cache` records this pass with.

        Raises:
            InputError: inputs that do not fit the model or each other.
        """
        inputs = self.as_inputs(input)
        first, last = self._layer_range(start_at_layer, stop_at_layer)
        if return_type not in ("logits", "loss", "both", None):
            raise InputError(f'return_type must be "logits", "loss", "both" or None, got {return_type!r}')
        self._check_call(inputs, first, last, resid, past_kv_cache, logits_at)
        here = text_pass(self, inputs, past_kv_cache, None if resid is None else resid.dtype, recorder)
        with running(here):
            stream = self._embed(inputs, here) if resid is None else here.pack(resid.to(inputs.device))
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
        loss = self._loss(logits, inputs, logits_at)
        return loss if return_type == "loss" else (logits, loss)

    def as_inputs(self, input: Any) -> VLMInputs:
        """`input` itself if it is a `VLMInputs`; raw text and bare token ids become one, on the model's device.

        Bare ids of several rows, some of which begin with the model's or the tokenizer's padding token, are
        taken as padded on the left: so `to_tokens` and tokenizers make them.

        Raises:
            InputError: bare token ids with image placeholders, ids outside the vocabulary, no tokens at all.
        """
        if not isinstance(input, VLMInputs):
            return self.inputs_of(input)
        return input if input.device == self.cfg.device else input.to(self.cfg.device)

    def run_layers(
        self,
        stream: Float[Tensor, "*dims d_model"],
        here: ForwardPass,
        first: int,
        stop: int,
        n_out: int | None = None,
    ) -> Float[Tensor, "*out d_model"]:
        """The stream through the decoder's blocks `first` to `stop` - 1 in a pass (`hooked_vlm.nn.forward_pass`).

        `n_out`: of the model's last block only so many positions at the end are wanted, so that queries and all that
        follows them are made for these alone.
        """
        narrow = n_out is not None and first < stop == self.cfg.n_layers
        with running(here):
            stream = run_blocks(self.blocks, stream, first, stop - 1 if narrow else stop)
        if narrow:
            with running(replace(here, n_out=n_out)):
                stream = run_blocks(self.blocks, stream, stop - 1, stop)
        return stream

    def _may_narrow(self, inputs: VLMInputs, here: ForwardPass) -> bool:
        """Whether nobody would notice that the last block makes queries of the last position only."""
        block = self.blocks[-1]
        recorded = here.recorder is not None and here.recorder.touches(f"blocks.{self.cfg.n_layers - 1}.")
        together = here.packing is None and min(inputs.stop) == inputs.shape[1]
        return together and not recorded and is_own(block) and not hooked_module(block) and not foreign_module(block)

    def next_logits(self, token: Int[Tensor, "batch"], past_kv_cache: KVCache) -> Float[Tensor, "batch d_vocab"]:
        """Logits after one more token in every row, which joins the cache."""
        with running(step_pass(self.cfg, past_kv_cache)):
            stream = self.hook_embed(self.embed(token[:, None]))  # [batch, 1, d_model]
            stream = run_blocks(self.blocks, stream).to(token.device)
            logits = self.unembed(self.ln_final(stream))[:, 0]
        past_kv_cache.advance(1, 1)
        return logits

    def _check_call(
        self,
        inputs: VLMInputs,
        first: int,
        last: int,
        resid: Tensor | None,
        past: KVCache | None,
        logits_at: str,
    ) -> None:
        if logits_at not in ("all", "last"):
            raise InputError(f'logits_at must be "all" or "last", got {logits_at!r}')
        if first and resid is None:
            raise InputError(f"start_at_layer={first} needs resid, what enters that block")
        if past is not None and (first, last) != (0, self.cfg.n_layers):
            raise InputError("a key-value cache holds all layers: it does not go with start_at_layer or stop_at_layer")
        if past is not None and past.batch != len(inputs):
            raise InputError(f"the key-value cache has {past.batch} rows, the inputs {len(inputs)}")
        self._check_context(inputs, 0 if past is None else past.length)
        if resid is not None and resid.shape != (*inputs.shape, self.cfg.d_model):
            expected = (*inputs.shape, self.cfg.d_model)
            raise InputError(f"resid must be [batch, pos, d_model] = {expected}, got {tuple(resid.shape)}")

    def _layer_range(self, start_at_layer: int, stop_at_layer: int | None) -> tuple[int, int]:
        n = self.cfg.n_layers
        for name, layer, top in (
            ("start_at_layer", start_at_layer, n - 1),
            ("stop_at_layer", stop_at_layer, n),
        ):
            if layer is not None and not -n <= layer <= top:
                raise InputError(f"{name}={layer} is out of range: the model has layers 0 to {n - 1}")
        first = start_at_layer % n
        last = n if stop_at_layer is None else stop_at_layer if stop_at_layer >= 0 else stop_at_layer + n
        return first, last

    def _embed(self, inputs: VLMInputs, here: ForwardPass) -> Float[Tensor, "*dims d_model"]:
        """What enters block 0: token embeddings with image features in the placeholders' places."""
        x = self.embed(inputs.tokens)
        if inputs.has_visuals:
            features = self._features(inputs, here, x)
            x = x.flatten(0, 1).index_copy(0, inputs.feature_slots, features).view_as(x)
        return self.hook_embed(here.pack(x))  # [batch, pos, d_model]

    def _features(self, inputs: VLMInputs, here: ForwardPass, like: Tensor) -> Float[Tensor, "token d_model"]:
        """What the decoder receives of the images, encoded now or given with the inputs, on `like`'s device."""
        here = here.without_positions()
        features = inputs.image_features
        if features is None:
            features = self._encode(inputs, here.context, here.recorder)
        else:
            hooked = [n for n, point in self.hook_dict.items() if is_encoder(n) and is_hooked(point)]
            self.check_reachable(hooked, inputs, {})
            features = features.clone()  # other passes share them
        with running(here):
            return self.hook_image_features(features.to(like))  # [image token of the batch, d_model]

    def encode_images(self, inputs: VLMInputs) -> Float[Tensor, "token d_model"]:
        """What the projector hands over for every image token, images first, then videos.

        `inputs.with_image_features(model.encode_images(inputs))` runs without the vision tower.
        """
        if self.cfg.vision is None:
            raise InputError(f"{self.cfg.model_name or 'this model'} is a language model without a vision tower")
        if inputs.pixel_values is None and inputs.pixel_values_videos is None:
            raise InputError("there are no images in these inputs to encode")
        return self._encode(inputs, {}, None)

    def _encode(
        self, inputs: VLMInputs, context: Mapping[str, Any], recorder: Recorder | None
    ) -> Float[Tensor, "token d_model"]:
        pixels = [p for p in (inputs.pixel_values, inputs.pixel_values_videos) if p is not None]
        images = image_pass(self, inputs.grids, inputs.device, context, recorder)
        return self.projector(self.vision(torch.cat(pixels), images), inputs.grids, images)

    def _check_context(self, inputs: VLMInputs, n_past: int) -> None:
        longest = max(b - a for a, b in zip(inputs.first, inputs.stop, strict=True)) + n_past
        if longest > self.cfg.n_ctx and longest > self.cfg.n_ctx_limit:  # a scaling of positions may stretch n_ctx
            vision = self.cfg.vision
            bound = "max_pixels" if vision is None or vision.tile_size is None else "max_tiles"
            lower = f", or lower {bound} in model.to_inputs(..., {bound}=)" if vision is not None else ""
            raise InputError(
                f"{longest} tokens do not fit the context of {self.cfg.n_ctx_limit}: shorten the prompt{lower}"
            )

    def _loss(self, logits: Tensor, inputs: VLMInputs, logits_at: str) -> Float[Tensor, ""]:
        if logits_at != "all":
            raise InputError('the loss needs logits_at="all"')
        targets = inputs.tokens[:, 1:]
        counted = (inputs.attention_mask[:, 1:] * inputs.attention_mask[:, :-1]).bool()
        for placeholder in inputs.spec.placeholder_ids:
            counted &= targets != placeholder
        predictions = logits[:, :-1][counted]
        predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
        return F.cross_entropy(predictions, targets[counted])

    def log_probs(self, inputs: VLMInputs, answer: Answer) -> Float[Tensor, "batch answer"]:
        """Log-probability of every token of `answer` after the prompt, in one forward pass.

        Where rows have answers of different lengths the shorter ones end in zeros, so that `.sum(-1)` is
        the log-probability of each whole answer.
        """
        with_answer = inputs.append(answer)
        n_new = [b - a for a, b in zip(inputs.n_generated, with_answer.n_generated, strict=True)]
        logits = self(with_answer)
        out = logits.new_zeros(len(inputs), max(n_new), dtype=torch.promote_types(logits.dtype, torch.float32))
        for row, (n, stop) in enumerate(zip(n_new, with_answer.stop, strict=True)):
            predicted = logits[row, stop - n - 1 : stop - 1].to(out.dtype).log_softmax(-1)
            targets = with_answer.tokens[row, stop - n : stop]
            out[row, :n] = predicted.gather(-1, targets[:, None])[:, 0]
        return out

    def new_kv_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty key-value cache for `batch` rows with room for `capacity` positions (it grows past that)."""
        cfg = self.cfg
        homes = [device_of(block) for block in self.blocks] if self.device_map else None
        sizes = (cfg.n_layers, batch, capacity, cfg.n_key_value_heads, cfg.d_head)
        return KVCache(*sizes, cfg.device, cfg.dtype, homes)

    # ---------------------------------------------------------------- hooks

    def identity(self) -> dict[str, str]:
        """Return what is equal for equal models: hashes of weights, settings and code, and versions of the software."""
        return identity(self)

    def add_hook(self, name: HookName, hook: Callable, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens; a hook that cannot act is refused (`HookError`)."""
        for point in self.points_of(name):
            point.add_hook(hook, *args, **kwargs)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[tuple[HookName, Callable]] = (),
        bwd_hooks: Sequence[tuple[HookName, Callable]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["HookedVLM"]:
        """Hooks for the length of a `with` block; as in TransformerLens, but a hook that cannot act is an error.

        Raises:
            HookError: an unknown name (the nearest ones are named), a filter that matches nothing, or a hook
                point that is switched off.
        """
        fwd = [(self.points_of(name), fn) for name, fn in fwd_hooks]
        bwd = [(self.points_of(name), fn) for name, fn in bwd_hooks]
        self.context_level += 1
        level = self.context_level
        try:
            for points, fn in fwd:
                self._hooked_at[level].update(points)
                for point in points:
                    point.add_hook(fn, level=level)
            for points, fn in bwd:
                self._hooked_at[level].update(points)
                for point in points:
                    point.add_hook(fn, dir="bwd", level=level)
            yield self
        finally:
            if reset_hooks_end:
                # with those that an earlier block of this depth left behind
                for point in self._hooked_at.pop(level, ()):
                    point.remove_hooks("both", level=level)
                if clear_contexts:
                    self.clear_contexts()
            self.context_level -= 1

    def run_with_hooks(
        self,
        input: VLMInputs | Int[Tensor, "batch pos"] | str | Sequence[str],
        *args: Any,
        fwd_hooks: Sequence = (),
        bwd_hooks: Sequence = (),
        **kwargs: Any,
    ) -> Any:
        """`forward` with temporary hooks: (name or filter, function(tensor, hook) -> tensor or None).

        Raises:
            HookError: a hook that cannot act, or that this run does not pass (no image to encode, a layer left out).
        """
        inputs = self.as_inputs(input)
        self.check_reachable([name for name, _ in (*fwd_hooks, *bwd_hooks)], inputs, kwargs)
        return super().run_with_hooks(inputs, *args, fwd_hooks=list(fwd_hooks), bwd_hooks=list(bwd_hooks), **kwargs)

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride] (the input has a type here)
        self,
        input: VLMInputs | Int[Tensor, "batch pos"] | str | Sequence[str],
        *args: Any,
        names_filter: HookName | Sequence[str] | None = None,
        pos_slice: Slice | SliceInput = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, VLMCache]:
        """`forward`, and the activations it made.

        Args:
            names_filter: a hook name, a list of them or a predicate. None stores everything but the
                [pos, pos] tensors, which `cache["pattern", layer]` derives; name them to store them.
            pos_slice: which positions of the text side to store (image-side tensors are kept whole). Of scores
                and patterns, named in `names_filter`, only these rows are made: `names_filter="blocks.3.attn.
                hook_pattern", pos_slice=-1` is where the last token looks, without a [pos, pos] tensor.
            device: where to store; by default where it is made, or with the inputs if the model is spread over devices.
            remove_batch_dim: drop the text side's batch axis; needs a batch of one.
            incl_bwd: also run backward from the output (use return_type="loss") and store gradients
                under "<name>_grad".
            reset_hooks_end: False leaves hooks that store the activations of later passes, too.

        Raises:
            HookError: a name that matches nothing, or a point switched off.
            InputError: `remove_batch_dim` with more than one row, or `pos_slice` outside of the inputs.
        """
        inputs = self.as_inputs(input)
        if remove_batch_dim and len(inputs) != 1:
            raise InputError(f"remove_batch_dim needs a batch of one row, this one has {len(inputs)}")
        cut = Slice.unwrap(pos_slice)
        places = {"int": [cut.slice], "array": cut.slice}.get(cut.mode, [])
        if any(not -inputs.shape[1] <= int(place) < inputs.shape[1] for place in places):
            raise InputError(f"pos_slice={pos_slice} lies outside of the {inputs.shape[1]} positions of these inputs")
        if cut.mode != "identity" and kwargs.get("logits_at") == "last":
            raise InputError('pos_slice does not go with logits_at="last", where ln_final has one position only')
        names = self._names_to_store(names_filter, inputs, kwargs)
        if device is None and self.device_map:
            device = self.cfg.device
        explicit = partial(runs_explicitly, self)
        touched = shows_modules(self)
        caching = Caching(cut, device, remove_batch_dim, explicit, incl_bwd, copies=touched)
        recorder: Recorder | None
        recorder, fwd = caching.recorder(names)
        others = [n for n, point in self.hook_dict.items() if not isinstance(point, HookPoint)]  # within an SAE, say
        fwd += [(n, caching.save) for n in others if recorder.records(n) and not self.why_silent(n, inputs, kwargs)]
        firing: list[str] = []
        if incl_bwd or not reset_hooks_end:  # these need hooks, and hooks need names
            wanted = default_filter(self) if names is None else names.__contains__
            firing = [n for n in self.hook_dict if wanted(n) and not self.why_silent(n, inputs, kwargs)]
        bwd = [(name, partial(caching.save, suffix="_grad")) for name in firing] if incl_bwd else []
        if not reset_hooks_end:
            fwd += [(name, caching.save) for name in firing if recorder.records(name) and name not in others]
            recorder = None
        with self.hooks(fwd, bwd, reset_hooks_end, clear_contexts):
            out = self(inputs, *args, recorder=recorder, **kwargs)
            if incl_bwd:
                out.backward()
        why_not = ""
        if kwargs.get("past_kv_cache") is not None:
            why_not = "the run continued a key-value cache, whose keys are not in this cache"
        elif cut.mode != "identity":
            why_not = "pos_slice cut the keys"
        mask = inputs_mask(self.cfg, inputs, None)
        vision_mask = None
        if inputs.has_visuals and self.cfg.vision is not None:
            vision_mask = image_pass(self, inputs.grids, inputs.device).patches.mask
        cache = VLMCache(caching.store, self, not remove_batch_dim, mask, vision_mask, why_not, inputs)
        cache.exchanged = cache.vision.exchanged = exchanged_patterns(self) if touched else frozenset()
        if not reset_hooks_end:
            caching.put = cache.follow
        return out, cache

    def _names_to_store(
        self, names_filter: HookName | Sequence[str] | None, inputs: VLMInputs, run: Mapping[str, Any]
    ) -> list[str] | None:
        """The names that a cache asks for; None for all that fire."""
        if names_filter is None:
            return None
        if callable(names_filter):  # a filter means: of those that fire
            self.check_reachable([names_filter], inputs, run)
            return [n for n in self.hook_dict if names_filter(n) and not self.why_silent(n, inputs, run)]
        several = isinstance(names_filter, Iterable) and not isinstance(names_filter, str)
        names: list[Any] = list(names_filter) if several else [names_filter]
        self.check_reachable(names, inputs, run)
        return [canonical(name, self.hook_dict) for name in names]
