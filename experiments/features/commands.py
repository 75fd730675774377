"""`hooked-vlm features train`, `find` and `page`."""

from typing import Any

import pandas as pd

from hooked_vlm.experiments.features.config import Command, FindConfig, PageConfig, TrainConfig
from hooked_vlm.experiments.features.pipeline import FOLDER, Found, find, kind_of, train


def answer(command: Command) -> tuple[str, dict[str, Any]]:
    """Run a command; what to print, and the same as data."""
    if isinstance(command, TrainConfig):
        return _trained(command)
    if isinstance(command, PageConfig):
        raise NotImplementedError
    return _found(command, find(command))


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
    lines = [sentence({str(name): value for name, value in row.items()}) for row in rows]
    n = int(found.meanings["found"].sum())
    text = "\n".join([f"{n} of {len(rows)} labels have a feature at {found.dictionary.hook_name}.", "", *lines, ""])
    about = how(config)
    files = {"meanings": str(config.out / "meanings.csv"), "features": str(config.out / "features.csv")}
    shown = "\n".join(f"{name}: {path}" for name, path in files.items())
    plain = found.meanings.astype(object).where(found.meanings.notna(), None).to_dict("records")
    return f"{text}{about}\n{shown}", {**files, "labels": plain, "found": n, "how": about}


def sentence(row: dict[str, Any]) -> str:
    """What was found for a label."""
    name = f"{kind_of(row['label'])} '{row['label']}'"
    if pd.isna(row["F1"]):
        return f"{name}: no token of the second half shows it, or is marked"
    scored = f"F1 {row['F1']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
    compared = f"best unit {row['unit']:.2f}, permuted {row['permuted']:.2f}"
    if row["found"]:
        return f"{name} is feature {row['feature']}: {scored}; {compared}"
    return f"no feature for {name}: best {row['feature']}, {scored}; {compared}"


def how(config: FindConfig) -> str:
    """How it was decided."""
    return (
        "Feature and threshold are chosen for each label on half of the pictures, by the largest F1 over image tokens; "
        "F1 and its 95% interval (over pictures) are those of the other half. A token shows a character if more than "
        "half of the character's box lies in it, an object if more than half of the token lies on it. The best unit of "
        "the activations, with either sign, was chosen and scored alike; permuted is the largest F1 of "
        f"{config.permutations} permutations of the labels between pictures of one kind, chosen and scored alike. A "
        f"label has a feature if the interval begins at {config.at_least:g} or above, and all permutations are below."
    )
