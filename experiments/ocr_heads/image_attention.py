"""Attention on the image, by head: what a control can be matched on."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.rows import attention_rows
from hooked_vlm.experiments.ocr_heads.attention_shares import measured_by_sample
from hooked_vlm.experiments.ocr_heads.examples import Example, to_inputs
from hooked_vlm.experiments.ocr_heads.study import Study
from hooked_vlm.model.vlm import HookedVLM


def attention_on_images(study: Study) -> Float[np.ndarray, "layer head"]:
    """Mean share of each head's attention on image tokens where the answer begins, over the pages that score heads."""
    sets = {f"attention on images, {data.name}": data for data in study.scored(as_text=False)}
    return measured_by_sample(study, image_shares, sets, "image attention", {}).mean(0)


def image_shares(
    model: HookedVLM, examples: Sequence[Example], pixels: int | None
) -> Float[np.ndarray, "sample layer head"]:
    """Share of the last position's attention that is on image tokens."""
    inputs = to_inputs(model, examples, pixels)
    keys = torch.zeros(inputs.shape, dtype=torch.bool)
    for visual in inputs.visuals:
        keys[visual.row, visual.positions] = True
    last = torch.tensor([[stop - 1] for stop in inputs.stop])

    def on_images(rows: Tensor) -> Float[Tensor, "sample head"]:
        return (rows[:, :, 0] * keys.to(rows)[:, None]).sum(-1)

    return attention_rows(model, inputs, last, reduce=on_images).transpose(0, 1).float().cpu().numpy()
