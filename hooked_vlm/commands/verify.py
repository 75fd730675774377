"""`hooked-vlm verify MODEL`."""

from typing import Any

from hooked_vlm.verify.config import VerifyConfig


def answer(config: VerifyConfig) -> tuple[str, dict[str, Any]]:
    """Run the comparison; what `hooked-vlm verify` prints, and what goes into the file."""
    from hooked_vlm.loading.quantisation import quiet_torchao

    with quiet_torchao():  # transformers imports it
        from hooked_vlm.verify.run import verify  # transformers' model classes take seconds to load

    found = verify(config)
    n_failed = sum(not row.passed for row in found.rows)
    verdict = "all of it agrees" if found.passed else f"{n_failed} of {len(found.rows)} comparisons FAILED"
    summary = f"{config.model} in {config.dtype}: {verdict}; written to {config.out}"
    return f"{found.table(config.layers)}\n\n{summary}", found.as_dict()
