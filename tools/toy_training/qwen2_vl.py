"""The toy Qwen2-VL (an ordinary one, very small) and a training forward over images of one size."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.layouts import whole_layout
from tools.toy_training.family import HFModel, ToyFamily, normal_vision_weights, write_checkpoint
from tools.toy_training.tokenizer import END_OF_TEXT, IM_END, IM_START, build_tokenizer

# Qwen2-VL's special tokens, in the order of its ids.
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)

# Qwen2-VL's template without its default system message: the toy never learned one.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 8, 2, 2
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # as published for Qwen2-VL
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def config_dict(**overrides: int) -> dict:
    """``config.json`` in the published, flat form.

    ``rope_theta`` is far below the published 1e6, with which heads of width 48 would see no difference
    between neighbouring rows of a page (the height part starts at theta ** (-1/3) radians per row).
    """
    tokenizer = build_tokenizer(SPECIAL_TOKENS)
    ids = {token: tokenizer.token_to_id(token) for token in tokenizer.get_vocab()}
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids[END_OF_TEXT],
        "eos_token_id": ids[IM_END],
        "pad_token_id": ids[END_OF_TEXT],
        "vision_start_token_id": ids[VISION_START],
        "vision_end_token_id": ids[VISION_END],
        "image_token_id": ids[IMAGE_PAD],
        "video_token_id": ids[VIDEO_PAD],
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 352,
        "max_position_embeddings": 1024,
        "max_window_layers": 4,
        "model_type": "qwen2_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 500.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 8, 8]},
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 3,
            "embed_dim": 96,
            "hidden_size": 192,
            "mlp_ratio": 4,
            "num_heads": 4,
            "in_chans": 3,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "spatial_patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        },
        "vocab_size": tokenizer.get_vocab_size(),
    }
    config.update(overrides)
    config["vision_config"]["hidden_size"] = config["hidden_size"]
    return config


def patches_of(images: UInt8[Tensor, "image height width 3"]) -> Float[Tensor, "patch voxel"]:
    """What ``Qwen2VLImageProcessorPil`` makes of uint8 images that need no resizing, all images at once.

    Patches come in 2x2 merge-block order; a still image is doubled to fill the temporal patch.
    """
    n, height, width, channels = images.shape
    mean, std = (torch.tensor(v, device=images.device) for v in (IMAGE_MEAN, IMAGE_STD))
    pixels = (images.float() / 255 - mean) / std
    block = PATCH_SIZE * MERGE_SIZE
    pixels = pixels.view(n, height // block, MERGE_SIZE, PATCH_SIZE, width // block, MERGE_SIZE, PATCH_SIZE, channels)
    # -> image, block row, block column, row in block, column in block, channel, patch row, patch column
    pixels = pixels.permute(0, 1, 4, 2, 5, 7, 3, 6).unsqueeze(6)
    pixels = pixels.expand(-1, -1, -1, -1, -1, -1, TEMPORAL_PATCH_SIZE, -1, -1)
    return pixels.reshape(n * (height // PATCH_SIZE) * (width // PATCH_SIZE), -1)


class _BatchedAttention:
    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def __call__(
        self,
        hidden_states: Float[Tensor, "patch d_vision"],
        cu_seqlens: Int[Tensor, " images_and_one"],
        position_embeddings: tuple[Tensor, Tensor],
        **_: object,
    ) -> Float[Tensor, "patch d_vision"]:
        attention = self.attention
        n = len(cu_seqlens) - 1
        qkv = attention.qkv(hidden_states).view(len(hidden_states), 3, attention.num_heads, -1)
        q, k, v = qkv.unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        # every image has the same number of patches: [patch head d] -> [image head patch d]
        q, k, v = (t.unflatten(0, (n, -1)).transpose(1, 2).to(v.dtype) for t in (q, k, v))
        z = F.scaled_dot_product_attention(q, k, v, scale=attention.scaling)
        return attention.proj(z.transpose(1, 2).reshape(hidden_states.shape))


class Qwen2VL(ToyFamily):
    name = "toy-qwen2-vl"
    special_tokens = SPECIAL_TOKENS
    prompt_start = ""
    turn_separator = "\n"

    def image_text(self, n_tokens: int) -> str:
        return f"{VISION_START}{IMAGE_PAD * n_tokens}{VISION_END}"

    def build(self, **overrides: int) -> HFModel:
        config = Qwen2VLConfig(**config_dict(**overrides))
        config._attn_implementation = "sdpa"
        model: HFModel = Qwen2VLForConditionalGeneration(config)
        normal_vision_weights(model.model.visual, model.config.vision_config.depth, ("attn.proj.weight", "fc2.weight"))
        return model

    def grid(self, height: int, width: int) -> ImageLayout:
        return whole_layout((width, height), (1, height // PATCH_SIZE, width // PATCH_SIZE), PATCH_SIZE, MERGE_SIZE)

    def pixel_values(self, images: UInt8[Tensor, "image height width 3"]) -> Float[Tensor, "patch voxel"]:
        return patches_of(images)

    def positions(self, length: int, grid: ImageLayout | None) -> Int[Tensor, "3 1 pos"]:
        """M-RoPE: an image's tokens have its rows and columns; the text after it goes on from the larger side."""
        positions = torch.arange(length).expand(3, -1).clone()
        if grid is not None:
            start, (rows, columns) = self.image_start, (grid.rows, grid.cols)
            end = start + rows * columns
            positions[0, start:end] = start
            positions[1, start:end] = start + torch.arange(rows).repeat_interleave(columns)
            positions[2, start:end] = start + torch.arange(columns).repeat(rows)
            positions[:, end:] = start + max(rows, columns) + torch.arange(length - end)
        return positions[:, None]

    def image_features(
        self, model: HFModel, pixel_values: Float[Tensor, "patch voxel"], grid: ImageLayout
    ) -> Float[Tensor, "image token d_model"]:
        patches = grid.patches
        n = len(pixel_values) // patches.n_tokens
        grids = torch.tensor([[1, patches.rows, patches.cols]], device=pixel_values.device).expand(n, -1)
        return model.model.visual(pixel_values, grid_thw=grids).pooler_output.unflatten(0, (n, -1))

    def prepare_training(self, model: HFModel) -> None:
        """Attends within all images at once where they have one size (training batches do).

        `transformers` loops over the images; for 64 small ones the loop costs more than the arithmetic.
        """
        for block in model.model.visual.blocks:
            block.attn.forward = _BatchedAttention(block.attn)

    def load(self, folder: Path) -> HFModel:
        return Qwen2VLForConditionalGeneration.from_pretrained(folder)

    def save(self, model: HFModel, folder: Path, **overrides: int) -> None:
        """Flat config, ``visual.*`` and ``model.*`` names."""
        tensors = {}
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight":
                continue  # tied to model.embed_tokens.weight
            published = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            tensors[published] = tensor.detach().to("cpu", torch.float32).contiguous()
        config = config_dict(**overrides)
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation["do_sample"] = False
        preprocessor = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": IMAGE_MEAN,
            "image_std": IMAGE_STD,
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 4 * 16 * 16,
            "max_pixels": 256 * 16 * 16,
            "merge_size": MERGE_SIZE,
            "patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "resample": 3,
            "rescale_factor": 1 / 255,
        }
        files = {
            "config.json": config,
            "generation_config.json": generation,
            "preprocessor_config.json": preprocessor,
        }
        write_checkpoint(folder, tensors, files, SPECIAL_TOKENS, chat_template=CHAT_TEMPLATE)
