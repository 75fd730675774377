"""The paper's prompts for documents and passages (papers 1.10)."""

from collections.abc import Sequence

import numpy as np

from hooked_vlm.experiments.ocr_heads.examples import Example, Picture


def about_pages(pages: Sequence[Picture], question: str, answers: Sequence[str]) -> Example:
    """A question about pictures of pages."""
    return Example(f"Question: {question}\nAnswer: ", tuple(answers), tuple(pages))


def about_passages(passages: Sequence[str], question: str, answers: Sequence[str]) -> Example:
    """A question about passages of text."""
    evidence = "\n".join(f"Evidence {i}: {passage}" for i, passage in enumerate(passages, 1))
    context = f"{evidence}\nAnswer the question with the answer only.\n"
    return Example(f"Question: {question}\nAnswer: ", tuple(answers), context=context)


def shuffled(rng: np.random.Generator, passages: Sequence[str]) -> list[str]:
    """Shuffle the passages."""
    return [passages[int(i)] for i in rng.permutation(len(passages))]
