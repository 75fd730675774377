"""A model spread over devices, with parts offloaded, computes what it does on one device."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import towers
from families import FAMILIES, KINDS, ROWS, inputs_of, model_and_inputs, tiny_model
from planted import dictionary_at, random_dictionary
from pretend_devices import FIRST, SECOND, PretendDevices
from torch import Tensor

from hooked_vlm import HookedVLM, sweep
from hooked_vlm.analysis.rows import attention_rows, generate_with_rows
from hooked_vlm.errors import CheckpointError, InputError
from hooked_vlm.features import EditFeatures, reconstruction_quality, run_with_features
from hooked_vlm.interventions import (
    AddVector,
    BlockAttention,
    Compose,
    MeanHeads,
    PatchActivation,
    RedistributeSink,
    ReplaceImageKV,
    ReplaceImageTokens,
    UniformAttention,
    ZeroHeads,
    mean_head_outputs,
    mean_image_kv,
)
from hooked_vlm.lens import head_lens, logit_attribution, logit_lens
from hooked_vlm.loading import placement
from hooked_vlm.metrics import log_prob
from hooked_vlm.model.fingerprints import weights_hash
from hooked_vlm.model.weight_processing import fold_ln
from hooked_vlm.patching import Pair, attribute, patch, patch_paths
from hooked_vlm.vision_config import VisionConfig

LAYOUTS: dict[str, dict[str, Any]] = {
    "disk": {"": "cpu", "blocks.1": "disk", "vision": "disk", "projector": "disk"},
    "disk, written anew": {"": "cpu", "blocks": "disk", "vision.blocks.0": "disk"},
    "two devices": {"": FIRST, "blocks.1": SECOND, "vision.blocks.1": SECOND, "projector": SECOND},
    "a device, the CPU, disk": {"": FIRST, "blocks.0": "cpu", "blocks.2": "disk", "vision": "cpu", "projector": SECOND},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family."""
    made = {family: tmp_path_factory.mktemp("checkpoints") / family for family in FAMILIES}
    for family, folder in made.items():
        model_and_inputs(family, "padded")[0].save_pretrained(folder)
    return made


Spread = tuple[Any, Any, Any]
"""The model on one device, the same spread, and what must be active while that is used."""


USUAL = {("internvl2", "disk, written anew"), ("qwen3-vl", "two devices"), ("llava-onevision", "disk")}
USUAL.add(("qwen3-vl", "a device, the CPU, disk"))
"""Every layout in one family; with --full the one of all kinds of places in every family, with --run-slow all."""


def kept_for(family: str, layout: str) -> Any:
    if (family, layout) in USUAL:
        return ()
    return pytest.mark.full if layout == "a device, the CPU, disk" else pytest.mark.slow


CASES = [
    pytest.param((family, layout), marks=kept_for(family, layout), id=f"{family}: {layout}")
    for family in FAMILIES
    for layout in LAYOUTS
]


@pytest.fixture(scope="module", params=CASES)
def models(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, layout = request.param
    devices = nullcontext() if "device" not in layout else PretendDevices()
    offload = tmp_path_factory.mktemp("offload") / "weights" if "anew" in layout else None
    with devices:
        spread = HookedVLM.from_pretrained(folders[family], device_map=LAYOUTS[layout], offload_folder=offload)
    return family, HookedVLM.from_pretrained(folders[family], device="cpu"), spread, devices


def values(out: Any) -> Iterator[Any]:
    """All arrays and numbers in a result, as arrays on the CPU."""
    if isinstance(out, Tensor):
        yield out.detach().cpu().numpy()
    elif isinstance(out, dict):
        yield from (value for key in sorted(out) for value in values(out[key]))
    elif isinstance(out, list | tuple):
        yield from (value for part in out for value in values(part))
    else:
        yield np.asarray(out)


def rotated(x: Tensor, hook: Any) -> Tensor:
    """An edit that mixes with a tensor made on the activation's device."""
    return x.roll(1, -1) * torch.linspace(0.5, 1, x.shape[-1], device=x.device)


def with_loss(model: Any, inputs: Any) -> Any:
    """Inputs that have a loss: a prompt whose tokens see each other both ways has none, an answer has."""
    if model.cfg.bidirectional != "prompt":
        return inputs
    return replace(inputs, n_generated=tuple(b - a for a, b in zip(inputs.first, inputs.stop, strict=True)))


def forward(model: Any, inputs: Any) -> Any:
    answer = torch.tensor([[5, 6]] * len(inputs))
    return (
        model(inputs),
        model(with_loss(model, inputs), return_type="both"),
        model(inputs, logits_at="last"),
        model.log_probs(inputs, answer),
    )


def start_and_stop(model: Any, inputs: Any) -> Any:
    stream = model(inputs, stop_at_layer=2)
    return stream, model(inputs, start_at_layer=2, resid=stream)


def hooks(model: Any, inputs: Any) -> Any:
    names = ["vision.hook_embed", "vision.blocks.1.attn.hook_z", "projector.hook_post", "hook_image_features"]
    names += ["hook_embed", "blocks.0.attn.hook_pattern", "blocks.1.attn.hook_rot_k", "blocks.2.mlp.hook_pre"]
    names += ["vision.blocks.0.attn.hook_attn_scores", "ln_final.hook_out"]
    names += ["blocks.0.hook_deepstack", "blocks.1.hook_deepstack", "projector.deepstack.0.hook_post"]
    there = [name for name in names if name in model.hook_dict]  # not every projector has an activation, or DeepStack
    return [model.run_with_hooks(inputs, fwd_hooks=[(name, rotated)]) for name in there]


def optional_points(model: Any, inputs: Any) -> Any:
    for switch in (model.set_use_attn_result, model.set_use_split_qkv_input, model.set_use_hook_mlp_in):
        switch(True)
    names = [f"blocks.{layer}.{point}" for layer in range(3) for point in ("attn.hook_result", "attn.hook_q_input")]
    found = model.run_with_cache(inputs, names_filter=names)
    for switch in (model.set_use_attn_result, model.set_use_split_qkv_input, model.set_use_hook_mlp_in):
        switch(False)
    return found[0], dict(found[1].cache_dict)


def cache(model: Any, inputs: Any) -> Any:
    logits, found = model.run_with_cache(inputs)
    patterns = [found["pattern", layer] for layer in range(3)], [found.vision["pattern", layer] for layer in range(2)]
    return logits, dict(found.cache_dict), dict(found.vision.cache_dict), patterns


def cache_tools(model: Any, inputs: Any) -> Any:
    _, found = model.run_with_cache(inputs)
    streams = found.accumulated_resid(apply_ln=True)
    heads = found.stack_head_results(pos_slice=-1)
    return streams, heads, found.logit_attrs(streams, tokens=7), model.accumulated_bias(2), found.on_image(1, 0)


def gradients(model: Any, inputs: Any) -> Any:
    names = ["vision.blocks.1.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.2.attn.hook_z"]
    with torch.enable_grad():
        inputs_with_loss = with_loss(model, inputs)
        found = model.run_with_cache(inputs_with_loss, names_filter=names, incl_bwd=True, return_type="loss")[1]
    model.zero_grad()
    pair = Pair(inputs, replace(inputs, pixel_values=inputs.pixel_values.flip(0)))
    estimated = attribute(model, pair, "resid_pre", log_prob(7), where="final", check=0)
    return {name: found[f"{name}_grad"] for name in names}, estimated.values


def interventions(model: Any, inputs: Any) -> list[Any]:
    source = model.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_resid_post"))[1]
    means = mean_image_kv(model, [inputs])
    return [
        ZeroHeads(((0, 1), (1, 2))),
        ZeroHeads(((2, 1),), positions="final"),
        MeanHeads(((1, 0),), mean_head_outputs(model, [inputs])),
        ReplaceImageKV(((1, 1), (2, 3))),
        ReplaceImageKV(((1, 2),), baseline=means),
        ReplaceImageKV(((2, 2),), baseline="knockout"),
        BlockAttention.in_layers(model, range(2), query="final", key="image"),
        RedistributeSink(((1, 1),), 0.3),
        UniformAttention(((2, 0),)),
        AddVector("blocks.1.hook_resid_post", torch.linspace(-1, 1, 64), positions="image"),
        PatchActivation("blocks.1.hook_resid_post", source["blocks.1.hook_resid_post"] * 2, positions="final"),
        ReplaceImageTokens(),
        AddVector("vision.hook_embed", torch.linspace(-1, 1, 32)),
        AddVector("vision.blocks.1.hook_resid_post", torch.linspace(-1, 1, 32)),
        AddVector("hook_image_features", torch.linspace(-1, 1, 64)),
        Compose((ZeroHeads(((0, 0),)), AddVector("vision.blocks.0.hook_resid_post", torch.ones(32)))),
    ]


def swept(model: Any, inputs: Any) -> Any:
    result = sweep(model, inputs, interventions(model, inputs), log_prob(7))
    return result.values, result.baseline


def one_by_one(model: Any, inputs: Any) -> Any:
    return [
        model.run_with_hooks(inputs, fwd_hooks=one.hooks(model, inputs), logits_at="last")
        for one in interventions(model, inputs)
        if "Compose" not in str(type(one))
    ]


def generation(model: Any, inputs: Any) -> Any:
    edit = ReplaceImageKV(((1, 1), (2, 3))).hooks(model, inputs)
    sampled = model.generate(inputs, 4, do_sample=True, generator=torch.Generator().manual_seed(0))
    return model.generate(inputs, 6, stop_at_eos=False), model.generate(inputs, 4, fwd_hooks=edit), sampled


def rows(model: Any, inputs: Any) -> Any:
    last = torch.tensor(inputs.stop)[:, None] - 1
    return attention_rows(model, inputs, last), generate_with_rows(model, inputs, 3)


def lenses(model: Any, inputs: Any) -> Any:
    seen = logit_lens(model, inputs, "final", targets=[7])
    attributed = logit_attribution(model, inputs, 7, unit="head")
    return seen.top_tokens, seen.target_log_probs, head_lens(model, inputs, [7] * len(inputs)), attributed.values


def weights(model: Any, inputs: Any) -> Any:
    return model.W_Q, model.W_O, model.b_K, model.W_in, model.blocks[1].attn.W_O, model.W_U, model.ln_final.w


def patching(model: Any, inputs: Any) -> Any:
    pair = Pair(inputs, replace(inputs, pixel_values=inputs.pixel_values.flip(0)))
    patched = patch(model, pair, "z", log_prob(7), where="final", heads=[1])
    return patched.values, patch_paths(model, pair, [(0, 1)], [(1, 2)], "q", log_prob(7)).values


def features(model: Any, inputs: Any) -> Any:
    """Dictionaries on the CPU: of the stream, of the tower, and a transcoder from one layer to the next."""
    d = model.cfg.d_model
    ends: Any = {"hook_name": "blocks.0.hook_resid_post", "out_hook_name": "blocks.1.hook_mlp_out"}
    across = random_dictionary(d, d_out=d, W_skip=torch.eye(d), **ends)
    own = [across, dictionary_at(model, "stream"), dictionary_at(model, "vision transcoder")]
    edits = [EditFeatures(each, (0, 1), add=2.0) for each in own]
    edits += [EditFeatures(each, (0, 1), positions="final") for each in own[:2]]
    out = [run_with_features(model, inputs, {each.hook_name: each for each in own}, edits=edits, error_term=False)]
    out += [model.run_with_hooks(inputs, fwd_hooks=edit.hooks(model, inputs)) for edit in edits]
    answered = inputs.append([[7, 9]] * len(inputs))
    tables = [reconstruction_quality(model, [answered], each).to_numpy() for each in own]
    return out, sweep(model, inputs, edits, log_prob(7)).values, tables


WORK = [forward, start_and_stop, hooks, optional_points, cache, cache_tools, gradients, swept, one_by_one]
PICTURED = (cache_tools, patching, gradients)
"""Those that need one picture more."""
WORK += [patching, generation, rows, lenses, weights, features]


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
@pytest.mark.repeats_shapes
@torch.no_grad()
def test_a_spread_model_computes_what_one_device_computes(models: Any, work: Callable[[Any, Any], Any]) -> None:
    family, plain, spread, devices = models
    if work is gradients and isinstance(devices, PretendDevices):
        pytest.skip("the pretended devices do not follow gradients")
    inputs = model_and_inputs(family, "two images" if work in PICTURED else "padded")[1]
    expected = list(values(work(plain, inputs)))
    with devices:
        found = list(values(work(spread, spread.as_inputs(inputs))))
    assert len(found) == len(expected) > 0
    # CPU kernels of one row round by how a weight is aligned in memory, which is another in the file than in a copy
    tolerance = 1e-6 if work is patching else 0.0
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=tolerance)


def test_the_pretended_devices_refuse_what_two_accelerators_refuse() -> None:
    with PretendDevices():
        x, y = torch.ones(2, 2, device=FIRST), torch.ones(2, 2).to(SECOND)
        assert (x.device, y.T.device, (x * 2).device, torch.nn.Parameter(y).device) == (FIRST, SECOND, FIRST, SECOND)
        for mix in (lambda: x + y, lambda: torch.cat((x, y)), lambda: x @ y, lambda: x[y.bool()], lambda: x.numpy()):
            with pytest.raises(RuntimeError, match="across devices"):
                mix()
        assert torch.equal((x + y.to(FIRST)).cpu(), torch.full((2, 2), 2.0))
        assert x[torch.tensor([0])].device == FIRST and (x * torch.tensor(2.0)).device == FIRST


@torch.no_grad()
def test_layers_compute_and_keep_their_keys_where_they_are(family: str, folders: dict[str, Path]) -> None:
    found: dict[str, torch.device] = {}
    with PretendDevices():
        model: Any = HookedVLM.from_pretrained(
            folders[family], device_map={"": FIRST, "blocks.1": SECOND, "blocks.2": "disk", "vision": SECOND}
        )
        inputs = model.as_inputs(model_and_inputs(family, "one image")[1])
        cache = model.new_kv_cache(*inputs.shape)
        watch = [(name, lambda x, hook: found.__setitem__(hook.name, x.device)) for name in model.hook_dict]
        names = {n for n in model.hook_dict if not model.why_silent(n, inputs, {})}
        logits = model.run_with_hooks(inputs, past_kv_cache=cache, fwd_hooks=[w for w in watch if w[0] in names])
        assert logits.device == model.cfg.device == inputs.device == FIRST
        assert [keys.device for keys in cache.keys] == [FIRST, SECOND, FIRST]
        assert found.keys() == names
        for name, device in found.items():
            assert device == (SECOND if name.startswith(("blocks.1.", "vision.")) else FIRST), name
    assert model.blocks[2].mlp.in_proj.weight.is_meta and not model.blocks[1].mlp.in_proj.weight.is_meta


def test_automatic_maps_fill_the_devices_within_their_memory(folders: dict[str, Path]) -> None:
    """What does not fit goes to disk, block by block; embedding, final norm and unembedding are never apart."""
    plain = HookedVLM.from_pretrained(folders["qwen2-vl"], device="cpu")
    sizes = {
        part: sum(p.numel() * 4 for n, p in plain.named_parameters() if n.startswith(f"{part}."))
        for part in ("embed", "unembed", "ln_final", "blocks.0", "vision", "projector")
    }
    ends = sizes["embed"] + sizes["unembed"] + sizes["ln_final"]
    room = ends + sizes["vision"] + sizes["projector"] + 5 * sizes["blocks.0"] // 2
    for how in ("auto", "sequential"):
        model = HookedVLM.from_pretrained(folders["qwen2-vl"], device_map=how, max_memory={"cpu": room})
        kept = [part for part, device in model.device_map.items() if device == "cpu"]
        used = sum(p.numel() * 4 for name, p in plain.named_parameters() if f"{name}.".startswith(tuple(kept)))
        assert {"embed", "ln_final", "unembed"} <= set(kept) and used <= room
        assert "disk" in model.device_map.values() and "vision.blocks.0" in model.device_map
    whole = HookedVLM.from_pretrained(folders["qwen2-vl"], device_map="auto", max_memory={"cpu": "1GB"})
    assert set(whole.device_map.values()) == {"cpu"}
    with pytest.raises(CheckpointError, match="unembedding"):
        HookedVLM.from_pretrained(folders["qwen2-vl"], device_map="auto", max_memory={"cpu": ends - 1})


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("fastest", "'fastest'"),
        ({"embed": "cpu"}, r"vision\.patch_embed"),
        ({"": "cpu", "blocks.7": "disk"}, r"blocks\.7"),
        ({"": "cpu", "blocks.0.attn": "disk"}, r"blocks\.0\.attn"),
        ({"": "cpu", "unembed": "disk"}, "unembed.*disk"),
        ({"": "disk"}, "unembed.*disk"),
        ({"": "cpu", "blocks": "cuda:97"}, "'cuda:97'"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(folders: dict[str, Path], device_map: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        HookedVLM.from_pretrained(folders["qwen2-vl"], device_map=device_map)


def test_every_part_of_a_tower_has_a_place() -> None:
    model = towers.vlm(VisionConfig(**{**towers.EVERY_PART, **towers.PROJECTORS["LLaVA"]}))
    devices = placement.planned(model, placement.Spread({"": "cpu", "vision.ln_post": "disk"}), torch.float64).devices
    assert {"vision.tile_embed", "vision.ln_pre", "vision.ln_post"} <= set(devices)
    for name in model.state_dict():
        assert sum(name.startswith(f"{part}.") for part in devices) == 1, name


def test_every_weight_of_a_family_has_one_place(family: str) -> None:
    model = tiny_model(family)
    devices = placement.planned(model, placement.Spread({"": "cpu"}), torch.float32).devices
    for name in model.state_dict():
        assert sum(name.startswith(f"{part}.") for part in devices) == 1, name


def test_the_projectors_of_inner_blocks_lie_with_the_projector(folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"projector\.deepstack\.0, which is no part"):
        HookedVLM.from_pretrained(folders["qwen3-vl"], device_map={"": "cpu", "projector.deepstack.0": "disk"})


def test_arguments_that_do_not_go_together_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, split = folders["qwen2-vl"], {"": "cpu", "blocks": "disk"}
    with pytest.raises(CheckpointError, match=r"\bdevice\b.*device_map"):
        HookedVLM.from_pretrained(folder, device="cpu", device_map=split)
    with pytest.raises(CheckpointError, match="offload_folder"):
        HookedVLM.from_pretrained(folder, offload_folder=tmp_path)
    (tmp_path / "index.json").write_text("{}")  # of another model, perhaps
    with pytest.raises(CheckpointError, match=r"offload_folder.*empty"):
        HookedVLM.from_pretrained(folder, device_map=split, offload_folder=tmp_path)


@torch.no_grad()
def test_offloaded_weights_read_but_are_not_edited_moved_or_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    model: Any = HookedVLM.from_pretrained(folders["internvl2"], device_map={"": "cpu", "blocks.1": "disk"})
    plain: Any = HookedVLM.from_pretrained(folders["internvl2"], device="cpu")
    assert weights_hash(model) == weights_hash(plain)
    for view in (model.blocks[1].attn.W_O, model.blocks[1].ln1.w, model.blocks[1].attn.b_Q, model.blocks[1].mlp.W_in):
        with pytest.raises(RuntimeError, match="copy"):
            view[0] = 0
    model.blocks[0].attn.W_O[1] = 0  # one that is in its place
    plain.blocks[0].attn.W_O[1] = 0
    inputs = model_and_inputs("internvl2", "padded")[1]
    assert torch.equal(model(inputs), plain(inputs))
    with pytest.raises(CheckpointError, match="offloaded"):
        model.save_pretrained(tmp_path / "saved")
    for refused in (model.half, lambda: model.to("cpu"), lambda: fold_ln(model)):
        with pytest.raises(InputError, match=r"spread|offloaded"):
            refused()


@pytest.mark.parametrize("part", ["blocks.1.attn.o_proj", "blocks.1.ln1", "vision.blocks.0"])
@torch.no_grad()
def test_an_edit_of_an_empty_parameter_is_an_error_at_its_next_use(folders: dict[str, Path], part: str) -> None:
    split = {"": "cpu", "blocks.1": "disk", "vision": "disk"}
    model: Any = HookedVLM.from_pretrained(folders["internvl2"], device_map=split)
    inputs = model_and_inputs("internvl2", "one image")[1]
    model(inputs)
    next(iter(model.get_submodule(part).parameters(recurse=False)))[0] = 0
    with pytest.raises(RuntimeError, match="empty"):
        model(inputs)


@torch.no_grad()
def test_a_dtype_is_made_once_or_at_every_use(folders: dict[str, Path], tmp_path: Path) -> None:
    inputs = model_and_inputs("internvl2", "padded")[1]
    expected = HookedVLM.from_pretrained(folders["internvl2"], device="cpu", dtype=torch.bfloat16)(inputs)
    for folder in (None, tmp_path / "weights"):
        model = HookedVLM.from_pretrained(
            folders["internvl2"], device_map={"": "cpu", "blocks": "disk"}, dtype=torch.bfloat16, offload_folder=folder
        )
        assert torch.equal(model(inputs), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith(", tied")])
@torch.no_grad()
def test_a_tied_model_stays_tied(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).save_pretrained(tmp_path / "tied")
    model: Any = HookedVLM.from_pretrained(tmp_path / "tied", device_map={"": "cpu", "blocks": "disk"})
    inputs = inputs_of(kind, ROWS["padded"])
    assert model.unembed.weight is model.embed.weight
    assert torch.equal(model(inputs), tiny_model(kind)(inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_accelerator_and_what_is_offloaded_from_it(folders: dict[str, Path], family: str, work: Any) -> None:
    """With a second accelerator some layers are there."""
    other = "cuda:1" if torch.cuda.device_count() > 1 else "disk"
    split = {"": "cuda:0", "blocks.1": other, "blocks.2": "cpu", "vision.blocks.1": other, "projector": "cpu"}
    inputs = model_and_inputs(family, "two images" if work in PICTURED else "padded")[1]
    expected = list(values(work(HookedVLM.from_pretrained(folders[family], device="cuda:0"), inputs.to("cuda:0"))))
    spread = HookedVLM.from_pretrained(folders[family], device_map=split)
    found = list(values(work(spread, inputs.to("cuda:0"))))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
