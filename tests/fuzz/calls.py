"""Cases made of what a caller passes: hook names, interventions, prompts."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fuzz.draws import Draws, changed_bytes, changed_json
from fuzz.laws import held
from fuzz.seeds import models, picture
from hooked_vlm.interventions import (
    AddVector,
    BlockAttention,
    Compose,
    PatchActivation,
    RedistributeSink,
    ReplaceImageKV,
    ReplaceImageTokens,
    ScaleHeads,
    UniformAttention,
    ZeroHeads,
)
from hooked_vlm.metrics import logit
from hooked_vlm.sweeps.run import sweep


def hook_names(data: bytes) -> str:
    """Names, filters and lists of hooks, through every method that takes them."""

    def case(folder: Path) -> str:
        draws = Draws(data)
        model, inputs = asked(draws)
        known = list(model.hook_dict)
        name: Any = draws.pick(known)
        kind = draws.below(6)
        if kind == 0:
            name = changed_bytes(draws, name.encode()).decode(errors="replace")
        elif kind == 1:
            name = draws.odd()
        elif kind == 2:
            part = draws.pick(("hook_z", "blocks.0", "vision", "nothing", ""))
            name = lambda n: n.endswith(part)  # noqa: E731
        elif kind == 3:
            name = [name, draws.odd()] if draws.one_in(2) else [draws.pick(known), draws.pick(known)]
        way = draws.below(4)
        cut = draws.pick((None, None, 0, -1, (0, 2), draws.number()))
        run: dict[str, Any] = {"stop_at_layer": draws.pick((None, None, 1, draws.number()))}
        if way == 0:
            model.run_with_cache(inputs, names_filter=name, pos_slice=cut, **run)
        elif way == 1:
            model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: None)], **run)
        elif way == 2:
            model.check_hook_name(name)
        else:
            model.generate(inputs, max_new_tokens=2, fwd_hooks=[(name, lambda x, hook: None)])
        return "ran"

    try:
        return held(case)
    finally:
        for model in models().values():
            model.reset_hooks()


def asked(draws: Draws) -> tuple[Any, Any]:
    """A bundled model and a prompt with or without a picture."""
    name = draws.pick(list(models()))
    return models()[name], _inputs(name, draws.below(2))


@lru_cache
def _inputs(name: str, n: int) -> Any:
    return models()[name].to_inputs("What is the value of a1?", images=[picture()] * n or None)


@torch.no_grad()
def interventions(data: bytes) -> str:
    """Heads, layers, factors, positions and tensors of interventions, run and swept."""

    def case(folder: Path) -> str:
        draws = Draws(data)
        model, inputs = asked(draws)
        runs = [intervention(draws, model, inputs) for _ in range(1 + draws.below(3))]
        if draws.one_in(2):
            sweep(model, inputs, runs, logit(draws.pick((5, 5, 5, draws.number()))))
        else:
            together = Compose(tuple(runs))
            model.run_with_hooks(inputs, fwd_hooks=together.hooks(model, inputs))
        return "ran"

    return held(case)


def intervention(draws: Draws, model: Any, inputs: Any) -> Any:
    heads: Any = tuple(
        (draws.pick((0, 1, 3, 3, draws.number())), draws.pick((0, 1, 2, draws.number()))) for _ in range(draws.below(4))
    )
    if draws.one_in(8):
        heads = draws.pick(((0,), ((0, 1, 2),), ((0.5, 1),), (("0", "1"),), ((0, 0), (0, 0)), ((True, False),), 5, None,
                            [[0, 1]], "0.1", ((None, 0),)))  # fmt: skip
    vector = draws.pick(
        (
            torch.zeros(model.cfg.d_model),
            torch.zeros(3),
            torch.full((model.cfg.d_model,), float("nan")),
            torch.zeros(()),
        )
    )
    name = draws.pick([*model.hook_dict, "blocks.9.hook_z", "x", "", "blocks.0.hook_resid_pre", "hook_embed"])
    width = inputs.shape[1]
    source = torch.zeros(
        draws.pick(((1, width, model.cfg.d_model), (2, width, 3), (1, 1, 1), (), (0,), (1, width, 4, 48)))
    )
    factor = draws.pick((0.0, 1.0, -1.0, float("nan"), float("inf"), 1e308))
    spots = lambda: positions(draws, width)  # noqa: E731
    baseline: Any = draws.pick(("mean", "zero", "knockout", "x"))
    values: Any = draws.pick(("mean", "zero", "x", vector))
    kind = draws.below(9)
    if kind == 0:
        return ScaleHeads(heads, factor, spots())
    if kind == 1:
        return ZeroHeads(heads, spots())
    if kind == 2:
        return BlockAttention(heads, spots(), spots())
    if kind == 3:
        return ReplaceImageKV(heads, baseline, draws.one_in(2), spots(), spots())
    if kind == 4:
        return RedistributeSink(heads, factor, draws.pick((0, 1, -1, 10**9)))
    if kind == 5:
        return UniformAttention(heads, spots())
    if kind == 6:
        return PatchActivation(name, source, spots(), draws.pick((None, (0,), (99,), (-1,))))
    if kind == 7:
        return AddVector(name, vector, factor, spots())
    return ReplaceImageTokens(spots(), values)


def positions(draws: Draws, width: int) -> Any:
    kind = draws.below(6)
    if kind < 2:
        return draws.pick(
            (None, "image", "text", "question", "final", "assistant_header", "video", "generated", "x", "")
        )
    if kind == 2:
        return tuple(draws.below(width) for _ in range(draws.below(4)))
    if kind == 3:
        return tuple(draws.number() for _ in range(draws.below(4)))
    if kind == 4:
        return tuple(tuple(draws.number() for _ in range(draws.below(3))) for _ in range(draws.below(3)))
    return draws.pick(((0.5,), ("a",), ((),), (None,), 5, (True,), [0, 1], ((0,), 1), {"x": 1}, (0, (1,))))


def prompts(data: bytes) -> str:
    """Prompts, chat messages and pictures of every shape, and batches as processors return them."""

    def case(folder: Path) -> str:
        draws = Draws(data)
        model = draws.pick(list(models().values()))
        if draws.one_in(4):
            model.inputs_from_hf(changed_batch(draws, model))
            return "made"
        kind = draws.pick(("image", "image", "video"))
        image: dict[str, Any] = {"type": kind, kind: picture() if kind == "image" else [picture(), picture()]}
        for _ in range(draws.below(3)):
            image[draws.pick(KEYS)] = draws.pick((4096, draws.number(), draws.odd(), {draws.pick(KEYS): draws.odd()}))
        chats: list[Any] = [
            "What is the value of a1?",
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": "Read the text in the image"}],
                }
            ],
            [
                {"role": "system", "content": "x"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ],
        ]
        prompt = draws.pick(chats)
        if draws.one_in(2):
            prompt = changed_json(draws, prompt) if not isinstance(prompt, str) else draws.odd()
        if isinstance(prompt, list) and draws.one_in(4):
            prompt = [*prompt, {"role": "user", "content": [image, draws.odd()]}]
        if draws.one_in(8):
            prompt = "".join(draws.pick(SPECIALS) for _ in range(draws.below(6)))
        pictures_: Any = draws.pick(
            (None, picture(), [picture()], [], [None], 5, "nowhere.png", ["/dev/zero"], [[picture()]], b"x", {"a": 1},
             torch.zeros(3, 3), [picture(1, 300)], draws.bytes(draws.below(30)), {draws.pick(KEYS): draws.odd()},
             {"bytes": draws.bytes(draws.below(30)), "path": draws.odd()}, {"bytes": None, "path": draws.odd()},
             f"data:image/png;base64,{draws.odd()}", f"file://{draws.odd()}",
             torch.full((3, 5, 6), draws.pick((0.5, 300.0, float("nan")))), torch.zeros(3, 3, 3, dtype=torch.uint8))
        )  # fmt: skip
        bounds: dict[str, Any] = {}
        if draws.one_in(4):
            bounds = {
                draws.pick(("min_pixels", "max_pixels", "max_tiles")): draws.pick((4096, draws.number(), draws.odd()))
            }
        videos = draws.pick(
            (None, None, None, [[picture()]], picture(), [[]], 5, "a.mp4", b"x", torch.zeros(2, 9, 9, 3))
        )
        template = {draws.pick(ARGUMENTS): draws.odd()} if draws.one_in(6) else None
        model.to_inputs(prompt, pictures_, videos, chat=not draws.one_in(3), template=template, **bounds)
        return "made"

    return held(case)


KEYS = ("type", "image", "video", "text", "url", "path", "base64", "image_url", "video_url", "bytes", "min_pixels",
        "max_pixels", "resized_height", "resized_width", "total_pixels", "fps", "nframes", "x")  # fmt: skip
ARGUMENTS = ("tools", "documents", "chat_template", "continue_final_message", "add_generation_prompt", "tokenize", "x")
SPECIALS = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>",
            "<img>", "</img>", "<image>", "user", "\0", "a")  # fmt: skip


def changed_batch(draws: Draws, model: Any) -> dict[str, Any]:
    image = model.to_inputs("a", images=[picture()])
    batch = {
        "input_ids": image.tokens.clone(), "attention_mask": image.attention_mask.clone(),
        "pixel_values": image.pixel_values, "image_grid_thw": image.image_grid_thw,
    }  # fmt: skip
    for _ in range(1 + draws.below(3)):
        name = draws.pick([*batch, "num_tiles", "video_grid_thw", "pixel_values_videos"])
        tensor = batch.get(name, torch.ones(1, 3, dtype=torch.long))
        action = draws.below(6)
        if action == 0:
            batch.pop(name, None)
        elif action == 1:
            batch[name] = draws.odd()
        elif action == 2 and isinstance(tensor, torch.Tensor):
            batch[name] = tensor[:, : draws.below(5)] if tensor.ndim > 1 else tensor[:0]
        elif action == 3 and isinstance(tensor, torch.Tensor):
            twice = tensor.repeat(2, 1) if tensor.ndim == 2 else tensor
            batch[name] = draws.pick((tensor.float(), tensor[None], tensor.reshape(-1), tensor.bool(), twice))
        elif isinstance(tensor, torch.Tensor) and tensor.numel() and not tensor.is_floating_point():
            changed = tensor.clone()
            changed.view(-1)[draws.below(changed.numel())] = max(-(2**63), min(2**63 - 1, draws.number()))
            batch[name] = changed
    return batch
