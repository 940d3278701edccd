"""A bounded list of reasons, such as those why messages were refused."""

from __future__ import annotations

KEPT = 1000


class Reasons(list[str]):
    """The last thousand reasons, so that wrong messages cannot fill the memory. total: how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def add(self, reason: str) -> None:
        """Add a reason; the oldest is dropped if there are too many."""
        self.total += 1
        self.append(reason)
        del self[:-KEPT]
