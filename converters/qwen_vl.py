"""What the Qwen-VL families share: the language model's settings, and Hugging Face tensors to ours and back.

Two things vary independently between checkpoints of a family, and any combination is read:

- the configuration is flat (as published until Qwen2.5-VL), nested in `text_config` (transformers 4.52 and later), or
  has in `vision_config` only the values that differ from the class defaults (written by transformers 4.45 to 4.47);
- tensors have the names of the first releases (`visual.*`, `model.*`) or those of transformers 5 in memory
  (`model.visual.*`, `model.language_model.*`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hooked_vlm.converters.dialects import QWEN2, Dialect
from hooked_vlm.converters.fields import Fields, refuse_quantised, stated_dtype, stored_in
from hooked_vlm.converters.language_models import MOST_LAYERS, head_sizes
from hooked_vlm.converters.renaming import Rename, affine, tied_to_ours, tied_to_theirs

# Rotary scalings that change the frequencies. Any other `type` ("mrope", "default", none) is plain M-RoPE.
SCALINGS = ("linear", "dynamic", "yarn", "longrope", "su", "llama3", "proportional")


@dataclass(frozen=True)
class QwenVL:
    """One family, with the defaults of its classes in transformers 5.23.0."""

    architecture: str
    model_type: str
    vision_kwargs: Callable[[Fields, int], dict[str, Any]]
    """From `vision_config` and the width of the language model to the keyword arguments of `VisionConfig`."""
    vision_mlp: Callable[[Mapping[str, Any], str, str], list[Rename]]
    """From those arguments to the tensors of a block's MLP, with the names of the block: theirs and ours."""
    published_vision: Callable[[Mapping[str, Any]], dict[str, Any]]
    """From those arguments to `vision_config`."""
    dialect: Dialect = QWEN2
    nested: bool = False
    """Whether files are as transformers 5 holds them: the language model in `text_config`, names as in memory."""
    merger: tuple[str, str, str] = ("ln_q", "mlp.0", "mlp.2")
    """Names of the projector's norm and of its two linear maps."""
    n_ctx: int = 32768
    d_head: int | None = None
    """None: the width shared out between the heads."""
    eps: float = 1e-5
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    mrope_interleaved: bool = False

    # ---------------------------------------------------------------- configuration

    def config_kwargs(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments for `VLMConfig`; `"vision"` holds those for `VisionConfig`.

        Raises:
            CheckpointError: a field is missing, absurd, contradicts another or asks for something not supported.
        """
        root = Fields(hf_config)
        # transformers ignores what a nested file repeats at its root; fields missing in text_config may be there.
        text = Fields(root.section("text_config"), hf_config)
        _refuse_unsupported(root, text)
        if self.dialect.qk_norm and text.flag("attention_bias", False):
            raise text.error("attention_bias", "false (biases are not supported in this language model)", True)
        # Null means as many key-value heads as query heads; an absent key means nothing.
        sizes = head_sizes(text, kv_may_be_absent=False, d_head=self.d_head)
        vision = Fields(root.section("vision_config"), where="vision_config")
        return {
            "n_layers": text.size("num_hidden_layers", most=MOST_LAYERS),
            **sizes,
            "d_mlp": text.size("intermediate_size"),
            "d_vocab": text.size("vocab_size"),
            "n_ctx": text.size("max_position_embeddings", default=self.n_ctx),
            **self._rope(text, sizes["d_head"]),
            "eps": text.number("rms_norm_eps", default=self.eps),
            "act_fn": text.one_of("hidden_act", ("silu",), default="silu"),
            "normalization_type": "RMS",
            "gated_mlp": True,
            "qkv_bias": self.dialect.qkv_bias,
            "qk_norm": self.dialect.qk_norm,
            # transformers 5 writes it at the root, some earlier versions only in text_config; either one ties.
            "tie_word_embeddings": any(fields.flag("tie_word_embeddings", False) for fields in (root, text)),
            "image_token_id": root.token_id("image_token_id", default=151655),
            "video_token_id": root.token_id("video_token_id", default=151656),
            "vision_start_token_id": root.token_id("vision_start_token_id", default=151652),
            "vision_end_token_id": root.token_id("vision_end_token_id", default=151653),
            "eos_token_ids": text.token_ids("eos_token_id"),
            "pad_token_id": text.token_id("pad_token_id"),
            "vision": self.vision_kwargs(vision, sizes["d_model"]),
            "original_architecture": self.architecture,
        }

    def dtype(self, hf_config: Mapping[str, Any]) -> torch.dtype | None:
        """The dtype stated in the configuration, or None (then the tensors' own is used).

        Raises:
            CheckpointError: it names no floating-point dtype.
        """
        return stated_dtype(hf_config, "text_config")

    def published_config(self, hf_config: Mapping[str, Any], stored_as: torch.dtype | None = None) -> dict[str, Any]:
        """The same configuration in the published form, which every transformers that knows the family reads.

        `stored_as` replaces the stated dtype. References to remote code (`auto_map`) are left out.

        Raises:
            CheckpointError: as `config_kwargs`.
        """
        cfg = self.config_kwargs(hf_config)
        fields = Fields(Fields(hf_config).section("text_config"), hf_config)
        inert = {"attention_dropout": 0.0, "bos_token_id": None, "initializer_range": 0.02, "use_cache": True}
        if not self.nested:
            inert |= {"max_window_layers": cfg["n_layers"], "sliding_window": cfg["n_ctx"], "vision_token_id": None}
        kept = {name: fields.get(name, default) for name, default in {**inert, "pad_token_id": None}.items()}
        eos = list(cfg["eos_token_ids"])
        text = {
            **{name: value for name, value in kept.items() if value is not None},
            **({"eos_token_id": eos[0] if len(eos) == 1 else eos} if eos else {}),
            **self._published_text(cfg),
        }
        own = {"architectures": [self.architecture], "model_type": self.model_type}
        root = {
            "vision_start_token_id": cfg["vision_start_token_id"],
            "vision_end_token_id": cfg["vision_end_token_id"],
            "image_token_id": cfg["image_token_id"],
            "video_token_id": cfg["video_token_id"],
            "tie_word_embeddings": cfg["tie_word_embeddings"],
            "vision_config": self.published_vision(cfg["vision"]),
        }
        if self.nested:
            config = {**own, **root, "text_config": {"model_type": f"{self.model_type}_text", **text}}
        else:
            config = {**text, **own, **root, "use_sliding_window": False}
        return stored_in(config, self.dtype(hf_config) if stored_as is None else stored_as)

    def _published_text(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        rope: dict[str, Any] = {"type": "mrope", "mrope_section": list(cfg["mrope_section"])}
        if self.mrope_interleaved:
            rope = {"rope_type": "default", "mrope_section": list(cfg["mrope_section"]), "mrope_interleaved": True}
        return {
            "hidden_act": cfg["act_fn"],
            "hidden_size": cfg["d_model"],
            "intermediate_size": cfg["d_mlp"],
            "max_position_embeddings": cfg["n_ctx"],
            "num_attention_heads": cfg["n_heads"],
            "num_hidden_layers": cfg["n_layers"],
            "num_key_value_heads": cfg["n_key_value_heads"],
            "rms_norm_eps": cfg["eps"],
            "rope_theta": cfg["rope_theta"],
            "rope_scaling": rope,
            "vocab_size": cfg["d_vocab"],
            **({} if self.d_head is None else {"head_dim": cfg["d_head"], "attention_bias": False}),
        }

    def _rope(self, text: Fields, d_head: int) -> dict[str, Any]:
        """The base of the rotary frequencies and the sections of M-RoPE.

        M-RoPE is recognised by `mrope_section`: its `type` is 'mrope', 'default' or absent, depending on the writer.
        The settings are in `rope_scaling` (beside `rope_theta`) or, since transformers 5, in `rope_parameters`.
        """
        key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
        rope = Fields(text.section(key), where=key)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind in SCALINGS:
            raise rope.error("type", "'mrope' or 'default' (rotary scaling is not supported here)", kind)
        if rope.number("partial_rotary_factor", default=1.0) != 1.0:
            raise rope.error("partial_rotary_factor", "1", rope.get("partial_rotary_factor"))
        section = rope.get("mrope_section", list(self.mrope_section))
        is_triple = isinstance(section, list | tuple) and [type(n) for n in section] == [int] * 3
        if not is_triple or min(section) < 0 or sum(section) != d_head // 2:
            expected = f"three counts (time, height, width) that sum to half the head width, {d_head // 2}"
            raise rope.error("mrope_section", expected, section)
        theta = text.number("rope_theta", default=self.rope_theta)
        interleaved = rope.flag("mrope_interleaved", self.mrope_interleaved)
        if interleaved != self.mrope_interleaved:
            raise rope.error("mrope_interleaved", f"{self.mrope_interleaved} in this family".lower(), interleaved)
        if interleaved and max(3 * section[1] - 1, 3 * section[2]) > d_head // 2:
            raise rope.error("mrope_section", f"counts that take turns among {d_head // 2} frequencies", section)
        kept = {"rope_theta": rope.number("rope_theta", default=theta), "mrope_section": tuple(section)}
        return {**kept, "mrope_interleaved": True} if interleaved else kept

    # ---------------------------------------------------------------- tensors

    def from_hf(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], notes: list[str] | None = None
    ) -> dict[str, Tensor]:
        """Our tensors from a checkpoint's (or from the state dict of a transformers model), as views.

        Projections keep the layout [out, in]; the fused q, k, v of the vision tower is split into three; the patch
        convolution [d_vision, channels, frames, height, width] becomes a matrix. Where the embeddings are tied,
        `unembed.weight` and `embed.weight` are the same object. `notes` gains what was left out because it cannot
        change a number.

        Raises:
            CheckpointError: tensors are missing, unexpected or misshapen, or contradict `tie_word_embeddings`.
        """
        cfg = self.config_kwargs(config)
        return tied_to_ours(
            tensors, self._table(cfg), cfg, (self.dialect.embed, self.dialect.head), _published_name, notes
        )

    def to_hf(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        names: Literal["published", "in_memory"] = "published",
    ) -> dict[str, Tensor]:
        """The inverse of `from_hf`, bit for bit and in the same dtypes.

        `names="published"` is for files: a tied output matrix is left out. `names="in_memory"` is the state dict
        of a transformers 5 model: a tied output matrix appears under both names, as one object. Only the fused
        q, k, v of the vision tower are copies.

        Raises:
            CheckpointError: tensors are missing, unexpected or misshapen, or `unembed.weight` is no longer tied.
            ValueError: `names` is neither of the two.
        """
        if names not in ("published", "in_memory"):
            raise ValueError(f"names must be 'published' or 'in_memory', got {names!r}")
        cfg = self.config_kwargs(config)
        rename = _in_memory_name if names == "in_memory" or self.nested else str
        theirs = tied_to_theirs(tensors, self._table(cfg), cfg, rename)
        if cfg["tie_word_embeddings"] and names == "in_memory":
            theirs[self.dialect.head] = theirs[rename(self.dialect.embed)]
        return theirs

    def _table(self, cfg: Mapping[str, Any]) -> list[Rename]:
        """Every tensor of a model with these settings, by its name in the first releases."""
        return [*self.dialect.table(cfg), *self._vision_table(cfg["vision"])]

    def _vision_table(self, cfg: Mapping[str, Any]) -> list[Rename]:
        """The tensors of tower and projector."""
        width, merged, name = cfg["d_model"], cfg["d_model"] * cfg["merge_size"] ** 2, "patch_embed.proj"
        kernel = (width, cfg["in_channels"], cfg["temporal_patch_size"], cfg["patch_size"], cfg["patch_size"])
        table = [Rename(f"visual.{name}.weight", (f"vision.{name}.weight",), kernel, flat=True)]
        if cfg["patch_bias"]:
            table.append(Rename(f"visual.{name}.bias", (f"vision.{name}.bias",), (width,)))
        if n_positions := cfg["n_positions"]:
            ours = ("vision.tile_embed.positions",)
            table.append(Rename("visual.pos_embed.weight", ours, (n_positions, width), lead=1))
        for layer in range(cfg["n_layers"]):
            theirs, ours = f"visual.blocks.{layer}", f"vision.blocks.{layer}"
            qkv = tuple(f"{ours}.attn.{part}_proj" for part in "qkv")
            table += _norm(cfg["normalization_type"], f"{theirs}.norm1", f"{ours}.ln1", width)
            table += affine(f"{theirs}.attn.qkv", qkv, (3 * width, width))
            table += affine(f"{theirs}.attn.proj", (f"{ours}.attn.o_proj",), (width, width))
            table += _norm(cfg["normalization_type"], f"{theirs}.norm2", f"{ours}.ln2", width)
            table += self.vision_mlp(cfg, theirs, ours)
        mergers = [("visual.merger", "projector", width)]
        for i in range(len(cfg.get("deepstack_layers", ()))):
            mergers.append((f"visual.deepstack_merger_list.{i}", f"projector.deepstack.{i}", merged))
        norm, first, second = self.merger
        for theirs, ours, normed in mergers:
            table += _norm(cfg["projector_norm_type"], f"{theirs}.{norm}", f"{ours}.ln", normed)
            table += affine(f"{theirs}.{first}", (f"{ours}.in_proj",), (merged, merged))
            table += affine(f"{theirs}.{second}", (f"{ours}.out_proj",), (cfg["d_out"], merged))
        return table


def _norm(kind: str, theirs: str, ours: str, width: int) -> list[Rename]:
    """A norm, with a bias unless it is an RMSNorm."""
    return affine(theirs, (ours,), (width,))[: 2 if kind == "LN" else 1]


# ---------------------------------------------------------------- the vision tower


def tower_kwargs(
    vision: Fields,
    text_width: int,
    *,
    width: int,
    patch_size: int = 14,
    depth: int = 32,
    names: tuple[str, str],
    d_mlp: int,
) -> dict[str, Any]:
    """Keyword arguments for `VisionConfig` that the families share, with Qwen2-VL's parts.

    Like transformers, ignores `in_chans` and `spatial_patch_size`.

    Args:
        width, patch_size, depth: the class's defaults.
        names: the fields that hold the width of the tower and that of the language model.
    """
    of_tower, of_text = names
    d_model, n_heads = vision.size(of_tower, default=width), vision.size("num_heads", default=16)
    d_head = vision.divided(of_tower, "num_heads", d_model, n_heads)
    if d_head % 4:
        raise vision.error(of_tower, "a multiple of 4 * num_heads (rotary positions in two axes)", d_model)
    # Dropped from re-saved files where it equals the class default, 3584. Only the width of the language
    # model can work here, so an absent value means that one.
    d_out = vision.size(of_text, default=text_width)
    if d_out != text_width:
        raise vision.error(of_text, f"the width of the language model, {text_width}", d_out)
    rope = Fields(vision.section("rope_parameters"), where="vision_config.rope_parameters")
    return {
        "n_layers": vision.size("depth", default=depth, most=MOST_LAYERS),
        "d_model": d_model,
        "n_heads": n_heads,
        "d_head": d_head,
        "d_mlp": d_mlp,
        "d_out": d_out,
        "gated_mlp": False,
        "normalization_type": "LN",
        "eps": 1e-6,  # not in the configurations: the blocks and mergers of all three classes have it
        "pre_norm": False,
        "post_norm": False,
        "rope_theta": rope.number("rope_theta", default=10000.0),
        "window": None,
        "full_layers": (),
        "patch_size": vision.size("patch_size", default=patch_size),
        "temporal_patch_size": vision.size("temporal_patch_size", default=2),
        "in_channels": vision.size("in_channels", default=3),
        "patch_bias": False,
        "patch_order": "blocks",
        "class_token": False,
        "n_positions": 0,
        "processor": "resized",
        "projector": ("norm", "merge", "linear", "activation", "linear"),
        "merge_size": vision.size("spatial_merge_size", default=2),
        "projector_norm_type": "LN",
        "projector_eps": 1e-6,
        "projector_bias": True,
    }


def layers_of(vision: Fields, name: str, default: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
    """A list of blocks of the tower, in ascending order.

    Raises:
        CheckpointError: others than the tower has.
    """
    stated = vision.get(name, default)
    whole = isinstance(stated, list | tuple) and all(type(layer) is int and 0 <= layer < n_layers for layer in stated)
    if not whole or sorted(set(stated)) != list(stated):
        raise vision.error(name, f"different blocks from 0 to {n_layers - 1}, in order", stated)
    return tuple(stated)


def shared_vision_fields(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `vision_config` that the families name alike."""
    return {
        "depth": vision["n_layers"],
        "num_heads": vision["n_heads"],
        "in_channels": vision["in_channels"],
        "patch_size": vision["patch_size"],
        "spatial_merge_size": vision["merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
    }


# ---------------------------------------------------------------- names and refusals


def _refuse_unsupported(root: Fields, text: Fields) -> None:
    refuse_quantised(root)
    if text.flag("use_sliding_window", False):
        raise text.error("use_sliding_window", "false (sliding-window attention is not supported)", True)
    layers = text.get("layer_types", [])
    if not isinstance(layers, list | tuple) or any(kind != "full_attention" for kind in layers):
        raise text.error("layer_types", "'full_attention' for every layer (others are not supported)", layers)


def _published_name(name: str) -> str:
    """The published name of a tensor, given that name or its name in memory."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


def _in_memory_name(name: str) -> str:
    """The name in transformers 5's memory of a tensor, given its published name."""
    if name.startswith("visual."):
        return "model." + name
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return name
