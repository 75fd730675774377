"""What `run_with_cache` stores, what it derives, and how it is cut."""

import copy
import pickle

import numpy as np
import pytest
import tiny_qwen2_vl as tiny
import torch
from safetensors.torch import save_file
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice

from hooked_vlm import HookError, InputError, VLMCache, VLMInputs
from hooked_vlm.model.cut import check_cut
from hooked_vlm.model.hook_catalogue import hook_table
from hooked_vlm.model.hooking import switched_off
from hooked_vlm.nn import attention
from hooked_vlm.nn.hooks import is_quadratic, is_vision

N_LAYERS = 3


def run(rows=tiny.ONE_IMAGE, hooks=(), **kwargs) -> VLMCache:
    """A cached run of the tiny model."""
    model = tiny.tiny_model()
    with torch.no_grad(), model.hooks(list(hooks)):
        return model.run_with_cache(tiny.inputs(rows), **kwargs)[1]


def everything(name: str) -> bool:
    return True


def quadratic(name: str) -> bool:
    return is_quadratic(name)


def all_names(cache: VLMCache) -> set[str]:
    """The full names of all that is stored."""
    names = list(cache)
    assert names == list(cache.keys()) == [name for name, _ in cache.items()] and len(names) == len(cache)
    assert all(name in cache for name in names) and len(list(cache.values())) == len(cache)
    return set(names)


def firing_names() -> set[str]:
    model = tiny.tiny_model()
    return {n for n in model.hook_dict if not switched_off(model, n)}


# ---- what is stored ----


def test_everything_that_fires_is_stored_but_scores_and_patterns():
    cache = run(tiny.PADDED)
    assert isinstance(cache, ActivationCache)
    assert all_names(cache) == {n for n in firing_names() if not is_quadratic(n)}


def test_on_text_alone_the_image_side_is_left_out():
    assert all_names(run(tiny.TEXT)) == {n for n in firing_names() if not (is_quadratic(n) or is_vision(n))}


@pytest.mark.parametrize(
    ("names_filter", "stored"),
    [
        ("blocks.1.attn.hook_z", {"blocks.1.attn.hook_z"}),
        (["hook_embed", "vision.hook_embed"], {"hook_embed", "vision.hook_embed"}),
        (("blocks.0.attn.hook_pattern",), {"blocks.0.attn.hook_pattern"}),
        (lambda n: n.endswith("0.hook_resid_mid"), {"blocks.0.hook_resid_mid", "vision.blocks.0.hook_resid_mid"}),
        (lambda n: n.endswith(("ln.hook_scale", "hook_mlp_in")), {"projector.ln.hook_scale"}),
    ],
    ids=["name", "list", "tuple", "predicate", "predicate that also matches points switched off"],
)
def test_a_filter_stores_what_it_names(names_filter, stored):
    assert all_names(run(names_filter=names_filter)) == stored


@pytest.mark.parametrize(
    ("names_filter", "says"),
    [
        ("blocks.0.attn.hook_zz", "blocks.0.attn.hook_z"),
        (["hook_embed", "blocks.9.hook_resid_pre"], r"'blocks\.9\.hook_resid_pre'"),
        (lambda n: n == "nothing", "filter"),
        ("blocks.0.attn.hook_result", "set_use_attn_result"),
    ],
)
def test_a_filter_that_matches_nothing_is_refused(names_filter, says):
    with pytest.raises(HookError, match=says):
        run(names_filter=names_filter)


def test_stored_tensors_are_those_that_passed_the_hook_points():
    seen: dict[str, torch.Tensor] = {}
    cache = run(
        tiny.PADDED, hooks=[(lambda n: not is_quadratic(n), lambda x, hook: seen.update({hook.name: x.clone()}))]
    )
    assert set(seen) == all_names(cache)
    assert all(cache[name].equal(value) for name, value in seen.items())


# ---- what is derived ----


@pytest.mark.parametrize("rows", [tiny.ONE_IMAGE, tiny.PADDED], ids=["one row", "padded"])
@pytest.mark.parametrize("what", ["pattern", "attn_scores"])
def test_derived_scores_and_patterns_equal_stored_ones(rows, what):
    derived, stored = run(rows), run(rows, names_filter=everything)
    for layer in (*range(N_LAYERS), -1):
        name = f"blocks.{layer % N_LAYERS}.attn.hook_{what}"
        assert name not in derived.cache_dict and name in stored.cache_dict
        for key in ((what, layer), (what, layer, "attn"), name):
            torch.testing.assert_close(derived[key], stored[name], atol=1e-5, rtol=1e-5)
    for layer in (0, 1):
        name = f"vision.blocks.{layer}.attn.hook_{what}"
        torch.testing.assert_close(derived[name], stored[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(derived.vision[what, layer - 2], stored.vision[what, layer], atol=1e-5, rtol=1e-5)


def test_patterns_are_derived_without_a_batch_axis_and_after_a_move():
    whole, cut = run(), run(remove_batch_dim=True)
    assert cut["pattern", 1].equal(whole["pattern", 1][0])
    assert cut["attn_scores", 1].equal(whole["attn_scores", 1][0])
    assert whole.to("cpu")["pattern", 1].equal(run()["pattern", 1])
    assert run().remove_batch_dim()["pattern", 1].equal(cut["pattern", 1])


@pytest.mark.parametrize("side", ["", "vision."])
@pytest.mark.parametrize("hooked", ["hook_pattern", "hook_attn_scores"])
def test_where_a_hook_edits_scores_or_pattern_the_edited_pattern_is_stored(side, hooked):
    first_column = torch.zeros(0)

    def look_at_the_first(x, hook):
        nonlocal first_column
        first_column = torch.full_like(x, 0.0 if hooked == "hook_pattern" else -torch.inf)
        first_column[..., 0] = 1.0 if hooked == "hook_pattern" else 0.0
        return first_column

    cache = run(hooks=[(f"{side}blocks.1.attn.{hooked}", look_at_the_first)])
    stored = {n for n in all_names(cache) if is_quadratic(n)}
    assert stored == {f"{side}blocks.1.attn.hook_pattern", f"{side}blocks.1.attn.hook_attn_scores"}
    assert cache[f"{side}blocks.1.attn.hook_pattern"][..., 0].eq(1).all()
    assert cache[f"{side}blocks.1.attn.{hooked}"].equal(first_column)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"names_filter": ["blocks.1.attn.hook_rot_q"]}, "names_filter"),
        ({"pos_slice": (0, 5)}, "pos_slice"),
        ({"stop_at_layer": 1}, r"blocks\.1\.attn\.hook_rot_q"),
    ],
)
def test_a_pattern_that_cannot_be_derived_says_why(kwargs, says):
    with pytest.raises(KeyError, match=says):
        run(**kwargs)["pattern", 1]


def test_a_pattern_is_not_derived_from_a_run_that_continued_others():
    model, inputs = tiny.tiny_model(), tiny.inputs(tiny.TEXT)
    past = model.new_kv_cache(1, 16)
    with torch.no_grad():
        model(inputs, past_kv_cache=past)
        _, cache = model.run_with_cache(inputs, past_kv_cache=past)
    with pytest.raises(KeyError, match="key-value cache"):
        cache["pattern", 0]


# ---- cutting ----


CUTS = [-1, (2, 6), (1, 9, 3), [4, 2], torch.tensor([0, 3])]
WHERE = [(rows, cut) for rows in (tiny.ONE_IMAGE, tiny.PADDED) for cut in CUTS]
WHERE[-2:] = [(tiny.PADDED, [-3, -1]), (tiny.PADDED, torch.tensor([-1]))]  # single positions must not be padding


@pytest.mark.parametrize(("rows", "pos_slice"), WHERE, ids=str)
def test_pos_slice_cuts_the_position_axis_of_every_text_tensor_and_no_other(rows, pos_slice):
    whole, cut = run(rows), run(rows, pos_slice=pos_slice)
    shapes = {row.name: row.shape for row in hook_table(tiny.tiny_model())}
    assert all_names(cut) == all_names(whole)
    for name in all_names(whole):
        expected = whole[name]
        if not is_vision(name):
            axes = shapes[".".join("{l}" if part.isdigit() else part for part in name.split("."))]
            expected = Slice.unwrap(pos_slice).apply(expected, dim=axes.index("pos"))  # one position keeps its axis
        assert cut[name].equal(expected), name


@pytest.mark.parametrize(("rows", "pos_slice"), WHERE, ids=str)
@pytest.mark.parametrize("suffix", ["hook_pattern", "hook_attn_scores"])
def test_rows_of_patterns_equal_those_of_the_whole_and_are_all_that_is_made(rows, pos_slice, suffix, monkeypatch):
    def named(name: str) -> bool:
        return name.endswith(suffix) and not is_vision(name)

    whole = run(rows, names_filter=named)
    monkeypatch.setattr(attention, "weighted_values", None)  # the [pos, pos] path cannot be taken
    cut = run(rows, names_filter=named, pos_slice=pos_slice)
    assert all_names(cut) == all_names(whole)
    for name in all_names(whole):
        expected = Slice.unwrap(pos_slice).apply(whole[name], dim=2)
        torch.testing.assert_close(cut[name], expected, atol=2e-5, rtol=1e-5, msg=name)


def test_rows_of_patterns_under_a_key_value_cache_are_those_of_its_steps():
    model, inputs = tiny.tiny_model(), tiny.inputs(tiny.PADDED)
    past = model.new_kv_cache(len(inputs), 40)
    named = {"names_filter": "blocks.1.attn.hook_pattern", "pos_slice": -1}
    _, first = model.run_with_cache(inputs, past_kv_cache=past, **named)
    token = torch.full((len(inputs), 1), 7)
    _, second = model.run_with_cache(model.as_inputs(token), past_kv_cache=past, **named)
    continued = inputs.append(token)
    _, whole = model.run_with_cache(continued, names_filter="blocks.1.attn.hook_pattern")
    n = inputs.shape[1]
    torch.testing.assert_close(first["pattern", 1][:, :, 0], whole["pattern", 1][:, :, n - 1, :n], atol=1e-6, rtol=0)
    torch.testing.assert_close(second["pattern", 1][:, :, 0], whole["pattern", 1][:, :, n], atol=1e-5, rtol=0)


def test_rows_of_a_pattern_that_was_edited_are_the_edited_ones():
    model = tiny.tiny_model()
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern * 0.5)]):
        cut = run(names_filter="blocks.1.attn.hook_pattern", pos_slice=-1)
    whole = run(names_filter="blocks.1.attn.hook_pattern")
    torch.testing.assert_close(cut["pattern", 1], whole["pattern", 1][:, :, -1:] * 0.5)


def test_pos_slice_and_remove_batch_dim_go_together():
    whole, cut = run(), run(pos_slice=-1, remove_batch_dim=True)
    assert cut["resid_post", 1].equal(whole["resid_post", 1][0, -1:])
    assert cut["rot_q", 1].equal(whole["rot_q", 1][0, -1:])
    assert cut["vision.hook_embed"].equal(whole["vision.hook_embed"])


def test_a_cut_cache_does_not_hold_the_memory_of_the_whole():
    cut = run(pos_slice=(2, 4))
    for name, value in cut.items():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


@pytest.mark.parametrize("afterwards", [False, True], ids=["in the run", "afterwards"])
def test_remove_batch_dim_acts_on_the_text_side_only(afterwards):
    whole = run(tiny.TWO_IMAGES)
    cut = run(tiny.TWO_IMAGES, remove_batch_dim=not afterwards)
    if afterwards:
        assert cut.remove_batch_dim() is cut
    assert not cut.has_batch_dim
    assert all(value.equal(whole[name][0]) for name, value in cut.items() if not is_vision(name))
    assert all(value.equal(whole.vision[name]) for name, value in cut.vision.items())
    assert cut.vision["resid_pre", 0].shape[0] == 2


def test_remove_batch_dim_of_several_rows_is_refused():
    with pytest.raises(InputError, match=r"remove_batch_dim.*3"):
        run(tiny.PADDED, remove_batch_dim=True)


@pytest.mark.parametrize("rows", [1, (1, 3), [2, 0]], ids=str)
def test_apply_slice_to_batch_dim_cuts_rows_and_keeps_all_images(rows):
    whole = run(tiny.PADDED)
    cut = whole.apply_slice_to_batch_dim(rows)
    assert isinstance(cut, VLMCache)
    assert cut.has_batch_dim == (not isinstance(rows, int))
    for name, value in cut.items():
        assert value.equal(whole[name] if is_vision(name) else Slice(rows).apply(whole[name], dim=0)), name
    assert cut["vision.hook_embed"].equal(whole["vision.hook_embed"])
    with pytest.raises(KeyError, match="rows"):
        cut["pattern", 0]


def test_device_says_where_to_store_and_to_moves_both_sides():
    cache = run(device="meta")
    assert {value.device.type for value in (*cache.values(), *cache.vision.values())} == {"meta"}
    moved = run().to("meta")
    assert {value.device.type for value in (*moved.values(), *moved.vision.values())} == {"meta"}


# ---- the image side ----


def test_image_side_tensors_are_found_by_full_name_and_in_cache_vision():
    cache = run(tiny.PADDED)
    assert cache["vision.blocks.1.hook_resid_post"].equal(cache.vision["resid_post", 1])
    assert cache["vision.hook_embed"].equal(cache.vision["hook_embed"])
    assert cache["projector.hook_pre"].equal(cache.vision["projector.hook_pre"])
    assert cache["hook_image_features"].equal(cache.vision["hook_image_features"])
    for name in ("vision.hook_embed", "projector.hook_pre", "hook_image_features", "hook_embed"):
        assert name in cache
    assert "vision.blocks.0.attn.hook_pattern" not in cache
    assert not cache["hook_embed"].equal(cache.vision["hook_embed"])


@pytest.mark.parametrize("key", ["blocks.1.hook_resid_past", "vision.blocks.1.hook_resid_past", ("resid_past", 1)])
def test_a_wrong_key_names_the_nearest(key):
    with pytest.raises(KeyError, match=r"blocks\.1\.hook_resid_post"):
        run()[key]


# ---- gradients ----


def gradients(rows, **kwargs) -> VLMCache:
    model = tiny.tiny_model()
    try:
        return model.run_with_cache(tiny.inputs(rows), return_type="loss", incl_bwd=True, **kwargs)[1]
    finally:
        model.zero_grad(set_to_none=True)


def test_incl_bwd_stores_a_gradient_for_every_activation():
    cache = gradients(tiny.PADDED)
    names = {n for n in all_names(cache) if not n.endswith("_grad")}
    assert all_names(cache) == names | {f"{n}_grad" for n in names}
    assert all(cache[f"{n}_grad"].shape == cache[n].shape for n in names)


def test_stored_gradients_are_those_of_autograd():
    model, inputs = tiny.tiny_model(), tiny.inputs(tiny.PADDED)
    cache = gradients(tiny.PADDED, names_filter=lambda n: n.endswith(("hook_resid_pre", "hook_image_features")))
    resid = cache["resid_pre", 1].clone().requires_grad_()
    features = cache["hook_image_features"].clone().requires_grad_()
    loss = model(inputs, return_type="loss", start_at_layer=1, resid=resid)
    (expected,) = torch.autograd.grad(loss, resid)
    torch.testing.assert_close(cache["blocks.1.hook_resid_pre_grad"], expected, atol=1e-6, rtol=1e-4)
    loss = model(inputs.with_image_features(features), return_type="loss")
    (expected,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(cache["hook_image_features_grad"], expected, atol=1e-6, rtol=1e-4)


# ---- other caches and runs ----


def test_a_later_run_leaves_an_earlier_cache_alone():
    cache = run()
    before = {name: value.clone() for name, value in cache.items()}
    run(hooks=[(lambda n: not is_vision(n), lambda x, hook: x.mul_(2))])
    assert all(value.equal(before[name]) for name, value in cache.items())


def test_stop_at_layer_stores_what_comes_before():
    cache = run(stop_at_layer=1)
    assert {n.split(".")[1] for n in cache if n.startswith("blocks.")} == {"0"}


@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "explicit"])
@pytest.mark.parametrize("rows", [tiny.ONE_IMAGE, tiny.PADDED], ids=["one row", "padded"])
def test_pos_slice_last_is_each_rows_own_last_token(rows, hooked):
    model = tiny.tiny_model()
    inputs = tiny.inputs(rows).append([[7] * (row + 1) for row in range(len(rows))])  # padded at the end
    named = {"names_filter": lambda name: not is_quadratic(name) or "blocks.1.attn" in name}
    hooks = [("blocks.1.attn.hook_pattern", lambda x, hook: None)] if hooked else []
    with torch.no_grad(), model.hooks(hooks):
        whole, last = (model.run_with_cache(inputs, **named, pos_slice=cut)[1] for cut in (None, "last"))
    assert all_names(last) == all_names(whole)
    for name, value in last.items():
        if is_vision(name):
            continue
        axis = 2 if is_quadratic(name) else 1
        assert value.shape[axis] == 1
        for row, stop in enumerate(inputs.stop):
            expected = whole[name][row].select(axis - 1, stop - 1)
            torch.testing.assert_close(value[row].select(axis - 1, 0), expected, atol=2e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("pos_slice", [-1, 0, [0, -1], np.int64(0), 999], ids=str)
def test_positions_that_are_padding_or_do_not_exist_are_refused(pos_slice):
    model = tiny.tiny_model()
    batch = tiny.inputs(tiny.PADDED).append([[7], [7, 8], [7, 8, 9]])
    wrong = "outside" if np.array_equal(pos_slice, 999) else "padding"
    with pytest.raises(InputError, match=wrong):
        model.run_with_cache(batch, pos_slice=pos_slice)
    _, fwd, _ = model.get_caching_hooks("blocks.1.hook_resid_post", pos_slice=pos_slice)
    with pytest.raises(InputError, match=wrong):
        model.run_with_hooks(batch, fwd_hooks=fwd)
    _, cache = model.run_with_cache(batch)
    for decomposition in (cache.decompose_resid, cache.accumulated_resid, cache.stack_head_results):
        with pytest.raises(InputError, match=wrong):
            decomposition(pos_slice=pos_slice)
    for wrong in ("first", True, 2.5, [0.5], {}):
        with pytest.raises(InputError, match="pos_slice"):
            check_cut(wrong)


def test_decompositions_at_positions_that_are_real():
    model = tiny.tiny_model()
    with torch.no_grad():
        _, cache = model.run_with_cache(tiny.inputs(tiny.PADDED))  # padded in front
        _, last = model.run_with_cache(tiny.inputs(tiny.PADDED), pos_slice="last")
        whole, cut = cache.decompose_resid(), cache.decompose_resid(pos_slice=-1)
        torch.testing.assert_close(cut.squeeze(2), whole[:, :, -1])
        torch.testing.assert_close(last.decompose_resid()[:, :, 0], whole[:, :, -1])
        with pytest.raises(InputError, match="run_with_cache"):
            cache.decompose_resid(pos_slice="last")


# ---- hooks that fill a dictionary ----


@torch.no_grad()
def test_caching_hooks_store_what_a_cache_stores_and_follow_later_passes():
    model, inputs = tiny.tiny_model(), tiny.inputs(tiny.ONE_IMAGE)
    _, cache = model.run_with_cache(inputs)
    store, fwd, bwd = model.get_caching_hooks()
    assert not store and not bwd
    model.run_with_hooks(inputs, fwd_hooks=fwd)
    assert set(store) == set(cache) and all(store[name].equal(x) for name, x in cache.items())
    text = tiny.inputs(tiny.TEXT)
    model.run_with_hooks(text, fwd_hooks=fwd)  # no image fires, and that is no error
    expected = model.run_with_cache(text)[1]["resid_post", 1]
    assert store["blocks.1.hook_resid_post"].equal(expected)
    assert store["vision.hook_embed"].equal(cache["vision.hook_embed"])  # of the latest pass that had one


@torch.no_grad()
@pytest.mark.parametrize("add", ["add_caching_hooks", "cache_some"])
def test_caching_hooks_stay_until_they_are_reset(add):
    model, inputs, store = tiny.tiny_model(), tiny.inputs(tiny.ONE_IMAGE), {}
    try:
        if add == "cache_some":
            model.cache_some(store, lambda name: name.endswith("hook_z"))
        else:
            assert model.add_caching_hooks(lambda name: name.endswith("hook_z"), cache=store) is store
        for given in (inputs, tiny.inputs(tiny.TEXT)):
            model(given)
            expected = model.run_with_cache(given)[1]["z", 2]
            assert store["blocks.2.attn.hook_z"].equal(expected)
        model.generate(inputs, 3, stop_at_eos=False)
        assert store["blocks.2.attn.hook_z"].shape[1] == 1  # the last step's
    finally:
        model.reset_hooks()
    before = store["blocks.2.attn.hook_z"]
    model(inputs)
    assert store["blocks.2.attn.hook_z"] is before


@pytest.mark.parametrize(
    "name", ["blocks.1.attn.hook_zz", "blocks.1.attn.hook_result", lambda name: False], ids=["unknown", "off", "empty"]
)
def test_caching_hooks_that_cannot_act_are_refused(name):
    model = tiny.tiny_model()
    for call in (model.get_caching_hooks, model.add_caching_hooks):
        with pytest.raises(HookError):
            call(name)
        if isinstance(name, str):
            with pytest.raises(HookError):
                call(["blocks.1.attn.hook_z", name])
    assert not model.hook_dict["blocks.1.attn.hook_z"].fwd_hooks


def test_caching_hooks_store_gradients_and_drop_the_batch_axis():
    model, inputs = tiny.tiny_model(), tiny.inputs(tiny.ONE_IMAGE)
    _, cache = model.run_with_cache(inputs, return_type="loss", incl_bwd=True)
    name = "blocks.1.hook_resid_mid"
    store, fwd, bwd = model.get_caching_hooks(name, incl_bwd=True, remove_batch_dim=True, pos_slice=-1)
    with model.hooks(fwd, bwd):
        model(inputs, return_type="loss").backward()
    model.zero_grad(set_to_none=True)
    torch.testing.assert_close(store[name], cache[name][0, -1:])
    torch.testing.assert_close(store[f"{name}_grad"], cache[f"{name}_grad"][0, -1:])
    with pytest.raises(InputError, match=r"remove_batch_dim.*3"), model.hooks(fwd):
        model(tiny.inputs(tiny.PADDED))


@torch.no_grad()
@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern"])
def test_pos_slice_under_a_key_value_cache_is_of_the_pass_itself(name):
    """Not of the inputs that the cache begins with."""
    model, begin = tiny.tiny_model(), tiny.inputs([[5, 6, 7], [8]])  # padded in front
    more = tiny.inputs([[9, 10, 11], [12, 13, 14]])
    answers = VLMInputs(more.tokens, more.spec, attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]))  # and at the end
    ends = (5, 3)
    _, whole = model.run_with_cache(begin.append([[9, 10, 11], [12]]), names_filter=name)
    store, fwd, _ = model.get_caching_hooks(name, pos_slice="last")
    for store_now in ({}, store):
        past = model.new_kv_cache(2, 8)
        model(begin, past_kv_cache=past)
        if store_now is store:
            with model.hooks(fwd):
                model(answers, past_kv_cache=past)
        else:
            store_now |= dict(model.run_with_cache(answers, past_kv_cache=past, names_filter=name, pos_slice="last")[1])
        for row, end in enumerate(ends):
            expected = whole[name][row].select(-2, end)
            found = store_now[name][row].select(-2, 0)
            torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=1e-5, rtol=1e-4)
    past = model.new_kv_cache(2, 8)
    model(begin, past_kv_cache=past)
    first = model.run_with_cache(more, past_kv_cache=past, names_filter="blocks.1.attn.hook_pattern", pos_slice=0)[1]
    assert first["pattern", 1].shape[2] == 1  # column 0 of this pass is no padding


@torch.no_grad()
@pytest.mark.parametrize("prompt", [[[5], [6]], [[5, 6, 7], [8]]], ids=["one token", "several"])
def test_caching_hooks_with_pos_slice_keep_the_newest_position_of_every_row_of_a_step(prompt):
    model, inputs = tiny.tiny_model(), tiny.inputs(prompt)
    store, fwd, _ = model.get_caching_hooks("blocks.1.hook_resid_post", pos_slice="last")
    model.generate(inputs, 2, do_sample=True, num_return_sequences=3, stop_at_eos=False, fwd_hooks=fwd)
    assert store["blocks.1.hook_resid_post"].shape[:2] == (6, 1)
    for cut in (0, [0], (0, 1)):
        _, fwd, _ = model.get_caching_hooks("blocks.1.hook_resid_post", pos_slice=cut)
        with pytest.raises(InputError, match=r"step|padding"):
            model.generate(inputs, 3, stop_at_eos=False, fwd_hooks=fwd)


def test_gradients_with_pos_slice_belong_to_one_forward_pass():
    model, name = tiny.tiny_model(), "blocks.1.hook_resid_mid"
    rows, others = tiny.inputs([[5, 6, 7], [8, 9, 10]]).append([[7], [7, 8]]), tiny.inputs([[5, 6, 7, 8, 9]] * 2)
    _, fwd, bwd = model.get_caching_hooks(name, incl_bwd=True, pos_slice="last")
    with model.hooks(fwd, bwd):
        loss = model(rows, return_type="loss")
        model(others)
        with pytest.raises(InputError, match="forward pass"):
            loss.backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_a_loaded_cache_knows_its_padding(tmp_path):
    model = tiny.tiny_model()
    _, cache = model.run_with_cache(tiny.inputs([[5, 6, 7], [8, 9, 10]]).append([[7], [7, 8]]))
    cache.save(tmp_path)
    for again in (cache, VLMCache.load(tmp_path, model), pickle.loads(pickle.dumps(cache))):
        again.model = model
        with pytest.raises(InputError, match="padding"):
            again.decompose_resid(pos_slice=-1)
        again.decompose_resid(pos_slice=0)  # the first token of every row


@torch.no_grad()
def test_a_copy_is_moved_alone_and_later_passes_take_their_inputs_along():
    cache = run()
    other = copy.copy(cache)
    other.to(torch.float16)
    assert cache.vision["resid_post", 1].dtype == cache["resid_post", 1].dtype == torch.float32
    assert other.vision["resid_post", 1].dtype == torch.float16
    model = tiny.tiny_model()
    _, cache = model.run_with_cache(tiny.inputs([[5, 6]]), reset_hooks_end=False)
    try:
        later = tiny.inputs([[5, 6, 7], [8, 9, 10]]).append([[7], [7, 8]])
        model(later)
        assert cache.inputs is later
        with pytest.raises(InputError, match="padding"):
            cache.decompose_resid(pos_slice=-1)
    finally:
        model.reset_hooks()


# ---- as a file ----


@torch.no_grad()
@pytest.mark.parametrize("through", ["pickle", "file"])
@pytest.mark.parametrize("rows", [tiny.ONE_IMAGE, tiny.PADDED], ids=["one row", "padded"])
def test_a_cache_survives_as_its_tensors(rows, through, tmp_path):
    model = tiny.tiny_model()
    cache = run(rows)
    if through == "file":
        cache.save(tmp_path / "cache")
        again = VLMCache.load(tmp_path / "cache")
    else:
        again = pickle.loads(pickle.dumps(cache))
    assert set(again) == set(cache) and all(again[name].equal(x) for name, x in cache.items())
    for layer in range(N_LAYERS):
        assert again["pattern", layer].equal(cache["pattern", layer])
    assert again["resid_post", -1].equal(cache["resid_post", -1])
    assert again.vision["pattern", 1].equal(cache.vision["pattern", 1])
    with pytest.raises(InputError, match="model"):
        again.stack_head_results()
    again.model = model
    torch.testing.assert_close(again.stack_head_results(), cache.stack_head_results())
    with pytest.raises(InputError, match="images"):
        again.on_image(0)
    if rows is tiny.ONE_IMAGE:
        again.inputs = cache.inputs
        assert again.on_image(1).equal(cache.on_image(1))


@torch.no_grad()
def test_one_activation_is_written_as_one_activation(tmp_path):
    cache = run(names_filter="blocks.1.hook_resid_post")
    n_bytes = cache["resid_post", 1].nbytes
    cache.save(tmp_path)
    assert len(pickle.dumps(cache)) < n_bytes + 4000
    assert (tmp_path / "cache.safetensors").stat().st_size < n_bytes + 4000
    row = run(tiny.PADDED, names_filter="blocks.1.hook_resid_post").apply_slice_to_batch_dim(1)
    assert len(pickle.dumps(row)) < row["resid_post", 1].nbytes + 4000  # not the batch that it is a view of


@torch.no_grad()
def test_a_copy_keeps_the_model_and_not_the_tensors(tmp_path):
    cache = run()
    other, same = copy.deepcopy(cache), copy.copy(cache)
    assert other.model is same.model is cache.model and other.inputs is cache.inputs
    other["resid_post", 1][:] = 0
    other["vision.hook_embed"][:] = 0
    assert cache["resid_post", 1].any() and cache["vision.hook_embed"].any()
    assert same["resid_post", 1] is cache["resid_post", 1]


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "no header", "wrong names"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    cache, path = run(names_filter="blocks.1.hook_resid_post"), tmp_path / "cache.safetensors"
    cache.save(tmp_path)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("not a cache")
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "no header":
        save_file({"x": torch.zeros(2)}, path)
    else:
        path.write_bytes(whole.replace(b'hook_resid_post\\": ', b'hook_resid_past\\": ').replace(b"rotary", b"notary"))
    with pytest.raises(InputError, match=r"cache\.safetensors"):
        VLMCache.load(tmp_path)


def test_a_cache_is_moved_to_another_dtype_on_both_sides():
    cache = run().to(torch.float16)
    assert cache["resid_post", 1].dtype == cache["vision.hook_embed"].dtype == torch.float16
    assert cache["pattern", 1].sum(-1).allclose(torch.ones((), dtype=torch.float16), atol=2e-3)


@pytest.mark.parametrize("wrong", ["logit", "tensor", 1])
def test_an_unknown_return_type_is_refused(wrong):
    model, inputs = tiny.tiny_model(), tiny.inputs(tiny.ONE_IMAGE)
    for call in (lambda: model(inputs, return_type=wrong), lambda: model.generate(inputs, 1, return_type=wrong)):
        with pytest.raises((InputError, TypeError), match="return_type"):
            call()


def test_rows_are_chosen_by_any_whole_number():
    inputs = tiny.inputs(tiny.PADDED)
    assert inputs[np.int64(1)].tokens.equal(inputs[1].tokens)
