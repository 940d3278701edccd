"""Server and clients in one process: an ask is a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from hosfl.engines.engine import Reply, check_ask


class InProcess:
    """The engine without a network, where everybody is always here.

    answer: (client, the server's bytes) -> the client's bytes. clients: N.
    """

    def __init__(self, answer: Callable[[int, bytes], bytes], clients: int) -> None:
        self.answer, self.clients = answer, clients

    def present(self) -> frozenset[int]:
        return frozenset(range(self.clients))

    def ask(self, messages: Mapping[int, bytes], deadline: float | None = None) -> Iterator[Reply]:
        """One client after another, in the order of the asks. No deadline here.

        Raises EngineError for clients that there are not.
        """
        check_ask(messages, self.clients)
        return (Reply(client, self.answer(client, data)) for client, data in messages.items())

    def offer(self, files: Mapping[str, bytes]) -> None:
        """Nobody fetches here what is in the process already."""

    def limit(self, largest: int) -> None:
        """An answer is in the memory already when it is here."""

    def close(self) -> None:
        """There is nothing to let go of."""
