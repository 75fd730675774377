"""Whole checkpoint folders of LLaVA's families, Gemma 3, PaliGemma 2, Idefics3, SmolVLM and Qwen3-VL: random weights, a
tokenizer that reads any question, the published chat template, the settings of pictures; and pictures annotated with
what such a model calls them."""

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import printable
from typing import Any

import numpy as np
import reading_gemma
import tiny_anyres
import tiny_gemma3
import tiny_idefics3
import tiny_llava
import tiny_paligemma
import tiny_qwen3_vl
import torch
from PIL import Image
from prompt_templates import GEMMA3, SMOLVLM, TEMPLATES, VICUNA
from tiny import randomise
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hooked_vlm import HookedVLM
from hooked_vlm.experiments.head_attribution.tasks import ONE_WORD
from hooked_vlm.interventions import ReplaceImageKV
from hooked_vlm.interventions.attention import all_heads
from hooked_vlm.toys.drawings import OBJECTS
from tools.toy_training.tokenizer import END_OF_TEXT, IM_END, IM_START, build_tokenizer

REFERENCES = {
    "llava": tiny_llava.tiny_llava,
    "llava-next": tiny_anyres.tiny_next,
    "llava-onevision": tiny_anyres.tiny_onevision,
    "idefics3": partial(tiny_idefics3.tiny_hf, "idefics3"),
    "smolvlm": partial(tiny_idefics3.tiny_hf, "smolvlm"),
    "gemma3": partial(tiny_gemma3.tiny_hf, False),
    "paligemma2": partial(tiny_paligemma.tiny_hf, "gemma2", False),
}
PROCESSORS = {
    "llava": LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    "llava-next": tiny_anyres.NEXT_PROCESSOR,
    "llava-onevision": tiny_anyres.ONEVISION_PROCESSOR,
    "gemma3": Gemma3ImageProcessorPil(size=dict.fromkeys(("height", "width"), tiny_gemma3.SIDE)),
    "paligemma2": SiglipImageProcessorPil(size=dict.fromkeys(("height", "width"), tiny_paligemma.SIDE)),
    **{name: made(**tiny_idefics3.SETTINGS) for name, made in tiny_idefics3.OF_TRANSFORMERS.items()},
}
SIZE = (60, 33)
"""Width and height of pictures."""
WORDS = ("What", "is", "the", "main", "object", "in", "image", "nswer", "with", "one", "word", *OBJECTS)


def sentencepiece_like(template: str) -> Any:
    """Some words whole, else letter by letter; spaces as ▁, one in front of a text, `<s>` before it; "ASSISTANT:" is
    the five tokens that Llama's vocabulary has for it."""
    merges = [("S", "S"), ("I", "S"), ("IS", "T"), ("A", "N"), ("AN", "T"), ("▁", "A")]
    merges += [("▁" + word[:n], word[n]) for word in WORDS for n in range(len(word))]
    merges = list(dict.fromkeys(merges))
    letters = ["<pad>", "<s>", "</s>", "<unk>", "▁", *printable]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*letters, *(a + b for a, b in merges)]))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.add_special_tokens({"additional_special_tokens": ["<image>"]})
    wrapped.chat_template = template
    return wrapped


def byte_level(template: str) -> Any:
    """The toy models' own tokenizer, with the marks of OneVision."""
    made = build_tokenizer((END_OF_TEXT, IM_START, IM_END, "<image>", "<video>"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, pad_token=END_OF_TEXT, eos_token=IM_END)
    wrapped.chat_template = template
    return wrapped


END = "<end_of_utterance>"
TAGS = ("<global-img>", *(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)))


def smol(template: str, tags: Sequence[str] = TAGS) -> Any:
    """The toy models' own tokenizer, with the marks of SmolVLM; without `tags` these are plain text (Idefics3-8B)."""
    made = build_tokenizer((END_OF_TEXT, IM_START, END, "<image>", "<fake_token_around_image>", *tags))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, pad_token=END_OF_TEXT, eos_token=END, bos_token=IM_START)
    wrapped.chat_template = template
    return wrapped


def gemma(template: str | None, image: str) -> Any:
    """Letter by letter; PaliGemma has no template."""
    wrapped = reading_gemma.tokenizer(image)
    wrapped.chat_template = template
    return wrapped


TOKENIZERS: dict[str, tuple[Any, Any]] = {
    "llava": (sentencepiece_like, VICUNA),
    "llava-next": (sentencepiece_like, TEMPLATES["mistral"]),
    "llava-onevision": (byte_level, TEMPLATES["onevision, converted"]),
    "idefics3": (partial(smol, tags=()), SMOLVLM),
    "smolvlm": (smol, SMOLVLM),
    "gemma3": (partial(gemma, image="<image_soft_token>"), GEMMA3),
    "paligemma2": (partial(gemma, image="<image>"), None),
}


def save_whole(family: str, folder: Path) -> Path:
    """Write a checkpoint folder as published repositories have it."""
    if family == "qwen3-vl":
        tiny_qwen3_vl.reading_model().save_pretrained(folder)
        return folder
    make, template = TOKENIZERS[family]
    tokenizer = make(template)
    _with_vocabulary_of(REFERENCES[family](), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    PROCESSORS[family].save_pretrained(folder)
    return folder


def _with_vocabulary_of(hf: Any, tokenizer: Any) -> Any:
    config = deepcopy(hf.config)
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name, value in {**own, "max_position_embeddings": 512}.items():
        setattr(config.text_config, name, value)
    config.image_token_id = tokenizer.convert_tokens_to_ids(getattr(tokenizer, "image_token", None) or "<image>")
    if "<video>" in tokenizer.get_vocab():
        config.video_token_id = tokenizer.convert_tokens_to_ids("<video>")
    made = type(hf)._from_config(config, attn_implementation="eager").eval()
    randomise(made)
    tiny_gemma3.with_offsets(made)
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    made.generation_config.pad_token_id = tokenizer.pad_token_id
    return made


@dataclass(frozen=True)
class Named:
    """A checkpoint folder, and COCO's annotations of pictures that it names as they say."""

    model: Path
    annotations: Path
    images: Path


def save_named(family: str, folder: Path, n: int = 3) -> Named:
    """Make a model that names `n` pictures, and as many that hardly differ from them, each in one word."""
    model = HookedVLM.from_pretrained(save_whole(family, folder / "random"), device="cpu")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8) for _ in range(n)]
    pictures = [Image.fromarray(pixels) for pixels in (*pictures, *(touched(pixels) for pixels in pictures))]
    names, end = (*OBJECTS[:n], *OBJECTS[:n]), model.cfg.eos_token_ids[0]
    asked = [model.to_inputs(ONE_WORD, images=picture) for picture in pictures]
    teach(model, [(inputs, (*said(model, name), end)) for inputs, name in zip(asked, names, strict=True)])
    model.save_pretrained(folder / "model")
    return Named(folder / "model", *annotated(pictures, names, folder / "coco"))


def said(model: HookedVLM, name: str) -> list[int]:
    """The tokens of a name: one where the vocabulary has it, otherwise its letters."""
    tokenizer: Any = model.tokenizer
    known = tokenizer.get_vocab()
    one = known.get("▁" + name, known.get(name))
    return tokenizer(name, add_special_tokens=False)["input_ids"] if one is None else [one]


def touched(pixels: np.ndarray) -> np.ndarray:
    """Another picture that looks the same."""
    return np.where(np.indices(pixels.shape).sum(0) == 0, pixels ^ 1, pixels)


@torch.no_grad()
def teach(model: HookedVLM, lessons: Sequence[tuple[Any, Sequence[int]]]) -> None:
    """Set the unembedding such that the model continues inputs of one row by these tokens, with logits of 10, and of 0
    for the first one where no head sees the pictures."""
    nothing_seen, cap = ReplaceImageKV(all_heads(model)), model.cfg.output_logits_soft_cap
    ten = 10.0 if cap is None else cap * math.atanh(10 / cap)
    read, wanted = [], []
    for inputs, reply in lessons:
        _, cache = model.run_with_cache(inputs.append([list(reply)]), return_type=None)
        read.append(model.ln_final(cache["resid_post", -1][0, -len(reply) - 1 : -1]))
        wanted.append(ten * torch.eye(model.cfg.d_vocab)[list(reply)])
        with model.hooks(nothing_seen.hooks(model, inputs)):
            _, cache = model.run_with_cache(inputs, return_type=None)
        read.append(model.ln_final(cache["resid_post", -1][0, -1:]))
        wanted.append(torch.zeros(1, model.cfg.d_vocab))
    found = torch.linalg.lstsq(torch.cat(read).double(), torch.cat(wanted).double(), driver="gelsd", rcond=1e-3)
    model.unembed.weight.copy_(found.solution.T)


def annotated(pictures: Sequence[Image.Image], names: Sequence[str], folder: Path) -> tuple[Path, Path]:
    """Write pictures and COCO's annotations of their one object, whose place is made up."""
    folder.mkdir()
    images, annotations = [], []
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        picture.save(folder / f"{i}.png")
        width, height = picture.size
        x, y = width // 2, height // 2
        own = {"area": x * y, "iscrowd": 0, "segmentation": [[0, 0, x, 0, x, y, 0, y]]}
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        annotations.append({"image_id": i, "category_id": OBJECTS.index(name), **own})
    categories = [{"id": i, "name": name} for i, name in enumerate(OBJECTS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json", folder
