"""Texts as answers: F1 and exact match, as SQuAD's official evaluation has them (Rajpurkar et al., 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """What of an answer counts: case, punctuation, articles and blanks do not."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def f1(predicted: str, given: str) -> float:
    """The harmonic mean of precision and recall of the words."""
    one, other = words(predicted), words(given)
    shared = (Counter(one) & Counter(other)).total()
    return 2 * shared / (len(one) + len(other)) if shared else 0.0


def exact_match(predicted: str, given: str) -> float:
    return float(words(predicted) == words(given))


SCORES: dict[str, Callable[[str, str], float]] = {"F1": f1, "exact match": exact_match}


def answer_scores(found: Sequence[str], given: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1 and exact match, from 0 to 1: of each answer against the given one that it is nearest to, and their means."""
    pairs = list(zip(found, given, strict=True))
    return {
        name: sum(max(score(text, one) for one in answers) for text, answers in pairs) / len(pairs)
        for name, score in SCORES.items()
    }
