"""Dictionaries made on the spot, and SAELens' formulas written out."""

from typing import Any

import torch
from torch import Tensor

from hooked_vlm.features import Dictionary

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
