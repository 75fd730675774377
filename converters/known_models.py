"""Configurations and sizes of published models, to use without a download."""

from typing import Any

from hooked_vlm.converters.known_gemma import GEMMA
from hooked_vlm.converters.known_idefics3 import IDEFICS3
from hooked_vlm.converters.known_llava import LLAVA
from hooked_vlm.converters.known_qwen_vl import QWEN_VL
from hooked_vlm.converters.known_sizes import SEEN, KnownModel

_LONG_FACTORS = (
    1.0299999713897705, 1.0499999523162842, 1.0499999523162842, 1.0799999237060547, 1.2299998998641968,
    1.2299998998641968, 1.2999999523162842, 1.4499999284744263, 1.5999999046325684, 1.6499998569488525,
    1.8999998569488525, 2.859999895095825, 3.68999981880188, 5.419999599456787, 5.489999771118164,
    5.489999771118164, 9.09000015258789, 11.579999923706055, 15.65999984741211, 15.769999504089355,
    15.789999961853027, 18.360000610351562, 21.989999771118164, 23.079999923706055, 30.009998321533203,
    32.35000228881836, 32.590003967285156, 35.56000518798828, 39.95000457763672, 53.840003967285156,
    56.20000457763672, 57.95000457763672, 59.29000473022461, 59.77000427246094, 59.920005798339844,
    61.190006256103516, 61.96000671386719, 62.50000762939453, 63.3700065612793, 63.48000717163086,
    63.48000717163086, 63.66000747680664, 63.850006103515625, 64.08000946044922, 64.760009765625,
    64.80001068115234, 64.81001281738281, 64.81001281738281,
)  # fmt: skip
_SHORT_FACTORS = (
    *(1.05,) * 3, 1.1, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.5, *(2.0,) * 21, *(2.05,) * 3, *(2.1,) * 3, 2.15, 2.15,
    2.35, 2.55, 2.6, 2.6, 2.75, 2.85, 2.85, 2.95,
)  # fmt: skip


def _internvl2(template: str, llm: dict[str, Any], *, large_vit: bool = False) -> dict[str, Any]:
    """The published `config.json`, reduced to the fields that describe the model."""
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_act": "gelu",
        "hidden_size": 3200 if large_vit else 1024,
        "image_size": 448,
        "intermediate_size": 12800 if large_vit else 4096,
        "layer_norm_eps": 1e-06,
        "norm_type": "rms_norm" if large_vit else "layer_norm",
        "num_attention_heads": 25 if large_vit else 16,
        "num_channels": 3,
        "num_hidden_layers": 45 if large_vit else 24,
        "patch_size": 14,
        "qk_normalization": large_vit,
        "qkv_bias": not large_vit,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "llm_config": {"hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", **llm},
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": vision,
    }


def _llm(
    architecture: str,
    *,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab_size: int,
    n_ctx: int,
    theta: float,
    eps: float = 1e-5,
    eos: int,
    **others: Any,
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": n_ctx,
        "rope_theta": theta,
        "rms_norm_eps": eps,
        "eos_token_id": eos,
        **others,
    }


def _internlm2(factor: float, **sizes: int) -> dict[str, Any]:
    scaling = {"type": "dynamic", "factor": factor}
    return _llm("InternLM2ForCausalLM", **sizes, kv_heads=8, vocab_size=92553, n_ctx=32768, theta=1e6, eos=2,
                bias=False, pad_token_id=2, rope_scaling=scaling)  # fmt: skip


def _internvl3(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int, n_params: int, of: str = ""
) -> KnownModel:
    """A size of InternVL3, with the language model `of` Qwen2.5."""
    llm = _llm(
        "Qwen2ForCausalLM", hidden_size=hidden_size, intermediate_size=intermediate_size, layers=layers, heads=heads,
        kv_heads=kv_heads, vocab_size=151674, n_ctx=32768, theta=1e6, eps=1e-6, eos=151643,
        rope_scaling={"type": "dynamic", "rope_type": "dynamic", "factor": 2.0},
    )  # fmt: skip
    config = _internvl2("internvl2_5", llm, large_vit=n_params > 2 * 10**10)
    return KnownModel(config, n_params, f"the language model's sizes are {of}'s; the rest as in 8B" if of else SEEN)


def _internvl3_5(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, n_params: int, of: str = ""
) -> KnownModel:
    """A size of InternVL3.5, with the language model `of` Qwen3."""
    llm = _llm(
        "Qwen3ForCausalLM", hidden_size=hidden_size, intermediate_size=intermediate_size, layers=layers, heads=heads,
        kv_heads=8, vocab_size=151936, n_ctx=40960, theta=1e6, eps=1e-6, eos=151645, head_dim=128,
        rope_scaling=None,
    )  # fmt: skip
    config = _internvl2("internvl2_5", llm, large_vit=n_params > 2 * 10**10)
    return KnownModel(config, n_params, f"the language model's sizes are {of}'s; untied from memory" if of else SEEN)


# fmt: off
KNOWN_MODELS: dict[str, KnownModel] = {
    **QWEN_VL,
    "OpenGVLab/InternVL2-1B": KnownModel(
        _internvl2("Hermes-2", _llm(
            "Qwen2ForCausalLM", hidden_size=896, intermediate_size=4864, layers=24, heads=14, kv_heads=2,
            vocab_size=151655, n_ctx=32768, theta=1e6, eps=1e-6, eos=151645)),
        n_params=938_158_976, certainty="the language model's sizes are Qwen2-0.5B-Instruct's",
    ),
    "OpenGVLab/InternVL2-2B": KnownModel(
        _internvl2("internlm2-chat", _internlm2(
            2.0, hidden_size=2048, intermediate_size=8192, layers=24, heads=16)),
        n_params=2_205_754_368, certainty="sizes seen in public sources, the rest as in 8B",
    ),
    "OpenGVLab/InternVL2-4B": KnownModel(
        _internvl2("phi3-chat", _llm(
            "Phi3ForCausalLM", hidden_size=3072, intermediate_size=8192, layers=32, heads=32, kv_heads=32,
            vocab_size=32020, n_ctx=131072, theta=1e4, eos=32000, original_max_position_embeddings=4096,
            sliding_window=262144, pad_token_id=32000,
            rope_scaling={"type": "su", "short_factor": list(_SHORT_FACTORS),
                          "long_factor": list(_LONG_FACTORS)})),
        n_params=4_146_855_936, certainty="as Phi-3-mini-128k-instruct; its short_factor from memory, not verified",
    ),
    "OpenGVLab/InternVL2-8B": KnownModel(
        _internvl2("internlm2-chat", _internlm2(
            2.0, hidden_size=4096, intermediate_size=14336, layers=32, heads=32)),
        n_params=8_075_365_376,
    ),
    "OpenGVLab/InternVL2-26B": KnownModel(
        _internvl2("internlm2-chat", _internlm2(
            3.0, hidden_size=6144, intermediate_size=16384, layers=48, heads=48), large_vit=True),
        n_params=25_514_186_112,
    ),
    "OpenGVLab/InternVL2-40B": KnownModel(
        _internvl2("Hermes-2", _llm(
            "LlamaForCausalLM", hidden_size=7168, intermediate_size=20480, layers=60, heads=56, kv_heads=8,
            vocab_size=64007, n_ctx=4096, theta=5e6, eos=7, pad_token_id=0), large_vit=True),
        n_params=40_068_684_160, certainty="sizes are Yi-34B's; max_position_embeddings not verified",
    ),
    "OpenGVLab/InternVL2-Llama3-76B": KnownModel(
        _internvl2("internlm2-chat", _llm(
            "LlamaForCausalLM", hidden_size=8192, intermediate_size=28672, layers=80, heads=64, kv_heads=8,
            vocab_size=128265, n_ctx=8192, theta=5e5, eos=128003), large_vit=True),
        n_params=76_262_358_400, certainty="sizes are Llama-3-70B's; template and stop token not verified",
    ),
    "OpenGVLab/InternVL3-1B": _internvl3(896, 4864, 24, 14, 2, 938_193_024, "Qwen2.5-0.5B"),
    "OpenGVLab/InternVL3-2B": _internvl3(1536, 8960, 28, 12, 2, 2_088_957_440, "Qwen2.5-1.5B"),
    "OpenGVLab/InternVL3-8B": _internvl3(3584, 18944, 28, 28, 4, 7_944_373_760),
    "OpenGVLab/InternVL3-14B": _internvl3(5120, 13824, 48, 40, 8, 15_117_256_704, "Qwen2.5-14B"),
    "OpenGVLab/InternVL3-38B": _internvl3(5120, 27648, 64, 40, 8, 38_388_164_992, "Qwen2.5-32B"),
    "OpenGVLab/InternVL3-78B": _internvl3(8192, 29568, 80, 64, 8, 78_408_318_336, "Qwen2.5-72B"),
    "OpenGVLab/InternVL3_5-1B": _internvl3_5(1024, 3072, 28, 16, 1_060_897_792, "Qwen3-0.6B"),
    "OpenGVLab/InternVL3_5-2B": _internvl3_5(2048, 6144, 28, 16, 2_348_347_392, "Qwen3-1.7B"),
    "OpenGVLab/InternVL3_5-4B": _internvl3_5(2560, 9728, 36, 32, 4_732_489_216, "Qwen3-4B"),
    "OpenGVLab/InternVL3_5-8B": _internvl3_5(4096, 12288, 36, 32, 8_528_318_464),
    "OpenGVLab/InternVL3_5-14B": _internvl3_5(5120, 17408, 40, 40, 15_119_523_840, "Qwen3-14B"),
    "OpenGVLab/InternVL3_5-38B": _internvl3_5(5120, 25600, 64, 64, 38_390_405_504, "Qwen3-32B"),
    **LLAVA,
    **GEMMA,
    **IDEFICS3,
}
# fmt: on
