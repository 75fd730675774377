"""Positions in the token stream: the three M-RoPE axes, and groups of tokens by their role in the prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.inputs.token_layout import Turns, Visual

Span = tuple[int, int, int, tuple[int, int, int], float]
"""Row, first position, number of tokens and patch grid of an image or video, and temporal positions of a frame."""


def opened_spans(
    tokens: Int[Tensor, "batch pos"],
    visuals: Sequence[Visual],
    first: Sequence[int],
    start_id: int | None,
    per_second: float | None = None,
) -> list[Span]:
    """The images and videos that have positions on three axes, where they lie.

    In the published code (`get_rope_index` of `transformers` up to 4.57, with which the model was trained) a row has
    as many images as there are `start_id` (`<|vision_start|>`) with an image's placeholder behind them, and they are
    the first ones; the others are positioned like text. The same holds for videos, each run counted by itself. (There,
    an image that is left out also shifts the grids of later rows of the batch; here each row is as alone.) `per_second`
    counts the temporal positions of a second of video; None: each frame takes one.
    """
    host = tokens.cpu()
    spans: list[Span] = []
    for row, kind in sorted({(v.row, v.kind) for v in visuals}):
        here = [span for v in visuals if (v.row, v.kind) == (row, kind) for span in _spans_of(v, per_second)]
        before = [int(host[row, start - 1]) if start > first[row] else None for _, start, *_ in here]
        spans += here[: len(here) if start_id is None else before.count(start_id)]
    return spans


def _spans_of(visual: Visual, per_second: float | None) -> list[Span]:
    """One span for each run: a video whose temporal patches are runs of their own counts each by itself."""
    t, h, w = visual.grid
    grid = (t // len(visual.runs), h, w)
    step = visual.layout.seconds * per_second if per_second is not None and visual.kind == "video" else 1.0
    return [(visual.row, start, stop - start, grid, step) for start, stop in visual.runs]


def mrope_positions(
    shape: Sequence[int], first: Sequence[int], stop: Sequence[int], spans: Sequence[Span], token_size: int
) -> Int[Tensor, "3 batch pos"]:
    """Temporal, height and width positions; padding gets 0.

    Text counts up on all three axes. An image or video starts where the text stopped and counts its own grid, of whose
    frames each may take several positions or a part of one; the text after it continues one past the largest position
    used on any axis. (As in the published code, with which the model was trained, and in `transformers` up to 4.57;
    release 5 ignores the temporal axis there, which makes the text after a long video overlap the video.)
    """
    positions = np.zeros((3, *shape), dtype=np.int64)
    for row, (begin, end) in enumerate(zip(first, stop, strict=True)):
        at, following = begin, 0
        for _, start, n_tokens, (t, h, w), step in sorted(s for s in spans if s[0] == row):
            positions[:, row, at:start] = np.arange(start - at) + following
            following += start - at
            grid = (t, h // token_size, w // token_size)
            own = np.indices(grid).reshape(3, -1)
            own[0] = own[0].astype(np.float32) * np.float32(step)  # rounded down
            positions[:, row, start : start + n_tokens] = own + following
            following += int(own.max()) + 1
            at = start + n_tokens
        positions[:, row, at:end] = np.arange(end - at) + following
    return torch.from_numpy(positions)


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """Positions by their role in the prompt; every field has one int64 tensor per row of the batch.

    The template's own tokens (turn markers, vision start and end) before the question belong to no
    group. Without chat markers the question is all text after the last image (or all text), and the
    assistant header is empty.
    """

    image: tuple[Tensor, ...]
    """Placeholders of images."""
    video: tuple[Tensor, ...]
    """Placeholders of videos."""
    question: tuple[Tensor, ...]
    """The text of the last user turn, after its last image or video (before it, if it ends the turn)."""
    assistant_header: tuple[Tensor, ...]
    """From the end of the user's turn to the end of the prompt: `<|im_end|> \\n <|im_start|> assistant \\n`."""
    final: tuple[Tensor, ...]
    """The last token of the prompt, whose logits predict the first token of the answer."""
    generated: tuple[Tensor, ...]
    """Tokens appended to the prompt."""


def prompt_groups(
    tokens: Sequence[int],
    first: int,
    stop: int,
    n_generated: int,
    visuals: Sequence[Visual],
    turns: Turns | None,
    markers: frozenset[int | None],
    openers: frozenset[int | None],
    encode: Callable[[str], list[int]] = lambda text: [],
) -> dict[str, list[int]]:
    """The fields of `TokenGroups` for one row.

    Args:
        first, stop: the row's real tokens lie at first <= pos < stop; the last `n_generated` were appended.
        visuals: the row's images and videos in order.
        turns: the tokens of the turns of a chat; None: there is no chat.
        markers: placeholders and the token that closes an image: never part of the question.
        openers: the token that opens an image, in families that have one.
        encode: the tokens of a text; none without a tokenizer. The texts around an image are not part of the question.
    """
    prompt_stop = stop - n_generated
    user_start, header_start = _last_turn(tokens[:prompt_stop], first, turns)
    ends = (_end(v, tokens, encode) for v in visuals if v.stop <= header_start)
    last_visual = max(ends, default=user_start)
    text = range(max(last_visual, user_start), header_start)
    question = [p for p in text if tokens[p] not in markers]
    if not question:  # the image closes the turn: the question comes before it
        before = [_begin(v, tokens, openers, encode) for v in visuals if v.start > user_start]
        question = list(range(user_start, min(before, default=user_start)))
    return {
        "image": [p for v in visuals if v.kind == "image" for p in v.positions.tolist()],
        "video": [p for v in visuals if v.kind == "video" for p in v.positions.tolist()],
        "question": question,
        "assistant_header": list(range(header_start, prompt_stop)),
        "final": [prompt_stop - 1],
        "generated": list(range(prompt_stop, stop)),
    }


def _begin(
    visual: Visual, tokens: Sequence[int], openers: frozenset[int | None], encode: Callable[[str], list[int]]
) -> int:
    """Where an image begins with its opener and the text before it."""
    start = visual.start - (visual.start > 0 and tokens[visual.start - 1] in openers)
    text = encode(visual.layout.between[0]) if visual.layout.between else []
    return start - len(text) if list(tokens[start - len(text) : start]) == text else start


def _end(visual: Visual, tokens: Sequence[int], encode: Callable[[str], list[int]]) -> int:
    """Where an image ends with the text behind it."""
    text = encode(visual.layout.between[-1]) if visual.layout.between else []
    stop = visual.stop + len(text)
    return stop if list(tokens[visual.stop : stop]) == text else visual.stop


def _last_turn(tokens: Sequence[int], first: int, turns: Turns | None) -> tuple[int, int]:
    """Where the last user's text begins, and the assistant's header behind it; both ends of a row without a chat."""
    if turns is None:
        return first, len(tokens)
    if not turns.starts:
        return _last_turn_by_headers(tokens, first, turns)
    ends = [p for p in range(first, len(tokens)) if tokens[p] == turns.end]
    starts = [p for p in range(first, len(tokens)) if tokens[p] in turns.starts]
    if not (ends and starts) or starts[-1] < ends[-1]:
        return first, len(tokens)
    opening = [p for p in starts if p < ends[-1]]
    return opening[-1] + len(turns.user) if opening else first, ends[-1]


def _last_turn_by_headers(tokens: Sequence[int], first: int, turns: Turns) -> tuple[int, int]:
    """The same where headers are plain text: the row must end with the one of an answer. A token that closes the user's
    turn belongs to that header."""
    row = tuple(tokens[first:])
    ends = [len(row) - len(h) for h in {turns.assistant, turns.assistant_behind} if h and row[-len(h) :] == h]
    if not ends:
        return first, len(tokens)
    header, users = min(ends), [0]
    for spelled in {turns.user, turns.user_behind} - {()}:
        n = len(spelled)
        users += [at + n for at in range(header - n + 1) if row[at : at + n] == spelled]
    user = max(users)
    closed = [at for at in range(user, header) if row[at] == turns.end]
    return first + user, first + (closed[-1] if closed else header)
