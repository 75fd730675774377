"""Decisions taken from bytes, so that hypothesis, a coverage-guided fuzzer and chance make the same cases."""

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 14, 32, 0.5, -0.0, 1e-30, 1e308, -1e308, float("nan"), float("inf"), 255, 256,
    1000, 10**5, 10**9, 2**31 - 1, 2**31, 2**62, 2**64, 10**30, 10**400, "", "x", "0", "1", "nan", "\0", "\ud800",
    "../../outside", "/dev/zero", "float32", "bfloat16", "default", "linear", "yarn", "𝕏" * 3, "a" * 5000, [], {}, [[]],
    [None], [1], [1, 2, 3], [-1, 10**9], ["x"], {"x": 1}, {"type": "x"}, [[[[[[[[[[]]]]]]]]]],
)  # fmt: skip
"""Values at the edges of what a field may hold, and far outside of it."""


class Draws:
    """Reads decisions off `data`; where it ends, everything is the first choice."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def bytes(self, n: int) -> bytes:
        found = self.data[self.at : self.at + n]
        self.at += n
        return found + b"\0" * (n - len(found))

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        width = max(1, ((n - 1).bit_length() + 7) // 8)
        return int.from_bytes(self.bytes(width), "little") % n

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def one_in(self, n: int) -> bool:
        return self.below(n) == n - 1

    def number(self) -> int:
        """Mostly small, of either sign."""
        return self.pick((0, 1, 2, 3, -1, self.below(256), -self.below(256), self.below(2**16), 2**31, 2**63, -(2**63)))

    def odd(self, depth: int = 2) -> Any:
        """Any JSON value."""
        kind = self.below(8)
        if kind < 6 or not depth:
            return copy.deepcopy(self.pick(ODD)) if kind < 5 else self.number()
        if kind == 6:
            return [self.odd(depth - 1) for _ in range(self.below(5))]
        return {str(self.odd(0))[:20]: self.odd(depth - 1) for _ in range(self.below(4))}


def changed_json(draws: Draws, content: Any, value: Callable[[], Any] | None = None) -> Any:
    """The same JSON with one to four of its values replaced, removed, added, wrapped or exchanged."""
    content = copy.deepcopy(content)
    for _ in range(1 + draws.below(4)):
        parent, key = _somewhere(draws, content)
        if parent is None:
            return draws.odd() if draws.one_in(8) else content
        action = draws.below(8)
        if action < 4:
            parent[key] = draws.odd() if value is None else value()
        elif action == 4:
            del parent[key]
        elif action == 5:
            parent[key] = [parent[key]] if draws.one_in(2) else {"x": parent[key]}
        elif action == 6:
            other, at = _somewhere(draws, content)
            parent[key] = copy.deepcopy(other[at]) if other is not None else None
        elif isinstance(parent, dict):
            parent[str(draws.odd(0))[:40]] = draws.odd()
        else:
            parent.insert(draws.below(len(parent) + 1), draws.odd())
    return content


def _somewhere(draws: Draws, content: Any) -> tuple[Any, Any]:
    """A container inside of `content` and a key of it; (None, None) if it is empty."""
    parent, key = None, None
    here = content
    while isinstance(here, dict | list) and here:
        keys = list(here) if isinstance(here, dict) else range(len(here))
        parent, key = here, keys[draws.below(len(keys))]
        here = here[key]
        if draws.one_in(4):
            break
    return parent, key


def changed_bytes(draws: Draws, content: bytes) -> bytes:
    """The same bytes with one to four places overwritten, cut, repeated or inserted."""
    changed = bytearray(content)
    for _ in range(1 + draws.below(4)):
        at = draws.below(len(changed) + 1)
        action = draws.below(7)
        if action == 0 and at < len(changed):
            changed[at] ^= 1 << draws.below(8)
        elif action == 1 and at < len(changed):
            changed[at] = draws.below(256)
        elif action == 2:
            odd = draws.pick((0, 1, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**62, 2**63 - 1, 2**64 - 1))
            size = 8 if odd >= 2**32 else draws.pick((1, 2, 4, 8))
            number = (odd % 2 ** (8 * size)).to_bytes(size, draws.pick(("little", "big")))
            changed[at : at + size] = number
        elif action == 3:
            del changed[at:]
        elif action == 4:
            del changed[at : at + 1 + draws.below(64)]
        elif action == 5:
            changed[at:at] = changed[at : at + 1 + draws.below(64)]
        else:
            changed[at:at] = draws.bytes(draws.below(32))
    return bytes(changed)


def json_bytes(content: Any) -> bytes:
    """As Python writes it, NaN and lone surrogates included."""
    return json.dumps(content).encode("utf-8", "surrogatepass")
