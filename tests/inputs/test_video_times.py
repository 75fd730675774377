"""Videos as pictures behind their times (Qwen3-VL): sizes, times and texts as in transformers, runs and positions."""

from typing import Any

import numpy as np
import pytest
import tiny_qwen3_vl
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_qwen3_vl import reading_model

from hooked_vlm import HookedVLM, InputError
from hooked_vlm.inputs.boxes import ImageSize
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.processors import processor_of
from hooked_vlm.inputs.resizing import resize_together
from hooked_vlm.inputs.videos import Clip
from tools.toy_training import qwen2_vl as toy


def frames(n: int, size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    rng = np.random.default_rng(n)
    return [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(n)]


def text_of(inputs: Any) -> str:
    """The prompt, runs of placeholders as one each."""
    text = reading_model().tokenizer.decode(inputs.tokens[0].tolist())
    while toy.VIDEO_PAD * 2 in text:
        text = text.replace(toy.VIDEO_PAD * 2, toy.VIDEO_PAD)
    return text


def test_a_prompt_has_no_system_turn_and_every_temporal_patch_its_time() -> None:
    inputs = reading_model().to_inputs("What?", videos=[frames(5)])  # at two frames a second
    assert text_of(inputs) == (
        "<|im_start|>user\n"
        "<0.2 seconds><|vision_start|><|video_pad|><|vision_end|>"
        "<1.2 seconds><|vision_start|><|video_pad|><|vision_end|>"
        "<2.0 seconds><|vision_start|><|video_pad|><|vision_end|>"
        "What?<|im_end|>\n<|im_start|>assistant\n"
    )
    video = inputs.visual("video", 0)
    assert [stop - start for start, stop in video.runs] == [4, 4, 4]
    assert video.layout.frames == 3 and video.layout.tile_of(5) == 1
    assert inputs.video_tokens(0).tolist() == [p for run in video.runs for p in range(*run)]


def test_texts_without_marks_and_other_rates() -> None:
    model = reading_model()
    part = {"type": "video", "video": frames(4), "fps": 10.0}
    inputs = model.to_inputs([{"role": "user", "content": [part, {"type": "text", "text": "?"}]}])
    assert "<0.1 seconds>" in text_of(inputs) and "<0.2 seconds>" in text_of(inputs)  # 0.05 and 0.25, rounded to even
    bare = model.to_inputs(f"a {toy.VIDEO_PAD} b", videos=[frames(2)], chat=False)
    marked = model.to_inputs(f"a {toy.VISION_START}{toy.VIDEO_PAD}{toy.VISION_END} b", videos=[frames(2)], chat=False)
    assert text_of(bare) == text_of(marked)
    assert text_of(bare) == "a <0.2 seconds><|vision_start|><|video_pad|><|vision_end|> b"


def test_images_beside_videos_keep_their_own_marks() -> None:
    inputs = reading_model().to_inputs("?", images=frames(1), videos=[frames(2), frames(3)])
    counts = [(v.kind, v.index, len(v.runs)) for v in inputs.visuals]
    assert counts == [("image", 0, 1), ("video", 0, 1), ("video", 1, 2)]
    assert text_of(inputs).count("<|vision_start|>") == 4


@given(st.integers(1, 12), st.sampled_from([1.0, 2.0, 24.0, 29.97]))
def test_times_are_those_of_transformers(n: int, rate: float) -> None:
    clip = Clip(ImageSize(8, 8), n, iter(()), False, rate, tuple(i / rate for i in range(n)))
    of: Any = transformers.Qwen3VLProcessor  # its method reads nothing of the processor
    theirs = of._calculate_timestamps(None, list(range(n)), rate, 2)
    assert clip.times_of_patches(2) == theirs


SIDES, BOUNDS = st.integers(8, 600), st.sampled_from([(2**12, 3 * 2**23), (2**16, 2**18)])


@given(st.integers(2, 64), SIDES, SIDES, BOUNDS)
def test_sizes_are_those_of_transformers(n: int, height: int, width: int, bounds: tuple[int, int]) -> None:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    if max(height, width) / min(height, width) > 20:
        return
    theirs = smart_resize(n, height, width, 2, 32, *bounds)
    assert resize_together(height, width, 32, *bounds, n, 2) == theirs


def test_bounds_hold_for_all_frames_together_unless_a_call_gives_others() -> None:
    model = reading_model()
    processor = processor_of(model.cfg)
    assert isinstance(processor, ImageProcessor) and processor.for_videos is not None and processor.for_videos.together
    assert processor.image_mean == (0.5, 0.5, 0.5)
    small = ImageProcessor(patch_size=4, min_pixels=64, max_pixels=64 * 100)
    together = ImageProcessor(patch_size=4, min_pixels=64, max_pixels=64 * 100, together=True)
    size = (96, 64)  # 12 x 8 tokens
    assert small.video(frames(8, size))[1].tolist() == [[4, 16, 24]]
    rows, cols = together.video(frames(8, size))[1][0, 1:].tolist()
    assert 8 * rows * cols * 16 <= 64 * 100
    assert together.bounded(64, 6400).video(frames(8, size))[1].tolist() == [[4, rows, cols]]
    both = ImageProcessor(patch_size=4, min_pixels=64, max_pixels=64 * 100, for_videos=together)
    assert both.video(frames(8, size), max_pixels=64 * 100)[1].tolist() == [[4, 16, 24]], "each frame by itself"


def test_a_hugging_face_batch_has_a_run_for_every_temporal_patch() -> None:
    model = HookedVLM.from_hf(tiny_qwen3_vl.tiny_hf())
    batch = tiny_qwen3_vl.hf_batch([[5, ("video", (2, 4, 4)), 7]])
    video = model.inputs_from_hf(batch).visual("video", 0)
    assert len(video.runs) == 2 and not video.layout.between
    batch["input_ids"][0, 4] = 8  # text among the placeholders of a temporal patch
    batch["input_ids"][0, 8] = tiny_qwen3_vl.VIDEO
    with pytest.raises(InputError, match="runs of 4, 4"):
        model.inputs_from_hf(batch)


def test_positions_of_each_temporal_patch_begin_anew() -> None:
    model = HookedVLM.from_hf(tiny_qwen3_vl.tiny_hf())
    hf = tiny_qwen3_vl.tiny_hf()
    for case in ("long-video", "padded-videos", "video-and-image"):
        batch = tiny_qwen3_vl.hf_batch(tiny_qwen3_vl.CASES[case])
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
        theirs, _ = hf.model.get_rope_index(**{name: batch[name] for name in names if name in batch})
        ours = model.inputs_from_hf(batch).position_ids
        real = batch["attention_mask"].bool()
        assert torch.equal(ours[:, real], theirs[:, real])
