"""Names that users of TransformerLens and `transformers` try, with what they are called here."""

from collections.abc import Mapping
from typing import Any

from hooked_vlm.errors import InputError

ARGUMENTS = {
    "prepend_bos": "give model.to_tokens(text, prepend_bos=True), or model.to_inputs(prompt)",
    "padding_side": "rows are padded on the left by model.to_inputs([...]) and model.to_tokens([...])",
    "attention_mask": "inputs hold their own: model.inputs_from_hf({'input_ids': ..., 'attention_mask': ...})",
    "input_ids": "give a VLMInputs: model.inputs_from_hf(batch)",
    "pixel_values": "give a VLMInputs: model.inputs_from_hf(batch)",
    "image_grid_thw": "give a VLMInputs: model.inputs_from_hf(batch)",
    "position_ids": "positions are computed from the inputs (inputs.position_ids)",
    "inputs_embeds": "start from the residual stream: model(inputs, start_at_layer=0, resid=...)",
    "labels": 'give return_type="loss"',
    "past_key_values": "the cache is past_kv_cache=model.new_kv_cache(batch, capacity)",
    "use_cache": "the cache is past_kv_cache=model.new_kv_cache(batch, capacity)",
    "output_attentions": 'patterns are run_with_cache(...)[1]["pattern", layer]',
    "output_hidden_states": 'the residual stream is run_with_cache(...)[1]["resid_post", layer]',
    "use_past_kv_cache": "generation always uses a cache",
    "freq_penalty": "use repetition_penalty",
    "num_beams": "use num_return_sequences with do_sample=True, or transformers for beam search",
    "max_length": "use max_new_tokens",
    "generation_config": 'use settings="checkpoint", or the single settings',
    "stopping_criteria": "use stop_strings or eos_token_id",
    "return_input_tokens": "the tokens are inputs.tokens",
}
"""Arguments of `forward` and `generate` elsewhere, and what to do here."""

LOADING = {
    "torch_dtype": "use dtype=",
    "trust_remote_code": "remote code is never run, nor needed: leave it out",
    "attn_implementation": "layers run fused, and explicitly where scores or patterns are hooked: leave it out",
    "load_in_8bit": 'use quantize="8bit"',
    "load_in_4bit": 'use quantize="4bit"',
    "quantization_config": "use quantize=",
    "low_cpu_mem_usage": "weights are always read when they are used: leave it out",
    "use_safetensors": "nothing else is read: leave it out",
    "n_devices": 'use device_map="balanced"',
    "hf_model": "use HookedVLM.from_hf(hf_model)",
    "tokenizer": "set model.tokenizer afterwards",
    "min_pixels": "use model.to_inputs(..., min_pixels=)",
    "max_pixels": "use model.to_inputs(..., max_pixels=)",
    "fold_ln": "norms stay as they are: hooked_vlm.model.weight_processing folds them",
    "center_writing_weights": "weights stay as they are: see hooked_vlm.model.weight_processing",
    "center_unembed": "weights stay as they are: see hooked_vlm.model.weight_processing",
    "fold_value_biases": "weights stay as they are: see hooked_vlm.model.weight_processing",
    "default_prepend_bos": "use model.to_tokens(text, prepend_bos=True)",
    "default_padding_side": "rows are padded on the left",
}
"""Arguments of `from_pretrained` elsewhere, and what to do here."""

ATTRIBUTES = {
    "input_to_embed": 'model.run_with_cache(inputs, names_filter="hook_embed", stop_at_layer=0)[1]["hook_embed"]',
    "W_pos": "model.cfg.rope_theta (positions are rotary)",
    "pos_embed": "model.cfg.rope_theta (positions are rotary)",
    "tokens_to_residual_direction": "model.tokens_to_residual_directions(token)",
    "process_weights_": "hooked_vlm.model.weight_processing, which folds on request",
    "fold_layer_norm": "hooked_vlm.model.weight_processing, which folds on request",
    "set_tokenizer": "model.tokenizer = ...",
    "sample_datapoint": "your own data",
    "lm_head": "model.unembed",
    "language_model": "model.blocks, model.embed, model.ln_final",
    "layers": "model.blocks",
    "visual": "model.vision",
    "vision_tower": "model.vision",
    "vision_model": "model.vision",
    "multi_modal_projector": "model.projector",
}
"""Attributes of models elsewhere, and what stands in their place."""


def refuse_arguments(function: str, given: Mapping[str, Any], known: Mapping[str, str] = ARGUMENTS) -> None:
    """Refuse keyword arguments that a function does not have.

    Args:
        known: those that it has elsewhere, and what to do here.

    Raises:
        InputError: one that is known from elsewhere; says what to do.
        TypeError: any other.
    """
    for name in given:
        if name in known:
            raise InputError(f"{function} has no {name}: {known[name]}")
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
