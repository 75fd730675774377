"""`hooked-vlm features train`, `find` and `page`."""

from typing import Any

from hooked_vlm.experiments.features.config import Command, FindConfig, PageConfig, TrainConfig
from hooked_vlm.experiments.features.page import feature_page
from hooked_vlm.experiments.features.pipeline import FOLDER, Found, find, train
from hooked_vlm.experiments.features.words import findings, how
from hooked_vlm.model.by_name import load


def answer(command: Command) -> tuple[str, dict[str, Any]]:
    """Run a command; what to print, and the same as data."""
    if isinstance(command, TrainConfig):
        return _trained(command)
    if not isinstance(command, PageConfig):
        return _found(command, find(command))
    model = load(command.model, command.device, command.dtype)
    found = find(command, model)
    page = feature_page(command, found, model).save(command.out / "features.html")
    text, data = _found(command, found)
    return f"{text}\npage: {page}", {**data, "page": str(page)}


def _trained(config: TrainConfig) -> tuple[str, dict[str, Any]]:
    found = train(config)
    last = {str(name): float(value) for name, value in found.measured.iloc[-1].items()}
    n_held_out = min(config.held_out_tokens, int(found.stream.held_out.sum()))
    text = (
        f"{config.hook}: {last['explained variance']:.3f} of the variance of {n_held_out:,} held-out tokens is "
        f"reconstructed, with {last['active']:.1f} of {config.n_features:,} features active on average; "
        f"{100 * last['dead']:.1f}% of the features are dead.\n"
        f"Trained on {last['tokens']:,.0f} tokens ({found.stream.n_rows:,} different ones, of other samples).\n"
        f"dictionary: {config.out / FOLDER}\ntraining: {config.out / 'training.csv'}"
    )
    data = {"dictionary": str(config.out / FOLDER), "training": str(config.out / "training.csv"), **last}
    return text, {**data, "held_out_tokens": n_held_out, "training_tokens": found.stream.n_rows}


def _found(config: FindConfig, found: Found) -> tuple[str, dict[str, Any]]:
    rows = found.meanings.to_dict("records")
    n = sum(row["found"] for row in rows)
    better = sum(row["low"] > max(row["unit"], row["permuted"]) for row in rows)
    first = (
        f"{n} of {len(rows)} labels have a feature at {found.dictionary.hook_name}; for {better} the interval of the "
        "best feature lies above the best unit and all permutations."
    )
    text = "\n".join([first, "", findings(found.meanings), "", ""])
    about = how(config)
    files = {"meanings": str(config.out / "meanings.csv"), "features": str(config.out / "features.csv")}
    shown = "\n".join(f"{name}: {path}" for name, path in files.items())
    plain = found.meanings.astype(object).where(found.meanings.notna(), None).to_dict("records")
    return f"{text}{about}\n{shown}", {**files, "labels": plain, "found": n, "above_unit": better, "how": about}
