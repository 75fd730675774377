"""One transformer block, as both the text decoder and the vision tower stack it: norms before attention and MLP, and
in some decoders behind them, too."""

from collections.abc import Iterable
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import HookError
from hooked_vlm.nn.attention import Attention
from hooked_vlm.nn.components import MLP, Norm, Part
from hooked_vlm.nn.forward_pass import ForwardPass
from hooked_vlm.nn.head_norms import AllHeadsNorm, EachHeadNorm
from hooked_vlm.nn.hooks import HookPoint, current_pass
from hooked_vlm.nn.scores import Scoring
from hooked_vlm.vision_config import VisionConfig


class Block(Part):
    """resid_pre -> + attention -> resid_mid -> + MLP -> resid_post."""

    # transformer_lens/tools/analysis/logit_lens.py asks every block that it has one residual stream
    hook_out_is_single_residual_stream = True

    def __init__(
        self,
        ln1: Norm,
        attn: Attention,
        ln2: Norm,
        mlp: MLP,
        layer_scale: int | None = None,
        deepstack: int | None = None,
        post_norms: tuple[Norm, Norm] | None = None,
    ) -> None:
        """One block from its parts.

        Args:
            post_norms: norms of what attention and MLP write, before it is added to the stream.
            layer_scale: width of the stream where what is added to it is scaled by learned vectors.
            deepstack: number of the block among those behind which image features enter the stream.
        """
        super().__init__()
        self.deepstack = deepstack
        self.ln1, self.attn, self.ln2, self.mlp = ln1, attn, ln2, mlp
        self.split_inputs = attn.split_inputs
        self.post_norms = post_norms is not None
        if post_norms is not None:
            self.ln1_post, self.ln2_post = post_norms
        self.layer_scale = layer_scale is not None
        if layer_scale is not None:
            self.scale_attn = nn.Parameter(torch.empty(layer_scale))
            self.scale_mlp = nn.Parameter(torch.empty(layer_scale))
            self.reset_parameters()
        self.hook_resid_pre = HookPoint(shared=True)  # [batch, pos, d_model]; the resid_post of the block before
        if self.split_inputs:
            self.hook_mlp_in = HookPoint(shared=True)  # [batch, pos, d_model], with use_hook_mlp_in
        self.hook_attn_out = HookPoint(shared=self.post_norms)  # [batch, pos, d_model]
        self.hook_resid_mid = HookPoint()  # [batch, pos, d_model]
        self.hook_mlp_out = HookPoint(shared=self.post_norms)  # [batch, pos, d_model]
        if deepstack is not None:
            self.hook_deepstack = HookPoint()  # [batch, pos, d_model]
        self.hook_resid_post = HookPoint()  # [batch, pos, d_model]

    def reset_parameters(self) -> None:
        for scale in (self.scale_attn, self.scale_mlp) if self.layer_scale else ():
            nn.init.ones_(scale)

    def forward(self, resid: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*out d_model"]:
        """The stream behind the block: of all positions, or of those whose queries the pass wants (`n_out`)."""
        here = current_pass()
        resid_pre = self.hook_resid_pre(resid)  # [batch, pos, d_model]
        attn_out = self.attn(*self._attention_inputs(resid_pre, here))
        if self.post_norms:
            attn_out = self.ln1_post(attn_out)
        if self.layer_scale:
            attn_out = attn_out * self.scale_attn
        attn_out = self.hook_attn_out(attn_out)  # [batch, pos, d_model]
        resid_mid = self.hook_resid_mid(here.wanted(resid_pre) + attn_out)  # [batch, pos, d_model]
        use_mlp_in = here.cfg.use_hook_mlp_in and self.split_inputs
        mlp_in = self.hook_mlp_in(resid_mid) if use_mlp_in else resid_mid  # [batch, pos, d_model]
        mlp_out = self.hook_mlp_out(self.mlp_output(mlp_in))  # [batch, pos, d_model]
        resid_post = resid_mid + mlp_out
        if self.deepstack is not None and here.deepstack is not None:
            entering = here.wanted(here.pack(here.deepstack.added(self.deepstack, resid_post)))
            resid_post = resid_post + self.hook_deepstack(entering)  # [batch, pos, d_model]
        return self.hook_resid_post(resid_post)  # [batch, pos, d_model]

    @property
    def submodules(self) -> dict[str, nn.Module]:
        """The block's parts by name, which TransformerLens' tools read to learn whether they may split attention."""
        return dict(self.named_children())

    @property
    def hook_aliases(self) -> dict[str, str]:
        """Where `hook_attn_out` and `hook_mlp_out` stand behind norms, for the same tools."""
        return {"hook_attn_out": "ln1_post.hook_out", "hook_mlp_out": "ln2_post.hook_out"} if self.post_norms else {}

    def mlp_output(self, mlp_in: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims d_model"]:
        """What the MLP adds to the stream when it reads `mlp_in`, norms and layer scale included."""
        mlp_out = self.mlp(self.ln2(mlp_in))
        if self.post_norms:
            mlp_out = self.ln2_post(mlp_out)
        return mlp_out * self.scale_mlp if self.layer_scale else mlp_out

    def head_outputs(
        self, z: Float[Tensor, "*dims head d_head"], post_scale: Float[Tensor, "*dims 1"] | None
    ) -> Float[Tensor, "*dims head d_model"]:
        """What each head adds to the stream, without the output bias: z W_O.

        A norm behind attention acts on the sum of all heads. Its denominator is then that of a run, `post_scale`
        (`ln1_post.hook_scale` at these positions), so that the heads' outputs sum to what the layer added.
        """
        assert isinstance(self.attn, Attention)
        results = self.attn.head_results(z)
        if not self.post_norms:
            return results
        assert post_scale is not None
        return self.ln1_post.frozen(results, post_scale[..., None, :])

    def _attention_inputs(self, resid_pre: Tensor, here: ForwardPass) -> tuple[Tensor, ...]:
        """Inputs of queries, keys and values: the normalised stream, one for all; or, with a switch on, a copy of the
        stream for every head, each normalised on its own."""
        attn, cfg = self.attn, here.cfg
        if not (self.split_inputs and (cfg.use_split_qkv_input or cfg.use_attn_in)):
            normalized = self.ln1(resid_pre)  # [batch, pos, d_model]
            return (normalized,) if here.n_out is None else (here.wanted(normalized), normalized, normalized)
        if not isinstance(attn, Attention):
            raise HookError(
                f"inputs for every head need the model's own attention, but a {type(attn).__name__} stands there: call "
                "set_use_split_qkv_input(False) and set_use_attn_in(False)"
            )
        n_heads, n_kv_heads = attn.n_heads, attn.n_key_value_heads
        if cfg.use_attn_in:  # keys and values read the inputs of the first heads, as in TransformerLens
            q_input = self.ln1(attn.hook_attn_in(_per_head(resid_pre, n_heads)))  # [batch, pos, head, d_model]
            k_input = v_input = q_input[..., :n_kv_heads, :]
        else:
            q_input = self.ln1(attn.hook_q_input(_per_head(resid_pre, n_heads)))  # [batch, pos, head, d_model]
            k_input = self.ln1(attn.hook_k_input(_per_head(resid_pre, n_kv_heads)))  # [batch, pos, kv_head, d_model]
            v_input = self.ln1(attn.hook_v_input(_per_head(resid_pre, n_kv_heads)))  # [batch, pos, kv_head, d_model]
        return here.wanted(q_input), k_input, v_input


def _per_head(stream: Float[Tensor, "batch pos d_model"], n: int) -> Float[Tensor, "batch pos head d_model"]:
    return stream.unsqueeze(-2).repeat_interleave(n, dim=-2)


def run_blocks(
    blocks: Iterable[nn.Module], stream: Float[Tensor, "*dims d_model"], first: int = 0, stop: int | None = None
) -> Float[Tensor, "*out d_model"]:
    """The stream through the blocks `first` to `stop` - 1, all of them by default, in the current pass."""
    for block in islice(blocks, first, stop):
        stream = block(stream)
    return stream


def text_norm(cfg: VLMConfig) -> Norm:
    """A norm of the language model's stream."""
    return Norm(cfg.d_model, cfg.eps, centered=False, offset=cfg.rmsnorm_uses_offset)


def scoring_of(cfg: VLMConfig) -> Scoring:
    """How the language model's queries and keys make scores."""
    return Scoring(cfg.attn_scale, cfg.attn_scores_soft_cap)


def text_blocks(cfg: VLMConfig) -> nn.ModuleList:
    """The language model's blocks: RMSNorm, grouped-query attention, gated MLP."""
    post_norms = cfg.use_normalization_before_and_after

    def qk_norm(n_heads: int) -> nn.Module:
        return EachHeadNorm(cfg.d_head, cfg.eps, cfg.rmsnorm_uses_offset)

    return nn.ModuleList(
        Block(
            text_norm(cfg),
            Attention(
                layer,
                cfg.d_model,
                cfg.n_heads,
                cfg.n_key_value_heads,
                cfg.d_head,
                qkv_bias=cfg.qkv_bias,
                o_bias=False,
                split_inputs=True,
                qk_norm=qk_norm if cfg.qk_norm else None,
                scoring=scoring_of(cfg),
                post_norm=post_norms,
            ),
            text_norm(cfg),
            MLP(cfg.d_model, cfg.d_mlp, cfg.act_fn, gated=cfg.gated_mlp, bias=False, post_norm=post_norms),
            deepstack=layer if layer < cfg.n_deepstack else None,
            post_norms=(text_norm(cfg), text_norm(cfg)) if post_norms else None,
        )
        for layer in range(cfg.n_layers)
    )


def vision_blocks(cfg: VisionConfig) -> nn.ModuleList:
    """The vision tower's blocks: attention within a picture, an MLP with biases."""
    centered = cfg.normalization_type == "LN"

    def qk_norm(n_heads: int) -> nn.Module:
        return AllHeadsNorm(n_heads, cfg.d_head, cfg.eps)

    return nn.ModuleList(
        Block(
            Norm(cfg.d_model, cfg.eps, centered),
            Attention(
                layer,
                cfg.d_model,
                cfg.n_heads,
                cfg.n_heads,
                cfg.d_head,
                qkv_bias=cfg.qkv_bias,
                o_bias=True,
                split_inputs=False,
                rotary=cfg.rope_theta is not None,
                qk_norm=qk_norm if cfg.qk_norm else None,
            ),
            Norm(cfg.d_model, cfg.eps, centered),
            MLP(cfg.d_model, cfg.d_mlp, cfg.act_fn, gated=cfg.gated_mlp, bias=True),
            layer_scale=cfg.d_model if cfg.layer_scale else None,
        )
        for layer in range(cfg.n_layers)
    )
