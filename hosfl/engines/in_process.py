"""Server and clients in one process: an ask is a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from hosfl.engines.engine import Reply


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
        """One client after another, in the order of the asks; those behind `enough` are not asked. No deadline here."""
        for number, (client, data) in enumerate(messages.items()):
            if enough is not None and number >= enough:
                yield Reply(client, None, "late")
            elif 0 <= client < self.clients:
                yield Reply(client, self.answer(client, data))
            else:
                yield Reply(client, None, "gone")

    def offer(self, files: Mapping[str, bytes]) -> None:
        """Nobody fetches here what is in the process already."""

    def close(self) -> None:
        """There is nothing to let go of."""
