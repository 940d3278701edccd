"""Why messages were refused: what is kept of any number of reasons."""

from __future__ import annotations

KEPT = 1000


class Reasons(list[str]):
    """The last thousand reasons: who sends wrong messages for ever must not fill the memory.

    total: how many there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def add(self, reason: str) -> None:
        """Keep one more, in place of the oldest where there are too many."""
        self.total += 1
        self.append(reason)
        del self[:-KEPT]
