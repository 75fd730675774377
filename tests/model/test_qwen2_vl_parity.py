"""What Qwen2-VL alone has: positions of three axes, patches in blocks, images of any size and videos in one batch.

`transformers` is given the published position ids (`tiny_qwen2_vl.published_positions`), since its own release 5
ignores the length of a video.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qwen2_vl import CASES, LONG_VIDEO, for_hf, hf_batch, inputs, published_positions, tiny_hf, tiny_model
from torch import Tensor

from hooked_vlm import VLMInputs


def close(ours: Tensor, theirs: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=atol, rtol=0)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("case", CASES)
def test_positions_follow_the_published_rule(case: str) -> None:
    batch = hf_batch(CASES[case])
    assert torch.equal(inputs(CASES[case]).position_ids, published_positions(batch))


@pytest.mark.parametrize("case", ["one-image", "images-of-two-sizes", "left-padded", "video-and-image"])
def test_positions_are_those_of_transformers_where_its_versions_agree(case: str) -> None:
    batch = hf_batch(CASES[case])
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    theirs, deltas = tiny_hf().model.get_rope_index(**{name: batch.get(name) for name in names})
    ours = inputs(CASES[case])
    real = batch["attention_mask"].bool()
    assert torch.equal(ours.position_ids[:, real], theirs[:, real])
    assert torch.equal(ours.next_position, batch["attention_mask"].sum(1) + deltas[:, 0])


def test_text_after_a_long_video_is_beyond_the_videos_last_frame() -> None:
    ids = inputs(LONG_VIDEO).position_ids
    assert ids[0, 0, 2:30].max() == 8 and ids[0, 0, 30] == 9  # 7 temporal patches from position 2 on


# ---------------------------------------------------------------- the vision tower


@pytest.mark.parametrize("layer", range(2))
@pytest.mark.parametrize("case", ["images-of-two-sizes", "padded-videos"])
@torch.no_grad()
def test_vision_patterns_equal_attention_within_every_image_and_frame(case: str, layer: int) -> None:
    """Written out image by image: merge-block order, rotation by row and column, softmax over one image."""
    batch, attention = hf_batch(CASES[case]), tiny_hf().model.visual.blocks[layer].attn
    name = f"vision.blocks.{layer}.attn.hook_pattern"
    entering: list[Tensor] = []  # images, then videos
    handle = attention.register_forward_pre_hook(
        lambda _m, args, kwargs: entering.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    try:
        tiny_hf()(**for_hf(batch))
    finally:
        handle.remove()
    seen = inputs(CASES[case])
    _, cache = tiny_model().run_with_cache(seen, names_filter=name)
    qkv = attention.qkv(torch.cat(entering)).view(-1, 3, 2, 16)
    at = image = 0
    for t, h, w in seen.grids:
        order = [(y + dy, x + dx) for y in range(0, h, 2) for x in range(0, w, 2) for dy in (0, 1) for dx in (0, 1)]
        turns = torch.tensor([1e4 ** (-i / 4) for i in range(4)])
        angles = torch.stack([torch.cat((y * turns, x * turns)) for y, x in order])[:, None]
        for _ in range(t):
            q, k, _ = qkv[at : at + h * w].unbind(1)
            q, k = (torch.view_as_complex(torch.stack((a[..., :8], a[..., 8:]), -1)) for a in (q, k))
            q, k = (a * torch.polar(torch.ones_like(angles), angles) for a in (q, k))
            scores = torch.einsum("qhd,khd->hqk", q, k.conj()).real / 4
            close(cache[name][image, :, : h * w, : h * w], scores.softmax(-1))
            assert not cache[name][image, :, h * w :].any() and not cache[name][image, ..., h * w :].any()
            at, image = at + h * w, image + 1


# ---------------------------------------------------------------- batches

items = st.one_of(
    st.integers(5, 90),
    st.sampled_from([("image", (1, 2, 4)), ("image", (1, 4, 2)), ("image", (1, 4, 4)), ("video", (3, 2, 2))]),
)
rows = st.lists(st.lists(items, min_size=1, max_size=5), min_size=1, max_size=3)


@settings(max_examples=12)
@given(rows, st.data())
@torch.no_grad()
def test_rows_of_a_batch_run_alone_as_they_run_in_it(batch: list[list[Any]], data: st.DataObject) -> None:
    model, whole = tiny_model(), inputs(batch)
    chosen = data.draw(st.lists(st.integers(0, len(batch) - 1), min_size=1, max_size=3))
    logits, cut = model(whole), whole[chosen]
    real = cut.attention_mask.bool()
    assert torch.equal(cut.tokens, whole.tokens[chosen]) and torch.equal(real, whole.attention_mask[chosen].bool())
    close(model(cut)[real], logits[chosen][real], 1e-5)
    for i in range(cut.n_images):
        assert cut.tokens[cut.row_of_image(i), cut.image_tokens(i)].eq(100).all()


@settings(max_examples=10)
@given(rows, rows)
@torch.no_grad()
def test_concatenated_batches_run_as_each_alone(a: list[list[Any]], b: list[list[Any]]) -> None:
    model = tiny_model()
    parts = [inputs(a), inputs(b, seed=1).append(torch.tensor([50, 51]))]
    together = VLMInputs.concat(parts)
    real = together.attention_mask.bool()
    alone = torch.cat([model(part)[part.attention_mask.bool()] for part in parts])
    close(model(together)[real], alone, 1e-5)
