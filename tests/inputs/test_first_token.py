"""Whether a prompt begins with the beginning-of-text token: as `transformers`' processor has it, in every layout.

The processors run without their constructor, which asks for a video processor and so for torchvision.
"""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import bundled
from PIL import Image
from tokenizers import processors
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from hooked_vlm import HookedVLM
from hooked_vlm.experiments.ocr_heads.examples import Example
from hooked_vlm.experiments.ocr_heads.scoring import needle_positions
from hooked_vlm.inputs.text import TextCodec
from hooked_vlm.inputs.tiles import TileProcessor

FIRST = "<|endoftext|>"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
QUESTION = "What is the value of a"
LAYOUTS = {"qwen2-vl": ("toy-qwen2-vl", None), "internvl-original": ("toy-internvl2", "original"),
           "internvl-hf": ("toy-internvl2", "hf")}  # fmt: skip


def with_first_token(name: str, adds: bool = True) -> HookedVLM:
    """A bundled model whose tokenizer has a beginning-of-text token, and adds it to every text as Llama's does."""
    shared = bundled(name)
    tokenizer: Any = copy.deepcopy(shared.tokenizer)
    tokenizer.bos_token = FIRST
    if adds:
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{FIRST} $A", pair=f"{FIRST} $A {FIRST} $B",
            special_tokens=[(FIRST, tokenizer.convert_tokens_to_ids(FIRST))],
        )  # fmt: skip
    model = copy.copy(shared)
    model.tokenizer = tokenizer
    return model


def saved(layout: str, folder: Path, adds: bool = True, template: str | None = None) -> HookedVLM:
    """The model loaded again from a folder in this layout, with the start of its template replaced if asked."""
    name, form = LAYOUTS[layout]
    with_first_token(name, adds).save_pretrained(folder, layout=form)  # pyright: ignore[reportArgumentType]
    jinja = folder / "chat_template.jinja"
    if template is not None:
        jinja.write_text(template + jinja.read_text())
    return HookedVLM.from_pretrained(folder)


def processor_of_transformers(model: HookedVLM, folder: Path) -> Any:
    qwen = not isinstance(model.image_processor, TileProcessor)
    processor: Any = object.__new__(Qwen2VLProcessor if qwen else InternVLProcessor)
    processor.tokenizer, processor.video_processor = model.tokenizer, None
    processor.chat_template = model.tokenizer.chat_template
    kind: Any = Qwen2VLImageProcessorPil if qwen else GotOcr2ImageProcessorPil
    processor.image_processor = kind.from_pretrained(folder)
    processor.image_token, processor.video_token = ("<|image_pad|>", "<|video_pad|>") if qwen else (
        "<IMG_CONTEXT>", "<video>")  # fmt: skip
    if not qwen:
        processor.start_image_token, processor.end_image_token = "<img>", "</img>"
        processor.image_seq_length = model.image_processor.tokens_per_tile
        processor.multimodal_pattern = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)")
    return processor


@pytest.mark.parametrize("template", [None, FIRST, "{{ bos_token }}"], ids=["silent", "writes it", "names it"])
@pytest.mark.parametrize("adds", [True, False], ids=["tokenizer adds it", "tokenizer does not"])
@pytest.mark.parametrize("layout", ["qwen2-vl", "internvl-hf"])
def test_prompts_begin_as_those_of_the_processor(layout: str, adds: bool, template: str | None, tmp_path: Path) -> None:
    model = saved(layout, tmp_path / "saved", adds, template)
    processor = processor_of_transformers(model, tmp_path / "saved")
    for pictures in ([], [PICTURE]):
        content = [{"type": "image", "image": p} for p in pictures] + [{"type": "text", "text": QUESTION}]
        theirs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True,
            return_tensors="pt",
        )["input_ids"]  # fmt: skip
        tokens = model.to_inputs(QUESTION, images=pictures or None).tokens
        assert torch.equal(tokens, theirs)
        first = model.to_single_token(FIRST)
        assert tokens[0].tolist().count(first) == (tokens[0, 0] == first).item() == (adds or template is not None)


def test_both_layouts_of_one_checkpoint_answer_alike(tmp_path: Path) -> None:
    models = [saved(layout, tmp_path / layout) for layout in ("internvl-original", "internvl-hf")]
    inputs = [model.to_inputs(QUESTION, images=PICTURE) for model in models]
    assert torch.equal(inputs[0].tokens, inputs[1].tokens) and inputs[0].tokens[0, 0] == models[0].to_single_token(
        FIRST
    )
    with torch.no_grad():
        first, second = (model(own) for model, own in zip(models, inputs, strict=True))
    assert torch.equal(first, second)


@pytest.mark.parametrize("template", ["", FIRST], ids=["silent", "writes it"])
def test_text_only_checkpoints_render_chats_as_their_tokenizer_does(template: str) -> None:
    model = with_first_token("toy-qwen2-vl")
    codec = TextCodec(model.cfg.with_(vision=None), model.tokenizer)
    chat = [{"role": "user", "content": QUESTION}]
    own = template + model.tokenizer.chat_template
    text = model.tokenizer.apply_chat_template(chat, chat_template=own, tokenize=False, add_generation_prompt=True)
    theirs = model.tokenizer.apply_chat_template(chat, chat_template=own, tokenize=True, add_generation_prompt=True)
    assert codec.encode_prompt(text, chat=True) == theirs["input_ids"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_without_a_template_is_taken_as_it_stands(layout: str) -> None:
    model = with_first_token(LAYOUTS[layout][0])
    plain = bundled(LAYOUTS[layout][0])
    assert torch.equal(model.to_inputs(QUESTION, chat=False).tokens, plain.to_inputs(QUESTION, chat=False).tokens)
    assert model.to_tokens(QUESTION, prepend_bos=True)[0, 0] == model.to_single_token(FIRST)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_studies_find_needles_behind_the_first_token(layout: str, tmp_path: Path) -> None:
    model = saved(layout, tmp_path / "saved")
    context = "The value of a is 40, the value of b is 51."
    example = Example("What is the value of b?", ("51",), context=context, answer_at=context.index("51"))
    inputs = model.to_inputs(example.prompt)
    found, spans = needle_positions(model, inputs, 0, example, 0)
    assert "".join("51"[a:b] for a, b in spans) == "51"
    assert inputs.tokens[0, 0] == model.to_single_token(FIRST)
    assert str(model.to_string(inputs.tokens[0, found])).strip() == "51"
