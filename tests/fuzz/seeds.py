"""What mutations start from: small whole checkpoints, tokenizers and pictures, made once in a process."""

import atexit
import io
import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny_internvl
from PIL import Image
from safetensors.torch import save_file

from hooked_vlm import HookedVLM
from hooked_vlm.loading.folders import TOY_MODELS

INTERNVL_KINDS = ("qwen2", "phi3", "llama-dynamic")


@lru_cache(maxsize=1)
def seed_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-seeds."))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@lru_cache(maxsize=1)
def checkpoints() -> dict[str, Path]:
    """Checkpoint folders by name: both bundled models, and tiny InternVLs of every layout and language model."""
    found = {name: TOY_MODELS / name for name in ("toy-qwen2-vl", "toy-internvl2")}
    nested = seed_folder() / "qwen2-vl nested"
    shutil.copytree(TOY_MODELS / "toy-qwen2-vl", nested)
    flat = json.loads((nested / "config.json").read_text())
    outside = ("architectures", "model_type", "vision_config", "tie_word_embeddings", "torch_dtype")
    text = {name: flat.pop(name) for name in list(flat) if name not in outside and not name.endswith("token_id")}
    (nested / "config.json").write_text(json.dumps({**flat, "text_config": text}))
    found[nested.name] = nested
    for kind in INTERNVL_KINDS:
        original = seed_folder() / f"internvl {kind}"
        original.mkdir()
        tensors = {k: v.contiguous() for k, v in tiny_internvl.by_hand(kind).items()}
        save_file(tensors, original / "model.safetensors")
        (original / "config.json").write_text(json.dumps(tiny_internvl.original_config(kind)))
        found[original.name] = original
        hf = seed_folder() / f"internvl-hf {kind}"
        HookedVLM.from_pretrained(original).save_pretrained(hf, layout="hf")
        found[hf.name] = hf
        language = seed_folder() / f"text {kind}"
        language.mkdir()
        text_only = {
            k.removeprefix("language_model."): v for k, v in tensors.items() if k.startswith("language_model.")
        }
        save_file(text_only, language / "model.safetensors")
        (language / "config.json").write_text(json.dumps(tiny_internvl.original_config(kind)["llm_config"]))
        found[language.name] = language
    return found


@lru_cache(maxsize=1)
def internlm2_tokenizer() -> Path:
    """The published tokenizer's files without any tokenizer.json, beside a small model's."""
    folder = seed_folder() / "internlm2 tokenizer"
    folder.mkdir()
    tiny_internvl.train_tokenizer(folder)
    (folder / "text.txt").unlink()
    return folder


@lru_cache(maxsize=1)
def models() -> dict[str, Any]:
    """Both bundled models."""
    return {name: HookedVLM.from_pretrained(name, device="cpu") for name in ("toy-qwen2-vl", "toy-internvl2")}


def picture(width: int = 48, height: int = 32) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "PNG": ("RGB", {}), "JPEG": ("RGB", {}), "GIF": ("P", {}), "WEBP": ("RGB", {}), "TIFF": ("RGB", {}),
    "BMP": ("RGB", {}), "PPM": ("RGB", {}), "TGA": ("RGB", {}), "ICO": ("RGBA", {}), "PCX": ("L", {}),
    "JPEG2000": ("RGB", {}), "SGI": ("RGB", {}), "DDS": ("RGBA", {}), "EPS": ("RGB", {}), "PDF": ("RGB", {}),
    "IM": ("RGB", {}), "MSP": ("1", {}), "XBM": ("1", {}), "SPIDER": ("F", {}), "ICNS": ("RGBA", {}),
}  # fmt: skip


@lru_cache(maxsize=1)
def pictures() -> dict[str, bytes]:
    """Files of every format that Pillow writes, and of odd kinds: CMYK, 16 bits, palettes, animations, EXIF, bombs."""
    rgb = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 40
    frames = [picture(20, 20).rotate(90 * i) for i in range(3)]
    animated: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    sixteen = Image.fromarray(np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) * 40)
    wanted: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        **{f: (rgb.convert(mode), f, more) for f, (mode, more) in FORMATS.items()},
        "PNG 16 bits": (sixteen, "PNG", {}),
        "TIFF 16 bits": (sixteen, "TIFF", {}),
        "TIFF deflate": (rgb, "TIFF", {"compression": "tiff_deflate"}),
        "TIFF pages": (frames[0], "TIFF", animated),
        "PNG alpha": (rgb.convert("RGBA"), "PNG", {}),
        "PNG palette": (rgb.convert("P"), "PNG", {"transparency": 3}),
        "PNG bits": (rgb.convert("1"), "PNG", {}),
        "PNG EXIF": (rgb, "PNG", {"exif": exif}),
        "JPEG CMYK": (rgb.convert("CMYK"), "JPEG", {}),
        "JPEG EXIF": (rgb, "JPEG", {"exif": exif}),
        "JPEG progressive": (rgb, "JPEG", {"progressive": True}),
        "GIF animated": (frames[0].convert("P"), "GIF", animated),
        "WEBP animated": (frames[0], "WEBP", animated),
        "PNG animated": (frames[0], "PNG", animated),
        "PNG narrow": (picture(1, 64), "PNG", {}),
        "PNG large": (Image.new("1", (8000, 9000)), "PNG", {}),
        "PNG bomb": (Image.new("1", (20000, 20000)), "PNG", {}),
    }
    made = {}
    for name, (image, kind, more) in wanted.items():
        file = io.BytesIO()
        try:
            image.save(file, kind, **more)
        except (OSError, KeyError, ValueError):  # this Pillow was built without it
            continue
        made[name] = file.getvalue()
    return made
