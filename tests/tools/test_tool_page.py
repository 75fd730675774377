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
    Setup,
    _collected,
    _faithfulness,
    _interchange,
    outcome,
    page,
    setups,
)

PAGE = Path(__file__).parents[2] / "docs" / "transformerlens.md"


@pytest.mark.slow
def test_the_page_is_generated() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_activation_patch_is_in_it() -> None:
    assert len(PATCHING) == 18 and all(f"`{name}`" in TOOLS["transformer_lens.patching"] for name in PATCHING)


def test_a_refusal_names_a_line_of_theirs_and_is_not_of_our_calls_making() -> None:
    refused = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if "cannot" in line and line.startswith("|")
    ]
    assert refused and all(re.search(r"cannot: `[\w/]+\.py:\d+` ", line) for line in refused)
    names = {line.split("|")[1].strip() for line in refused}
    assert names == {
        '`get_act_patch_direct_path`, component "k"',
        '`get_act_patch_direct_path`, component "v"',
        "`attribution_patch`, edges",
        "`faithfulness`",
        '`faithfulness`, ablation "mean"',
        "`JacobianLens.fit`",
        "`ProcessWeights.refactor_factored_attn_matrices`",
    }


def test_an_empty_circuit_recovers_nothing_and_all_edges_everything() -> None:
    *_, ungrouped = setups()
    nothing = _faithfulness(ungrouped)
    clean, corrupt = (ungrouped.metric(ungrouped.model(x)).item() for x in (ungrouped.clean, ungrouped.corrupt))
    assert abs(nothing.full_metric - clean) < 1e-5 and abs(nothing.corrupt_metric - corrupt) < 1e-5
    assert abs(nothing.recovered) < 1e-4
    found = TOOLS["transformer_lens.tools.analysis"]["`attribution_patch`, edges"](ungrouped)
    everything = _faithfulness(ungrouped, found.top_edges(k=nothing.total_edges))
    assert everything.circuit_size == everything.total_edges and abs(everything.recovered - 1) < 1e-4


def test_run_with_intervention_is_a_patch_of_the_stream() -> None:
    for setup in setups()[:2]:
        _, cache = setup.model.run_with_cache(setup.both, names_filter=HOOK)
        assert torch.equal(_collected(setup), cache[HOOK][:, 6])
        edit = PatchActivation(HOOK, cache[HOOK].flip(0), (6,))
        expected = setup.model.run_with_hooks(setup.both, fwd_hooks=edit.hooks(setup.model, setup.both))[:, -1, [3, 4]]
        for run in (interchange.run_with_intervention, interchange.intervened_logits):
            torch.testing.assert_close(_interchange(setup, run), expected, atol=1e-5, rtol=1e-5)


def test_an_error_of_our_own_is_no_refusal_of_theirs() -> None:
    def broken(setup: Setup) -> None:
        raise ZeroDivisionError

    try:
        outcome(broken, setups()[0])
    except ZeroDivisionError:
        return
    raise AssertionError("the error was taken for TransformerLens'")
