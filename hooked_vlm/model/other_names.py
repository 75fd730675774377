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


def refuse_arguments(function: str, given: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that a function does not have.

    Raises:
        InputError: one that is known from elsewhere; says what to do.
        TypeError: any other.
    """
    for name in given:
        if name in ARGUMENTS:
            raise InputError(f"{function} has no {name}: {ARGUMENTS[name]}")
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
