"""Scores of answers that are texts: F1 and exact match of SQuAD's official evaluation (Rajpurkar et al., 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def counted_words(text: str) -> list[str]:
    """Return the words of an answer that count, in lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def f1(predicted: str, reference: str) -> float:
    """Return the harmonic mean of the words' precision and recall."""
    first, second = counted_words(predicted), counted_words(reference)
    shared = (Counter(first) & Counter(second)).total()
    return 2 * shared / (len(first) + len(second)) if shared else 0.0


def exact_match(predicted: str, reference: str) -> float:
    """Return 1.0 if the words of both answers are the same, else 0.0."""
    return float(counted_words(predicted) == counted_words(reference))


SCORES: dict[str, Callable[[str, str], float]] = {"F1": f1, "exact match": exact_match}


def answer_scores(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the means of F1 and exact match, from 0 to 1, by name.

    references: all correct answers of each question; a prediction is scored against the best of them.
    """
    pairs = list(zip(predicted, references, strict=True))
    return {
        name: sum(max(score(text, reference) for reference in answers) for text, answers in pairs) / len(pairs)
        for name, score in SCORES.items()
    }
