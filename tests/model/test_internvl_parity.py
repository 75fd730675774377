"""What InternVL alone has: scaled rotary frequencies, sliding windows, tiles and their placeholders."""

from typing import Any

import pytest
import torch
from references import KV_CACHE, with_cache
from tiny_internvl import CASES, IMAGE, for_hf, hf_batch, tiny_config, tiny_hf, tiny_model
from torch import Tensor
from transformers import InternVLForConditionalGeneration, Phi3ForCausalLM

from hooked_vlm import HookedVLM, InputError
from hooked_vlm.analysis.rows import attention_rows


def close(ours: Tensor, theirs: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=atol, rtol=0)


def test_a_long_row_of_a_batch_is_what_the_reference_makes_of_it_alone() -> None:
    batch, model, hf = hf_batch(CASES["left-padded"]), tiny_model("phi3"), tiny_hf("phi3")
    with torch.no_grad():
        ours = model(model.inputs_from_hf(batch))
        real = batch["attention_mask"].bool()
        # images by row: one of two tiles, none, two of one
        tiles = [batch["pixel_values"][:2], None, batch["pixel_values"][2:]]
        for row, pixels in enumerate(tiles):
            alone = {"input_ids": batch["input_ids"][row, real[row]][None]}
            theirs = hf(**alone, **({} if pixels is None else {"pixel_values": pixels})).logits
            close(ours[row, real[row]], theirs[0])
    assert min(real.sum(1)) <= 32 < max(real.sum(1))  # on both sides of the trained length


# ---------------------------------------------------------------- lengths beyond training


def text_of(length: int, rows: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return {"input_ids": torch.randint(4, 190, (rows, length), generator=generator)}


@pytest.mark.parametrize("length", [127, 128, 129, 200])
@torch.no_grad()
def test_dynamic_scaling_beyond_the_trained_length(length: int) -> None:
    hf, model = tiny_hf("llama-dynamic"), tiny_model("llama-dynamic")
    close(model(text_of(length)["input_ids"]), hf(**text_of(length)).logits)


@pytest.mark.parametrize("length", [31, 32, 33, 100])
@torch.no_grad()
def test_longrope_on_both_sides_of_the_trained_length(length: int) -> None:
    close(tiny_model("phi3")(text_of(length)["input_ids"]), tiny_hf("phi3")(**text_of(length)).logits)


@pytest.mark.parametrize("kind", ["llama-dynamic", "phi3"])
@torch.no_grad()
def test_an_earlier_long_input_leaves_no_trace(kind: str) -> None:
    model = tiny_model(kind)
    short = model(text_of(20)["input_ids"])
    model(text_of(120)["input_ids"])
    assert torch.equal(model(text_of(20)["input_ids"]), short)


@torch.no_grad()
def test_steps_across_the_trained_length_equal_a_fresh_references() -> None:
    """Keys keep the rotation that they were cached with."""
    fresh: Any = InternVLForConditionalGeneration(tiny_config("llama-dynamic")).eval()
    fresh.load_state_dict(tiny_hf("llama-dynamic").state_dict())
    model, tokens = tiny_model("llama-dynamic"), text_of(140)["input_ids"]
    cache, step = model.new_kv_cache(1, 140), None
    for first, stop in ((0, 120), *((i, i + 1) for i in range(120, 140))):
        past = None if step is None else getattr(step, KV_CACHE)
        step = fresh(input_ids=tokens[:, first:stop], **with_cache(past))
        close(model(tokens[:, first:stop], past_kv_cache=cache)[:, -1], step.logits[:, -1])
    whole = model(tokens)[:, -1]
    assert step is not None
    assert (whole - step.logits[:, -1]).abs().max() > 1e-3  # an uncached run rotates all keys anew


@pytest.mark.parametrize("window", [4, 9])
@torch.no_grad()
def test_a_sliding_window_hides_what_lies_before_it(window: int) -> None:
    config: Any = tiny_config("phi3").text_config
    config.sliding_window = window
    config._attn_implementation = "eager"
    hf: Any = Phi3ForCausalLM(config).eval()
    model, tokens = HookedVLM.from_hf(hf), text_of(24)["input_ids"]
    theirs = hf(input_ids=tokens, output_attentions=True)
    logits, seen = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(("_q", "_k", "hook_pattern")))
    close(logits, theirs.logits)
    close(seen["pattern", 1], theirs.attentions[1], 5e-6)
    close(model(tokens), theirs.logits)  # the fused kernel
    rows = attention_rows(model, model.as_inputs(tokens), torch.tensor([[3, 20]]))
    close(rows[1, 0], theirs.attentions[1][0][:, [3, 20]], 5e-6)
    cache = model.new_kv_cache(1, 24)
    steps = [model(tokens[:, i : i + 1], past_kv_cache=cache) for i in range(24)]
    close(torch.cat(steps, dim=1), theirs.logits)


# ---------------------------------------------------------------- tiles


@torch.no_grad()
def test_learned_positions_are_interpolated_for_other_tile_sizes() -> None:
    hf, model = tiny_hf("qwen2"), tiny_model("qwen2")
    batch = hf_batch([[5, ("image", 2), 7]], tile_size=48)
    close(model(model.inputs_from_hf(batch)), hf(**for_hf(batch)).logits)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("layer", [-2, 1])
@torch.no_grad()
def test_the_projector_may_read_an_earlier_layer(kind: str, layer: int) -> None:
    hf = InternVLForConditionalGeneration(tiny_config(kind, vision_feature_layer=layer)).eval()
    hf.load_state_dict(tiny_hf(kind).state_dict())
    model, batch = HookedVLM.from_hf(hf), hf_batch(CASES["one-image"])
    inputs = model.inputs_from_hf(batch)
    theirs = hf(**for_hf(batch), vision_feature_layer=layer)
    close(model(inputs), theirs.logits)
    _, cache = model.run_with_cache(inputs)
    assert "vision.blocks.0.hook_resid_post" in cache and "vision.blocks.1.hook_resid_post" not in cache
    with pytest.raises(ValueError, match="projector"):
        model.run_with_hooks(inputs, fwd_hooks=[("vision.blocks.1.hook_resid_post", lambda x, hook: x)])


def test_tiles_of_images_are_inferred_from_the_runs_of_placeholders() -> None:
    batch, model = hf_batch(CASES["left-padded"]), tiny_model("qwen2")
    told = model.inputs_from_hf(batch)
    inferred = model.inputs_from_hf({k: v for k, v in batch.items() if k != "num_tiles"})
    assert inferred.grids == told.grids == ((2, 8, 8), (1, 8, 8), (1, 8, 8))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_tiles": torch.tensor([3, 2])}, r"4.*num_tiles.*\[3, 2\]"),
        ({"num_tiles": torch.tensor([3, 1, 0])}, r"4.*\[3, 1, 0\]"),
        ({"num_tiles": torch.tensor([1, 3])}, r"\brun\b"),
        ({"pixel_values": torch.zeros(4, 3, 32, 30)}, r"8.*\(4, 3, 32, 30\)"),
        ({"pixel_values": torch.zeros(4, 96)}, r"pixel_values.*\(4, 96\)"),
        ({"num_tiles": None, "pixel_values": torch.zeros(4, 3, 40, 40)}, "25.*num_tiles"),
        ({"num_tiles": None, "pixel_values": torch.zeros(3, 3, 32, 32)}, r"3.*\[3, 1\]"),
        ({"pixel_values": torch.zeros(4, 1, 32, 32)}, r"3.*\(4, 1, 32, 32\)"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids"),
        ({"pixel_values": None}, "no image"),
    ],
)
def test_tiles_that_do_not_fit_the_placeholders(change: dict[str, Any], says: str) -> None:
    batch = {**hf_batch(CASES["images-of-two-sizes"]), **change}
    with pytest.raises(InputError, match=says):
        tiny_model("qwen2").inputs_from_hf(batch)


def test_rows_take_their_tiles_along() -> None:
    batch, model = hf_batch(CASES["left-padded"]), tiny_model("qwen2")
    inputs = model.inputs_from_hf(batch)
    last = inputs[2]
    assert last.pixel_values is not None and torch.equal(last.pixel_values, batch["pixel_values"][2:])
    again = type(inputs).concat([inputs[0], inputs[1], inputs[2]])
    assert again.pixel_values is not None and torch.equal(again.pixel_values, batch["pixel_values"])
    assert [v.n_tokens for v in again.visuals] == [32, 16, 16]
    assert int((inputs.tokens == IMAGE).sum()) == 64
    assert torch.equal(inputs.position_ids[0, 0], inputs.position_ids[2, 0])  # plain positions
