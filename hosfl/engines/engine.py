"""Who carries the messages between the server and its clients: one narrow interface, and a file for each engine.

Bytes go out, bytes come back. An engine knows clients by number and nothing of what the bytes say; the rounds, the
server and the clients know nothing of who carries them. The server's side is `Engine`; a client's side is `Line`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Reply:
    """What came back of a client: its bytes, or None and the reason.

    Reasons: "gone", "late", or "failed: ..." where the client could not answer. That names the kind of its error and no
    more: the text may be of its data, and stays in the client's own log.
    """

    client: int
    data: bytes | None
    reason: str = ""


class Engine(Protocol):
    """The server's side. Not for several threads at once."""

    def present(self) -> frozenset[int]:
        """The clients that could be asked now, by number."""

    def ask(self, messages: Mapping[int, bytes], deadline: float | None = None) -> Iterator[Reply]:
        """Send each client its bytes, and give what comes back as it comes: one `Reply` for each client.

        They leave when the first reply is asked for. Ends when every client's reply is there, or after `deadline`
        seconds (None: no end). Clients that have brought none by then are told of as "late"; whoever is not here, or
        vanishes meanwhile, at once as "gone". A reply counts for its own ask alone: what comes later, or twice, is
        dropped. Closing the iterator early ends the ask.
        """

    def offer(self, files: Mapping[str, bytes]) -> None:
        """What clients may fetch, by name, from now on; what was offered before is replaced.

        Until the first offer, those that fetch wait.
        """

    def limit(self, largest: int) -> None:
        """No right answer of the run has more bytes than this: an engine that refuses large ones need take no more."""

    def close(self) -> None:
        """Let go of everything. Clients stay as they are, and look for the next server."""


def check_ask(clients: Collection[int], there: int) -> None:
    """Raises EngineError for clients that are not among the run's, of which there are so many."""
    for client in clients:
        if not 0 <= client < there:
            raise EngineError(f"the run has clients 0 to {there - 1}, and no {client}")


class Line(Protocol):
    """A client's side."""

    def fetch(self, name: str, deadline: float | None = None) -> bytes:
        """What the server offers under a name. Waits for a server that is away. Raises EngineError, also of a server
        whose run has no such client."""

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        """Answer the server's asks, one after another, until the line is closed: from another thread, or a signal.

        Meanwhile the client is present. A server or broker that goes away is waited for. What `answer` raises is logged
        here and fails that ask alone. Raises EngineError when another process of the same client takes its place, or
        the server's run has no such client.
        """

    def close(self) -> None:
        """End `serve`."""


class EngineError(RuntimeError):
    """What stands between server and clients does not work; says what, and what to do."""


class JoinError(ValueError):
    """A run that this client does not take part in, and why."""
