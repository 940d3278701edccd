"""Clients on other machines: a NATS broker carries the messages. Here is what both ends have; the server's is
`NatsEngine` (`nats_server.py`), a client's `NatsLine` (`nats_line.py`).

Two subjects for each client of a run: it publishes `hosfl.RUN.up.CLIENT.m` and hears `hosfl.RUN.down.CLIENT.m`. Who a
message is of is its subject, which the broker holds against the sender's certificate; what a message says of itself is
believed by nobody. See `frames.py` for what is sent, `nats_link.py` for the connection.

A client is here from its first beat on. It is gone when the broker has nobody at its subject any more, which a ping
tells within two seconds, also of a process that was killed; when it says goodbye; when another process of the same
client takes its place; and after `patience` seconds of silence, for machines that lost their power.
"""

from __future__ import annotations

import logging
import re
import time

from hosfl.engines.engine import EngineError

log = logging.getLogger("hosfl.engines.nats")

# Bytes of an ask or a file: all messages that the protocol has. A replay grows with its rounds, and a base half is as
# large as it is; a client cannot know either.
MAX_MESSAGE = 1 << 32
STALLED = 20.0  # seconds without a byte, after which a transfer begins again where it stopped
QUIET = 10.0  # seconds between two lines of the log about the same thing
TWO_SERVERS = "two servers are at work on run %s, and each ends what the other asks: end one of them"


def check_line(run: str, client: int) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", run):
        raise EngineError(f"a run is named by letters, digits, _ and -, not {run!r}")
    if client < 0:
        raise EngineError(f"clients are numbered from 0, not {client}")


class ThrottledLog:
    """A log with at most one line of each kind in `QUIET` seconds, so that nobody can flood it."""

    def __init__(self) -> None:
        self._kept: dict[object, tuple[float, int]] = {}

    def warn(self, kind: object, text: str, *values: object, level: int = logging.WARNING) -> None:
        said, more = self._kept.get(kind, (-QUIET, 0))
        if time.monotonic() - said < QUIET:
            self._kept[kind] = said, more + 1
            return
        self._kept[kind] = time.monotonic(), 0
        log.log(level, text + (f" (and {more} more of the kind)" if more else ""), *values)
