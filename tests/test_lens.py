"""Lenses and attributions equal their formulas, in both families; attention laid out on the image finds its tokens."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import factor, head_output, normed, unembedded
from families import model_and_inputs
from pairs import last_logits
from PIL import Image
from torch import Tensor

from hooked_vlm import GeometryError, HookedVLM, InputError
from hooked_vlm.analysis.pictures import overlay
from hooked_vlm.lens import head_lens, logit_attribution, logit_lens
from hooked_vlm.model.weight_processing import fold_value_biases

TOYS = ("toy-qwen2-vl", "toy-internvl2")


@pytest.fixture(params=["one image", "padded"])
def case(family: str, request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return model_and_inputs(family, request.param)


def spoken(model: Any, written: Tensor) -> Tensor:
    """Log-probabilities through the final norm and unembedding, written out."""
    return unembedded(model, normed(model.ln_final, written)).log_softmax(-1)


# ---- logit lens ----


@torch.no_grad()
def test_the_logit_lens_reads_every_stream_at_image_and_text_positions(case: tuple[Any, Any]) -> None:
    model, inputs = case
    logits, cache = model.run_with_cache(inputs)
    lens = logit_lens(model, inputs, targets=[5, 9], top=3)
    assert len(lens.positions) == int(inputs.attention_mask.sum())
    assert lens.layers == (0, 1, 2, 3)
    for i, (row, position) in enumerate(zip(lens.rows, lens.positions, strict=True)):
        for layer in lens.layers:
            stream = cache["resid_post", 2] if layer == 3 else cache["resid_pre", layer]
            expected = spoken(model, stream[row, position])
            np.testing.assert_allclose(lens.target_log_probs[layer, i], expected[[5, 9]], atol=2e-5)
            best = expected.topk(3)
            assert lens.top_tokens[layer, i].tolist() == best.indices.tolist()
            np.testing.assert_allclose(lens.top_probs[layer, i], best.values.exp(), atol=1e-5)
            assert lens.target_ranks[layer, i, 0] == int((expected > expected[5]).sum())
        np.testing.assert_allclose(
            lens.target_log_probs[3, i], logits[row, position].log_softmax(-1)[[5, 9]], atol=2e-5
        )


def test_the_lens_looks_where_it_is_told_and_says_so() -> None:
    model = HookedVLM.from_pretrained("toy-internvl2")
    picture = Image.new("RGB", (128, 128), "white")
    inputs = model.to_inputs("Read the text.", images=picture)
    lens = logit_lens(model, inputs, "image", targets=7, layers=(2, 4))
    assert lens.positions.tolist() == inputs.image_tokens(0).tolist() and lens.layers == (2, 4)
    frame = lens.to_dataframe(model)
    assert len(frame) == 2 * 64 * 5
    line = frame.iloc[64 * 5 + 3 * 5]  # layer 4, the fourth token, the likeliest
    assert (line.layer, line.position, line["rank"]) == (4, inputs.image_tokens(0)[3], 0)
    assert line.text == model.to_string([int(lens.top_tokens[1, 3, 0])])
    figure = lens.on_image(inputs, picture)
    shown = np.asarray(figure.axes[1].images[1].get_array())
    np.testing.assert_allclose(shown, np.exp(lens.target_log_probs[1, :, 0]).reshape(8, 8))
    assert np.asarray(lens.heatmap().axes[0].images[0].get_array()).shape == (2, 64)
    with pytest.raises(InputError, match="image 0"):
        logit_lens(model, inputs, "final", targets=7).on_image(inputs, picture)
    with pytest.raises(InputError, match="target 1"):
        lens.heatmap(target=1)
    refused: Any = (
        ({"layers": (9,)}, "layer 9"),
        ({"layers": ()}, "no layer"),
        ({"targets": -1}, "token -1"),
        ({"targets": [3, 10**6]}, "token 1000000"),
        ({"top": 0}, r"\btop\b.*0"),
        ({"positions": "generated"}, "generated"),
    )
    for settings, says in refused:
        with pytest.raises(InputError, match=says):
            logit_lens(model, inputs, **{"positions": "final", **settings})
    for ask in (head_lens, logit_attribution):
        with pytest.raises(InputError, match="token -1"):
            ask(model, inputs, -1)


# ---- heads ----


@torch.no_grad()
def test_the_head_lens_reads_what_one_head_writes(case: tuple[Any, Any]) -> None:
    model, inputs = case
    _, cache = model.run_with_cache(inputs)
    targets = torch.arange(5, 5 + len(inputs))
    for positions, group in (("final", inputs.positions.final), ("question", inputs.positions.question)):
        found = head_lens(model, inputs, targets, positions)
        for row, own in enumerate(group):
            for layer in range(3):
                for head in range(4):
                    written = head_output(model, cache, layer, head)[row, own]
                    expected = spoken(model, written)[:, targets[row]].exp().mean()
                    assert found[row, layer, head] == pytest.approx(expected.item(), abs=1e-5)
    with pytest.raises(InputError, match=rf"{len(inputs)} rows.*\({len(inputs) + 1},\)"):
        head_lens(model, inputs, [1] * (len(inputs) + 1))


@pytest.mark.parametrize("unit", ["layer", "component", "head"])
@torch.no_grad()
def test_a_logit_is_the_sum_of_what_its_parts_add(case: tuple[Any, Any], unit: Any) -> None:
    model, inputs = case
    right, wrong = torch.arange(5, 5 + len(inputs)), 42
    found = logit_attribution(model, inputs, right, wrong, unit)
    logits = last_logits(model(inputs), inputs)
    if (cap := model.cfg.output_logits_soft_cap) is not None:
        logits = cap * torch.atanh(logits / cap)  # parts sum to what is capped
    expected = logits[torch.arange(len(inputs)), right] - logits[:, 42]
    np.testing.assert_allclose(found.logit, expected, atol=2e-5)
    np.testing.assert_allclose(found.values.sum(0), expected, atol=5e-5)
    assert len(found.labels) == {"layer": 4, "component": 7, "head": 16}[unit] + model.cfg.n_deepstack
    alone = logit_attribution(model, inputs, 42, unit=unit)
    np.testing.assert_allclose(alone.values.sum(0), logits[:, 42], atol=5e-5)
    if unit == "head":
        _, cache = model.run_with_cache(inputs)
        last = inputs.stop[0] - 1
        written = head_output(model, cache, 1, 2)[0, last]
        read = written / cache["ln_final.hook_scale"][0, last] * factor(model.ln_final)
        by_hand = read @ (model.W_U[:, right[0]] - model.W_U[:, 42])
        assert found.values[found.labels.index("L1H2"), 0] == pytest.approx(by_hand.item(), abs=1e-5)
        assert len(found.to_dataframe()) == found.values.size


@pytest.mark.parametrize("unit", ["layer", "component", "head"])
@torch.no_grad()
def test_parts_sum_to_the_logit_of_folded_and_of_rounded_weights(unit: Any) -> None:
    """With an output bias that value biases were folded into; in bfloat16, up to its rounding."""
    model, inputs = model_and_inputs("qwen2-vl", "padded")
    folded = copy.deepcopy(model)
    fold_value_biases(folded)
    found = logit_attribution(folded, inputs, 5, 42, unit)
    np.testing.assert_allclose(found.values.sum(0), found.logit, atol=5e-5)
    if unit == "head":
        assert "L1 b_O" in found.labels
    rounded = logit_attribution(copy.deepcopy(model).to(torch.bfloat16), inputs, 5, 42, unit)
    np.testing.assert_allclose(rounded.values.sum(0), rounded.logit, atol=0.03)


# ---- attention on the image ----


@pytest.mark.parametrize("stored", [False, True], ids=["derived", "stored"])
@pytest.mark.parametrize("name", TOYS)
@torch.no_grad()
def test_attention_on_the_image_is_that_of_the_tokens_there(name: str, stored: bool) -> None:
    """Two pictures, the second wide: in InternVL2 two tiles and a thumbnail."""
    model = HookedVLM.from_pretrained(name)
    noise = np.random.default_rng(0).integers(0, 255, (128, 256, 3), dtype=np.uint8)
    inputs = model.to_inputs("Read the text.", images=[noise[:, :128], noise])
    names = (lambda n: n.endswith(("hook_pattern", "rot_q", "rot_k"))) if stored else None
    _, cache = model.run_with_cache(inputs, names_filter=names)
    pattern = cache["pattern", 2][0, 1, -1]
    parts = ("tiles", "thumbnail") if name == "toy-internvl2" else ("tiles",)
    mass = 0.0
    for part in parts:
        found = cache.on_image(2, 1, image=1, part=part)
        rows, cols = found.shape
        assert (rows, cols) == ((8, 8) if part == "thumbnail" else (8, 16))
        for r in range(rows):
            for c in range(cols):
                centre = ((c + 0.5) / cols * 256, (r + 0.5) / rows * 128)
                box = (centre[0], centre[1], centre[0] + 0.01, centre[1] + 0.01)
                (token,) = inputs.tokens_in_box(1, box, part=part if len(parts) == 2 else "all")
                assert found[r, c] == pytest.approx(pattern[token].item(), abs=1e-6)
        mass += found.sum().item()
    assert mass == pytest.approx(pattern[inputs.image_tokens(1)].sum().item(), abs=1e-5)
    heads = cache.on_image(2, query=-3, image=1)
    assert heads.shape == (4, 8, 16)
    torch.testing.assert_close(heads[1].sum() > 0, torch.tensor(True))
    figure = overlay(noise, heads.numpy(), [f"head {h}" for h in range(4)], "attention")
    assert len(figure.axes) == 5
    assert len(overlay(noise, heads.bfloat16()).axes) == 5  # tensors, with default titles
    assert [axes.get_title() for axes in overlay(noise, heads[1]).axes[:1]] == [""]
    with pytest.raises(InputError, match="4 maps, got 1"):
        overlay(noise, heads, ["head 1"])
    with pytest.raises(InputError, match="row, col"):
        overlay(noise, heads[0, 0])


def test_attention_on_the_image_of_padded_rows_and_without_a_batch_axis() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    picture = Image.new("RGB", (128, 112), "white")
    inputs = model.to_inputs(["What is the main object in the image?", "Read."], images=[[picture], [picture]])
    assert inputs.first[1] > 0
    _, cache = model.run_with_cache(inputs)
    _, alone = model.run_with_cache(inputs[1], remove_batch_dim=True)
    torch.testing.assert_close(cache.on_image(2, 0, image=1), alone.on_image(2, 0), atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.on_image(2, 0, query=inputs[1].shape[1] - 1), alone.on_image(2, 0))
    refused: Any = (
        ({"query": 400}, "query 400"),
        ({"head": 4}, "head 4"),
        ({"image": 1}, "image 1"),
    )
    for arguments, says in refused:
        with pytest.raises(InputError, match=says):
            alone.on_image(2, **arguments)
    with pytest.raises(GeometryError, match="thumbnail"):
        alone.on_image(2, 0, part="thumbnail")
    with pytest.raises(InputError, match="rows"):
        cache.apply_slice_to_batch_dim(0).on_image(2, 0)
    _, rows = model.run_with_cache(inputs, names_filter="blocks.2.attn.hook_pattern", pos_slice=-1)
    with pytest.raises(InputError, match=r"1.*pos_slice"):
        rows.on_image(2, 0)
