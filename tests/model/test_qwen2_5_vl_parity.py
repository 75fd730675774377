"""What Qwen2.5-VL alone has: videos whose frames lie apart by their time."""

import pytest
import torch
from families import tiny_model
from tiny_qwen2_5_vl import CASES, PER_SECOND, for_hf, hf_batch, tiny_hf

from hooked_vlm.errors import InputError


@pytest.mark.parametrize("case", CASES)
def test_positions_follow_the_published_rule(case: str) -> None:
    batch = hf_batch(CASES[case])
    assert torch.equal(tiny_model("qwen2.5-vl").inputs_from_hf(batch).position_ids, for_hf(batch)["position_ids"])


def test_frames_of_a_video_lie_where_transformers_has_them() -> None:
    """Of the text behind a video its release 5 ignores the length of the video (docs/references.md)."""
    batch = hf_batch([[5, ("video", (7, 4, 4))], [6, 7, ("video", (5, 4, 2))]])
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    theirs, _ = tiny_hf().model.get_rope_index(**{name: batch[name] for name in names})
    ours = tiny_model("qwen2.5-vl").inputs_from_hf(batch)
    for visual in ours.visuals:
        assert torch.equal(ours.position_ids[:, visual.row, visual.span], theirs[:, visual.row, visual.span])
    assert ours.position_ids[0, 0].max() == 2 + 6 * PER_SECOND * 1.0 + 1


def test_times_of_videos_stay_with_them() -> None:
    model = tiny_model("qwen2.5-vl")
    inputs = model.inputs_from_hf(hf_batch(CASES["padded-videos"]))
    seconds = [v.layout.seconds for v in inputs.visuals if v.kind == "video"]
    assert seconds == [1.0, 0.5] and inputs[[1]].video_layouts[0].seconds == 0.5
    with pytest.raises(InputError, match="second_per_grid_ts"):
        model.inputs_from_hf(hf_batch(CASES["padded-videos"]) | {"second_per_grid_ts": torch.ones(3)})


def test_frames_of_a_list_are_half_a_second_apart_unless_their_rate_is_given() -> None:
    from hooked_vlm.inputs.image_processor import ImageProcessor
    from hooked_vlm.inputs.picture_settings import PictureSettings
    from hooked_vlm.inputs.videos import open_video

    frames = torch.zeros(4, 3, 16, 16, dtype=torch.uint8).numpy()
    assert open_video(frames, PictureSettings(), ImageProcessor()).rate == 2.0
    assert open_video(frames, PictureSettings(fps=8.0), ImageProcessor()).rate == 8.0
