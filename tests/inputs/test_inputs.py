"""A batch of inputs behaves like its tokens, keeps every image with its row, and never changes."""

from dataclasses import FrozenInstanceError, replace

import pytest
import tiny_qwen2_vl as tiny
import torch
from PIL import Image
from tiny_qwen2_vl import IMAGE, VISION_END, VISION_START

from hooked_vlm import InputError, VLMInputs
from hooked_vlm.inputs.layouts import whole_layout
from hooked_vlm.inputs.token_layout import Turns

BATCH = [
    [5, 6, ("image", (1, 4, 6)), 7, 8],
    [11, 12, 13],
    [5, ("image", (1, 4, 4)), 9, ("image", (1, 2, 6)), 9],
    [5, ("video", (2, 4, 4)), 7, ("image", (1, 2, 2)), 8],
]
"""Left-padded; images 0 | none | 1, 2 | a video and image 3."""


@pytest.fixture
def batch() -> VLMInputs:
    return tiny.inputs(BATCH)


def logits(inputs: VLMInputs) -> torch.Tensor:
    """Of the real positions, row after row."""
    with torch.no_grad():
        return tiny.tiny_model()(inputs)[inputs.attention_mask.bool()]


# ---- like a token tensor ----


def test_it_has_the_shape_of_its_tokens(batch):
    assert batch.shape == batch.tokens.shape == (4, 16)
    assert (batch.ndim, len(batch), batch.size(0), batch.size(-1)) == (2, 4, 4, 16)
    assert (batch.dtype, batch.device) == (batch.tokens.dtype, batch.tokens.device)
    assert [len(row) for row in batch] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (0, [0]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        ([2, 0], [2, 0]),
        (torch.tensor([2, 2, 3]), [2, 2, 3]),
        (torch.tensor(2), [2]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        ([True, False, False, True], [0, 3]),
    ],
    ids=str,
)
def test_row_indexing_takes_the_images_of_the_rows_along(batch, index, rows):
    taken = batch[index]
    assert taken.tokens.equal(batch.tokens[rows])
    assert taken.attention_mask.equal(batch.attention_mask[rows])
    assert [v.row for v in taken.visuals] == [i for i, r in enumerate(rows) for v in batch.visuals if v.row == r]
    expected = torch.cat([logits(tiny.inputs(BATCH))[_real_range(batch, r)] for r in rows])
    assert (logits(taken) - expected).abs().max() < 1e-5


def _real_range(batch: VLMInputs, row: int) -> slice:
    counts = [0, *batch.attention_mask.sum(1).cumsum(0).tolist()]
    return slice(counts[row], counts[row + 1])


def test_rows_taken_one_by_one_and_joined_are_the_batch(batch):
    joined = VLMInputs.concat(list(batch))
    for name in ("tokens", "attention_mask", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        assert getattr(joined, name).equal(getattr(batch, name)), name
    assert joined.position_ids.equal(batch.position_ids)


@pytest.mark.parametrize("index", [(slice(None), slice(None, -1)), (0, 1), (slice(None), 0)])
def test_positions_cannot_be_cut_out_and_the_error_says_what_can_be_done(batch, index):
    with pytest.raises(InputError, match=r"inputs\.tokens.*append"):
        batch[index]


@pytest.mark.parametrize("index", [4, -5, [0, 7], torch.tensor([5])])
def test_rows_that_are_not_there_are_refused(batch, index):
    with pytest.raises(IndexError):
        batch[index]


@pytest.mark.parametrize("index", [slice(2, 2), [], torch.zeros(4, dtype=torch.bool)], ids=str)
def test_no_rows_at_all_are_refused(batch, index):
    with pytest.raises(InputError, match="no rows"):
        batch[index]


def test_repeat_gives_plain_token_ids(batch):
    assert batch.repeat(2, 1).equal(batch.tokens.repeat(2, 1))


def test_to_moves_everything_and_casts_only_pixels(batch):
    features = torch.randn(sum(v.n_tokens for v in batch.visuals), 64)
    batch = batch.with_image_features(features)
    halves = batch.to(torch.bfloat16)
    assert halves.pixel_values.dtype == halves.pixel_values_videos.dtype == torch.bfloat16
    assert halves.image_features.dtype == torch.bfloat16
    assert halves.tokens.equal(batch.tokens)
    assert batch.cpu().tokens.equal(batch.tokens)
    assert batch.cpu().image_features.equal(features)


# ---- immutable ----


@pytest.mark.parametrize("field", ["tokens", "pixel_values", "n_generated", "visuals", "position_ids"])
def test_fields_cannot_be_set(batch, field):
    with pytest.raises(FrozenInstanceError):
        setattr(batch, field, None)


def test_what_is_made_from_inputs_leaves_them_as_they_were(batch):
    before = {name: getattr(batch, name).clone() for name in ("tokens", "attention_mask", "pixel_values")}
    for made in (batch[0], batch.append(torch.tensor([8, 9])), VLMInputs.concat([batch, batch])):
        made.tokens.fill_(1)
        made.attention_mask.fill_(0)
    assert all(getattr(batch, name).equal(value) for name, value in before.items())


# ---- refused at the door ----


@pytest.mark.parametrize("n_generated", [(1,), (1, 1, 1, 1, 1), (-1, 0, 0, 0), (500, 0, 0, 0)])
def test_no_more_tokens_are_appended_than_there_are(batch, n_generated):
    assert len(batch) == 4
    with pytest.raises(InputError, match=r"n_generated.*each of 4 rows"):
        replace(batch, n_generated=n_generated)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ([1, 1, 0, 1], "row 0.*padding"),
        ([0, 1, 0, 1], "row 0.*padding"),
        ([0, 0, 0, 0], "row 0.*attention_mask"),
    ],
)
def test_bad_masks_are_refused(mask, says):
    with pytest.raises(InputError, match=says):
        VLMInputs(torch.tensor([[5, 6, 7, 8]]), tiny.tiny_model().input_spec(), torch.tensor([mask]))


def with_changes(**changes) -> VLMInputs:
    return replace(tiny.inputs(tiny.ONE_IMAGE), **{"image_layouts": None, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_grid_thw": torch.tensor([[1, 4, 4]])}, "4 placeholders.*6"),
        ({"image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 2]])}, "2 images.*7 placeholders"),
        ({"image_grid_thw": None, "pixel_values": None}, "6 image placeholders"),
        ({"pixel_values": None}, "grids"),
        ({"pixel_values": torch.zeros(23, 96)}, "23.*24"),
        ({"image_layouts": (whole_layout((9, 9), (1, 6, 4)),)}, r"\(1, 6, 4\).*\(1, 4, 6\)"),
        ({"image_layouts": (whole_layout((9, 9), (1, 4, 6)),) * 2}, r"\(1, 4, 6\), \(1, 4, 6\)"),
        ({"image_grid_thw": torch.tensor([[1, 2, 6], [1, 2, 4]]), "tokens": "split"}, None),
        ({"image_grid_thw": torch.tensor([[1, 4, 6]]), "tokens": "split"}, r"\brun\b"),
    ],
)
def test_images_and_placeholders_must_agree(changes, says):
    if changes.get("tokens") == "split":
        row = [5, VISION_START, IMAGE, IMAGE, IMAGE, VISION_END, 7]
        row += [VISION_START, *[IMAGE] * (2 if says is None else 3), VISION_END]
        tokens = torch.tensor([row])
        changes = {**changes, "tokens": tokens, "attention_mask": torch.ones_like(tokens)}
        n = int(changes["image_grid_thw"].prod(1).sum())
        changes["pixel_values"] = torch.zeros(n, 96)
    if says is None:
        assert with_changes(**changes).n_images == 2
        return
    with pytest.raises(InputError, match=says):
        with_changes(**changes)


def test_bare_tokens_with_placeholders_are_refused():
    tokens = tiny.inputs(tiny.ONE_IMAGE).tokens
    with pytest.raises(InputError, match=r"6 image placeholders.*VLMInputs"):
        tiny.tiny_model()(tokens)


# ---- new inputs from these ----


@pytest.mark.parametrize("answer", [torch.tensor([20, 21]), [[20, 21]] * 4], ids=["one for all", "one each"])
def test_appended_tokens_stand_behind_the_rows_and_move_nothing(batch, answer):
    longer = batch.append(answer)
    n = batch.shape[1]
    assert longer.tokens[:, :n].equal(batch.tokens)
    assert longer.tokens[:, n:].tolist() == [[20, 21]] * 4
    assert longer.position_ids[:, :, :n].equal(batch.position_ids)
    following = batch.position_ids.amax((0, 2)) + 1
    assert longer.position_ids[:, :, n:].equal(torch.stack((following, following + 1), -1).expand(3, -1, -1))
    assert [g.tolist() for g in longer.positions.generated] == [[n, n + 1]] * 4


def test_answers_of_different_lengths_are_padded_at_the_end_and_appending_twice_is_appending_both(batch):
    longer = batch.append([[20], [21, 22, 23], [24, 25], [26]])
    assert longer.n_generated == (1, 3, 2, 1)
    assert longer.attention_mask[:, 16:].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    twice, once = longer.append([[30]] * 4), batch.append([[20, 30], [21, 22, 23, 30], [24, 25, 30], [26, 30]])
    assert twice.tokens.equal(once.tokens)
    assert twice.attention_mask.equal(once.attention_mask)
    assert (logits(twice) - logits(once)).abs().max() == 0


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([[1], [2]], "2 answers.*4"),
        (torch.tensor([5, IMAGE]), "placeholder"),
        ("text", "tokenizer"),
    ],
)
def test_answers_that_do_not_fit_are_refused(batch, answer, says):
    with pytest.raises(InputError, match=says):
        batch.append(answer)


def test_concat_of_batches_runs_every_row_as_before(batch):
    other = tiny.inputs(tiny.LONG_VIDEO, seed=1)
    joined = VLMInputs.concat([other, batch])
    assert joined.shape == (5, other.shape[1])
    assert (logits(joined) - torch.cat((logits(other), logits(batch)))).abs().max() < 1e-5


def test_encoded_images_follow_their_rows(batch):
    model = tiny.tiny_model()
    with torch.no_grad():
        features = model.encode_images(batch)
    encoded = batch.with_image_features(features)
    assert logits(encoded).equal(logits(batch))
    assert (logits(encoded[[3, 0]]) - logits(batch[[3, 0]])).abs().max() < 1e-5
    assert (logits(VLMInputs.concat([encoded[2], encoded[3]])) - logits(batch[2:])).abs().max() < 1e-5
    assert encoded.with_image_features(None).image_features is None


def test_features_of_another_number_of_tokens_are_refused(batch):
    with pytest.raises(InputError, match=r"22.*17"):
        batch.with_image_features(torch.zeros(17, 64))
    encoded = batch.with_image_features(torch.zeros(22, 64))
    with pytest.raises(InputError, match="encoded"):
        VLMInputs.concat([encoded, batch])


def test_with_image_puts_another_picture_in_its_place_and_keeps_the_rest(batch):
    picture = Image.effect_noise((60, 31), 50).convert("RGB")
    assert batch.spec.image_processor is not None
    pixels, grid, _ = batch.spec.image_processor([picture])
    other = batch.with_image(1, picture)
    assert other.image_grid_thw.tolist() == [[1, 4, 6], *grid.tolist(), [1, 2, 6], [1, 2, 2]]
    assert other.pixel_values.split([24, len(pixels), 12, 4])[1].equal(pixels)
    n = len(pixels) // 4
    expected = [5, VISION_START, *[IMAGE] * n, VISION_END, 9]
    assert other.tokens[2, other.first[2] :].tolist()[: n + 4] == expected
    assert (logits(other[[0, 1, 3]]) - logits(batch[[0, 1, 3]])).abs().max() < 1e-5


@pytest.mark.parametrize("i", [4, -1])
def test_images_that_are_not_there_are_named_as_such(batch, i):
    for method in (batch.image_tokens, batch.image_grid, batch.row_of_image):
        with pytest.raises(InputError, match=rf"image {i}\b.*4"):
            method(i)


# ---- positions ----


START, END, NEWLINE, SYSTEM, USER, ASSISTANT = 50, 51, 52, 53, 54, 55


def chat(*content) -> VLMInputs:
    """A system turn, a user turn with this content, and the opening of the answer."""
    row = [START, SYSTEM, NEWLINE, 60, END, NEWLINE, START, USER, NEWLINE, *content]
    row += [END, NEWLINE, START, ASSISTANT, NEWLINE]
    made = tiny.inputs([row])
    return replace(made, spec=replace(made.spec, turns=Turns((START,), END, (START, 0, 0), (START, 0, 0))))


def groups(inputs: VLMInputs, row: int = 0) -> dict[str, list[int]]:
    return {name: value[row].tolist() for name, value in vars(inputs.positions).items()}


PICTURE = ("image", (1, 4, 4))


@pytest.mark.parametrize(
    ("content", "image", "question"),
    [
        ([PICTURE, 70, 71, 72], [10, 11, 12, 13], [15, 16, 17]),
        ([70, PICTURE, 71, 72], [11, 12, 13, 14], [16, 17]),
        ([PICTURE, 70, PICTURE, 71], [10, 11, 12, 13, 17, 18, 19, 20], [22]),
        ([70, 71, 72, PICTURE], [13, 14, 15, 16], [9, 10, 11]),
        ([70, 71], [], [9, 10]),
    ],
    ids=["image, text", "text, image, text", "two images", "text, image", "text"],
)
def test_a_chat_prompt_splits_into_image_question_role_and_final(content, image, question):
    inputs = chat(*content)
    n = inputs.shape[1]
    expected = {
        "image": image,
        "video": [],
        "question": question,
        "assistant_header": list(range(n - 5, n)),
        "final": [n - 1],
        "generated": [],
    }
    assert groups(inputs) == expected
    # appended tokens change nothing but `generated`
    assert groups(inputs.append(torch.tensor([90, 91]))) == {**expected, "generated": [n, n + 1]}


def test_without_chat_markers_the_question_is_what_follows_the_image(batch):
    assert groups(batch, 0)["question"] == [14, 15]
    assert groups(batch, 1) == {
        "image": [],
        "video": [],
        "question": [13, 14, 15],
        "assistant_header": [],
        "final": [15],
        "generated": [],
    }
    assert len(groups(batch, 3)["video"]) == 8
    assert groups(batch, 3)["question"] == [15]
