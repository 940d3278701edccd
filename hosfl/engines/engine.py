"""The interface of engines, which carry messages between the server and its clients; each engine has its own file.

An engine sends and receives bytes, which it does not interpret. It identifies clients by their number. Rounds, server
and clients do not depend on the engine. The server's side is `Engine`, the client's side is `Line`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Reply:
    """A client's reply: its bytes, or None and the reason.

    Reasons: "gone", "late", or "failed: ..." if the client could not answer. That names only the class of its error:
    the message may quote its data, and stays in the client's own log.
    """

    client: int
    data: bytes | None
    reason: str = ""


class Engine(Protocol):
    """The server's side. It must not be used by several threads at once."""

    def present(self) -> frozenset[int]:
        """Return the numbers of the clients that are connected now."""

    def ask(self, messages: Mapping[int, bytes], deadline: float | None = None) -> Iterator[Reply]:
        """Send each client its bytes, and yield one `Reply` for each client, as they arrive.

        The messages are sent when the first reply is requested. Ends when every client has replied, or after `deadline`
        seconds (None: no limit); clients that have not replied by then are "late". Clients that are not connected, or
        disconnect meanwhile, are "gone" at once. Replies that arrive later, or twice, are dropped. Closing the iterator
        cancels the request.
        """

    def offer(self, files: Mapping[str, bytes]) -> None:
        """Set the files that clients can fetch, by name, replacing earlier ones. Until the first offer clients wait."""

    def limit(self, largest: int) -> None:
        """Set the size of the run's largest valid answer, bytes; an engine may refuse larger ones."""

    def close(self) -> None:
        """Disconnect and free everything. Clients stay, and wait for the next server."""


def check_ask(clients: Collection[int], count: int) -> None:
    """Raises EngineError for numbers of clients that a run of `count` clients does not have."""
    for client in clients:
        if not 0 <= client < count:
            raise EngineError(f"the run has clients 0 to {count - 1}, and no {client}")


class Line(Protocol):
    """The client's side: its connection to the server. Each engine has its own, except those that need none."""

    def fetch(self, name: str, deadline: float | None = None) -> bytes:
        """Fetch a file that the server offers. Waits for a server that is away.

        Raises EngineError, also if the server's run has no such client.
        """

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        """Answer the server's requests, one after another, until the line is closed by another thread or a signal.

        Meanwhile the client counts as present. It waits for a server or broker that goes away. An error in `answer` is
        logged here and fails that request only. Raises EngineError if another process of the same client takes its
        place, or the server's run has no such client.
        """

    def close(self) -> None:
        """End `serve`."""


class EngineError(RuntimeError):
    """The connection between server and clients does not work. The message says why, and what to do."""


class JoinError(ValueError):
    """This client cannot take part in a run. The message says why."""
