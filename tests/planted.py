"""Dictionaries made on the spot, and SAELens' formulas written out."""

from typing import Any

import torch
from torch import Tensor

from hooked_vlm.features import Dictionary
from hooked_vlm.features.dictionary import width_at

ACTIVATIONS = ("relu", "topk", "jumprelu", "gated")
RESID = "blocks.1.hook_resid_post"


def random_dictionary(
    d_in: int, n_features: int = 24, *, activation: str = "relu", d_out: int | None = None, seed: int = 0, **fields: Any
) -> Dictionary:
    """A dictionary of random float32 weights."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) / 4

    own: dict[str, Any] = {
        "relu": {},
        "topk": {"k": 5},
        "jumprelu": {"threshold": normal(n_features).abs()},
        "gated": {"r_mag": normal(n_features), "b_mag": normal(n_features)},
    }[activation]
    return Dictionary(
        **{"hook_name": RESID, "activation": activation, **own, **fields},
        W_enc=normal(d_in, n_features),
        b_enc=normal(n_features),
        W_dec=normal(n_features, d_out or d_in),
        b_dec=normal(d_out or d_in),
    )


PLACES = {
    "stream": (RESID, RESID),
    "topk on the stream": (RESID, RESID),
    "normalised": ("blocks.0.hook_resid_mid", "blocks.0.hook_resid_mid"),
    "all heads": ("blocks.1.attn.hook_z", "blocks.1.attn.hook_z"),
    "last block": ("blocks.2.hook_mlp_out", "blocks.2.hook_mlp_out"),
    "transcoder": ("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"),
    "skip transcoder across blocks": ("blocks.0.hook_resid_post", "blocks.2.hook_mlp_out"),
    "vision stream": ("vision.blocks.0.hook_resid_post", "vision.blocks.0.hook_resid_post"),
    "vision transcoder": ("vision.blocks.1.ln2.hook_out", "vision.blocks.1.hook_mlp_out"),
    "image features": ("hook_image_features", "hook_image_features"),
}
"""Where dictionaries read and write, in either tower."""


def dictionary_at(model: Any, place: str) -> Dictionary:
    """A random dictionary that fits a model, of the activation and normalisation that the place stands for."""
    read, written = PLACES[place]
    d_in, d_out = width_at(model, read), width_at(model, written)
    fields: dict[str, Any] = {"activation": "topk" if place.startswith("topk") else "relu"}
    if place == "normalised":
        fields = {"activation": "gated", "normalisation": "layer_norm", "apply_b_dec_to_input": True}
    if place.startswith("skip"):
        fields["W_skip"] = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(4)) / 4
    return random_dictionary(d_in, d_out=d_out, hook_name=read, out_hook_name=written, **fields)


def planted_dictionary(d: int, n_features: int, hook_name: str = RESID, **fields: Any) -> Dictionary:
    """Orthonormal directions, each read by its own feature: streams in their positive span are reconstructed."""
    directions = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(1)))[0][:n_features]
    return Dictionary(
        hook_name, directions.T.contiguous(), torch.zeros(n_features), directions, torch.zeros(d), **fields
    )


def encoded_by_hand(own: Dictionary, x: Tensor) -> Tensor:
    """Activations of one vector, feature by feature."""
    z = x.clone()
    if own.normalisation == "layer_norm":
        z = z - z.mean()
        z = z / (z.std() + 1e-5)
    elif own.normalisation == "constant_norm_rescale":
        z = z * (len(z) ** 0.5 / z.norm())
    if own.apply_b_dec_to_input:
        z = z - own.b_dec
    pre = [float(torch.dot(z, own.W_enc[:, i]) + own.b_enc[i]) for i in range(own.n_features)]
    if own.activation == "topk":
        kept = sorted(range(len(pre)), key=lambda i: -pre[i])[: own.k]
        return torch.tensor([max(p, 0.0) if i in kept else 0.0 for i, p in enumerate(pre)])
    if own.threshold is not None:
        return torch.tensor([p if p > max(t, 0.0) else 0.0 for p, t in zip(pre, own.threshold.tolist(), strict=True)])
    if own.r_mag is not None and own.b_mag is not None:
        found = []
        for i, gate in enumerate(pre):
            magnitude = float(torch.dot(z, own.W_enc[:, i]) * own.r_mag[i].exp() + own.b_mag[i])
            found.append(max(magnitude, 0.0) if gate > 0 else 0.0)
        return torch.tensor(found)
    return torch.tensor([max(p, 0.0) for p in pre])


def decoded_by_hand(own: Dictionary, features: Tensor, x: Tensor) -> Tensor:
    """Reconstruction of one vector, a sum of directions."""
    out = own.b_dec.clone()
    for value, direction in zip(features, own.W_dec, strict=True):
        out = out + value * direction
    if own.normalisation == "layer_norm" and not own.is_transcoder:
        return out * x.std() + x.mean()
    if own.normalisation == "constant_norm_rescale" and not own.is_transcoder:
        return out * x.norm() / len(x) ** 0.5
    return out if own.W_skip is None else out + own.W_skip @ x
