"""Samples of a user's own: pictures of any kind and size, names, boxes, and answers as they come."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from whole_folders import save_whole

from hooked_vlm import HookedVLM
from hooked_vlm.atlas import Atlas, Observed, Stimulus, as_stimuli, atlas, shipped
from hooked_vlm.atlas import study as study_module
from hooked_vlm.atlas.attention import attention_scores
from hooked_vlm.atlas.effects import group_masks
from hooked_vlm.atlas.evidence import _places, needle, tokens_of_boxes
from hooked_vlm.atlas.show import in_terminal
from hooked_vlm.atlas.stimuli import of_kind
from hooked_vlm.data.samples import NamedBox, Sample
from hooked_vlm.errors import InputError
from hooked_vlm.toys import make_page


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-qwen2-vl")


def page(name: str = "mine", seed: int = 3) -> Sample:
    drawn = make_page(np.random.default_rng(seed), n_lines=2)
    line = drawn.lines[0]
    boxes = [NamedBox(char, box) for char, box in zip(line.value, line.value_boxes, strict=True)]
    return Sample(name, drawn.question(0), (drawn.image,), boxes, line.value)


def enlarged(sample: Sample, by: int) -> Sample:
    [picture] = sample.images
    larger = picture.resize((picture.width * by, picture.height * by))
    boxes = [box._replace(box=tuple(by * corner for corner in box.box)) for box in sample.boxes]
    return replace(sample, images=(larger,), boxes=boxes)


@pytest.mark.parametrize("given", ["array", "tensor", "path", "bytes", "in messages"])
def test_a_picture_is_the_same_however_it_is_given(model: HookedVLM, tmp_path: Path, given: str) -> None:
    """The boxes of another page are placed by the size of its picture."""
    first, second = page("first"), enlarged(page("second", 4), 3)
    second.images[0].save(tmp_path / "page.png")
    file = tmp_path / "page.png"
    pictures: dict[str, Any] = {
        "array": np.array(second.images[0]),
        "tensor": torch.from_numpy(np.array(second.images[0])),
        "path": file,
        "bytes": {"bytes": file.read_bytes(), "path": None},
    }
    if given == "in messages":
        content = [{"type": "image", "image": second.images[0]}, {"type": "text", "text": second.prompt}]
        other = replace(second, prompt=[{"role": "user", "content": content}], images=())
    else:
        other = replace(second, images=(pictures[given],))
    stimuli, expected = as_stimuli([first, other]), as_stimuli([first, second])
    assert [stimulus.kind for stimulus in stimuli] == ["page", "page"]
    inputs = model.as_inputs(first.inputs(model))
    found = [tokens_of_boxes(model, inputs, 0, own[0], own[1]) for own in (stimuli, expected)]
    assert found[0].any() and found[0].equal(found[1])
    for own, plain in zip(attention_scores(model, stimuli), attention_scores(model, expected), strict=True):
        for name, (value, null) in plain.items():
            np.testing.assert_array_equal(own[name][0], value, err_msg=name)
            np.testing.assert_array_equal(own[name][1], null, err_msg=name)


def test_spaces_of_an_answer_need_no_box_and_shift_none(model: HookedVLM) -> None:
    sample = page()
    value, boxes = str(sample.answer), list(sample.boxes)
    spaced = f" {value[0]} {value[1:]}"
    space = NamedBox(" ", boxes[0].box)
    boxed = replace(sample, id="boxed", answer=spaced, boxes=[space, boxes[0], space, *boxes[1:]])
    [own, with_boxes] = as_stimuli([replace(sample, answer=spaced), boxed])
    [plain] = as_stimuli([sample])
    by_character = tokens_of_boxes(model, model.as_inputs(sample.inputs(model)), 0, plain, plain)
    for stimulus in (own, with_boxes):
        assert stimulus.kind == "page"
        inputs = model.as_inputs(stimulus.asked.inputs(model))
        tokens = inputs.tokens[0, inputs.stop[0] - inputs.n_generated[0] :].tolist()
        found = tokens_of_boxes(model, inputs, 0, stimulus, stimulus)
        kept = [i for i, token in enumerate(tokens) if model.tokenizer.decode([token]).strip()]
        assert len(kept) == len(value) and found[kept][:, : by_character.shape[1]].nonzero().equal(
            by_character.nonzero()
        )
        assert not found[[i for i in range(len(tokens)) if i not in kept]].any()
    assert as_stimuli([replace(sample, answer="  ", boxes=())])[0].kind == "object"


def test_a_box_outside_is_refused_by_the_name_of_its_sample(model: HookedVLM) -> None:
    bad = replace(page("bad", 4), boxes=[box._replace(box=(900, 900, 910, 910)) for box in page("bad", 4).boxes])
    with pytest.raises(InputError, match=r"^sample 'bad': the box \(900"):
        atlas(model, [page("good"), bad], n=1, groups=0)


def test_names_tell_all_stimuli_apart(model: HookedVLM) -> None:
    with pytest.raises(InputError, match="several stimuli named 'repeated-0'"):
        atlas(model, [replace(page(), id="repeated-0")], n=1, groups=0)


def test_the_null_of_text_retrieval_is_by_chance_among_the_keys_that_a_layer_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HookedVLM.from_pretrained(save_whole("gemma3", tmp_path), device="cpu")
    text = Stimulus("t", "text", Sample("t", "5 is five and more words than a window holds", answer="5"))
    inputs = model.as_inputs(text.asked.inputs(model))
    tokens, stop = inputs.tokens[0], inputs.stop[0]
    logits = torch.nn.functional.one_hot(tokens[stop - 1], model.cfg.d_vocab).float()
    monkeypatch.setattr(model.unembed, "forward", lambda x: logits.expand(*x.shape[:-1], -1))
    [found] = attention_scores(model, [text])
    evidence = needle(model, inputs, 0)[0].nonzero()[:, 0].tolist()
    _, cache = model.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_pattern"))
    nulls = []
    for layer in range(model.cfg.n_layers):
        seen = (cache[f"blocks.{layer}.attn.hook_pattern"][0, :, stop - 2] > 0).any(0)
        nulls.append(sum(bool(seen[key]) for key in evidence) / int(seen.sum()))
    assert len(set(nulls)) > 1
    np.testing.assert_allclose(
        found["text_retrieval"][1], np.array(nulls)[:, None].repeat(model.cfg.n_heads, 1), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("prompt", "answer", "places"),
    [
        ("in 2019 it was 1, not 10; 1?", "1", [15, 26]),  # not the 1 of 2019
        ("in 2019 it was so", "1", [5]),
        ("aaa", "aa", [0, 1]),
        ("(a+b) a+b", "a+b", [1, 6]),
        ("none", "zz", []),
        ("none", "", []),
    ],
)
def test_an_answer_stands_in_a_text_as_a_word_if_it_ever_does(prompt: str, answer: str, places: list[int]) -> None:
    assert _places(answer, prompt) == places


def test_every_page_has_another_page_for_its_null(model: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "TOGETHER", 3)
    found = atlas(model, [page(f"p{i}", i) for i in range(4)], n=1, groups=0)
    assert np.isfinite(found.observed["ocr"].nulls).all()


def test_another_answer_may_be_that_of_another_kind(model: HookedVLM) -> None:
    only = page("only")
    alone = replace(of_kind(shipped(model, 1), ("object",))[0].asked, id="object")
    found = atlas(model, [only, alone], n=1, groups=0)
    assert np.isfinite(found.observed["direct_logit"].nulls).all()


def test_what_interactions_add_to_coefficients_averages_out_over_stimuli() -> None:
    """Heads 0 to 2 act together alone: no other head has a coefficient, and chance does not repeat itself."""
    found = []
    for i in range(40):
        kept = group_masks(32, 15, 0, Stimulus(f"s{i}", "repeated"))
        assert np.array_equal(kept, group_masks(32, 15, 0, Stimulus(f"s{i}", "repeated")))
        effects = np.prod(2.0 * kept[:, :3] - 1, axis=1)
        found.append(np.linalg.lstsq(np.column_stack((np.ones(32), kept)), effects, rcond=None)[0][4:])
    observed = Observed(tuple(f"s{i}" for i in range(40)), np.array(found)[:, None], np.zeros((40, 1, 12)))
    rows = Atlas("m", {"transfer_in_groups": observed}).rows("transfer_in_groups")
    assert rows["p_holm"].to_numpy().min() > 0.05


def test_a_model_with_hooks_is_refused_before_anything_is_stored(model: HookedVLM, tmp_path: Path) -> None:
    with (
        model.hooks(fwd_hooks=[("blocks.2.attn.hook_z", lambda z, hook: 0 * z)]),
        pytest.raises(InputError, match=r"blocks\.2\.attn\.hook_z has a hook"),
    ):
        atlas(model, n=1, groups=0, folder=tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_the_terminal_does_not_call_untested_heads_idle() -> None:
    def said(n: int) -> str:
        values = np.linspace(0, 1, 16).reshape(1, 4, 4).repeat(n, 0)
        observed = Observed(tuple(f"s{i}" for i in range(n)), values, np.zeros_like(values))
        return in_terminal(Atlas("m", {"ocr": observed})).splitlines()[0]

    assert said(2) == "m: no head was tested for ocr, which takes 3 stimuli and their nulls."
    assert said(9).startswith("m: 0 of 16 heads") and said(9).endswith(
        "On 9 stimuli none of 16 tests can pass: take 10 or more."
    )
    assert said(10) == "m: 15 of 16 heads read text in pictures (OCR score above its null)."
