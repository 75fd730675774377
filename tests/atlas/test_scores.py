"""Every score of an atlas against a literal reimplementation with whole patterns, and against planted heads."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from atlas_by_hand import check_attention
from largest import Largest

from hooked_vlm import HookedVLM
from hooked_vlm.atlas import Stimulus, shipped
from hooked_vlm.atlas import attention as attention_module
from hooked_vlm.atlas.attention import attention_scores, repeated_scores
from hooked_vlm.atlas.definitions import BY_NAME
from hooked_vlm.atlas.evidence import needle, tokens_of_box, tokens_of_boxes
from hooked_vlm.atlas.stimuli import REPEATED_LENGTH, as_stimuli, of_kind
from hooked_vlm.atlas.vision import vision_scores
from hooked_vlm.data.samples import NamedBox, Sample
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.toys import pages

TOYS = ("toy-qwen2-vl", "toy-internvl2")


@pytest.fixture(scope="module", params=TOYS)
def model(request: pytest.FixtureRequest) -> HookedVLM:
    return HookedVLM.from_pretrained(request.param)


def stimuli(model: HookedVLM, kind: Any, n: int = 3, seed: int = 0) -> list[Stimulus]:
    return of_kind(shipped(model, n, seed), (kind,))


# ---------------------------------------------------------------- literal


@pytest.mark.parametrize("kind", ["page", "text", "object"])
def test_scores_of_attention_are_their_definitions(model: HookedVLM, kind: str) -> None:
    check_attention(model, stimuli(model, kind))


def test_nulls_are_the_same_scores_of_uniform_attention(model: HookedVLM) -> None:
    [stimulus, *_] = stimuli(model, "page")
    [found] = attention_scores(model, [stimulus])
    inputs = model.as_inputs(stimulus.asked.inputs(model))
    stop, n = inputs.stop[0], inputs.n_generated[0]
    answer, image = range(stop - n - 1, stop - 1), inputs.positions.image[0]
    question = inputs.positions.question[0].tolist()
    expected = {
        "image_from_answer": np.mean([len(image) / (q + 1) for q in answer]),
        "image_from_question": np.mean([(image <= q).sum() / (q + 1) for q in question]),
        "first_token_sink": np.mean([1 / (q + 1) for q in [*question, *answer]]),
        "locality": 0.5,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name][1], value, rtol=1e-5, err_msg=name)
    assert np.isnan(found["ocr"][1]).all()  # a page alone has no other's boxes
    assert np.isnan(found["entropy"][1]).all()


def test_repeated_tokens_are_scored_as_transformer_lens_does(model: HookedVLM) -> None:
    from transformer_lens.head_detector import compute_head_attention_similarity_score as detected

    own = stimuli(model, "repeated")
    found = repeated_scores(model, own)
    for i, stimulus in enumerate(own):
        tokens = torch.tensor([stimulus.tokens])
        n, begin = REPEATED_LENGTH, tokens.shape[1] - 2 * REPEATED_LENGTH
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
        for layer in range(model.cfg.n_layers):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
            second = pattern[:, begin + n :]
            stripe = second.diagonal(begin + 1, dim1=-2, dim2=-1).mean(-1)  # TransformerLens' main demo
            np.testing.assert_allclose(found[i]["induction"][0][layer], stripe, atol=1e-6)
            for name, offset, rows in (("previous_token", 1, tokens.shape[1] - 1), ("duplicate_token", n, n)):
                target = torch.zeros(tokens.shape[1], tokens.shape[1])
                for q in range(offset if name == "previous_token" else begin + n, tokens.shape[1]):
                    target[q, q - offset] = 1
                for head in range(model.cfg.n_heads):
                    score = detected(pattern[head], detection_pattern=target, exclude_bos=False,
                                     exclude_current_token=False, error_measure="mul")  # fmt: skip
                    assert found[i][name][0][layer, head] == pytest.approx(score * tokens.shape[1] / rows, abs=1e-6)


def test_scores_do_not_depend_on_what_else_is_in_the_batch(model: HookedVLM) -> None:
    own = stimuli(model, "object")
    together = attention_scores(model, own)
    for stimulus, found in zip(own, together, strict=True):
        [alone] = attention_scores(model, [stimulus])
        for name, (value, _) in found.items():
            np.testing.assert_allclose(value, alone[name][0], atol=1e-4, rtol=1e-4, err_msg=name)


def test_scores_of_the_vision_tower_are_their_definitions(model: HookedVLM) -> None:
    tower = model.cfg.vision
    assert tower is not None
    class_tokens = int(tower.class_token)
    [stimulus, *_] = stimuli(model, "page")
    found = vision_scores(model, stimulus)
    inputs = model.as_inputs(stimulus.asked.inputs(model))
    [image] = inputs.image_grid(0).tower_order.tolist()
    layout = inputs.image_grid(0).patches
    centres = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in layout.boxes[image].tolist()]
    text = {image.index(i) for box in stimulus.boxes("text") for i in layout.tokens_in_box(box.box, 0.1)}
    text |= {image.index(i) for box in stimulus.boxes("text") for i in layout.tokens_in_box(box.box, 0.5, of="token")}
    _, cache = model.run_with_cache(inputs, names_filter=lambda name: name.startswith("vision"))
    for layer in range(tower.n_layers_run):
        norms = cache[f"vision.blocks.{layer}.hook_resid_pre"][0, class_tokens:].norm(dim=-1).tolist()
        sinks = sorted(range(len(norms)), key=lambda i: -norms[i])[: max(1, len(norms) // 100)]
        patches = range(len(image))
        for head in (layer % tower.n_heads, -1):
            whole = cache[f"vision.blocks.{layer}.attn.hook_pattern"][0, head].tolist()
            a = [row[class_tokens:] for row in whole[class_tokens:]]
            relative = []
            for q in patches:
                own = [math.dist(centres[q], centres[k]) for k in patches]
                relative.append(sum(a[q][k] * own[k] / max(own) for k in patches))
            expected = {"distance": np.mean(relative)}
            expected["sink_patches"] = np.mean([sum(a[q][k] for k in sinks) for q in patches])
            outside = [sum(a[q][k] for k in text) / sum(a[q]) for q in patches if q not in text]
            expected["text_region"] = np.mean(outside)
            if class_tokens:
                expected["class_token"] = np.mean([row[0] for row in whole[1:]])
            assert set(found) == set(expected)
            for name, value in expected.items():
                assert found[name][0][layer, head] == pytest.approx(value, abs=2e-6), name
    share = len(text) / (len(image) + class_tokens) / (len(image) / (len(image) + class_tokens))
    np.testing.assert_allclose(found["text_region"][1], share, rtol=1e-5)


# ---------------------------------------------------------------- planted heads


@contextmanager
def planted(
    model: HookedVLM, inputs: VLMInputs, layer: int, head: int, key_of: Callable[[int], int], tower: str = ""
) -> Iterator[None]:
    """One head attends to exactly one key for each query; what it writes stays what it was."""
    rng = torch.Generator().manual_seed(0)
    attn = f"{tower}blocks.{layer}.attn"
    _, cache = model.run_with_cache(inputs, names_filter=f"{attn}.hook_z")
    z = cache[f"{attn}.hook_z"]
    n, d_head = z.shape[1], z.shape[3]
    codes = torch.nn.functional.normalize(torch.randn(n, d_head, generator=rng), dim=-1)

    def queries(q: torch.Tensor, hook: Any) -> torch.Tensor:
        q = q.clone()
        q[0, :, head] = 1e5 * codes[[key_of(i) for i in range(n)]]
        return q

    def keys(k: torch.Tensor, hook: Any) -> torch.Tensor:
        k = k.clone()
        n_heads = z.shape[2]
        k[0, :, head // (n_heads // k.shape[2])] = codes
        return k

    rotated = f"{attn}.hook_rot_q" in model.hook_dict
    suffixes = ("hook_rot_q", "hook_rot_k") if rotated else ("hook_q", "hook_k")
    pairs = [(f"{attn}.{suffixes[0]}", queries), (f"{attn}.{suffixes[1]}", keys)]
    with model.hooks(fwd_hooks=[*pairs, (f"{attn}.hook_z", lambda x, hook: z)]):
        yield


LAYER, HEAD = 2, 1


def right(model: HookedVLM, kind: str) -> Stimulus:
    """A stimulus whose answer the model predicts whole."""
    for stimulus in stimuli(model, kind, n=12):
        inputs = model.as_inputs(stimulus.asked.inputs(model))
        stop, n = inputs.stop[0], inputs.n_generated[0]
        if (model(inputs)[0, stop - n - 1 : stop - 1].argmax(-1) == inputs.tokens[0, stop - n : stop]).all():
            return stimulus
    raise AssertionError("the toy answers none")


def scored(model: HookedVLM, stimulus: Stimulus, key_of: Callable[[VLMInputs, int], int]) -> dict[str, Any]:
    inputs = model.as_inputs(stimulus.asked.inputs(model))
    with planted(model, inputs, LAYER, HEAD, lambda q: key_of(inputs, q)):
        [found] = attention_scores(model, [stimulus])
    return {name: value[LAYER, HEAD] for name, (value, _) in found.items()}


def evidence_key(model: HookedVLM, stimulus: Stimulus) -> Callable[[VLMInputs, int], int]:
    def key_of(inputs: VLMInputs, q: int) -> int:
        part = max(q - (inputs.stop[0] - inputs.n_generated[0] - 1), 0)
        own = (
            tokens_of_boxes(model, inputs, 0, stimulus, stimulus)
            if stimulus.kind == "page"
            else needle(model, inputs, 0)
        )
        return int(own[min(part, len(own) - 1)].nonzero()[0])

    return key_of


def test_a_planted_head_that_reads_scores_exactly_1(model: HookedVLM) -> None:
    page, text = right(model, "page"), right(model, "text")
    reads = scored(model, page, evidence_key(model, page))
    assert reads["ocr"] == reads["localisation"] == reads["image_from_answer"] == 1.0
    assert scored(model, text, evidence_key(model, text))["text_retrieval"] == 1.0
    first = scored(model, page, lambda inputs, q: 0)
    assert first["first_token_sink"] == 1.0 and first["ocr"] == first["image_from_answer"] == 0.0
    assert scored(model, page, lambda inputs, q: q)["locality"] == 1.0
    to_image = scored(model, page, lambda inputs, q: int(inputs.positions.image[0][0]))
    assert to_image["image_from_question"] == 1.0 and to_image["entropy"] == 0.0


def test_a_head_that_reads_what_the_model_does_not_say_scores_0(model: HookedVLM) -> None:
    page = right(model, "page")
    sample, said = page.asked, str(page.asked.answer)
    wrong = "zz" + said[2:]
    text = [box for box in sample.boxes if box.name == "text"]
    boxes = [NamedBox(char, box.box) for char, box in zip(wrong, page.boxes("evidence"), strict=True)]
    other = Stimulus("wrong", "page", replace(sample, answer=wrong, boxes=(*boxes, *text)))
    assert scored(model, other, evidence_key(model, other))["ocr"] <= 0.5


def test_a_uniform_head_has_entropy_1(model: HookedVLM) -> None:
    page = right(model, "page")

    def flat(q: torch.Tensor, hook: Any) -> torch.Tensor:
        return q * (torch.arange(q.shape[2]) != HEAD)[:, None]

    with model.hooks(fwd_hooks=[(f"blocks.{LAYER}.attn.hook_rot_q", flat)]):
        [found] = attention_scores(model, [page])
    assert found["entropy"][0][LAYER, HEAD] == pytest.approx(1, abs=1e-5)
    for name in ("image_from_answer", "image_from_question", "first_token_sink", "locality", "localisation"):
        assert found[name][0][LAYER, HEAD] == pytest.approx(found[name][1][LAYER, HEAD], abs=1e-5), name


def test_visual_sinks_are_large_where_the_first_token_is(model: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    page = right(model, "page")
    inputs = model.as_inputs(page.asked.inputs(model))
    image = inputs.positions.image[0]

    def massive(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[0, [0, int(image[3])], 7] = 1e4  # rms is then 1e4 / sqrt(d_model)
        x[0, int(image[4]), 8] = 1e4  # large, but elsewhere
        return x

    ratio = model.cfg.d_model**0.5
    monkeypatch.setattr(attention_module, "SINK", 0.9 * ratio)
    with (
        planted(model, inputs, LAYER, HEAD, lambda q: int(image[3])),
        model.hooks(fwd_hooks=[(f"blocks.{LAYER}.hook_resid_pre", massive)]),
    ):
        [found] = attention_scores(model, [page])
    assert found["visual_sink"][0][LAYER, HEAD] == 1.0
    assert found["visual_sink"][1][LAYER, HEAD] < 0.1


def test_planted_induction_previous_and_duplicate_heads_score_exactly_1(model: HookedVLM) -> None:
    [stimulus, *_] = stimuli(model, "repeated")
    inputs = model.as_inputs(torch.tensor([stimulus.tokens]))
    n = REPEATED_LENGTH
    for name, back in (("induction", n - 1), ("previous_token", 1), ("duplicate_token", n)):
        with planted(model, inputs, LAYER, HEAD, lambda q, back=back: max(q - back, 0)):
            [found] = repeated_scores(model, [stimulus])
        assert found[name][0][LAYER, HEAD] == 1.0


def test_planted_values_of_norm_1_have_norm_1(model: HookedVLM) -> None:
    [stimulus, *_] = stimuli(model, "text")
    W_O = model.blocks[LAYER].attn.W_O[HEAD]

    def unit(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.nn.functional.normalize(x, dim=-1)

    def writes_1(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[:, :, HEAD] = z[:, :, HEAD] / (z[:, :, HEAD] @ W_O).norm(dim=-1, keepdim=True)
        return z

    attn = f"blocks.{LAYER}.attn"
    with model.hooks(fwd_hooks=[(f"{attn}.hook_v", unit), (f"{attn}.hook_z", writes_1)]):
        [found] = attention_scores(model, [stimulus])
    assert found["value_norm"][0][LAYER] == pytest.approx(np.ones(model.cfg.n_heads), abs=1e-6)
    assert found["output_norm"][0][LAYER, HEAD] == pytest.approx(1, abs=1e-6)


def test_planted_heads_of_the_vision_tower_score_exactly_1(model: HookedVLM) -> None:
    tower = model.cfg.vision
    assert tower is not None
    n_class = int(tower.class_token)
    [stimulus, *_] = stimuli(model, "page")
    inputs = model.as_inputs(stimulus.asked.inputs(model))
    layout = inputs.image_grid(0).patches
    [numbers] = inputs.image_grid(0).tower_order.tolist()
    centres = torch.from_numpy(layout.boxes[numbers]).unflatten(-1, (2, 2)).mean(1)
    farthest = torch.cdist(centres, centres).argmax(-1)
    text = [i for box in stimulus.boxes("text") for i in tokens_of_box(layout, box.box, "page")]
    _, cache = model.run_with_cache(inputs, names_filter="vision.blocks.1.hook_resid_pre")
    sink = int(cache["vision.blocks.1.hook_resid_pre"][0, n_class:].norm(dim=-1).argmax())
    plants: dict[str, Callable[[int], int]] = {
        "distance": lambda q: n_class + int(farthest[max(q - n_class, 0)]),
        "text_region": lambda q: n_class + numbers.index(text[0]),
        "sink_patches": lambda q: n_class + sink,
    }
    if n_class:
        plants["class_token"] = lambda q: 0
    for name, key_of in plants.items():
        with planted(model, inputs, 1, 2, key_of, "vision."):
            assert vision_scores(model, stimulus)[name][0][1, 2] == 1.0, name


def test_every_score_of_the_table_is_made(model: HookedVLM) -> None:
    made = set(repeated_scores(model, stimuli(model, "repeated", 1))[0])
    for kind in ("page", "text", "object"):
        made |= set(attention_scores(model, stimuli(model, kind, 1))[0])
    made |= set(vision_scores(model, stimuli(model, "page", 1)[0]))
    of_effects = {"transfer", "transfer_in_groups", "direct_logit", "answer_without"}
    missing = set() if model.cfg.vision is not None and model.cfg.vision.class_token else {"class_token"}
    assert made | of_effects == set(BY_NAME) - missing


# ---------------------------------------------------------------- stimuli


def test_a_users_samples_become_stimuli_by_what_they_have(model: HookedVLM) -> None:
    picture = stimuli(model, "object", 1)[0].asked.images
    box = (0, 0, 40, 40)
    given = [
        Sample("a", "Read?", picture, (NamedBox("4", box), NamedBox("2", box), NamedBox("text", box)), "42"),
        Sample("b", "What?", picture, (NamedBox("fish", box),), "fish"),
        Sample("c", "What?", picture, (), "fish"),
        Sample("d", "a = 1\nWhat is a?", answer="1"),
    ]
    assert [stimulus.kind for stimulus in as_stimuli(given)] == ["page", "object", "object", "text"]
    found = attention_scores(model, [as_stimuli(given)[2]])
    assert "localisation" not in found[0] and "image_from_answer" in found[0]


def test_memory_grows_with_the_number_of_tokens(model: HookedVLM) -> None:
    rng = np.random.default_rng(0)

    def largest(n_lines: int, side: int) -> tuple[int, int]:
        lines = pages.random_lines(rng, n_lines)
        told = "\n".join(line.text for line in lines) + "\n" + pages.question_for(lines[0].key)
        text = Stimulus("text", "text", Sample("text", told, answer=lines[0].value))
        picture = pages.make_page(rng, size=(side, side), lines=lines[:2]).image
        shown = Stimulus("page", "page", Sample("page", "Read the text.", (picture,), answer=lines[0].value))
        with Largest() as of_text:
            attention_scores(model, [text])
        with Largest() as of_picture:
            vision_scores(model, shown)
        return of_text.numel, of_picture.numel

    (text, picture), (long_text, large_picture) = largest(16, 224), largest(64, 448)
    assert long_text < 4.5 * text and large_picture < 4.5 * picture  # four times the tokens, four times the patches
