"""Cases made of files: checkpoints, tokenizers, pictures."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fuzz.draws import Draws, changed_bytes, changed_json, json_bytes
from fuzz.laws import held
from fuzz.seeds import checkpoints, internlm2_tokenizer, models, picture, pictures
from hooked_vlm import CheckpointError, HookedVLM
from hooked_vlm.errors import ImageError
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.images import load_image
from hooked_vlm.inputs.tiles import TileProcessor
from hooked_vlm.inputs.tokenization import load_tokenizer

PLANTED = "import pathlib, builtins\nbuiltins.planted_code_was_run = True\n"


def linked(source: Path, folder: Path, changed: Mapping[str, bytes | None]) -> Path:
    """A copy of a checkpoint in which some files are others, or missing; code waits in it to be run."""
    for file in source.iterdir():
        if file.name not in changed:
            (folder / file.name).symlink_to(file)
    for name, content in changed.items():
        if content is not None:
            (folder / name).write_bytes(content)
    for name in ("configuration_x", "modeling_x", "tokenization_x", "image_processing_x"):
        (folder / f"{name}.py").write_text(PLANTED)
    return folder


@torch.no_grad()
def used(model: Any, folder: Path) -> str:
    """What anyone does first with a model: ask it about a picture, look at it, save it."""
    image = [picture()] if model.cfg.vision is not None else []
    if model.tokenizer is not None:
        inputs = model.to_inputs("What is the value of a1?", images=image or None)
        model(inputs, logits_at="last")
    elif image:
        model.image_processor(image)
    else:
        model(torch.tensor([[1, 2, 3]]), logits_at="last")
    model.save_pretrained(folder / "saved")
    return "used"


REMOTE = {"auto_map": {f"Auto{kind}": "modeling_x.X" for kind in ("Config", "Model", "Tokenizer", "ImageProcessor")}}


def settings(data: bytes) -> str:
    """config.json and the files of settings of every family and layout."""

    def case(folder: Path) -> str:
        draws = Draws(data)
        source = draws.pick(list(checkpoints().values()))
        names = ("config.json", *STARTS)
        changed: dict[str, bytes | None] = {}
        for name in {draws.pick(names) for _ in range(1 + draws.below(2))}:
            path = source / name
            content = json.loads(path.read_text()) if path.exists() else dict(STARTS[name])
            if draws.one_in(3):
                content |= REMOTE
            content = changed_json(draws, content)
            whole = json_bytes(content)
            changed[name] = changed_bytes(draws, whole) if draws.one_in(16) else whole
        linked(source, folder, changed)
        return used(HookedVLM.from_pretrained(folder, device="cpu"), folder)

    return held(case)


IMAGE_SETTINGS = {
    "min_pixels": 256, "max_pixels": 65536, "patch_size": 8, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"height": 32, "width": 32},
    "min_patches": 1, "max_patches": 6, "use_thumbnail": True, "do_resize": True,
}  # fmt: skip
VIDEO_SETTINGS = {
    "patch_size": 8, "size": {"shortest_edge": 256, "longest_edge": 65536}, "cap_pixels_per_frame": True,
    "max_video_tokens": 4096,
}  # fmt: skip
STARTS: dict[str, dict[str, Any]] = {
    "config.json": {},
    "generation_config.json": {"eos_token_id": [2, 3], "pad_token_id": 0},
    "preprocessor_config.json": IMAGE_SETTINGS,
    "video_preprocessor_config.json": VIDEO_SETTINGS,
    "processor_config.json": {
        "image_processor": VIDEO_SETTINGS, "video_processor": VIDEO_SETTINGS,
        "chat_template": {"default": "{{ messages[0].content[0].type }}"},
    },
    "chat_template.json": {"chat_template": "{{ messages[0].content[0].type }}"},
}  # fmt: skip


def loading(data: bytes) -> str:
    """The same files, held to what `from_pretrained` promises: no error but `CheckpointError`."""

    def case(folder: Path) -> str:
        draws = Draws(data)
        source = draws.pick(list(checkpoints().values()))
        name = draws.pick(tuple(STARTS))
        path = source / name
        content = json.loads(path.read_text()) if path.exists() else STARTS[name]
        linked(source, folder, {name: json_bytes(changed_json(draws, content))})
        HookedVLM.from_pretrained(folder, device="cpu")
        return "loaded"

    return held(case, (CheckpointError,))


def tensors(data: bytes) -> str:
    """safetensors files and the index of shards."""

    def case(folder: Path) -> str:
        draws = Draws(data)
        source = draws.pick([p for n, p in checkpoints().items() if n.startswith(("internvl", "text"))])
        whole = (source / "model.safetensors").read_bytes()
        changed: dict[str, bytes | None] = {"pytorch_model.bin": PICKLE}
        if draws.one_in(2):
            changed["model.safetensors"] = changed_safetensors(draws, whole)
        else:
            index = {"metadata": {}, "weight_map": dict.fromkeys(header_of(whole)[1], "model-1.safetensors")}
            index["weight_map"].pop("__metadata__", None)
            changed |= {"model.safetensors": None, "model-1.safetensors": whole}
            if draws.one_in(2):
                changed["model-1.safetensors"] = changed_safetensors(draws, whole)
            if draws.one_in(4):
                changed["model-2.safetensors"] = whole
            outside = draws.pick(
                ("../x.safetensors", "/etc/passwd", "model-2.safetensors", "x.bin", "pytorch_model.bin")
            )
            made = changed_json(draws, index, lambda: draws.odd() if draws.one_in(2) else outside)
            changed["model.safetensors.index.json"] = json_bytes(made)
        linked(source, folder, changed)
        return used(HookedVLM.from_pretrained(folder, device="cpu"), folder)

    return held(case)


PICKLE = b"\x80\x04cbuiltins\nexec\n(X\x15\x00\x00\x00raise SystemExit(137)tR."


def header_of(content: bytes) -> tuple[int, dict[str, Any]]:
    (n,) = struct.unpack("<Q", content[:8])
    return n, json.loads(content[8 : 8 + n])


def changed_safetensors(draws: Draws, content: bytes) -> bytes:
    n, header = header_of(content)
    if draws.one_in(4):
        return changed_bytes(draws, content)
    if draws.one_in(3):
        head = changed_bytes(draws, content[: 8 + n])
        return head + content[8 + n :]
    name = draws.pick(list(header))
    values = ("F4", "F8_E4M3", "F64", "BOOL", "I64", "BF16", "F16", "U8", "C64", "X")
    sizes = lambda: draws.pick((draws.number(), [draws.number(), draws.number()], [], [0, draws.number()]))  # noqa: E731
    value: Callable[[], Any] = lambda: draws.pick((draws.pick(values), sizes(), draws.odd()))  # noqa: E731
    header[name] = changed_json(draws, header[name], value)
    if draws.one_in(4):
        header = changed_json(draws, header, value)
    head = json_bytes(header)
    length = len(head) if not draws.one_in(8) else abs(draws.number()) % 2**64
    return struct.pack("<Q", length) + head + content[8 + n :]


def tokenizers(data: bytes) -> str:
    """Tokenizer files of both kinds, chat templates with attacks in them, and a prompt through what was loaded."""

    def case(folder: Path) -> str:
        draws = Draws(data)
        source = internlm2_tokenizer() if draws.one_in(3) else checkpoints()["toy-qwen2-vl"]
        present = [n for n in TOKENIZER_FILES if (source / n).exists()] + [
            "added_tokens.json",
            "special_tokens_map.json",
        ]
        name = draws.pick(present)
        changed: dict[str, bytes | None] = {}
        if name == "tokenizer.model":
            changed[name] = changed_bytes(draws, (source / name).read_bytes())
        else:
            path = source / name
            content = json.loads(path.read_text()) if path.exists() else {"<img>": 384, "bos_token": "<s>"}
            if name == "tokenizer_config.json" and draws.one_in(4) is False:
                content["chat_template"] = draws.pick(TEMPLATES)
            if draws.one_in(3):
                content |= {"auto_map": {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}}
            if draws.one_in(4):
                content |= {"tokenizer_class": draws.pick(CLASSES)}
            content = changed_json(draws, content) if draws.one_in(2) else content
            whole = json_bytes(content)
            changed[name] = changed_bytes(draws, whole) if draws.one_in(8) else whole
        linked(source, folder, {**changed, "model.safetensors": None, "config.json": b"{}"})
        tokenizer = load_tokenizer(folder)
        model = models()["toy-qwen2-vl"]
        before, model.tokenizer = model.tokenizer, tokenizer
        try:
            model.to_inputs("What is the value of a1?", images=[picture()])
            model.to_string([1, 2, 3])
        finally:
            model.tokenizer = before
        return "used"

    return held(case)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
CLASSES = ("InternLM2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "BertTokenizer", "X", "os.system", "T5Tokenizer",
           "PreTrainedTokenizerFast", "ByT5Tokenizer", "tokenization_x.X", "RagTokenizer", "CLIPTokenizer")  # fmt: skip
TEMPLATES = (
    "{{ messages[0]['content'] }}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch /tmp/planted').read() }}",
    "{{ lipsum.__globals__['os'].system('true') }}",
    "{% for m in messages %}{{ m.append(1) }}{% endfor %}",
    "{{ messages.append(1) }}{{ undefined.x }}",
    "{% for a in range(10**9) %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for", "{{ raise_exception('no') }}", "{{ 1/0 }}", "{{ {}['x']['y'] }}", "{% include '/etc/passwd' %}",
    "{{ 'x' * 10**3 }}", "{{ messages | tojson }}", "{{ strftime_now('%Y') }}", "\0", "{{ [] | first }}",
)  # fmt: skip


def images(data: bytes) -> str:
    """Picture files through `load_image` and both processors."""

    def case(folder: Path) -> str:
        draws = Draws(data)
        source = pictures()[draws.pick(list(pictures()))]
        content = changed_bytes(draws, source) if not draws.one_in(16) else draws.bytes(draws.below(600))
        path = folder / draws.pick(("x.png", "x.jpg", "x", "x.eps", "x.gif"))
        path.write_bytes(content)
        image = load_image(path)
        if image.mode != "RGB" or 0 in image.size:
            raise AssertionError(f"load_image gave mode {image.mode} and size {image.size}")
        for processor in (ImageProcessor(max_pixels=28 * 28 * 64), TileProcessor(56, 14, 2, max_tiles=4)):
            pixels = processor([image])[0]
            if not torch.isfinite(pixels).all():
                raise AssertionError("pixels that are not numbers")
        return "read"

    return held(case, (ImageError,))
