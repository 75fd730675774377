"""What a run leaves behind: a table on the terminal, Parquet tables, config.json and pictures."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hooked_vlm.experiments.ocr_heads.config import OFFICIAL_CODE, OcrHeadsConfig, Protocol, StudyError
from hooked_vlm.experiments.ocr_heads.masking import Outcome, wilson
from hooked_vlm.experiments.ocr_heads.published import per_range, ranked


def prepare_folder(out: Path) -> None:
    """Make the output folder, and be sure that it can be written, before any work is done.

    Raises:
        StudyError: it is a file, or cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out):
            pass
    except OSError as error:
        raise StudyError(f"cannot write to --out {out}: {error.strerror or error}") from error


def nothing_generated(scores: Any) -> StudyError:
    return StudyError(
        f"no answer token was generated on any of {scores.n_samples} pages, so no head can be scored: "
        "this model does not answer these questions"
    )


def write(result: Any, config: OcrHeadsConfig, versions: Mapping[str, str], pictures: Mapping[str, Figure]) -> None:
    """Every file is written aside and put in place when complete."""
    out = config.out
    _place(out / "scores.parquet", lambda p: result.to_dataframe(config.threshold).to_parquet(p, index=False))
    _place(out / "masking.parquet", lambda p: result.masking_dataframe().to_parquet(p, index=False))
    for name, figure in pictures.items():
        _place(out / name, lambda p, figure=figure: figure.savefig(p, dpi=150, format="png"))
    record = {
        "config": config.as_dict(),
        "protocol": protocol_name(config.measured_by),
        "data": result.about,
        "exact_match": result.scores.exact,
        "n_samples": result.scores.n_samples,
        "ocr_heads": [list(head) for head in result.ocr_heads],
        "heads_per_score_range": per_range(result.scores.mean),
        "published": None if result.published is None else vars(result.published),
        "versions": dict(versions),
    }
    _place(out / "config.json", lambda p: p.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8"))


def _place(path: Path, save: Callable[[Path], Any]) -> None:
    aside = path.with_name(f".{path.name}.part")
    try:
        save(aside)
        os.replace(aside, path)
    except OSError as error:
        raise StudyError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)


def protocol_name(protocol: Protocol) -> str:
    if protocol == Protocol():
        return "the paper's definition"
    if protocol == OFFICIAL_CODE:
        return "the paper's code (compat)"
    return "custom: see config"


def summary(result: Any, config: OcrHeadsConfig) -> str:
    """The terminal's table."""
    scores = result.scores
    mean, frequency = scores.mean, scores.frequency(config.threshold)
    low, high = result.interval
    lines = [
        f"OCR heads of {config.model}",
        f"{scores.n_samples} pages ({result.about['data']}), {scores.n_tokens} answer tokens read, "
        f"{scores.exact:.1%} answered rightly; measured by {protocol_name(config.measured_by)}",
        "",
        "  head    score  95% interval     active   selected",
    ]
    shown = ranked(mean)[: max(10, min(20, len(result.ocr_heads)))]
    for layer, head in shown:
        at = (layer, head)
        mark = "   OCR head" if result.selected[at] else ""
        name = f"{layer}.{head}"
        lines.append(f"  {name:6s}  {mean[at]:.3f}  {low[at]:.3f} to {high[at]:.3f}   {frequency[at]:6.1%}{mark}")
    n_found = len(result.ocr_heads)
    rule = f"active in at least {config.min_frequency:.0%} of the instances"
    if config.measured_by.frequency_rule == "inverted":
        rule = f"zero in more than {config.min_frequency:.0%} of the instances (the code's rule)"
    lines += [
        f"  {n_found} of {mean.size} heads are OCR heads: mean > {config.threshold:g}, {rule}",
        "",
        "  heads per score range: " + ", ".join(f"{k} {v}" for k, v in per_range(mean).items()),
    ]
    lines += ["", *_masking_table(result, config)]
    if result.published is not None:
        lines += ["", *_comparison(result.published)]
    return "\n".join([*lines, "", f"tables and pictures: {config.out}"])


def masking_rows(outcomes: Sequence[Outcome]) -> list[tuple[str, str, float, float, float]]:
    """(task, condition, exact, low, high); random draws by their median and their extremes."""
    rows = []
    for task in dict.fromkeys(o.task for o in outcomes):
        for condition in ("none", "top", "random"):
            chosen = [o for o in outcomes if o.task == task and o.condition == condition]
            if not chosen:
                continue
            exact = np.array([o.exact for o in chosen])
            if condition == "random":
                rows.append((task, condition, float(np.median(exact)), float(exact.min()), float(exact.max())))
            else:
                rows.append((task, condition, chosen[0].exact, *wilson(chosen[0].right, chosen[0].n)))
    return rows


def _masking_table(result: Any, config: OcrHeadsConfig) -> list[str]:
    rows = {(task, condition): values for task, condition, *values in masking_rows(result.outcomes)}
    top = next((o.heads for o in result.outcomes if o.condition == "top"), ())
    n = result.outcomes[0].n
    lines = [
        f"Masking the top {result.n_masked} heads ({', '.join(f'{a}.{b}' for a, b in top)}), {n} samples a task",
        "  task      nothing masked           top masked               random masked (median, range)",
    ]
    for task in dict.fromkeys(o.task for o in result.outcomes):
        cells = []
        for condition in ("none", "top", "random"):
            values = rows.get((task, condition))
            cells.append("-" if values is None else f"{values[0]:6.1%} ({values[1]:.1%} to {values[2]:.1%})")
        lines.append(f"  {task:8s}  " + "  ".join(f"{cell:23s}" for cell in cells).rstrip())
    draws = sum(o.condition == "random" for o in result.outcomes) // max(1, len({o.task for o in result.outcomes}))
    if draws:
        lines.append(
            f"  random: {draws} draws of {result.n_masked} from {result.n_candidates} live heads that score below 0.1"
        )
    else:
        lines.append(
            f"  no random control: only {result.n_candidates} live heads score below 0.1, {result.n_masked} are needed"
        )
    return lines


def _comparison(published: Any) -> list[str]:
    lines = [
        f"Against the heads published for {published.model}",
        f"  Jaccard of the heads above 0.1: {published.jaccard:.2f}",
        f"  of the {published.top_k} published above 0.5, {published.top_k_found} are among the top "
        f"{published.top_k} here",
        "  score range: published, here",
    ]
    return [*lines, *(f"  {k:12s} {a:5d} {b:5d}" for k, (a, b) in published.heads_per_range.items())]
