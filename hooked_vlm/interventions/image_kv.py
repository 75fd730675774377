"""Replace the image keys and values that text queries of a head attend to (arXiv 2509.17588)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import Positions, first_position, image_tokens, position_table, positions_mask
from hooked_vlm.interventions.heads import Edit, HeadIntervention, HeadSelection
from hooked_vlm.nn.attention import AttentionCall
from hooked_vlm.nn.forward_pass import inputs_rotations
from hooked_vlm.nn.hooks import HookPoint
from hooked_vlm.nn.rotary import Rotation

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True, eq=False)
class ImageMeans:
    """Keys and values averaged over the image tokens of a dataset; see `mean_image_kv`."""

    keys: Float[Tensor, "layer kv_head d_head"]
    values: Float[Tensor, "layer kv_head d_head"]
    before_rope: bool = True
    """Whether the keys are means of keys before rotation, or of rotated ones."""


@dataclass(frozen=True, eq=False)
class ReplaceImageKV(HeadIntervention):
    """Text queries of a head see a baseline in place of the image's keys and values.

    Flow from image to image stays as it is, and so do the other heads that share keys and values with this one
    (grouped queries): z is recomputed for these heads and the text positions behind an image, and for nothing else.
    Patterns that are cached in the same run are those of the real keys.

    Args:
        baseline: "mean" over the tokens of each image, "zero" keys and values (the tokens still draw attention,
            with score 0), "knockout" (the tokens are masked), or `ImageMeans` of a dataset.
        before_rope: whether the mean key is taken before rotation (behind its norm, where it has one) and then rotated
            to each token's position (positions stay visible), or over rotated keys (one key for all). `ImageMeans` must
            use the same.
        queries: only these of the text positions behind an image ("assistant_header", "final", positions, ...).
        tokens: only these image tokens are replaced; means stay those of whole images.
    """

    baseline: Literal["mean", "zero", "knockout"] | ImageMeans = "mean"
    before_rope: bool = True
    queries: Positions = None
    tokens: Positions = None

    attention: ClassVar[Literal["edited", "recomputed", ""]] = "recomputed"
    varies: ClassVar[frozenset[str]] = frozenset({"heads", "queries", "tokens"})

    def first_position(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        return first_position(_behind_images(self.queries, inputs, model.cfg.bidirectional == "prompt"))

    def edits(self, model: "HookedVLM", inputs: VLMInputs, layer: int) -> list[tuple[str, Edit]]:
        if not inputs.has_visuals:
            raise InputError("there is no image in these inputs whose keys and values could be replaced")
        if isinstance(self.baseline, str) and self.baseline not in ("mean", "zero", "knockout"):
            raise InputError(f'baseline must be "mean", "zero", "knockout" or ImageMeans, got {self.baseline!r}')
        if isinstance(self.baseline, ImageMeans):
            self._check_means(self.baseline, model)
        rotate = None
        if self.before_rope:
            rotate = inputs_rotations(model.cfg, inputs, model.cfg.dtype)[model.cfg.kind_number(layer)]
        behind_images = partial(_behind_images, both_ways=model.cfg.bidirectional == "prompt")

        def edit(z: Tensor, hook: HookPoint, chosen: HeadSelection) -> Tensor:
            call: AttentionCall = hook.ctx["attention"]
            n = z.shape[1]
            behind = _for_runs(behind_images, "queries", chosen, inputs)
            here = positions_mask(behind, call.k.shape[1] - n, n, len(z))
            rows = here.any(0).nonzero()[:, 0].to(z.device)
            if not len(rows):
                return z
            replaced = self._z(call, inputs, layer, rows, chosen, rotate)
            if len(rows) == n and len(chosen.heads) == z.shape[2] and bool(here.all()):
                return torch.where(chosen.mask[:, None, :, None], replaced, z)
            heads = torch.tensor(chosen.heads, device=z.device)
            where = here.to(z.device)[:, rows, None] & chosen.mask[:, None, heads]
            out, at = z.clone(), (slice(None), rows[:, None], heads)
            out[at] = torch.where(where[..., None], replaced, z[at])
            return out

        return [("hook_z", edit)]

    def _check_means(self, means: ImageMeans, model: "HookedVLM") -> None:
        cfg = model.cfg
        expected = (cfg.n_layers, cfg.n_key_value_heads, cfg.d_head)
        for own in (means.keys, means.values):
            if own.shape != expected:
                raise InputError(
                    f"mean keys and values are [layer, kv_head, d_head] = {expected}, got {tuple(own.shape)}"
                )
        if means.before_rope != self.before_rope:
            raise InputError(
                f"the dataset's mean keys were taken with before_rope={means.before_rope} and are to be used "
                f"with before_rope={self.before_rope}: give mean_image_kv the same"
            )

    def _z(
        self,
        call: AttentionCall,
        inputs: VLMInputs,
        layer: int,
        rows: Int[Tensor, "row"],
        chosen: HeadSelection,
        rotate: Rotation | None,
    ) -> Float[Tensor, "batch row head d_head"]:
        """z of some positions and of the chosen heads, with the baseline in place."""
        tokens = _for_runs(image_tokens, "tokens", chosen, inputs)
        here = positions_mask(tokens, 0, call.k.shape[1], len(call.k)).to(call.k.device)
        if self.baseline == "knockout":
            return call.z(rows[None], chosen.heads, call.visible(rows[None]) & ~here[:, None, None])
        k, v = self._baseline(call, inputs, layer, rotate)
        if any(getattr(run, "tokens", None) is not None for run in chosen.runs):
            k, v = (torch.where(here[..., None, None], new, real) for new, real in ((k, call.k), (v, call.v)))
        return replace(call, k=k, v=v).z(rows[None], chosen.heads)

    def _baseline(
        self, call: AttentionCall, inputs: VLMInputs, layer: int, rotate: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, replaced at all image tokens."""
        k, v = call.k.clone(), call.v.clone()
        rotate = None if rotate is None else rotate.to(k.device)
        for visual in inputs.visuals:
            row, span = visual.row, visual.span
            these = slice(row, None, len(inputs))  # this row of every run in the batch
            alike = slice(row, row + 1) if visual.stop <= call.n_shared else these
            if self.baseline == "zero":
                k[these, span], v[these, span] = 0, 0
                continue
            turn = None if rotate is None else rotate.rows(row).positions(span)
            if isinstance(self.baseline, ImageMeans):
                key = self.baseline.keys[layer].to(k).expand(1, 1, -1, -1)
                v[these, span] = self.baseline.values[layer].to(v)
            else:
                real = k[alike, span]
                key = (real if turn is None else turn.inverse()(real)).mean(1, keepdim=True)
                v[these, span] = v[alike, span].mean(1, keepdim=True)
            k[these, span] = key if turn is None else turn(key.expand(-1, visual.n_tokens, -1, -1))
        return k, v


def _for_runs(
    table: Callable[[Positions, VLMInputs], Tensor], name: str, chosen: HeadSelection, inputs: VLMInputs
) -> Bool[Tensor, "rows width_and_one"]:
    """The position table of each run, one run after the other; a single table if all are equal."""
    wanted = [getattr(run, name) for run in chosen.runs]
    tables = {where: table(where, inputs) for where in dict.fromkeys(wanted)}
    return tables[wanted[0]] if len(tables) == 1 else torch.cat([tables[where] for where in wanted])


def _behind_images(where: Positions, inputs: VLMInputs, both_ways: bool) -> Bool[Tensor, "batch width_and_one"]:
    """Text positions that see an image, or some of them, as a `position_table`; all of a row with an image where the
    tokens of a prompt see each other `both_ways`."""
    behind = position_table("text", inputs)
    for row in range(len(inputs)):
        own = [visual.start for visual in inputs.visuals if visual.row == row]
        first = 0 if both_ways else min(own, default=0)
        behind[row, : first if own else behind.shape[1]] = False
    if where is None:
        return behind
    table = behind & position_table(where, inputs)
    if not table.any():
        raise InputError(f"no text behind an image is among the queries {where!r}")
    return table


@torch.no_grad()
def mean_image_kv(model: "HookedVLM", inputs: Iterable[VLMInputs], before_rope: bool = True) -> ImageMeans:
    """Keys and values averaged over all image tokens of a dataset.

    Keys are taken before rotation (behind their norm, where they have one), or rotated.

    Raises:
        InputError: there is no image token in them.
    """
    sums = {kind: torch.zeros((), device=model.cfg.device) for kind in "kv"}
    n = 0
    before = "hook_k_normed" if model.blocks[0].attn.has_qk_norm else "hook_k"
    hooks = {"k": before if before_rope else "hook_rot_k", "v": "hook_v"}
    names = {
        kind: [f"blocks.{layer}.attn.{hook}" for layer in range(model.cfg.n_layers)] for kind, hook in hooks.items()
    }
    for batch in inputs:
        images = image_tokens(None, batch)[:, :-1].to(batch.device)
        _, cache = model.run_with_cache(batch, names_filter=[*names["k"], *names["v"]], return_type=None)
        for kind in "kv":
            found = torch.stack([cache[name][images] for name in names[kind]])
            sums[kind] = sums[kind] + found.sum(1, dtype=torch.promote_types(found.dtype, torch.float32))
        n += int(images.sum())
    if n == 0:
        raise InputError("there is no image in these inputs to average over")
    return ImageMeans(sums["k"] / n, sums["v"] / n, before_rope)
