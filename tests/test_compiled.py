"""Compiled blocks: the same numbers, no hook passed over, a clear refusal where nothing can be compiled."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import inputs, tiny_model
from torch import Tensor

import hooked_vlm.model as model_module
from hooked_vlm import HookedVLM
from hooked_vlm.attention import AttentionRun
from hooked_vlm.decoder import Block
from hooked_vlm.token_layout import InputError

# In a process of its own: the type checks that tests install would be compiled along.
COMPARE = """
import numpy as np
import torch
from hooked_vlm import HookedVLM
from hooked_vlm.experiments.toy.data import make_page

model = HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")
pages = [make_page(np.random.default_rng(i), n_lines=n) for i, n in enumerate([3, 6])]
inputs = [model.to_inputs(page.question(0), images=page.image) for page in pages]
both = model.to_inputs([page.question(0) for page in pages], [page.image for page in pages])
name = "blocks.2.attn.hook_z"
double = [(name, lambda z, hook: z * 2)]

def outputs():
    found = []
    for x in (*inputs, both):
        found += [model(x), model(x, logits_at="last"), model.run_with_hooks(x, fwd_hooks=double)]
        found.append(model.run_with_cache(x, names_filter=name)[1][name])
        found.append(model.generate(x, 4, fwd_hooks=double))
    loss = model(inputs[0], return_type="loss")
    loss.backward()
    found.append(model.embed.weight.grad)
    model.zero_grad()
    return [x.detach().clone() for x in found]

plain = outputs()
model.set_use_compile(True)
compiled = outputs()
counters = torch._dynamo.utils.counters["stats"]
assert counters["unique_graphs"] >= 1, counters
for a, b in zip(plain, compiled, strict=True):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
print("same")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_same_and_hooks_still_act(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "same" in done.stdout


def test_a_machine_that_cannot_compile_is_told_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", fail)
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    with pytest.raises(InputError, match=r"does not work here \(no C\+\+ compiler\)"):
        model.set_use_compile(True)
    assert not model.cfg.use_compile


def test_loading_leaves_the_compiler_alone(tmp_path: Path) -> None:
    """It takes a second to load, and initial values of tensors that a checkpoint replaces would load it."""
    script = (
        "import sys; from hooked_vlm import HookedVLM; HookedVLM.from_pretrained('toy-internvl2'); "
        "print('torch._dynamo.symbolic_convert' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "False"


def test_only_passes_of_one_shape_without_hooks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(block: Block, stream: Tensor, run: AttentionRun, layer: int, *rest: object) -> Tensor:
        calls.append(layer)
        return block(stream, run, layer, *rest)

    monkeypatch.setattr(model_module, "compiled_block", lambda: counted)
    model = tiny_model()
    monkeypatch.setattr(model, "cfg", model.cfg.with_(use_compile=True))
    alike, padded = inputs([[5, 6, 7], [8, 9, 7]]), inputs([[5, 6, 7], [5, 6, 7, 8, 9]])
    model(alike)
    assert calls == list(range(model.cfg.n_layers))
    calls.clear()
    model.run_with_hooks(alike, fwd_hooks=[("blocks.1.mlp.hook_post", lambda x, hook: None)])
    assert calls == [layer for layer in range(model.cfg.n_layers) if layer != 1]
    calls.clear()
    model(padded)
    model(alike, past_kv_cache=model.new_kv_cache(2, 3))
    assert calls == []
