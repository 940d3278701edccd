"""Output to a terminal or a log that may quote what servers, clients or files of others contain."""

from __future__ import annotations

import logging


def printable(text: str) -> str:
    """A text on one line, with "?" for characters that are not printable, such as a terminal's control codes."""
    return "".join(c if c.isprintable() else "?" for c in text)


class _PrintableFormatter(logging.Formatter):
    """Makes messages and tracebacks printable, since errors may quote what a server or a client sent."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def log_to_terminal(level: int) -> None:
    """Log to stderr: printable lines with their time."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(asctime)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
