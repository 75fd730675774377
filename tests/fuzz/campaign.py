"""A long campaign against one target: `python tests/fuzz/campaign.py TARGET --seconds 300 --engine atheris`.

Prints how many cases were run, what became of them, the slowest, and what was found broken; writes the same as JSON.
atheris also says on stderr how many branches of the library it reached (`cov`). Without it cases are drawn by chance.
"""

import argparse
import importlib
import json
import os
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def campaign(name: str, seconds: float, seed: int, engine: str, out: Path) -> None:
    if engine == "atheris":
        atheris: Any = importlib.import_module("atheris")
        with atheris.instrument_imports(include=["hooked_vlm"]):
            from fuzz import laws, targets
    else:
        from fuzz import laws, targets
    import torch

    targets.prepare()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    target, figures = targets.TARGETS[name], laws.Figures()
    rng = random.Random(seed)
    for _ in range(3):  # whatever is made once, before memory is bounded
        figures.run(target, rng.randbytes(40))
    laws.bound_memory()
    start = time.monotonic()

    def one(data: bytes) -> None:
        figures.run(target, data)
        if time.monotonic() - start > seconds:
            told(name, engine, seed, time.monotonic() - start, figures, out)
            sys.stdout.flush()
            os._exit(0)  # the fuzzer's loop has no other end

    if engine == "chance":
        while True:
            one(rng.randbytes(rng.choice((8, 40, 200, 1000))))
    else:
        atheris: Any = importlib.import_module("atheris")
        corpus = out.with_suffix(".corpus")
        corpus.mkdir(parents=True, exist_ok=True)
        for i in range(64):
            (corpus / f"start{i}").write_bytes(rng.randbytes(rng.choice((40, 200))))
        flags = [f"-seed={seed + 1}", "-max_len=1500", "-timeout=600", "-rss_limit_mb=0", "-len_control=0",
                 "-handle_segv=0", "-handle_abrt=0", "-verbosity=1"]  # fmt: skip
        atheris.Setup([sys.argv[0], str(corpus), *flags], one)
        atheris.Fuzz()


def told(name: str, engine: str, seed: int, seconds: float, figures: Any, out: Path) -> None:
    """Print and keep the figures."""
    print(f"{name} ({engine}, seed {seed}): {figures.cases} cases in {seconds:.0f} s, slowest {figures.worst:.2f} s")
    print("  " + ", ".join(f"{outcome} {n}" for outcome, n in figures.outcomes.most_common()))
    print(f"  laws broken {figures.n_broken} times in {len(figures.broken)} places")
    for place, (message, case) in figures.broken.items():
        print(f"    {place}: {message[:160]}  [{len(case) // 2} bytes]")
    record = {"target": name, "engine": engine, "seed": seed, "seconds": seconds, "cases": figures.cases,
              "outcomes": figures.outcomes, "worst": figures.worst, "worst_case": figures.worst_case,
              "broken": figures.broken}  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("atheris", "chance"), default="chance")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    asked = parser.parse_args()
    out = asked.out / f"{asked.target}-{asked.engine}-{asked.seed}.json"
    campaign(asked.target, asked.seconds, asked.seed, asked.engine, out)


if __name__ == "__main__":
    main()
