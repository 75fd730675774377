"""Which of TransformerLens' own tools run with an image in the input. `python -m tools.tool_page` runs each on
minute random models and writes docs/transformerlens.md; a tool that refuses is shown with the line that does."""

# TransformerLens annotates inputs as token tensors and models as bridges; what it accepts is what is asked here:
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens import SVDInterpreter, patching
from transformer_lens.head_detector import detect_head
from transformer_lens.tools import analysis
from transformer_lens.tools.analysis import attribution_patching, interchange
from transformer_lens.tools.analysis.projection_kernel import (
    attention_head_subspace_affinity,
    orthonormal_subspace,
    projection_kernel,
)
from transformer_lens.weight_processing import ProcessWeights

from hooked_vlm.analysis.text_tables import markdown_table
from hooked_vlm.model.vlm import HookedVLM
from tools.tool_setups import Setup, setups

HOOK = "blocks.0.hook_resid_post"


Tool = Callable[[Setup], Any]


def _patch(name: str, s: Setup) -> Any:
    with torch.no_grad():
        return getattr(patching, name)(s.model, s.corrupt, s.caches[0], s.metric)


def _direct_path(s: Setup, component: str = "q") -> Any:
    with torch.no_grad():
        return patching.get_act_patch_direct_path(
            s.model,
            s.corrupt,
            *s.caches,
            s.metric,
            src_layer=0,
            src_head=0,
            component=component,
            verbose=False,
        )


def _all_sources(s: Setup) -> Any:
    with torch.no_grad():
        return patching.get_act_patch_direct_path_all_sources(s.model, s.corrupt, *s.caches, s.metric, verbose=False)


@contextmanager
def _edges_in_sight(model: HookedVLM) -> Iterator[None]:
    """What edges are read from: head results, and an input of its own for every reader."""
    switches = [getattr(model, f"set_use_{name}") for name in ("attn_result", "split_qkv_input", "hook_mlp_in")]
    try:
        for switch in switches:
            switch(True)
        yield
    finally:
        for switch in switches:
            switch(False)


def _attribution(s: Setup, granularity: Literal["node", "edge"]) -> Any:
    config = attribution_patching.EdgeAttributionConfig(ig_steps=1, granularity=granularity)
    with _edges_in_sight(s.model) if granularity == "edge" else nullcontext():
        return analysis.attribution_patch(s.model, s.clean, s.corrupt, s.metric, config)


def _faithfulness(s: Setup, circuit: Sequence[Any] = (), ablation: Literal["corrupt", "mean"] = "corrupt") -> Any:
    config = analysis.FaithfulnessConfig(ablation=ablation)
    others = {"mean_tokens": s.both} if ablation == "mean" else {}
    with _edges_in_sight(s.model):
        return analysis.faithfulness(s.model, s.clean, s.corrupt, s.metric, circuit, config, **others)


def _writers(s: Setup) -> Any:
    with _edges_in_sight(s.model):
        return attribution_patching.capture_writer_outputs(s.model, s.clean)


def _collected(s: Setup) -> Tensor:
    return interchange.collect_activations(s.model, HOOK, s.both, s.task, positions=torch.tensor([s.last, s.last]))


def _interchange(s: Setup, run: Callable[..., Any], placebo: bool = False) -> Any:
    """Each of the two inputs with the other's stream; or moved as far within a random subspace."""
    everything: Any = interchange.SubspaceInterchange(torch.eye(8))
    if placebo:
        everything = interchange.NormMatchedPlacebo(everything, interchange.random_basis(8, 2, seed=0))
    return run(
        s.model, HOOK, everything, s.both, _collected(s).flip(0), s.task, positions=torch.tensor([s.last, s.last])
    )


def _all_cells(s: Setup) -> Any:
    with torch.no_grad():
        return patching.generic_activation_patch(
            s.model,
            s.corrupt,
            s.caches[0],
            s.metric,
            patching.layer_pos_patch_setter,
            "resid_pre",
            index_axis_names=("layer", "pos"),
        )


def _das(s: Setup) -> Any:
    at, targets = torch.tensor([s.last, s.last]), torch.tensor([0, 1])
    settings: dict[str, Any] = {"rank": 1, "base_positions": at, "source_positions": at, "epochs": 1}
    return interchange.fit_das(s.model, HOOK, s.both, s.both, targets, s.task, **settings)


def _subspaces(s: Setup) -> tuple[Any, Any]:
    attn: Any = s.model.blocks[0].attn
    bases = (orthonormal_subspace(w.detach()) for w in (attn.W_O[0].T, attn.W_Q[0]))
    return tuple(bases)


def _probe_data(s: Setup) -> tuple[Tensor, Tensor]:
    features = torch.cat([cache["resid_post", 1][0] for cache in s.caches] * 3)
    return features + 0.01 * torch.randn(features.shape), torch.arange(len(features)) % 2 == 0


def _decomposed(s: Setup) -> Any:
    return analysis.get_sparse_decomposition(s.caches[0]["resid_post", 1][0, -1], s.model.W_U.detach().T, k=2)


def _coordinate(s: Setup) -> Any:
    source = int(_decomposed(s).support[0])
    stream, dictionary = s.caches[0]["resid_post", 1][0, -1], s.model.W_U.detach().T
    return analysis.solve_coordinate_patch(stream, dictionary, source, (source + 1) % len(dictionary), k=2)


def _lens(s: Setup, **settings: Any) -> Any:
    with torch.no_grad():
        return analysis.logit_lens(s.model, s.clean, **settings)


def _readout(s: Setup) -> Any:
    with torch.no_grad():
        return analysis.logit_readout(s.model, s.caches[0]["resid_post", 1], targets=[3, 4], return_type="log_probs")


def _direct(s: Setup, unit: str) -> Any:
    with torch.no_grad():
        return analysis.direct_logit_attribution(s.model, s.clean, 3, 4, unit=unit)


def _detect(s: Setup, pattern: Any) -> Any:
    with torch.no_grad():
        return detect_head(s.model, s.clean, pattern)


def _detect_tensor(s: Setup) -> Any:
    return _detect(s, torch.eye(s.last + 1))


def _cache(call: Callable[[Any], Any], s: Setup) -> Any:
    with torch.no_grad():
        return call(s.model.run_with_cache(s.clean)[1])


def _gradient(s: Setup) -> Any:
    return attribution_patching.cache_activation_and_gradient(s.model, s.clean, s.metric, lambda name: name == HOOK)


def _singular(s: Setup, kind: str) -> Any:
    return SVDInterpreter(s.model).get_singular_vectors(kind, 0, num_vectors=2, head_index=0)


PATCHING = [name for name in dir(patching) if name.startswith("get_act_patch") and "direct_path" not in name]
CACHE: dict[str, Callable[[Any], Any]] = {
    "accumulated_resid": lambda c: c.accumulated_resid(apply_ln=True),
    "decompose_resid": lambda c: c.decompose_resid(apply_ln=True),
    "compute_head_results": lambda c: c.compute_head_results(),
    "stack_head_results": lambda c: c.stack_head_results(apply_ln=True),
    "stack_activation": lambda c: c.stack_activation("resid_post"),
    "get_neuron_results": lambda c: c.get_neuron_results(0),
    "stack_neuron_results": lambda c: c.stack_neuron_results(1, apply_ln=True),
    "get_full_resid_decomposition": lambda c: c.get_full_resid_decomposition(apply_ln=True),
    "apply_ln_to_stack": lambda c: c.apply_ln_to_stack(c.decompose_resid()),
    "logit_attrs": lambda c: c.logit_attrs(c.decompose_resid(), tokens=3),
    "logit_lens": lambda c: c.logit_lens(),
}

TOOLS: dict[str, dict[str, Tool]] = {
    "transformer_lens.patching": {
        "`generic_activation_patch`": _all_cells,
        **{f"`{name}`": partial(_patch, name) for name in PATCHING},
        '`get_act_patch_direct_path`, component "q"': _direct_path,
        "`get_act_patch_direct_path_all_sources`": _all_sources,
        '`get_act_patch_direct_path`, component "k"': partial(_direct_path, component="k"),
        '`get_act_patch_direct_path`, component "v"': partial(_direct_path, component="v"),
    },
    "transformer_lens.head_detector": {
        **{
            f'`detect_head`, "{name}"': partial(_detect, pattern=name)
            for name in ("previous_token_head", "duplicate_token_head", "induction_head")
        },
        "`detect_head`, a tensor pattern": _detect_tensor,
    },
    "ActivationCache": {f"`{name}`": partial(_cache, call) for name, call in CACHE.items()},
    "transformer_lens.tools.analysis": {
        "`logit_lens`": partial(_lens, positions=None),
        "`logit_readout`": _readout,
        **{f'`direct_logit_attribution`, unit "{u}"': partial(_direct, unit=u) for u in ("component", "head", "layer")},
        "`attribution_patch`, nodes": partial(_attribution, granularity="node"),
        "`attribution_patch`, edges": partial(_attribution, granularity="edge"),
        "`faithfulness`": _faithfulness,
        '`faithfulness`, ablation "mean"': partial(_faithfulness, ablation="mean"),
        "`cache_activation_and_gradient`": _gradient,
        "`capture_writer_outputs`": _writers,
        "`collect_activations`": _collected,
        "`intervened_logits`": partial(_interchange, run=interchange.intervened_logits),
        "`run_with_intervention`": partial(_interchange, run=interchange.run_with_intervention),
        "`run_with_intervention`, `NormMatchedPlacebo`": partial(
            _interchange, run=interchange.run_with_intervention, placebo=True
        ),
        "`mean_difference_basis`": lambda s: interchange.mean_difference_basis(_collected(s), ["clean", "corrupt"]),
        "`probe_basis`": lambda s: interchange.probe_basis(_collected(s)),
        "`neuron_basis`": lambda s: interchange.neuron_basis(s.model.cfg.d_mlp, [0, 3]),
        "`random_neuron_basis`": lambda s: interchange.random_neuron_basis(s.model.cfg.d_mlp, 2, seed=0),
        "`arbitrary_targets`": lambda s: interchange.arbitrary_targets(["clean", "corrupt"], 2, seed=0),
        "`fit_das`": _das,
        "`reinitialized`": lambda s: interchange.reinitialized(s.model, seed=0),
        "`attention_head_subspace_affinity`": lambda s: attention_head_subspace_affinity(
            s.model, target_role="Q", layer_order="all"
        ),
        "`projection_kernel`": lambda s: projection_kernel(*_subspaces(s)),
        "`random_projection_kernel_moments`": lambda s: analysis.random_projection_kernel_moments(8, 4),
        "`fit_sparse_probe`": lambda s: analysis.fit_sparse_probe(*_probe_data(s), k=2),
        "`sweep_sparse_probe`": lambda s: analysis.sweep_sparse_probe(*_probe_data(s), ks=[1, 2]),
        "`get_sparse_decomposition`": _decomposed,
        "`solve_coordinate_patch`": _coordinate,
        "`JacobianLens.fit`": lambda s: analysis.JacobianLens.fit(s.model, ["a prompt"], corpus="none"),
    },
    "transformer_lens.weight_processing, on `model.tl_state_dict()`": {
        "`ProcessWeights.fold_layer_norm`": lambda s: ProcessWeights.fold_layer_norm(
            s.model.tl_state_dict(), s.model.cfg, fold_biases=False, center_weights=False
        ),
        "`ProcessWeights.center_unembed`": lambda s: ProcessWeights.center_unembed(
            s.model.tl_state_dict(), cfg=s.model.cfg
        ),
        "`ProcessWeights.fold_value_biases`": lambda s: ProcessWeights.fold_value_biases(
            s.model.tl_state_dict(), s.model.cfg
        ),
        "`ProcessWeights.process_weights`": lambda s: ProcessWeights.process_weights(
            s.model.tl_state_dict(), s.model.cfg, center_writing_weights=False
        ),
        "`ProcessWeights.refactor_factored_attn_matrices`": lambda s: ProcessWeights.refactor_factored_attn_matrices(
            s.model.tl_state_dict(), s.model.cfg
        ),
    },
    "transformer_lens.SVDInterpreter": {
        f'`get_singular_vectors`, "{kind}"': partial(_singular, kind=kind) for kind in ("OV", "w_in", "w_out")
    },
}


def outcome(tool: Tool, setup: Setup) -> str:
    """ "runs", or where in TransformerLens it is refused, and how."""
    try:
        tool(setup)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/transformer_lens/" in f.filename]
        if not frames:
            raise  # ours to mend
        where = frames[-1]
        said = " ".join(str(error).split())
        short = said if len(said) <= 110 else said[:110].rsplit(" ", 1)[0] + " ..."
        return f"`{where.filename.rsplit('/transformer_lens/', 1)[1]}:{where.lineno}` {short}"
    return "runs"


_HEAD = """\
# TransformerLens' tools with an image in the input

Which of TransformerLens' tools take pictures, and what those that refuse say: for bringing over code written for it.
Generated by `python -m tools.tool_page` with TransformerLens {version}; do not edit.

Every tool below was called on a model of each family, with a `VLMInputs` in place of tokens. A number stands for a
refusal: below the table are the line of TransformerLens that refuses, and what it says. LLaVA-1.5's sizes have no
grouped queries (no more than InternVL2-4B), so that what needs a key for each query head runs there. The numbers are
tested against manual patches, autograd and the logits in every family (`tests/model/test_transformerlens.py`).

- `patching` of TransformerLens runs one forward pass for each cell. `hooked_vlm.patching` gives the same numbers for
  several examples at once, on the sweep engine, with statistics ([patching.md](patching.md)).
- Their annotations name token tensors, so type checkers complain about a `VLMInputs`; the tools accept it.
- Norms are not folded in these models. `VLMCache` applies their weights, so `apply_ln`, `logit_attrs` and
  `direct_logit_attribution` sum to the true logits; with a plain `ActivationCache` they would not.
- `random_init_bridge` and `JacobianLens.from_pretrained` take the name of a repository, not a model.
- What enters the stream behind blocks (Qwen3-VL's DeepStack) is a part of its own in `decompose_resid`,
  `get_full_resid_decomposition` and `direct_logit_attribution`; it is no node of `attribution_patch`.
- Behind a norm of what attention and MLPs write (Gemma 3, PaliGemma 2) the outputs of heads and neurons are what that
  norm makes of them with the run's denominator, so that they sum to what the layer added: in `stack_head_results`,
  neuron results, `get_full_resid_decomposition` and `direct_logit_attribution`. `hook_result` is before the norm.
  Direct paths and edges, which take z W_O for a head's write, refuse.
- Under a soft cap of logits (PaliGemma 2) parts sum to the logits before it; `logit_lens` and `logit_readout` apply
  it. `ProcessWeights.center_unembed` knows no cap and would change log-probabilities: `hooked_vlm`'s `center_unembed`
  refuses.
- Norms that multiply by 1 + weight (Gemma 3, PaliGemma) show their weight as `w`, and `cfg.rmsnorm_uses_offset` says
  so, which these tools read; `norm.factor` is what is multiplied.
- Where a family has no value biases (Qwen3-VL, InternVL3.5, SmolVLM, Gemma, LLaVA with Llama or Mistral),
  `fold_value_biases` of `hooked_vlm` refuses, and TransformerLens' adds zeros.
- `ProcessWeights` works on copies under TransformerLens' keys; `hooked_vlm.model.weight_processing` folds the model
  itself.

"""


def page() -> str:
    """docs/transformerlens.md."""
    families = setups()
    parts = [_HEAD.format(version=version("transformer_lens"))]
    for module, tools in TOOLS.items():
        refusals: dict[str, int] = {}
        rows = [[name, *(_cell(outcome(tool, s), refusals) for s in families.values())] for name, tool in tools.items()]
        notes = "".join(f"{number}. cannot: {said}\n" for said, number in refusals.items())
        parts.append(f"## {module}\n\n{markdown_table(['tool', *families], rows)}" + (f"\n{notes}" if notes else ""))
    return "\n".join(parts)


def _cell(said: str, refusals: dict[str, int]) -> str:
    """ "runs", or the number of a refusal, which is noted."""
    return said if said == "runs" else f"cannot ({refusals.setdefault(said, len(refusals) + 1)})"


if __name__ == "__main__":
    path = Path("docs/transformerlens.md")
    path.write_text(page(), encoding="utf-8")
    print(f"wrote {path}")
