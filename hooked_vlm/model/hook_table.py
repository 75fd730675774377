"""The table of hook points: names, shapes, when they fire, what they are. `python -m hooked_vlm.model.hook_table`
writes docs/hooks.md from it."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hooked_vlm.config import VisionConfig, VLMConfig
from hooked_vlm.nn.hooks import is_vision

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True)
class HookRow:
    """One hook point, or the same one of every layer."""

    name: str
    """With `{l}` for the layer."""
    shape: tuple[str, ...]
    """Names of the axes; a number stands for itself."""
    fires: str
    """How often in one forward pass."""
    what: str


ONCE = "once"
RESULT = "with use_attn_result"
SPLIT = "with use_split_qkv_input"
ATTN_IN = "with use_attn_in"
MLP_IN = "with use_hook_mlp_in"
IMAGES = "once, if there are images"
ENCODES = "once, if images are encoded"

# suffix: (axes after those of batch and position, when it fires, what it is), in the order of the forward pass
_BLOCK = {
    "hook_resid_pre": ("d_model", ONCE, "residual stream entering the block"),
    "attn.hook_attn_in": ("head d_model", ATTN_IN, "what each head reads, before ln1"),
    "attn.hook_q_input": ("head d_model", SPLIT, "what each query head reads, before ln1"),
    "attn.hook_k_input": ("kv_head d_model", SPLIT, "what each key head reads, before ln1"),
    "attn.hook_v_input": ("kv_head d_model", SPLIT, "what each value head reads, before ln1"),
    "ln1.hook_scale": ("1", ONCE, "denominator of the norm before attention"),
    "ln1.hook_normalized": ("d_model", ONCE, "normalised stream before the norm's weight and bias"),
    "ln1.hook_out": ("d_model", ONCE, "what attention reads"),
    "attn.hook_q": ("head d_head", ONCE, "queries, bias included, before a norm and rotation"),
    "attn.hook_k": ("kv_head d_head", ONCE, "keys, bias included, before a norm and rotation"),
    "attn.hook_v": ("kv_head d_head", ONCE, "values, bias included"),
    "attn.hook_q_normed": ("head d_head", ONCE, "queries behind their norm, where there is one"),
    "attn.hook_k_normed": ("kv_head d_head", ONCE, "keys behind their norm, where there is one"),
    "attn.hook_rot_q": ("head d_head", ONCE, "rotated queries"),
    "attn.hook_rot_k": ("kv_head d_head", ONCE, "rotated keys"),
    "attn.hook_attn_scores": ("", ONCE, "q·k / sqrt(d_head), -inf where masked"),
    "attn.hook_pattern": ("", ONCE, "softmax of the scores; zero in rows of padding"),
    "attn.hook_z": ("head d_head", ONCE, "pattern times values, per head"),
    "attn.hook_result": ("head d_model", RESULT, "each head's own output, z W_O"),
    "hook_attn_out": ("d_model", ONCE, "what attention adds to the stream"),
    "hook_resid_mid": ("d_model", ONCE, "stream between attention and MLP"),
    "hook_mlp_in": ("d_model", MLP_IN, "the MLP's own copy of the stream, before ln2"),
    "ln2.hook_scale": ("1", ONCE, "denominator of the norm before the MLP"),
    "ln2.hook_normalized": ("d_model", ONCE, "normalised stream before the norm's weight and bias"),
    "ln2.hook_out": ("d_model", ONCE, "what the MLP reads"),
    "mlp.hook_pre": ("d_mlp", ONCE, "before the activation function"),
    "mlp.hook_pre_linear": ("d_mlp", ONCE, "the other factor of a gated MLP"),
    "mlp.hook_post": ("d_mlp", ONCE, "what the output matrix reads (gated: the product)"),
    "hook_mlp_out": ("d_model", ONCE, "what the MLP adds to the stream"),
    "hook_resid_post": ("d_model", ONCE, "residual stream leaving the block"),
}
_TEXT = {
    "hook_embed": ("d_model", ONCE, "what enters block 0: token embeddings, image features in their places"),
    **{f"blocks.{{l}}.{suffix}": row for suffix, row in _BLOCK.items()},
    "ln_final.hook_scale": ("1", ONCE, "denominator of the final norm"),
    "ln_final.hook_normalized": ("d_model", ONCE, "normalised stream before the norm's weight"),
    "ln_final.hook_out": ("d_model", ONCE, "what the unembedding reads"),
}
_VISION = {
    "vision.hook_embed": ("d_model", ENCODES, "what enters block 0: patch embeddings"),
    **{
        f"vision.blocks.{{l}}.{suffix}": (
            axes.replace("kv_head", "head"),
            ENCODES if fires == ONCE else fires,
            what,
        )
        for suffix, (axes, fires, what) in _BLOCK.items()
    },
}
_PROJECTOR_NORM = {"patch": ("image patch", "d_model", "patches"), "token": ("image token", "d_merged", "tokens")}
_PROJECTOR = {
    "projector.hook_pre": (
        "image token d_projector",
        ENCODES,
        "before the activation function; one row per token",
    ),
    "projector.hook_post": ("image token d_projector", ENCODES, "after the activation function"),
    "hook_image_features": (
        "image_token d_model_text",
        IMAGES,
        "what the language model receives, all images in a row",
    ),
}


def hook_table(model: "HookedVLM") -> list[HookRow]:
    """A row for every hook point of `model`, those of all layers in one; in the order of the forward pass.

    Raises:
        KeyError: a hook point that is described nowhere.
    """
    vision = model.cfg.vision
    described = {
        **{name: _vision_row(name, *row) for name, row in _VISION.items()},
        **({} if vision is None else _projector_norm_rows(vision)),
        **{name: HookRow(name, tuple(axes.split()), *rest) for name, (axes, *rest) in _PROJECTOR.items()},
        **{name: _text_row(name, *row) for name, row in _TEXT.items()},
    }
    present = {re.sub(r"blocks\.\d+\.", "blocks.{l}.", name) for name in model.hook_dict}
    if unknown := present - set(described):
        raise KeyError(f"hook points without a description in hook_table.py: {sorted(unknown)}")
    return [row for name, row in described.items() if name in present]


def _text_row(name: str, axes: str, fires: str, what: str) -> HookRow:
    at = "batch pos" if axes else "batch head query key"
    if ".ln1." in name:
        fires = f"{ONCE}; with a head axis {ATTN_IN}; three times (q, k, v) {SPLIT}, with a head axis"
    return HookRow(name, (*at.split(), *axes.split()), fires, what)


def _vision_row(name: str, axes: str, fires: str, what: str) -> HookRow:
    at = "image patch" if axes else "image head query_patch key_patch"
    return HookRow(name, (*at.split(), *axes.split()), fires, what)


def _projector_norm_rows(vision: VisionConfig) -> dict[str, HookRow]:
    at, width, what = _PROJECTOR_NORM[vision.projector_norm]
    rows = {
        "hook_scale": ("1", "denominator of the projector's norm"),
        "hook_normalized": (width, f"normalised {what} before the norm's weight and bias"),
        "hook_out": (width, f"normalised {what}"),
    }
    return {
        f"projector.ln.{own}": HookRow(f"projector.ln.{own}", (*at.split(), axis), ENCODES, text)
        for own, (axis, text) in rows.items()
    }


_HEAD = """\
# Hook points

Generated by `python -m hooked_vlm.model.hook_table`; do not edit.

`{l}` counts layers from 0. A hook is a function `(tensor, hook) -> tensor or None`:

```python
def zero_head_5(z, hook):
    z[:, :, 5] = 0.0  # in place, or return a new tensor


model.run_with_hooks(inputs, fwd_hooks=[("blocks.3.attn.hook_z", zero_head_5)])
_, cache = model.run_with_cache(inputs, names_filter=["blocks.3.attn.hook_z", "vision.hook_embed"])
```

What holds for every hook point (tested for all of them):

1. It fires once per forward pass, or as the table says.
2. An edit that changes nothing changes nothing: the output is equal bit for bit. Only scores and patterns, whose
   hook makes the layer compute attention explicitly instead of in the fused kernel, may differ by rounding.
3. A real edit changes the output.
4. Its shape is the one below, and what a hook returns has the shape and dtype it was given (`HookError` otherwise).
5. An edit in place, by any means (`x[...] =`, `x.data`, `x.numpy()`), is as good as a returned one and stays within its
   run: model, inputs, encoded images and caches are as before, and so is what another hook recorded earlier in the
   same run.

Hooks set through plain PyTorch (`point.register_forward_hook`) and backward hooks count like any other. A hook point
is called in every pass, so that a module put in its place takes part (an SAE, say; call `model.setup()` after the
exchange); scores and pattern are called if something listens there or another module stands there. An unknown name, a
filter that matches nothing, a hook point that is switched off or was exchanged, and an image-side hook where no image
is encoded raise `HookError`. (Hooks on all modules of the process, `register_module_forward_hook`, do not count as
listening to scores and patterns.)

Plain PyTorch hooks on other modules (`model.blocks[3]`, `attn.o_proj`, `mlp`, norms) see `[batch, pos, ...]`, or
`[image, patch, ...]` in the vision tower's blocks (its patch embedding and what the projector returns have all images
in a row). A pass over such hooks, or over modules of someone else's (a LoRA adapter, an SAE), does not pack padded
rows; it takes longer and gives the same numbers up to rounding. `sweep`, `sweep_many` and `stream_activations` refuse
a model with hooks of any kind; over modules of someone else's a sweep runs whole rows.

Switches: `model.set_use_attn_result(True)`, `model.set_use_split_qkv_input(True)` or `model.set_use_attn_in(True)` (not
both), `model.set_use_hook_mlp_in(True)`. What they switch on costs memory and a little time, and may move results by
rounding. Where a projection is hooked or wrapped they call it for each head on its own, at as many times its cost.

Names as TransformerLens' `get_act_name` gives them are accepted: `blocks.3.hook_q_input` (`k`, `v`) for
`blocks.3.attn.hook_q_input`, and likewise `hook_q_normed`, `hook_k_normed`, `hook_attn_in`.

`run_with_cache` stores everything that fires but scores and patterns; `cache["pattern", l]` is computed from the
stored queries and keys. Tensors are stored as they are, not copied: `resid_pre` of a block is the `resid_post` of the
one before it. Padding: rows of a pattern that belong to padding are zero; other tensors hold unused
numbers there.

While it is called, a text-side hook finds `hook.ctx["positions"]`, the absolute positions that its tensor holds, and
the first of them as a plain number, `hook.ctx["first_position"]`; a hook on `hook_z` also finds
`hook.ctx["attention"]`, what z was made from: scores, patterns or another z of a few queries and heads can be had
from it at linear cost. During `model.generate(...)` there is `hook.ctx["step"]`, too (0 is the pass over the prompt);
after the first step `pos` and `query` are 1 and `key` is all positions so far. Image-side hooks fire at step 0 only.

With `logits_at="last"` the last block computes queries, and all that follows them, for the last position alone,
unless one of its modules is hooked; results may then move by rounding.
"""

_SECTIONS = (
    (
        "Language model",
        lambda name: not is_vision(name),
        "`batch` and `pos` are those of the tokens; keys and values have `kv_head` heads. Position slicing "
        "(`pos_slice`) and batch removal act on these.",
    ),
    (
        "Vision tower",
        lambda name: name.startswith("vision."),
        "One tensor per forward pass: `image` counts the images of the whole batch in order of appearance, then the "
        "videos. A video has one row for each temporal patch (two frames), because attention never crosses them. "
        "`patch` runs in the checkpoint's order, merge block by merge block; images with fewer patches end in "
        "padding, which is zero and masked, and edits of it are ignored. Head and width axes are the tower's own. "
        'In a cache: `cache.vision["blocks.0.hook_resid_pre"]`, or under the full name.',
    ),
    (
        "Projector",
        lambda name: is_vision(name) and not name.startswith("vision."),
        "`token` are an image's tokens (merge blocks of patches), padded like patches; `d_merged` is the width of a "
        "merge block, `d_projector` that of the projector's hidden layer. `hook_image_features` has the tokens of all "
        "images, then of all videos, without padding; it also fires when the features came with the inputs "
        "(`inputs.with_image_features`).",
    ),
)


_TILES = """\
## Where InternVL2 differs

`image` counts tiles: those of the first image, its thumbnail, those of the next. `patch` starts with the class token
of the tile, its patches follow in raster order; tiles of one size need no padding. `hook_attn_out` and `hook_mlp_out`
are what is added to the stream, after layer scale (`attn.hook_result` is before it). InternViT-6B has a norm of queries
and keys: `attn.hook_q` and `attn.hook_k` come before it, `attn.hook_q_normed` and `attn.hook_k_normed` behind it. The
norm is over all heads together, so that an edit of one head's `hook_q` moves the others' `hook_q_normed`; both are
`[image, patch, head, d_head]`, where TransformerLens' norm of single heads has `[batch, head, pos, d_head]`. Positions
are learned and enter with `vision.hook_embed`, so queries and keys are not rotated and these points do not exist:
{absent}.
Blocks behind the layer that the projector reads (`select_layer`) do not run. These shapes differ:
"""


def markdown(rows: list[HookRow], rows_of_tiles: list[HookRow]) -> str:
    """The page docs/hooks.md: a table of Qwen2-VL's points, and what is different in InternVL2."""
    parts = [_HEAD]
    for title, belongs, note in _SECTIONS:
        parts.append(f"## {title}\n\n{note}\n\n" + _table([row for row in rows if belongs(row.name)]))
    absent = sorted({row.name for row in rows} - {row.name for row in rows_of_tiles})
    parts.append(_TILES.format(absent=", ".join(f"`{name}`" for name in absent)))
    parts.append(_table([row for row in rows_of_tiles if row not in rows]))
    return "\n".join(parts)


def _table(rows: list[HookRow]) -> str:
    lines = ["| name | shape | fires | what |", "|---|---|---|---|"]
    lines += [f"| `{r.name}` | `[{', '.join(r.shape)}]` | {r.fires} | {r.what} |" for r in rows]
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/hooks.md for both families; sizes do not matter, so the models are minute and random."""
    from hooked_vlm.model.vlm import HookedVLM

    sizes = VisionConfig(n_layers=1, d_model=4, n_heads=1, d_head=4, d_mlp=4, d_out=4, patch_size=2)
    tiles = replace(
        sizes,
        tile_size=4,
        n_positions=4,
        rope_theta=None,
        layer_scale=True,
        qk_norm=True,
        d_projector=4,
        projector_norm="token",
    )
    cfg = VLMConfig(
        n_layers=1,
        d_model=4,
        n_heads=2,
        n_key_value_heads=1,
        d_head=2,
        d_mlp=4,
        d_vocab=8,
        n_ctx=8,
        rope_theta=1e4,
    )
    whole, tiled = (hook_table(HookedVLM(cfg.with_(vision=vision))) for vision in (sizes, tiles))
    return markdown(whole, tiled)


if __name__ == "__main__":
    path = Path("docs/hooks.md")
    path.parent.mkdir(exist_ok=True)
    path.write_text(page())
    print(f"wrote {path}")
