"""Where a token stands in a text, and single tokens as text."""

from typing import TYPE_CHECKING, Any, Literal

from hooked_vlm.errors import InputError

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


def to_single_str_token(model: "HookedVLM", token: int) -> str:
    """Decode one token id."""
    return str(model.to_string([int(token)]))


def get_token_position(
    model: "HookedVLM",
    single_token: str | int,
    input: Any,
    mode: Literal["first", "last"] = "first",
    prepend_bos: bool | None = None,
) -> int:
    """Return the column of a token in one row of inputs, ids or raw text.

    Args:
        single_token: its id, or a text that is one token.
        mode: where it occurs several times.

    Raises:
        InputError: it does not occur, the text is no single token, or there are several rows.
    """
    if mode not in ("first", "last"):
        raise InputError(f'mode must be "first" or "last", got {mode!r}')
    tokens = model.to_tokens(input, prepend_bos)
    ids = getattr(tokens, "tokens", tokens)
    if ids.ndim == 2 and len(ids) != 1:
        raise InputError(f"get_token_position takes one row, got {len(ids)}")
    wanted = model.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
    at = (ids.reshape(-1) == wanted).nonzero()[:, 0].tolist()
    if not at:
        raise InputError(f"the token {single_token!r} does not occur: {model.to_str_tokens(ids)}")
    return at[0 if mode == "first" else -1]
