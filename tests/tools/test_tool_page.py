"""The page about TransformerLens' tools is what running them gives."""

import re
from pathlib import Path

import pytest
import torch
from transformer_lens.tools.analysis import interchange

from hooked_vlm.interventions import PatchActivation
from tools.tool_page import (
    HOOK,
    PATCHING,
    TOOLS,
    _collected,
    _faithfulness,
    _interchange,
    outcome,
    page,
)
from tools.tool_setups import Setup, setups

PAGE = Path(__file__).parents[2] / "docs" / "transformerlens.md"


@pytest.mark.slow
def test_the_page_is_generated() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_activation_patch_is_in_it() -> None:
    assert len(PATCHING) == 18 and all(f"`{name}`" in TOOLS["transformer_lens.patching"] for name in PATCHING)


def test_a_refusal_names_a_line_of_theirs_and_is_not_of_our_calls_making() -> None:
    names: set[str] = set()
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        refused = [line for line in section.splitlines() if line.startswith("|") and "cannot" in line]
        cited = {number for line in refused for number in re.findall(r"cannot \((\d+)\)", line)}
        assert cited == set(re.findall(r"^(\d+)\. cannot: `[\w/]+\.py:\d+` ", section, re.MULTILINE))
        names |= {line.split("|")[1].strip() for line in refused}
    assert names == {
        '`get_act_patch_direct_path`, component "q"',
        "`get_act_patch_direct_path_all_sources`",
        '`get_act_patch_direct_path`, component "k"',
        '`get_act_patch_direct_path`, component "v"',
        "`attribution_patch`, edges",
        "`faithfulness`",
        '`faithfulness`, ablation "mean"',
        "`JacobianLens.fit`",
        "`ProcessWeights.refactor_factored_attn_matrices`",
    }


def test_paths_are_refused_where_a_norm_stands_behind_attention() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    families = next(line for line in lines if line.startswith("| tool")).split("|")[2:]
    (row,) = (line for line in lines if line.startswith("| `get_act_patch_direct_path_all_sources`"))
    refused = {family.strip() for family, cell in zip(families, row.split("|")[2:], strict=True) if "cannot" in cell}
    assert refused == {"Gemma 3", "PaliGemma 2"}


def test_an_empty_circuit_recovers_nothing_and_all_edges_everything() -> None:
    ungrouped = setups()["LLaVA-1.5"]
    nothing = _faithfulness(ungrouped)
    clean, corrupt = (ungrouped.metric(ungrouped.model(x)).item() for x in (ungrouped.clean, ungrouped.corrupt))
    assert abs(nothing.full_metric - clean) < 1e-5 and abs(nothing.corrupt_metric - corrupt) < 1e-5
    assert abs(nothing.recovered) < 1e-4
    found = TOOLS["transformer_lens.tools.analysis"]["`attribution_patch`, edges"](ungrouped)
    everything = _faithfulness(ungrouped, found.top_edges(k=nothing.total_edges))
    assert everything.circuit_size == everything.total_edges and abs(everything.recovered - 1) < 1e-4


def test_run_with_intervention_is_a_patch_of_the_stream() -> None:
    for setup in setups().values():
        _, cache = setup.model.run_with_cache(setup.both, names_filter=HOOK)
        assert torch.equal(_collected(setup), cache[HOOK][:, setup.last])
        edit = PatchActivation(HOOK, cache[HOOK].flip(0), (setup.last,))
        expected = setup.model.run_with_hooks(setup.both, fwd_hooks=edit.hooks(setup.model, setup.both))[:, -1, [3, 4]]
        for run in (interchange.run_with_intervention, interchange.intervened_logits):
            torch.testing.assert_close(_interchange(setup, run), expected, atol=1e-5, rtol=1e-5)


def test_an_error_of_our_own_is_no_refusal_of_theirs() -> None:
    def broken(setup: Setup) -> None:
        raise ZeroDivisionError

    try:
        outcome(broken, setups()["Qwen2-VL"])
    except ZeroDivisionError:
        return
    raise AssertionError("the error was taken for TransformerLens'")
