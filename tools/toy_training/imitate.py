"""A head start for a vision tower: to give, token for token, what another toy's tower gives for the same image.

Like this the glyphs are learned within minutes and the decoder, which comes from the other toy, meets image tokens
that it can read. (The published small InternViT was taught by the large one in the same way.) What the towers differ
in, the positions that the decoder gives to image tokens among it, is learned from the tasks afterwards.
"""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hooked_vlm.toys import pages as data
from tools.toy_training.families import family_of
from tools.toy_training.family import HFModel

IMAGES = 40  # per step


def step_images(rng: np.random.Generator, size: tuple[int, int]) -> UInt8[Tensor, "image height width 3"]:
    """Pages of all numbers of lines, short lines and drawings, all of ``size`` (width, height)."""
    pages = [data.page_sample(rng, size=size) for _ in range(IMAGES // 2)]
    strips = [data.transcription_sample(rng, size) for _ in range(IMAGES // 4)]
    drawings = [data.naming_sample(rng, size) for _ in range(IMAGES // 4)]
    return torch.from_numpy(np.stack([np.asarray(sample.pixels) for sample in pages + strips + drawings]))


def imitation_loss(
    model: HFModel, teacher: HFModel, images: UInt8[Tensor, "image height width 3"]
) -> Float[Tensor, ""]:
    """Squared error of the image tokens, as a share of their variance at the teacher."""
    features = []
    for part in (model, teacher):
        family, grid = family_of(part), family_of(part).grid(*images.shape[1:3])
        with torch.set_grad_enabled(part is model):
            features.append(family.image_features(part, family.pixel_values(images), grid))
    own, taught = features
    return (own - taught).square().mean() / taught.var()
