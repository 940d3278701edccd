"""The NATS engine, for clients on other machines: a NATS broker carries the messages.

This module has what both sides share. The server's side is `NatsEngine` (`nats_server.py`), the client's side is
`NatsLine` (`nats_line.py`). `frames.py` defines what is sent, `nats_link.py` keeps the connection to the broker.

Each client of a run has two subjects: it publishes at `hosfl.RUN.up.CLIENT.m` and subscribes to
`hosfl.RUN.down.CLIENT.m`. The subject alone says who sent a message: the broker checks it against the sender's
certificate. Nothing that a message says about its own sender is trusted.

A client is present from its first beat on. It is gone

- when the broker has no subscriber at its subject any more: a ping finds that out within two seconds, also after the
  process was killed;
- when it says goodbye;
- when another process of the same client takes its place;
- after `patience` seconds of silence, for machines that lost their power.
"""

from __future__ import annotations

import logging
import re
import time

from hosfl.engines.engine import EngineError

log = logging.getLogger("hosfl.engines.nats")

# Size limit of a request or a file, bytes. It admits every message of the protocol: a client cannot know how many
# rounds a replay has, nor how large a base half is.
MAX_MESSAGE = 1 << 32
STALLED = 20.0  # seconds without progress, after which a transfer is resumed
QUIET = 10.0  # seconds between two log lines of the same kind
TWO_SERVERS = "two servers are at work on run %s, and each ends the other's requests: end one of them"


def check_names(run: str, client: int) -> None:
    """Raises EngineError for a name of a run, or a number of a client, that cannot be part of a subject."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", run):
        raise EngineError(f"a run is named by letters, digits, _ and -, not {run!r}")
    if client < 0:
        raise EngineError(f"clients are numbered from 0, not {client}")


class ThrottledLog:
    """A log that writes at most one line of each kind in `QUIET` seconds, so that nobody can flood it."""

    def __init__(self) -> None:
        self._last: dict[object, tuple[float, int]] = {}  # of each kind: when it was written, lines left out since

    def warn(self, kind: object, text: str, *values: object, level: int = logging.WARNING) -> None:
        """Log a line, unless one of its kind was logged less than `QUIET` seconds ago."""
        written, omitted = self._last.get(kind, (-QUIET, 0))
        if time.monotonic() - written < QUIET:
            self._last[kind] = written, omitted + 1
            return
        self._last[kind] = time.monotonic(), 0
        log.log(level, text + (f" (and {omitted} more of the kind)" if omitted else ""), *values)
