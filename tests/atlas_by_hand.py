"""The scores of attention by their definitions: whole patterns, query by query and key by key."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.atlas import Stimulus
from hooked_vlm.atlas.attention import attention_scores
from hooked_vlm.atlas.evidence import needle, tokens_of_boxes


def check_attention(model: HookedVLM, stimuli: Sequence[Stimulus]) -> None:
    """Compare the scores on a batch of one kind with `literal`, each on its row alone."""
    found = attention_scores(model, stimuli)
    for i, stimulus in enumerate(stimuli):
        expected = literal(model, stimulus, stimuli[(i + 1) % len(stimuli)])
        values = {name: value for name, (value, _) in found[i].items()}
        values |= {f"{name} null": null for name, (_, null) in found[i].items()}
        assert set(found[i]) == {name for name in expected if not name.endswith("null")}
        for name, value in expected.items():
            scale = 60 if name.endswith("norm") else 1
            np.testing.assert_allclose(values[name], value, atol=2e-6 * scale, rtol=5e-5, err_msg=name)


def literal(model: HookedVLM, stimulus: Stimulus, other: Stimulus) -> dict[str, np.ndarray]:
    """The definitions, head by head, query by query and key by key, on a row alone."""
    inputs = model.as_inputs(stimulus.asked.inputs(model))
    with torch.no_grad():
        layers = [f"blocks.{layer}." for layer in range(model.cfg.n_layers)]
        suffixes = ("attn.hook_pattern", "hook_resid_pre", "attn.hook_v", "attn.hook_z")
        post = "ln1_post.hook_scale" if model.cfg.use_normalization_before_and_after else ""
        suffixes += (post,) if post else ()
        own_names = [layer + suffix for layer in layers for suffix in suffixes]
        logits, cache = model.run_with_cache(inputs, names_filter=own_names)
    cfg, tokens = model.cfg, inputs.tokens[0].tolist()
    stop, n_answer = inputs.stop[0], inputs.n_generated[0]
    image, question = inputs.positions.image[0].tolist(), inputs.positions.question[0].tolist()
    answer = list(range(stop - n_answer - 1, stop - 1))
    if stimulus.kind == "text":
        evidence, elsewhere = needle(model, inputs, 0), None
    else:
        evidence = tokens_of_boxes(model, inputs, 0, stimulus, stimulus)
        elsewhere = tokens_of_boxes(model, inputs, 0, stimulus, other)
    asked = [key for key in image if evidence[:, key].any()]
    found: dict[str, np.ndarray] = {}
    for layer in range(cfg.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
        x = cache[f"blocks.{layer}.hook_resid_pre"][0]
        v, z = cache[f"blocks.{layer}.attn.hook_v"][0], cache[f"blocks.{layer}.attn.hook_z"][0]
        big = [[abs(float(a)) / float(row.pow(2).mean().sqrt()) >= 20 for a in row] for row in x]
        sinks = [key for key in image if any(a and b for a, b in zip(big[key], big[0], strict=True))]
        queries = question + answer
        anyone = (pattern > 0).any(0)  # of one head alone, attention to a key that it sees may round to 0
        seen = {q: [k for k in range(stop) if anyone[q, k]] for q in queries}
        for head in range(cfg.n_heads):
            a = pattern[head].tolist()

            def put(name: str, value: Any, layer: int = layer, head: int = head) -> None:
                found.setdefault(name, np.full((cfg.n_layers, cfg.n_heads), np.nan))[layer, head] = value

            put("first_token_sink", np.mean([a[q][0] for q in queries]))
            put("locality", 1 - np.mean([sum(a[q][k] * max(q - k, 0) / q for k in seen[q]) for q in queries]))
            entropies = [-sum(p * math.log(p) for p in a[q] if p) / math.log(len(seen[q])) for q in queries]
            put("entropy", np.mean(entropies))
            if image:
                put("image_from_question", np.mean([sum(a[q][k] for k in image) for q in question]))
                if header := inputs.positions.assistant_header[0].tolist():
                    put("image_from_header", np.mean([sum(a[q][k] for k in image) for q in header]))
                put("image_from_answer", np.mean([sum(a[q][k] for k in image) for q in answer]))
                put("visual_sink", np.mean([sum(a[q][k] for k in sinks) for q in queries]))
                see = [q for q in answer if any(a[q][k] for k in image)]
                shares = [sum(a[q][k] for k in asked) / sum(a[q][k] for k in image) for q in see]
                put("localisation", np.mean(shares) if see else np.nan)
            prompt = range(stop - n_answer)
            kv_head = head // (cfg.n_heads // v.shape[1])
            put("value_norm", np.mean([float(v[q, kv_head].norm()) for q in prompt]))
            written = (z[:, head] @ model.blocks[layer].attn.W_O[head]).detach()
            if post:  # a norm behind attention
                written = written * model.blocks[layer].ln1_post.factor.detach() / cache[f"blocks.{layer}.{post}"][0]
            put("output_norm", np.mean([float(written[q].norm()) for q in prompt]))
            copied = []
            for part, q in enumerate(answer):
                right = int(logits[0, q].argmax()) == tokens[q + 1]
                looked = max(seen[q], key=lambda k: a[q][k])
                by_chance = sum(bool(evidence[part, k]) for k in seen[q]) / len(seen[q])
                not_here = elsewhere is not None and bool(elsewhere[part, looked])
                copied.append((right and bool(evidence[part, looked]), right and not_here, right * by_chance))
            hits, misplaced, chance = (np.mean(own) for own in zip(*copied, strict=True))
            if stimulus.kind == "text":
                put("text_retrieval", hits)
                put("text_retrieval null", chance)
            if stimulus.kind == "page":
                put("ocr", hits)
                put("ocr null", misplaced)
    return found
