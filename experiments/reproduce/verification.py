"""The check before a study: this library against `transformers` on the same checkpoint."""

import json
from pathlib import Path
from typing import Any

from hooked_vlm.errors import InputError
from hooked_vlm.experiments.common.claims import Claim, Evidence, Judgement, cannot_say
from hooked_vlm.experiments.reproduce.config import ReproduceConfig
from hooked_vlm.model.fingerprints import provenance
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.verify.config import VerifyConfig

SAME = ("weights", "settings", "tokenizer", "dtype", "code", "versions")
"""Parts of a record that a stored check must share with the model."""


def check_against_transformers(config: ReproduceConfig, path: Path) -> dict[str, Any]:
    """Record of `verify`, in the study's precision; {"error": ...} where it cannot be made.

    Raises:
        CheckpointError, OutputError: the checkpoint cannot be loaded, the file not written.
    """
    from hooked_vlm.loading.quantisation import quiet_torchao

    with quiet_torchao():  # transformers imports it
        from hooked_vlm.verify.run import verify  # transformers' model classes take seconds to load

    dtype = config.dtype
    if dtype == "auto":
        dtype = str(HookedVLM.without_weights(config.model).cfg.dtype).removeprefix("torch.")
    device = None if config.device == "auto" else config.device
    try:
        return verify(VerifyConfig(config.model, dtype, device, path, quiet=True)).as_dict()  # pyright: ignore[reportArgumentType]
    except InputError as error:
        return {"error": str(error)}


def stored_check(path: Path) -> dict[str, Any] | None:
    """Record of an earlier `verify`; None if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("rows"), list) else None


def is_of(record: dict[str, Any], model: HookedVLM) -> bool:
    """Whether a record is of this model and these versions."""
    own = provenance(model)
    return all(record.get(name) == own[name] for name in SAME)


def judged(record: dict[str, Any]) -> Claim:
    """The check as the first claim of a page."""

    def judge(evidence: Evidence) -> Judgement:
        if "error" in record:
            return cannot_say(record["error"], published="")
        rows, passed = record["rows"], bool(record["passed"])
        failed = [str(row["quantity"]) for row in rows if not row["passed"]]
        reason = f"{len(rows) - len(failed)} of {len(rows)} comparisons agree in {record['dtype']}"
        reason += f"; these do not: {', '.join(dict.fromkeys(failed))}" if failed else ""
        return Judgement("pass" if passed else "differs", reason, published="")

    return Claim(
        "as in transformers",
        "Not a claim of the paper: the numbers below are those of the checkpoint, because this library computes on "
        "it what transformers computes.",
        "Every comparison of `hooked-vlm verify` is within its tolerance.",
        judge,
    )
