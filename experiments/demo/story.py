"""The demo in ten lines for a terminal, and as data."""

from typing import TYPE_CHECKING, Any

from hooked_vlm.experiments.ocr_heads.changed import UNCHANGED
from hooked_vlm.experiments.ocr_heads.effects import interval
from hooked_vlm.interventions import Head

if TYPE_CHECKING:
    from hooked_vlm.experiments.demo.pipeline import Demo

COLUMN = 19
"""Where the second column of the terminal's lines begins."""


def lines(demo: "Demo") -> list[str]:
    """The story: question and answer, the heads, what becomes of the answer without them, the same over many pages."""
    pages, reading = demo.pages, demo.reading
    n_draws, n_right = len(demo.random), int(pages.right.sum())
    off, kept = reading.replies[0].text, sum(one.replies[0].text == demo.example.answer for one in demo.random)
    first, second = (f"{name(head)} {score_words(demo, head)}" for head in demo.heads)
    return [
        f"{demo.config.model} is shown page {pages.shown + 1} of {len(pages.right)} and asked: {demo.example.question}",
        _line("it answers", f"{reading.replies[-1].text} (right)"),
        _line("read by heads", f"{first}, {second}"),
        _line("", f"OCR score on {demo.scores.n_asked} other pages; {demo.scores.mean.size} heads in all"),
        _line("without the two", f"{off} ({verdict(demo)})"),
        _line("without random two", f"{demo.example.answer} with {kept} of {n_draws} pairs"),
        _line("on all pages", f"{int(pages.flipped.sum())} of {n_right} right answers change without the two; right:"),
        _line("  all heads", interval(pages.share(UNCHANGED.name))),
        _line("  without the two", interval(pages.share(pages.name))),
        _line("  random two", f"{interval(pages.share(pages.control.name))}, {rank_words(demo)}"),
        f"page: {demo.page}",
    ]


def name(head: Head) -> str:
    """A head as "2.1": layer and head."""
    return f"{head[0]}.{head[1]}"


def score_words(demo: "Demo", head: Head) -> str:
    """OCR score of a head with its 95% interval."""
    low, high = demo.scores.interval
    return f"{demo.scores.mean[head]:.2f} ({low[head]:.2f} to {high[head]:.2f})"


def verdict(demo: "Demo") -> str:
    """Whether the answer without the two heads is wrong, on the page that is shown."""
    off = demo.reading.replies[0].text
    if off == demo.reading.replies[-1].text:
        return "unchanged: on this page the two heads do not matter"
    return "still right" if off == demo.example.answer else "wrong"


def rank_words(demo: "Demo") -> str:
    """How many random pairs do at least as much damage as the two heads, and the p that this is."""
    test = demo.pages.test
    as_bad = round(test.p * (test.draws + 1)) - 1
    return f"{as_bad} of {test.draws} pairs as bad (p = {test.p:.3f})"


def as_data(demo: "Demo") -> dict[str, Any]:
    """Numbers and files, for --json."""
    pages = demo.pages
    low, high = demo.scores.interval
    shares = {"all": UNCHANGED.name, "without": pages.name, "random": pages.control.name}
    return {
        "page": str(demo.page),
        "question": demo.example.question,
        "answer": demo.reading.replies[-1].text,
        "answer_without": demo.reading.replies[0].text,
        "heads": [
            {"head": name(head), "score": float(demo.scores.mean[head]), "low": float(low[head]), "high": float(high[head])}
            for head in demo.heads
        ],
        "right": {
            word: {end: float(getattr(pages.share(condition), end)) for end in ("value", "low", "high")}
            for word, condition in shares.items()
        },
        "random_pairs": [
            {"heads": [name(head) for head in one.heads], "answer": one.replies[0].text, "right": share}
            for one, share in zip(demo.random, pages.random_shares, strict=True)
        ],
        "p": float(pages.test.p),
        "changed": int(pages.flipped.sum()),
        "pages": len(pages.right),
    }  # fmt: skip


def _line(head: str, text: str) -> str:
    return f"{head:{COLUMN}s} {text}"
