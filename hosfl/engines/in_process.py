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

    def ask(
        self, messages: Mapping[int, bytes], deadline: float | None = None, enough: int | None = None
    ) -> Iterator[Reply]:
        """One client after another, in the order of the asks; those behind `enough` are not asked. No deadline here.

        Raises EngineError for clients that there are not, and for enough below 1.
        """
        check_ask(messages, self.clients, enough)
        return self._asked(messages, len(messages) if enough is None else enough)

    def _asked(self, messages: Mapping[int, bytes], enough: int) -> Iterator[Reply]:
        for number, (client, data) in enumerate(messages.items()):
            yield Reply(client, self.answer(client, data)) if number < enough else Reply(client, None, "late")

    def offer(self, files: Mapping[str, bytes]) -> None:
        """Nobody fetches here what is in the process already."""

    def limit(self, largest: int) -> None:
        """An answer is in the memory already when it is here."""

    def close(self) -> None:
        """There is nothing to let go of."""
