"""What hosfl says to a terminal or a log. It quotes servers, clients and files, which may be anybody's."""

from __future__ import annotations

import logging


def printable(text: str) -> str:
    """A text of somebody else's, fit for a log: on one line."""
    return "".join(c if c.isprintable() else "?" for c in text)


class _Lines(logging.Formatter):
    """Tracebacks as well, whose errors may quote what a server or a client made."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def log_to_terminal(level: int) -> None:
    """Lines with their time on stderr, of which none does anything to a terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(asctime)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
