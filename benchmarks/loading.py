"""Loading a checkpoint in the shape of Qwen2-VL-2B, bfloat16: time and memory beside `transformers`.

Each way loads in a process of its own, because what one has mapped the other would find in memory.

python benchmarks/loading.py [--device cuda] [--rounds 5]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from interleaved import Settings, Timing, ratios, read_settings, save, show
from models import shape_of_2b

LOAD = """
import json, sys, time, torch
sys.path.insert(0, sys.argv[4])
from interleaved import PeakMemory
kind, folder, device = sys.argv[1:4]
if kind == "transformers":
    from transformers import Qwen2VLForConditionalGeneration as Model
    import transformers.modeling_utils
else:
    from hooked_vlm import HookedVLM as Model
torch.ones(8, device=device) @ torch.ones(8, device=device)
with PeakMemory(device) as peak:
    start = time.perf_counter()
    if kind == "transformers":
        model = Model.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    else:
        model = Model.from_pretrained(folder, device=device)
    touched = sum(float(p.view(-1)[:: 2048 // p.element_size()].float().sum()) for p in model.parameters())
    seconds = time.perf_counter() - start
print(json.dumps([seconds, peak.extra_bytes]))
"""


def main() -> None:
    settings = read_settings(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        shape_of_2b("cpu", torch.bfloat16).save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        found: dict[str, list[tuple[float, int]]] = {"transformers": [], "hooked_vlm": []}
        for _ in range(settings.rounds):
            for kind, runs in found.items():
                runs.append(load(kind, folder, settings))
    measured = {
        kind: Timing(median(s for s, _ in runs), int(median(m for _, m in runs))) for kind, runs in found.items()
    }
    show(f"loading {size / 2**30:.2f} GiB of weights and reading each page once", measured)
    shares = {kind: timing.extra_bytes / size for kind, timing in measured.items()}
    print("  memory as a share of the file: " + ", ".join(f"{kind} {share:.2f}" for kind, share in shares.items()))
    save(settings, "loading", {"2B": {**ratios(measured), "share of the file in memory": shares}})


def load(kind: str, folder: str, settings: Settings) -> tuple[float, int]:
    command = [sys.executable, "-c", LOAD, kind, folder, settings.device, str(Path(__file__).parent)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, extra = json.loads(out.strip().splitlines()[-1])
    return seconds, extra


if __name__ == "__main__":
    main()
