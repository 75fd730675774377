"""What is planned for memory against what is really allocated, on models built on the spot."""

import math
from copy import deepcopy
from typing import Any

import pytest
import tiny_anyres
import tiny_internvl
import tiny_qwen2_vl as tiny
import torch
import towers
import transformers
from families import KINDS, inputs_of, own_copy, plain_first, tiny_model
from largest import Largest
from PIL import Image
from torch import Tensor

from hooked_vlm import HookedVLM, VLMInputs
from hooked_vlm.converters import KNOWN_MODELS
from hooked_vlm.inputs.processors import processor_of
from hooked_vlm.model.hook_catalogue import hook_table
from hooked_vlm.model.hook_shapes import PromptSize, filled, prompt_with_picture
from hooked_vlm.model.memory import memory_plan, n_gpus
from hooked_vlm.verify.allocation import Allocations
from hooked_vlm.vision_config import VisionConfig

CASES = {
    "qwen2-vl": (lambda: tiny.tiny_model(), [[*[5] * 50, ("image", (1, 8, 12)), 7]], PromptSize(77, 1, 96, 24)),
    "qwen2-vl, tied": (lambda: tiny.tiny_model(True), [[("image", (1, 4, 4)), 7, 8]], PromptSize(8, 1, 16, 4)),
    "qwen2-vl, text": (lambda: tiny.tiny_model(), [[5] * 60], PromptSize(60)),
    "internvl2, tiles": (lambda: tiny_internvl.tiny_model("qwen2"), [[5, ("image", 3), 7]], PromptSize(52, 3, 65, 16)),
    "internvl2, norms": (lambda: tiny_internvl.tiny_model("llama"), [[5, ("image", 1), 7]], PromptSize(20, 1, 65, 16)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, Any, PromptSize]:
    make, rows, prompt = CASES[request.param]
    model, batch = make(), (tiny if request.param.startswith("qwen") else tiny_internvl).hf_batch(rows)
    inputs = model.inputs_from_hf(batch)
    assert inputs.shape[1] == prompt.n_tokens
    return model, inputs, prompt


def allocated(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def all_of(cache: Any) -> list[Tensor]:
    return [*cache.cache_dict.values(), *cache.vision.cache_dict.values()]


def test_weights_and_key_values_are_what_they_really_take(case: tuple[Any, Any, PromptSize]) -> None:
    model, _, prompt = case
    plan = memory_plan(model, prompt, torch.float32)
    assert plan.weights == allocated(list(model.parameters()))
    cache = model.new_kv_cache(1, prompt.n_tokens)
    assert plan.kv_cache == allocated([*cache.keys, *cache.values])


@torch.no_grad()
def test_a_full_cache_is_what_it_really_takes(case: tuple[Any, Any, PromptSize]) -> None:
    model, inputs, prompt = case
    _, cache = model.run_with_cache(inputs)
    assert memory_plan(model, prompt, torch.float32).full_cache == allocated(all_of(cache))
    shapes = {
        row.name: filled(row, model.cfg, prompt) for row in hook_table(model) if row.name.replace("{l}", "1") in cache
    }
    assert shapes == {name: tuple(cache[name.replace("{l}", "1")].shape) for name in shapes}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("name", ["toy-qwen2-vl", "toy-internvl2"])
@torch.no_grad()
def test_activations_are_the_most_that_is_alive_in_a_pass(name: str, with_image: bool, dtype: torch.dtype) -> None:
    model = HookedVLM.from_pretrained(name, dtype=dtype)
    picture = Image.new("RGB", (256, 256))
    inputs = model.to_inputs("what is this " * 20, images=picture if with_image else None)
    n = inputs.shape[1]
    prompt = prompt_with_picture(model, n, picture.size) if with_image else PromptSize(n)
    if with_image:
        assert prompt.n_images * prompt.n_image_tokens == len(inputs.feature_slots)
    with Allocations() as made:
        model(inputs)
    plan = memory_plan(model, prompt, dtype)
    assert 0.9 * plan.activations <= made.peak <= plan.activations
    _, cache = model.run_with_cache(inputs)
    assert plan.full_cache == allocated(all_of(cache))


@pytest.mark.parametrize("norms", ["LN", "RMS"])
@pytest.mark.parametrize("name", ["LLaVA", "PaliGemma", "Qwen2-VL, Qwen3-VL"])
@torch.no_grad()
def test_a_full_cache_of_a_tower_with_every_part_is_what_it_really_takes(name: str, norms: str) -> None:
    parts = {**towers.EVERY_PART, **towers.PROJECTORS[name], "normalization_type": norms, "projector_norm_type": norms}
    model, grid = towers.vlm(VisionConfig(**parts)).to(torch.bfloat16), (1, 4, 4)
    assert model.cfg.vision is not None
    n_tokens = 16 // model.cfg.vision.token_size**2
    inputs = VLMInputs(
        torch.tensor([[5, *[1] * n_tokens, 6]]),
        model.input_spec(),
        pixel_values=towers.pixels_of(model.cfg.vision, (grid,)),
        image_grid_thw=torch.tensor([grid]),
    )
    _, cache = model.run_with_cache(inputs)
    prompt = PromptSize(n_tokens + 2, 1, 17, n_tokens)
    assert memory_plan(model, prompt, torch.bfloat16).full_cache == allocated(all_of(cache))
    assert prompt_with_picture(model, 20) == PromptSize(20)  # it has no image processor


@pytest.mark.parametrize("name", ["toy-qwen2-vl", "toy-internvl2"])
def test_gradients_have_room(name: str) -> None:
    model = HookedVLM.from_pretrained(name)
    picture = Image.new("RGB", (256, 256))
    inputs = model.to_inputs("what is this", images=picture)
    plan = memory_plan(model, prompt_with_picture(model, inputs.shape[1], picture.size), torch.float32)
    with Allocations() as made:
        _, cache = model.run_with_cache(inputs, return_type="loss", incl_bwd=True)
    # TransformerLens' rule: a gradient for each activation, and one for each weight
    stored = {**cache.cache_dict, **{f"vision.{name}": x for name, x in cache.vision.cache_dict.items()}}
    copies = sum(x.nbytes for name, x in stored.items() if name.endswith("hook_resid_pre"))
    assert sum(name.endswith("_grad") for name in stored) == len(stored) // 2
    assert sum(t.nbytes for t in stored.values()) == 2 * (plan.full_cache + copies)
    weights = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert plan.gradients == plan.full_cache + 2 * copies + weights
    assert 0.9 * (plan.full_cache + plan.gradients) <= made.peak <= plan.total(gradients=True) - plan.weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["gemma3", "paligemma", "paligemma2"])
def test_norms_behind_attention_and_soft_caps_have_room(kind: str, dtype: torch.dtype) -> None:
    """Gemma's norms multiply in float32; under a cap scores are written out, and kept for backward."""
    model, inputs = own_copy(tiny_model(kind)).to(dtype), inputs_of(kind, [[5, 6, "small", 7, 8]]).to(dtype)
    n_patches = math.prod(inputs.grids[0][1:])
    plan = memory_plan(model, PromptSize(inputs.shape[1], 1, n_patches, len(inputs.feature_slots)), dtype)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    assert plan.full_cache == allocated(all_of(cache))
    text = VLMInputs(torch.full((1, 250), 5), model.input_spec(), n_generated=(250,))  # no prompt: it has a loss
    plan = memory_plan(model, PromptSize(250), dtype)
    with torch.no_grad(), Allocations() as made:
        model(text)
    least = 0.9 if kind == "paligemma2" else 0.0
    assert least * plan.activations <= made.peak and (kind == "gemma3" or made.peak <= 1.01 * plan.activations)
    with Allocations() as made:
        model.run_with_cache(text, incl_bwd=True, return_type="loss")
    assert made.peak <= plan.total(gradients=True) - plan.weights


def test_allocations_are_counted_until_they_are_freed() -> None:
    given = torch.zeros(1000)
    with Allocations() as made:
        a = given + 1  # 4,000 bytes
        b = a.view(10, 100)[2:]
        c = torch.zeros(500)
        assert (made.alive, made.peak) == (6000, 6000)
        del c
        given.add_(1)
        assert made.alive == 4000
        d = torch.cat((b.flatten(), given))
        assert made.peak == 4000 + 4 * 1800
    assert len(d) == 1800 and made.alive == 4000 + 4 * 1800


def many_tiles() -> tuple[Any, dict[str, Tensor], int]:
    """A OneVision of tiles of 16 x 16 patches, and a picture of six of them, whose grid is resampled."""
    side, rows, cols = 16 * 7, 2, 3
    config = deepcopy(tiny_anyres.tiny_onevision().config)
    config.vision_config.image_size, config.image_grid_pinpoints = side, [[rows * side, cols * side]]
    config.text_config.max_position_embeddings = 1024
    hf: Any = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    model: Any = HookedVLM.from_hf(hf)
    processor: Any = processor_of(model.cfg)
    n_tokens = processor.layout((cols * side, rows * side)).n_tokens
    ids = torch.tensor([[5, *[tiny_anyres.IMAGE] * n_tokens, 7]])
    pixels = torch.randn(1, 1 + rows * cols, 3, side, side)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return model, {**batch, "image_sizes": torch.tensor([[rows * side, cols * side]])}, n_tokens


@pytest.mark.parametrize("name", plain_first(("qwen3-vl", "qwen2.5-vl", "llava-onevision")))
@torch.no_grad()
def test_no_tensor_of_a_pass_is_quadratic_in_the_picture(name: str) -> None:
    """DeepStack, windows and grids that are stitched and resampled included; patches are more than tokens."""
    if name == "llava-onevision":
        model, batch, n_tokens = many_tiles()
    else:
        model, n_tokens = tiny_model(name), 480
        batch = KINDS[name].batch([[5, ("image", (1, 48, 40)), 7]])
    inputs = model.inputs_from_hf(batch)
    with Largest() as made:
        model(inputs)
    assert len(inputs.feature_slots) == n_tokens
    assert made.numel < n_tokens**2
    with Largest() as written_out:  # the bound is one that a pattern exceeds
        model.run_with_hooks(inputs, fwd_hooks=[("blocks.0.attn.hook_pattern", lambda pattern, hook: None)])
    assert written_out.numel >= n_tokens**2


# ---------------------------------------------------------------- GPUs


def published() -> list[Any]:
    """All published sizes: the smallest of every tower and language model, and with --full the others."""
    smallest: dict[Any, str] = {}
    for name, known in sorted(KNOWN_MODELS.items(), key=lambda own: -own[1].n_params):
        smallest[known.config["architectures"][0], *known.config.get("llm_config", {}).get("architectures", ())] = name
    return [pytest.param(n, marks=() if n in smallest.values() else pytest.mark.full) for n in KNOWN_MODELS]


@pytest.mark.parametrize("name", published())
@pytest.mark.repeats_shapes
def test_a_plan_needs_no_weights_and_knows_the_published_sizes(name: str) -> None:
    model = HookedVLM.without_weights(name)
    assert all(p.is_meta for p in model.parameters())
    plan = memory_plan(model, PromptSize(1000), model.dtype)
    assert plan.weights == model.dtype.itemsize * KNOWN_MODELS[name].n_params
    cache = model.new_kv_cache(1, 1000)
    assert plan.kv_cache == sum(t.nbytes for t in [*cache.keys, *cache.values])


def test_gpus_by_hand() -> None:
    """Qwen2-VL-72B: 80 blocks of 878 million parameters, and 1.25 billion in embedding and unembedding each."""
    model, prompt = HookedVLM.without_weights("Qwen/Qwen2-VL-72B-Instruct"), PromptSize(1000)
    block = 2 * (8192 * (2 * 8192 + 2 * 1024 + 3 * 29568) + 8192 + 2 * 1024 + 2 * 8192) + 1000 * 2 * 2 * 1024
    parameters = sum(p.numel() for p in model.vision.parameters()) + sum(
        p.numel() for p in model.projector.parameters()
    )
    embedding = 2 * 8192 * 152064
    activations = 2 * 1000 * (5 * 8192 + 4 * 29568 + 2 * 128) + 8 * 1001
    activations = max(activations, 2 * 1000 * (2 * 8192 + 152064))
    for size in (24, 40, 80, 141):
        room = 0.9 * size * 1e9 - activations
        first = math.floor((room - 2 * parameters - embedding) / block)  # blocks beside the tower
        later = math.floor(room / block)
        n = 1 + math.ceil((80 - first) / later)
        in_last = (80 - first) - (n - 2) * later
        if in_last * block + embedding + 2 * 8192 > room:
            n += 1
        assert n_gpus(model, prompt, torch.bfloat16, size * 10**9) == n
    assert n_gpus(model, prompt, torch.bfloat16, 2 * 10**9) is None


@pytest.mark.repeats_shapes
def test_more_to_store_never_needs_fewer_gpus() -> None:
    model = HookedVLM.without_weights("OpenGVLab/InternVL2-26B")
    prompt = prompt_with_picture(model, 4096)
    needs = [n_gpus(model, prompt, torch.bfloat16, 40 * 10**9, *extra) for extra in ((), (True,), (True, True))]
    assert needs == sorted(needs, key=lambda n: n or 0) and len(set(needs)) == 3
    assert prompt == PromptSize(4096, 13, 1025, 256)
    assert prompt_with_picture(model, 1000) == PromptSize(1000, 3, 1025, 256)  # three tiles fit
    qwen = HookedVLM.without_weights("Qwen/Qwen2-VL-2B-Instruct")
    assert prompt_with_picture(qwen, 4096) == PromptSize(4096, 1, 4 * 37 * 27, 37 * 27)
    assert prompt_with_picture(qwen, 100) == PromptSize(100, 1, 400, 100)
