"""The demo in ten lines for a terminal, and as data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hooked_vlm.experiments.ocr_heads.changed import UNCHANGED
from hooked_vlm.experiments.ocr_heads.effects import interval
from hooked_vlm.interventions import Head

if TYPE_CHECKING:
    from hooked_vlm.experiments.demo.pipeline import Demo

COLUMN = 23
"""Where the second column of the terminal's lines begins."""


def lines(demo: "Demo") -> list[str]:
    """The story: question and answer, the heads, what becomes of the answer without them, the same over many pages."""
    pages, scores, said = demo.pages, demo.scores, demo.reading.replies[-1].text
    scored = f"{pair(demo.heads)}, by OCR score on {scores.n_asked} other pages:"
    n_pages, kept = len(pages.right), sum(one.replies[0].text == said for one in demo.random)
    return [
        f"{demo.config.model} is shown page {pages.shown + 1} of {n_pages} and asked: {demo.example.question}",
        _line("it answers", f"{said} ({judged(demo, said)})"),
        _line(f"top two of {scores.mean.size} heads", scored),
        _line("", " and ".join(score_words(demo, head) for head in demo.heads)),
        _line("without the two", f"{demo.reading.replies[0].text} ({verdict(demo)})"),
        _line("without a random pair", f"{said} in {kept} of {len(demo.random)} draws"),
        _line(f"right of {n_pages} pages", interval(pages.share(UNCHANGED.name))),
        _line("  without the two", f"{interval(pages.share(pages.name))}, {changed_words(demo)}"),
        _line("  without random pairs", f"{interval(pages.share(pages.control.name))}, {rank_words(demo)}"),
        f"page: {demo.page}",
    ]  # fmt: skip


def name(head: Head) -> str:
    """A head as "2.1": layer and head."""
    return f"{head[0]}.{head[1]}"


def pair(heads: Sequence[Head]) -> str:
    """Heads as "2.1 and 2.0"."""
    return " and ".join(map(name, heads))


def score_words(demo: "Demo", head: Head) -> str:
    """OCR score of a head with its 95% interval."""
    low, high = demo.scores.interval
    return f"{demo.scores.mean[head]:.2f} ({low[head]:.2f} to {high[head]:.2f})"


def verdict(demo: "Demo") -> str:
    """What the answer without the two heads is, on the page that is shown."""
    off = demo.reading.replies[0].text
    return "unchanged" if off == demo.reading.replies[-1].text else judged(demo, off)


def judged(demo: "Demo", reply: str) -> str:
    """Whether a reply to the question is right."""
    return "right" if reply in demo.example.answers else "wrong"


def changed_words(demo: "Demo") -> str:
    """On how many pages the answer changes without the two heads."""
    return f"{demo.pages.flipped.sum()} of {demo.pages.right.sum()} right answers change"


def rank_words(demo: "Demo") -> str:
    """How many random pairs do at least as much damage as the two heads, and the p that this is."""
    test = demo.pages.test
    as_bad = round(test.p * (test.draws + 1)) - 1
    return f"{as_bad or 'none'} of {test.draws} as bad (p = {test.p:.3f})"


def as_data(demo: "Demo") -> dict[str, Any]:
    """Numbers and files, for --json."""
    pages, scores = demo.pages, demo.scores
    low, high = scores.interval
    shares = {"all": UNCHANGED.name, "without": pages.name, "random": pages.control.name}
    return {
        "page": str(demo.page),
        "question": demo.example.question,
        "answer": demo.reading.replies[-1].text,
        "answer_without": demo.reading.replies[0].text,
        "heads": [
            {"head": name(head), "score": float(scores.mean[head]), "low": float(low[head]), "high": float(high[head])}
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
