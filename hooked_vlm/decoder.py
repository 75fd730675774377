"""One transformer block, pre-norm, as both the text decoder and the vision tower stack it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.attention import Attention, AttentionRun
from hooked_vlm.components import MLP, Norm
from hooked_vlm.config import VisionConfig, VLMConfig
from hooked_vlm.hooks import HookPoint, fresh


class Block(nn.Module):
    """resid_pre -> + attention -> resid_mid -> + MLP -> resid_post."""

    # transformer_lens/tools/analysis/logit_lens.py asks every block that it has one residual stream
    hook_out_is_single_residual_stream = True

    def __init__(self, ln1: Norm, attn: Attention, ln2: Norm, mlp: MLP, layer_scale: int | None = None) -> None:
        """`layer_scale` is the width of the stream where what is added to it is scaled by learned vectors."""
        super().__init__()
        self.ln1, self.attn, self.ln2, self.mlp = ln1, attn, ln2, mlp
        self.layer_scale = layer_scale is not None
        if layer_scale is not None:
            self.scale_attn = nn.Parameter(torch.empty(layer_scale))
            self.scale_mlp = nn.Parameter(torch.empty(layer_scale))
            self.reset_parameters()
        self.hook_resid_pre = HookPoint()  # [batch, pos, d_model]
        if attn.split_inputs:
            self.hook_mlp_in = HookPoint()  # [batch, pos, d_model], with use_hook_mlp_in
        self.hook_attn_out = HookPoint()  # [batch, pos, d_model]
        self.hook_resid_mid = HookPoint()  # [batch, pos, d_model]
        self.hook_mlp_out = HookPoint()  # [batch, pos, d_model]
        self.hook_resid_post = HookPoint()  # [batch, pos, d_model]

    def reset_parameters(self) -> None:
        for scale in (self.scale_attn, self.scale_mlp) if self.layer_scale else ():
            nn.init.ones_(scale)

    def forward(
        self,
        resid: Float[Tensor, "*dims d_model"],
        run: AttentionRun,
        layer: int,
        split_qkv_input: bool = False,
        own_mlp_input: bool = False,
        n_out: int | None = None,
    ) -> Float[Tensor, "*out d_model"]:
        """The stream behind the block, of the last `n_out` positions if that is all that is wanted: queries and
        all that follows them are then made for these alone."""
        # the previous block's resid_post is this very tensor
        resid_pre = run.hook(self.hook_resid_pre, fresh(self.hook_resid_pre, resid))
        if split_qkv_input:
            inputs = self._split_inputs(resid_pre, run.hook)
        else:
            normalized = self.ln1(resid_pre, run.hook)
            inputs = (normalized, normalized, normalized)
        asking = run
        if n_out is not None:
            asking, resid_pre = run.last(n_out), resid_pre[:, -n_out:]
            inputs = (inputs[0][:, -n_out:], *inputs[1:])
        hook = asking.hook
        attn_out = self.attn(inputs, run, asking, layer)
        attn_out = hook(self.hook_attn_out, attn_out * self.scale_attn if self.layer_scale else attn_out)
        resid_mid = hook(self.hook_resid_mid, resid_pre + attn_out)
        mlp_in = hook(self.hook_mlp_in, fresh(self.hook_mlp_in, resid_mid)) if own_mlp_input else resid_mid
        mlp_out = self.mlp(self.ln2(mlp_in, hook), hook)
        mlp_out = hook(self.hook_mlp_out, mlp_out * self.scale_mlp if self.layer_scale else mlp_out)
        return hook(self.hook_resid_post, resid_mid + mlp_out)

    def _split_inputs(self, resid_pre: Tensor, hook) -> tuple[Tensor, Tensor, Tensor]:
        """A residual stream for every head to read, each normalised on its own (ln1's hooks fire thrice)."""
        attn = self.attn
        points = (attn.hook_q_input, attn.hook_k_input, attn.hook_v_input)
        heads = (attn.n_heads, attn.n_key_value_heads, attn.n_key_value_heads)
        q, k, v = (
            self.ln1(hook(point, resid_pre.unsqueeze(-2).repeat_interleave(n, dim=-2)), hook)
            for point, n in zip(points, heads, strict=True)
        )
        return q, k, v


def text_blocks(cfg: VLMConfig) -> nn.ModuleList:
    """The language model's blocks: RMSNorm, grouped-query attention, gated MLP."""
    return nn.ModuleList(
        Block(
            Norm(cfg.d_model, cfg.eps, centered=False),
            Attention(
                cfg.d_model,
                cfg.n_heads,
                cfg.n_key_value_heads,
                cfg.d_head,
                qkv_bias=cfg.qkv_bias,
                o_bias=False,
                split_inputs=True,
            ),
            Norm(cfg.d_model, cfg.eps, centered=False),
            MLP(cfg.d_model, cfg.d_mlp, cfg.act_fn, gated=cfg.gated_mlp, bias=False),
        )
        for _ in range(cfg.n_layers)
    )


def vision_blocks(cfg: VisionConfig) -> nn.ModuleList:
    """The vision tower's blocks: full attention within an image or tile, a plain MLP with biases."""
    centered = cfg.normalization_type == "LN"
    return nn.ModuleList(
        Block(
            Norm(cfg.d_model, cfg.eps, centered),
            Attention(
                cfg.d_model,
                cfg.n_heads,
                cfg.n_heads,
                cfg.d_head,
                qkv_bias=cfg.qkv_bias,
                o_bias=True,
                split_inputs=False,
                rotary=cfg.rope_theta is not None,
                qk_norm_eps=cfg.eps if cfg.qk_norm else None,
            ),
            Norm(cfg.d_model, cfg.eps, centered),
            MLP(cfg.d_model, cfg.d_mlp, cfg.act_fn, gated=False, bias=True),
            layer_scale=cfg.d_model if cfg.layer_scale else None,
        )
        for _ in range(cfg.n_layers)
    )
