"""Every patching sweep equals the literal loop of patched runs, in both towers and families."""

from typing import Any

import numpy as np
import pytest
import tiny_qwen2_vl as tiny
import torch
from pairs import last_logits, model_and_pair, patched_by_hand
from torch import Tensor

from hooked_vlm import HookedVLM, InputError
from hooked_vlm.interventions import PatchActivation
from hooked_vlm.metrics import answered, kl_divergence, logit_difference
from hooked_vlm.patching import Pair, patch

METRIC = logit_difference(5, 9)
SUFFIX = {
    "z": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
}
STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def positions(inputs: Any, place: str | int) -> list[list[int]]:
    """Of each row, by what the inputs say of themselves."""
    if isinstance(place, int):
        return [[place]] * len(inputs)
    if place == "here":
        return [[1, 3]] * len(inputs)
    if place == "all":
        return [list(range(a, b)) for a, b in zip(inputs.first, inputs.stop, strict=True)]
    return [group.tolist() for group in getattr(inputs.positions, place)]


def by_hand(model: Any, pair: Pair, what: str, layer: int, head: int | None, place: Any, direction: Any) -> Tensor:
    name = f"blocks.{layer}.{SUFFIX.get(what, f'hook_{what}')}"

    def put(x: Tensor, source: Tensor) -> None:
        for row, own in enumerate(positions(pair.clean, place)):
            for p in own:
                if what == "pattern":
                    x[row, head, p] = source[row, head, p]
                elif head is None:
                    x[row, p] = source[row, p]
                else:
                    x[row, p, head] = source[row, p, head]

    return METRIC(patched_by_hand(model, pair, direction, name, put))


def agrees(result: Any, model: Any, pair: Pair, direction: Any) -> None:
    for cell in result.to_dataframe().drop_duplicates(list(result.axes)).to_dict("records"):
        head = cell.get("head")
        expected = by_hand(model, pair, result.what, cell["layer"], head, cell["place"], direction)
        labels = {name: cell[name] for name in result.axes}
        found = result.select(**labels).values.reshape(-1)
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5, err_msg=str(labels))
    assert np.abs(result.effects).max() > 1e-3


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("what", [*STREAMS, *SUFFIX])
@pytest.mark.repeats_shapes
def test_a_sweep_over_groups_equals_the_loop(family: str, what: Any, direction: Any) -> None:
    model, pair = model_and_pair(family, places={"here": (1, 3)})
    where = ("image", "final", "here")
    result: Any = patch(model, pair, what, METRIC, where=where, layers=(0, 2), direction=direction)
    n_heads = {"k": 2, "v": 2}.get(what, 4)
    assert result.values.shape == ((2, 3, 1) if what in STREAMS else (2, n_heads, 3, 1))
    agrees(result, model, pair, direction)
    clean, corrupt = (METRIC(last_logits(model(x), x)).detach() for x in (pair.clean, pair.corrupt))
    np.testing.assert_allclose(result.clean, clean, atol=1e-5)
    np.testing.assert_allclose(result.corrupt, corrupt, atol=1e-5)


@pytest.mark.parametrize("what", ["resid_mid", "v"])
def test_a_sweep_over_every_position_equals_the_loop(family: str, what: Any) -> None:
    model, pair = model_and_pair(family)
    result = patch(model, pair, what, METRIC, where="each", layers=(1,))
    assert result.axes["place"] == tuple(range(pair.clean.shape[1]))
    agrees(result, model, pair, "denoising")


def test_rows_are_examples_padded_or_not(family: str) -> None:
    model, pair = model_and_pair(family, "padded")
    result = patch(model, pair, "resid_pre", METRIC, where=("question", "final", "all"))
    assert result.values.shape == (3, 3, 3)
    agrees(result, model, pair, "denoising")
    with pytest.raises(InputError, match=r"row 1.*image"):
        patch(model, pair, "resid_pre", METRIC, where="image")
    with pytest.raises(InputError, match="padding"):
        patch(model, pair, "resid_pre", METRIC, where="each")
    with pytest.raises(InputError, match=r"row 1.*patches"):
        patch(model, pair, "resid_pre", METRIC, where="image", tower="vision")
    with pytest.raises(InputError, match=r"clean\[i\]"):
        patch(model, pair, "resid_pre", METRIC, where="each", tower="vision")


def test_several_pairs_have_their_own_metrics_and_places(family: str) -> None:
    model, first = model_and_pair(family, places={"here": (1, 3)})
    _, second = model_and_pair(family, "two images", places={"here": (2,)})
    metrics = [logit_difference(5, 9), logit_difference(7, 11)]
    both = patch(model, [first, second], "resid_mid", metrics, where=("here", "image"))
    for i, (pair, metric) in enumerate(zip((first, second), metrics, strict=True)):
        alone = patch(model, pair, "resid_mid", metric, where=("here", "image"))
        np.testing.assert_allclose(both.values[..., i], alone.values[..., 0], atol=1e-5)
    assert both.n_examples == 2


def test_the_whole_clean_stream_of_one_layer_restores_the_clean_run_exactly(family: str) -> None:
    model, pair = model_and_pair(family)
    with torch.no_grad():
        expected, cache = model.run_with_cache(pair.clean)
        for layer in range(model.cfg.n_deepstack, model.cfg.n_layers):  # all of the picture has entered before
            whole = PatchActivation(f"blocks.{layer}.hook_resid_pre", cache["resid_pre", layer])
            found = model.run_with_hooks(pair.corrupt, fwd_hooks=whole.hooks(model, pair.corrupt))
            assert torch.equal(found, expected)
    whole = range(max(model.cfg.n_deepstack - 1, 0), model.cfg.n_layers)
    result = patch(model, pair, "resid_post", METRIC, where="all", layers=whole)
    np.testing.assert_allclose(result.mean, 1.0, atol=1e-5)
    to_clean = kl_divergence(last_logits(expected, pair.clean))
    assert patch(model, pair, "resid_post", to_clean, where="all", layers=whole).values.max() < 1e-5


def test_patching_a_run_with_itself_changes_nothing(family: str) -> None:
    model, pair = model_and_pair(family)
    same = Pair(pair.clean, pair.clean)
    for tower in ("language", "vision"):
        result = patch(model, same, "resid_pre", METRIC, where="image", tower=tower)
        np.testing.assert_allclose(result.effects, 0.0, atol=1e-5)
        assert np.isnan(result.normalised).all() and np.isnan(result.mean).all()  # 0 of 0


@pytest.mark.parametrize("what", ["k", "v"])
def test_keys_and_values_are_patched_by_key_value_head(family: str, what: Any) -> None:
    model, pair = model_and_pair(family)
    _, source = model.run_with_cache(pair.clean)
    _, plain = model.run_with_cache(pair.corrupt)
    name = f"blocks.1.attn.hook_{what}"
    one = PatchActivation(name, source[name], heads=(1,))
    with model.hooks(fwd_hooks=one.hooks(model, pair.corrupt)):
        _, edited = model.run_with_cache(pair.corrupt)
    changed = (edited["z", 1] - plain["z", 1]).abs().amax((0, 1, 3)) > 1e-6
    assert changed.tolist() == [False, False, True, True]  # the two query heads that read from it
    with pytest.raises(InputError, match="key-value head 2"):
        patch(model, pair, what, METRIC, where="final", heads=(2,))


# ---- the vision tower ----


@pytest.mark.parametrize("what", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "k", "pattern"])
@pytest.mark.repeats_shapes
def test_patches_of_the_vision_tower_equal_the_loop(family: str, what: Any) -> None:
    model, pair = model_and_pair(family)
    heads = (1,) if what in SUFFIX else None
    result = patch(model, pair, what, METRIC, where="each", layers=(0, 1), heads=heads, tower="vision")
    n = result.axes["patch"]
    sizes = {
        "internvl2": 65,
        "internvl3.5": 65,
        "llava": 17,
        "idefics3": 48,
        "gemma3": 64,
        "made-up": 64,
        "llava-next": 50,
        "llava-onevision": 45,
    }  # patches, with the class token
    assert len(n) == sizes.get(family, 16)
    some = [(0, 3), (1, 0), (1, n[-1])]
    for layer, index in some:
        for head in (None,) if what not in SUFFIX else (1,):
            name = f"vision.blocks.{layer}.{SUFFIX.get(what, f'hook_{what}')}"

            def put(x: Tensor, source: Tensor, patch=index, head=head) -> None:
                tile, own = divmod(patch, x.shape[2 if what == "pattern" else 1])  # tile by tile
                at = (tile, own) if head is None else (tile, head, own) if what == "pattern" else (tile, own, head)
                x[at] = source[at]

            expected = METRIC(patched_by_hand(model, pair, "denoising", name, put))
            labels = {"layer": layer, "patch": index} | ({} if head is None else {"head": head})
            found = result.select(**labels).values.reshape(-1)
            np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)
    assert np.abs(result.effects).max() > 1e-4


@pytest.mark.parametrize("family", ["qwen2-vl", pytest.param("internvl2", marks=pytest.mark.full)])
def test_patches_of_several_images_are_numbered_image_by_image(family: str) -> None:
    model, pair = model_and_pair(family, "two images")
    result = patch(model, pair, "resid_pre", METRIC, where="each", layers=(1,), tower="vision")
    _, cache = model.run_with_cache(pair.clean)
    n_images, width = cache.vision["resid_pre", 1].shape[:2]
    image, index = n_images - 1, 2

    def put(x: Tensor, source: Tensor) -> None:
        x[image, index] = source[image, index]

    expected = METRIC(patched_by_hand(model, pair, "denoising", "vision.blocks.1.hook_resid_pre", put))
    found = result.select(patch=image * width + index).values.reshape(-1)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    with pytest.raises(InputError, match=f"patch {n_images * width}"):
        patch(model, pair, "resid_pre", METRIC, where=n_images * width, tower="vision")


def test_a_pattern_of_one_image_is_patched_in_that_image_alone(family: str) -> None:
    """The rows of one query, of the last image or tile; and all rows of images of different sizes."""
    model, pair = model_and_pair(family, "two images")
    _, cache = model.run_with_cache(pair.clean)
    n_images, width = cache.vision["resid_pre", 1].shape[:2]
    name, head = "vision.blocks.1.attn.hook_pattern", 1
    settings: Any = {"layers": (1,), "heads": (head,), "tower": "vision"}
    last = (n_images - 1) * width + 2

    def one(x: Tensor, source: Tensor) -> None:
        x[n_images - 1, head, 2] = source[n_images - 1, head, 2]

    def every(x: Tensor, source: Tensor) -> None:
        x[:, head] = source[:, head]

    result = patch(model, pair, "pattern", METRIC, where=("image", last), **settings)
    for place, put in ((last, one), ("image", every)):
        expected = METRIC(patched_by_hand(model, pair, "denoising", name, put))
        np.testing.assert_allclose(result.select(place=place).values.reshape(-1), expected, atol=2e-5)
    assert np.abs(result.effects).min() > 1e-6
    # the same patch of several images, and different ones of each
    for chosen in ([(3,)] * n_images, [(i,) for i in range(n_images)]):
        edit = PatchActivation(name, cache[name], tuple(chosen), (head,))

        def some(x: Tensor, source: Tensor, chosen=chosen) -> None:
            for image, (query,) in enumerate(chosen):
                x[image, head, query] = source[image, head, query]

        logits = model.run_with_hooks(pair.corrupt, fwd_hooks=edit.hooks(model, pair.corrupt))
        expected = patched_by_hand(model, pair, "denoising", name, some)
        torch.testing.assert_close(last_logits(logits, pair.corrupt), expected, atol=2e-5, rtol=1e-5)


# ---- metrics ----


def test_positions_are_one_place_in_every_example() -> None:
    """Pictures of 2 x 3 and of 3 x 2 tokens: as many columns, which show other places."""
    model, _ = model_and_pair("qwen2-vl")
    wide, tall = (
        Pair(*(tiny.inputs([[5, 6, ("image", grid), 7, 8]], seed) for seed in (1, 2)))
        for grid in ((1, 4, 6), (1, 6, 4))
    )
    assert wide.clean.shape == tall.clean.shape
    with pytest.raises(InputError, match="sizes"):
        patch(model, [wide, tall], "resid_pre", METRIC, where="each")
    with pytest.raises(InputError, match=r"4, 6.*6, 4"):
        patch(model, [wide, tall], "resid_pre", METRIC, where="each", tower="vision")
    assert patch(model, [wide, tall], "resid_pre", METRIC, where="image").n_examples == 2


def test_a_metric_that_is_not_a_number_is_reported_by_example(family: str) -> None:
    model, pair = model_and_pair(family, "padded")

    def bad(logits: Tensor) -> Tensor:
        values = METRIC(logits)
        return torch.where(torch.arange(len(values)) == 1, torch.nan, values)

    with pytest.warns(UserWarning, match=r"NaN.*\b1\b"):
        result = patch(model, pair, "resid_pre", bad, where=("final", "question"))
    assert set(result.not_numbers()["example"]) == {1} and len(result.not_numbers()) == 6
    assert set(result.summary()["not_numbers"]) == {1} and set(result.summary()["n"]) == {2}
    good = patch(model, pair, "resid_pre", METRIC, where=("final", "question"))
    kept = [0, 2]
    expected = good.effects[..., kept].mean(-1) / (good.source - good.base)[kept].mean()
    np.testing.assert_allclose(result.mean, expected, atol=1e-6)


def test_the_generated_answer_is_a_metric() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    prompt = model.to_inputs("What is the value of ab?\nab = 12")
    said = model.generate(prompt, max_new_tokens=4, stop_at_eos=False)[0, prompt.shape[1] :]
    for answer, expected in ((said, 1.0), (torch.cat((said[:3], said[3:] + 1)), 0.0)):
        with_answer = prompt.append(answer)
        with torch.no_grad():
            assert answered(with_answer)(model(with_answer)).tolist() == [expected]
    with pytest.raises(InputError, match="append"):
        answered(prompt)
    with pytest.raises(InputError, match='logits_at="all"'):
        answered(prompt.append(said))(torch.zeros(1, 1, 5))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"what": "z", "where": "finale"}, "'finale'"),
        ({"what": "z", "where": "final", "layers": (3,)}, "layer 3"),
        ({"what": "z", "where": "final", "heads": (4,)}, "head 4"),
        ({"what": "mlp_out", "where": "final", "heads": (0,)}, "mlp_out"),
        ({"what": "z", "where": "final", "tower": "vision"}, "vision.*'final'"),
        ({"what": "z", "where": ()}, "where"),
        ({"what": "z", "where": ("each", "final")}, 'where="each"'),
        ({"what": "z", "where": (3, 99)}, "99.*row 0"),
        ({"what": "z", "where": "final", "layers": ()}, "no layer"),
        ({"what": "z", "where": "final", "metric": logit_difference(5, 10**6)}, "token 1000000"),
        ({"what": "z", "where": "final", "metric": logit_difference(-1, 5)}, "token -1"),
        ({"what": "z", "where": "final", "metric": logit_difference([1, 2, 3], 5)}, r"1 rows.*\(3,\)"),
    ],
)
def test_what_does_not_exist_is_refused(settings: dict, says: str) -> None:
    model, pair = model_and_pair("qwen2-vl")
    with pytest.raises(InputError, match=says):
        patch(model, pair, **{"metric": METRIC, **settings})
