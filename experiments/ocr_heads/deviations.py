"""What the published code does in another way than the paper says, and how much each of it changes on a toy model.

`deviations.json` is measured by `python -m tools.deviation_table`: one deviation at a time against the defaults.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
import torch

from hooked_vlm.experiments.ocr_heads.config import Protocol
from hooked_vlm.experiments.ocr_heads.examples import Example, as_asked
from hooked_vlm.experiments.ocr_heads.official import OfficialCode
from hooked_vlm.experiments.ocr_heads.scoring import Kind, Scores, gather, score_batch
from hooked_vlm.experiments.ocr_heads.selection import select
from hooked_vlm.model.vlm import HookedVLM

DEVIATIONS: dict[str, tuple[str, str]] = {
    "min_overlap": ("0.1 of the box's area", "0.001 (a percentage is compared with 0.1)"),
    "truncate_boxes": ("exact boxes", "scaled and cut to whole pixels"),
    "query": ("`producing`: the position that predicts the token", "`copied`: the token itself, one step later"),
    "matching": (
        "`aligned`: each token against its own box",
        "`in_order`: any token whose id occurs in the answer, the i-th against the i-th box",
    ),
    "missing": ("`zero`: answer tokens that were not generated count as not copied", "`skip`"),
    "weight_by_run": (
        "`no`: a copy counts 1",
        "`prompt_and_reply` (InternVL2: `reply`): it counts the share of the answer in the longest shared run",
    ),
    "keys": ("`all`: argmax over all keys", "`prompt`: over the prompt without its last token"),
    "ocr_instance": ("`sample`", "`token`: single boxes"),
    "frequency_rule": ("`active` in at least 10%", "`inverted`: drops heads that are non-zero in 90%"),
    "retrieval": ("`needle`: Wu et al.", "`same_token`: every answer token anywhere, any token with the same id"),
    "pages": (
        "`paper`: lines of 10 pixels, line breaks as spaces",
        "`code`: needles on lines of 12 pixels, line breaks deleted, its questions, boxes and draws of needles",
    ),
    "page_order": ("`number`", '`name`: "10" before "2", so boxes are on other pages from 11 pages on'),
    "first_resize": ("none", "28: pictures are first resized to multiples of 28 pixels (InternVL2: none)"),
    "max_new_tokens": ("8 (toy data) or 32", "128 (InternVL2: 32)"),
}
"""Option -> (default, the code), in words."""
ALL = "all of them (`--compat`)"
DEVIATIONS_CAPTION = (
    "What the published code does otherwise than the paper's definition, and what each alone changes in a toy model's "
    "scores"
)
Build = Callable[[bool, Protocol], Sequence[Sequence[Example]]]
"""(as text, protocol) -> sets of examples."""


def measured(model: HookedVLM, code: OfficialCode, build: Build, new_tokens: int, pixels: int | None) -> list[dict]:
    """Scores under each deviation alone, and under all, against those under the defaults: one record each."""
    plain = Protocol()
    base = {kind: _scores(model, kind, plain, build, new_tokens, pixels) for kind in KINDS}
    records = []
    for option in (*DEVIATIONS, ALL):
        protocol, length = plain, code.reply_tokens if option in ("max_new_tokens", ALL) else new_tokens
        if option == ALL:
            protocol = code.protocol
        elif option != "max_new_tokens":
            protocol = replace(plain, **{option: getattr(code.protocol, option)})
        record: dict[str, Any] = {"option": option}
        for kind in KINDS:
            found = _scores(model, kind, protocol, build, length, pixels)
            record[kind] = effect(base[kind], found, protocol)
        records.append(record)
    return records


KINDS: tuple[Kind, ...] = ("ocr", "retrieval")


def effect(before: Scores, after: Scores, protocol: Protocol) -> dict[str, Any]:
    """Number of heads whose score changes, the largest change, and the heads that enter and leave the selection."""
    change = np.abs(after.mean - before.mean)
    chosen = [_selected(before, "active"), _selected(after, protocol.frequency_rule)]
    return {
        "heads": int((change > 1e-9).sum()),
        "largest": round(float(change.max()), 4),
        "in": sorted(chosen[1] - chosen[0]),
        "out": sorted(chosen[0] - chosen[1]),
    }


def _selected(scores: Scores, rule: Any) -> set[str]:
    return {f"{layer}.{head}" for layer, head in np.argwhere(select(scores, 0.1, 0.1, rule))}


@torch.no_grad()
def _scores(
    model: HookedVLM, kind: Kind, protocol: Protocol, build: Build, new_tokens: int, pixels: int | None
) -> Scores:
    tables = []
    for examples in build(kind == "retrieval", protocol):
        asked = [as_asked(e, protocol) for e in examples]
        for i in range(0, len(asked), 16):
            tables.append(score_batch(model, kind, asked[i : i + 16], protocol, pixels, new_tokens, False))
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    return gather(kind, pd.concat(tables, ignore_index=True), shape, protocol.instance(kind))


def shipped() -> dict[str, Any]:
    """The measured effects, with the model and the data they were measured on."""
    return json.loads(resources.files(str(__package__)).joinpath("deviations.json").read_text(encoding="utf-8"))


def deviation_table() -> pd.DataFrame:
    """One row per deviation: option, default, code, and its measured effect on OCR and retrieval scores, in words."""
    rows = []
    for record in shipped()["deviations"]:
        option = record["option"]
        name = option if option == ALL else f"`--{option.replace('_', '-')}`"
        rows.append((name, *DEVIATIONS.get(option, ("", "")), *(_in_words(record[kind]) for kind in KINDS)))
    return pd.DataFrame(rows, columns=["option", "default (paper)", "`--compat` (code)", "OCR", "retrieval"])


def _in_words(found: Mapping[str, Any]) -> str:
    if not found["heads"] and not found["in"] and not found["out"]:
        return "no change"
    words = [f"{found['heads']} heads, at most {found['largest']:.3f}"] if found["heads"] else ["no score changes"]
    words += [f"selects {', '.join(found['in'])}"] if found["in"] else []
    words += [f"drops {', '.join(found['out'])}"] if found["out"] else []
    return "; ".join(words)
