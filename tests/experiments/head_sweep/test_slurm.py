"""The array job of docs/slurm.md, its tasks started as processes: one is preempted, all are merged."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pages import ROOT

from hooked_vlm.toys import make_page

N = 3
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ENVIRONMENT = os.environ | {"PATH": PATH, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_an_array_job_with_a_preempted_task_is_the_whole(tmp_path: Path) -> None:
    rng, lines = np.random.default_rng(5), []
    for number in range(7):
        page = make_page(rng, n_lines=3)
        page.image.save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"id": str(number), "prompt": page.question(1), "images": [f"{number}.png"]}))
    (tmp_path / "pages.jsonl").write_text("\n".join(lines), encoding="utf-8")
    script = re.findall(r"```bash\n(#!/bin/bash.*?)```", (ROOT / "docs" / "slurm.md").read_text("utf-8"), re.DOTALL)[0]
    script = script.replace("Qwen/Qwen2-VL-7B-Instruct", "toy-qwen2-vl").replace("/8", f"/{N}")
    assert "--array=0-7" in script and "--requeue" in script
    (tmp_path / "job.sh").write_text(script, encoding="utf-8")

    def start(task: int) -> subprocess.Popen[bytes]:
        own = ENVIRONMENT | {"SLURM_ARRAY_TASK_ID": str(task)}
        return subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=own, start_new_session=True)

    tasks = [start(task) for task in range(N)]
    parts = tmp_path / "heads" / "1" / "parts"
    while tasks[1].poll() is None and not list(parts.glob("*.parquet")):
        time.sleep(0.01)
    os.killpg(tasks[1].pid, signal.SIGTERM)
    tasks[1].wait()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert kept and not (parts.parent / "sweep.json").exists()
    tasks[1] = start(1)  # requeued
    assert [task.wait() for task in tasks] == [0] * N
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was done is not done again"
    folders = [f"heads/{task}" for task in range(N)]
    subprocess.run(["hooked-vlm", "merge", *folders, "--out", "heads/all"], cwd=tmp_path, check=True, env=ENVIRONMENT)
    whole = ["hooked-vlm", "sweep", "--data", "pages.jsonl", "--out", "whole", "--quiet"]
    subprocess.run(whole, cwd=tmp_path, check=True, env=ENVIRONMENT)
    assert (tmp_path / "heads/all/sweep.csv").read_bytes() == (tmp_path / "whole/sweep.csv").read_bytes()
    last = json.loads((tmp_path / "heads/1/progress.jsonl").read_text().splitlines()[-1])
    assert last["step"] == last["total"]
