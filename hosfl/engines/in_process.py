"""The engine for server and clients in one process: a request is a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from hosfl.engines.engine import Reply, check_ask


class InProcessEngine:
    """The engine without a network. All clients are always present.

    answer: (client, the server's bytes) -> the client's bytes. clients: N.
    """

    def __init__(self, answer: Callable[[int, bytes], bytes], clients: int) -> None:
        self.answer, self.clients = answer, clients

    def present(self) -> frozenset[int]:
        """See `Engine.present`."""
        return frozenset(range(self.clients))

    def ask(self, messages: Mapping[int, bytes], deadline: float | None = None) -> Iterator[Reply]:
        """Ask one client after another, in the order of `messages`, without a deadline.

        Raises EngineError for clients that do not exist.
        """
        check_ask(messages, self.clients)
        return (Reply(client, self.answer(client, data)) for client, data in messages.items())

    def offer(self, files: Mapping[str, bytes]) -> None:
        """Do nothing: clients of this process fetch no files."""

    def limit(self, largest: int) -> None:
        """Do nothing: answers are in memory already."""

    def close(self) -> None:
        """Do nothing."""
