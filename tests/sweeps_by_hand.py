"""A sweep as the loop over `run_with_hooks` that it stands for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hooked_vlm import sweep
from hooked_vlm.interventions import Intervention


def naive(
    model: Any, batch: Any, interventions: Sequence[Intervention], metric: Any, logits_at: str = "last"
) -> Tensor:
    """One forward pass, from the pixels on, for each intervention."""
    values = []
    for iv in interventions:
        with torch.no_grad():
            logits = model.run_with_hooks(batch, fwd_hooks=iv.hooks(model, batch))
        last = torch.tensor(batch.stop) - 1
        values.append(metric(logits[torch.arange(len(batch)), last] if logits_at == "last" else logits))
    return torch.stack(values)


def agrees(model: Any, batch: Any, interventions: Sequence[Intervention], metric: Any, **settings: Any) -> Any:
    result = sweep(model, batch, interventions, metric, **settings)
    expected = naive(model, batch, interventions, metric, settings.get("logits_at", "last"))
    torch.testing.assert_close(result.values, expected, atol=2e-5, rtol=1e-5)
    return result
